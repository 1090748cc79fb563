// The page: two files of one translator, side by side.

import { loadLiteRt } from "@litertjs/core";
import { Translator } from "./translator.js";

const form = document.querySelector("form");
const status = document.querySelector("[role=status]");
const number = (value, digits = 0) =>
  value.toLocaleString("en", { maximumFractionDigits: digits });
const cards = [];

/** Milliseconds a token, of all translations so far. */
const median = ({ milliseconds: all }) =>
  all.slice().sort((a, b) => a - b)[all.length >> 1] ?? 0;

/** A card for a file, with an error in it if it cannot be used. */
async function addCard({ name, file, table_bytes }) {
  const card = document.querySelector("template").content.cloneNode(true)
    .firstElementChild;
  const part = (selector) => card.querySelector(selector);
  part("h2").textContent = name;
  document.querySelector("main").append(card);
  try {
    const translator = await Translator.load(file);
    await translator.translate("a"); // the first time is slower
    part(".bytes").textContent = number(translator.bytes);
    part(".table").textContent = number(table_bytes);
    cards.push({ name, table_bytes, translator, part, milliseconds: [] });
  } catch (error) {
    part("output").textContent = error.message;
    card.className = "failed";
  }
}

async function translate(text) {
  for (const card of cards) {
    await new Promise((resolve) => setTimeout(resolve)); // lets the page be drawn
    const output = card.part("output");
    output.dataset.ids = "[]";
    try {
      const { text: translation, ids, milliseconds } =
        await card.translator.translate(text);
      output.textContent = translation;
      output.dataset.ids = JSON.stringify(ids);
      card.milliseconds.push(...milliseconds);
      card.part(".speed").textContent =
        `${number(median(card), 2)} (median of ${card.milliseconds.length})`;
    } catch (error) {
      output.textContent = error.message;
    }
  }
  showBars();
}

/** Each number of each card as a bar, the largest being full. */
function showBars() {
  const figures = {
    bytes: ({ translator }) => translator.bytes,
    table: ({ table_bytes }) => table_bytes,
    speed: median,
  };
  for (const [name, figure] of Object.entries(figures)) {
    const largest = Math.max(...cards.map(figure)) || 1;
    for (const card of cards) {
      card.part(`.${name} + meter`).value = figure(card) / largest;
    }
  }
}

/** Keeps all that the page has read, for when there is no network. */
async function keep() {
  await navigator.serviceWorker.register("sw.js");
  const own = performance.getEntriesByType("resource")
    .filter(({ responseStatus }) => !(responseStatus >= 400)) // not what is missing
    .map(({ name }) => name).filter((name) => name.startsWith(location.origin));
  const cache = await caches.open("translator");
  await cache.addAll(new Set([location.href.split(/[?#]/)[0], ...own]));
}

async function start() {
  if (typeof WebAssembly !== "object") {
    throw new Error("This browser has no WebAssembly, or it is switched off: " +
      "the page needs it to run the models.");
  }
  await loadLiteRt("wasm/").catch((error) => {
    throw new Error(`The runtime, LiteRT.js, could not be loaded: ${error.message}`);
  });
  const response = await fetch("translators.json");
  if (!response.ok) throw new Error("translators.json is missing: run `make web`.");
  const { translators, examples } = await response.json();
  for (const translator of translators) await addCard(translator);
  if (!cards.length) throw new Error("No translator could be loaded.");
  for (const example of examples) {
    const button = Object.assign(document.createElement("button"),
      { type: "button", textContent: example });
    button.addEventListener("click", () => {
      form.text.value = example;
      form.requestSubmit();
    });
    document.querySelector(".examples").append(button);
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (form.elements.go.disabled) return; // one translation at a time
    form.elements.go.disabled = true;
    await translate(form.text.value);
    form.elements.go.disabled = false;
  });
  showBars();
  form.elements.go.disabled = false;
  status.textContent = "Ready.";
  await keep().then(
    () => { status.textContent = "Ready, and kept for use without a network."; },
    () => {}, // private windows, http: it works as long as there is a network
  );
}

start().catch((error) => {
  status.textContent = error.message;
  status.className = "failed";
});
