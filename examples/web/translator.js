// Translates with a step-by-step LiteRT file: its signatures `encode` and
// `decode` (docs/on-device.md), and its tokenizer in the zip at its end.

import { loadAndCompile, Tensor } from "@litertjs/core";
import { Tokenizer } from "./tokenizer.js";

export class Translator {
  /** Reads a file, and refuses one that is missing, damaged or of other use. */
  static async load(url) {
    const response = await fetch(url);
    if (!response.ok) {
      throw new Error(`${url} is missing (HTTP status ${response.status}). ` +
        "Build the page again with `make web`.");
    }
    const bytes = new Uint8Array(await response.arrayBuffer());
    const members = await readMembers(bytes, url);
    const translator = new Translator();
    translator.bytes = bytes.length;
    translator.tokenizer = new Tokenizer(members["vocabulary.spm"]);
    translator.settings = JSON.parse(
      new TextDecoder().decode(members["translation.json"]));
    const model = await loadAndCompile(bytes, { accelerator: "wasm" });
    const { encode, decode } = model.signatures;
    const details = [encode, decode].flatMap((s) => s?.getInputDetails() ?? []);
    if (!encode || !decode || details.some(({ shape }) => shape.some((n) => n < 1))) {
      throw new Error(`${url} must have the signatures encode and decode, ` +
        "exported with a batch_size of 1 and a sequence_length.");
    }
    return Object.assign(translator, { encode, decode });
  }

  /**
   * The likeliest token each time, until the end.
   * @returns {Promise<{text: string, ids: number[], milliseconds: number[]}>}
   *     The times are those of the steps, one a token.
   */
  async translate(text) {
    const { pad_id, bos_id, eos_id, max_length, source_start_ids = [],
      start_ids = [bos_id], stop_ids = [eos_id] } = this.settings;
    const source = this.tokenizer.encode(text);
    if (!source.length) return { text: "", ids: [], milliseconds: [] };
    source.unshift(...source_start_ids);
    source.push(stop_ids[0]);
    const [input] = this.encode.getInputDetails();
    const longest = input.shape[1];
    if (source.length > longest) {
      throw new RangeError(`The text has ${source.length} tokens, and the ` +
        `model reads ${longest} at most: translate it in parts.`);
    }
    while (source.length < longest) source.push(pad_id);
    const integers = (values, shape) => new Tensor(new Int32Array(values), shape);
    const encoded = { [input.name]: integers(source, [...input.shape]) };
    const cross = await this.encode.run(encoded);
    release(encoded);

    let caches = this.emptyCaches();
    const ids = [...start_ids], milliseconds = [];
    for (let at = 0; at < max_length - 1; at++) {
      const start = performance.now();
      const step = { token: integers([ids[at]], [1, 1]), position: integers([at], [1]) };
      const { logits, ...updated } =
        await this.decode.run({ ...cross, ...caches, ...step });
      release({ ...caches, ...step });
      caches = updated;
      const scores = await logits.data();
      release({ logits });
      const best = scores.reduce((best, score, i) => (score > scores[best] ? i : best), 0);
      milliseconds.push(performance.now() - start);
      if (at + 1 < ids.length) continue; // more to start with
      ids.push(best);
      if (stop_ids.includes(best)) break;
    }
    release({ ...cross, ...caches });
    const special = [pad_id, ...source_start_ids, ...start_ids, ...stop_ids];
    const found = ids.slice(start_ids.length);
    const text_ids = found.filter(
      (id) => !special.includes(id) && id < this.tokenizer.pieces.length);
    return { text: this.tokenizer.decode(text_ids), ids: found, milliseconds };
  }

  /** Zeros for the inputs of `decode` that are also its outputs. */
  emptyCaches() {
    const outputs = this.decode.getOutputDetails().map(({ name }) => name);
    const caches = this.decode.getInputDetails()
      .filter(({ name }) => outputs.includes(name))
      .map(({ name, shape }) => {
        const size = shape.reduce((a, b) => a * b, 1);
        return [name, new Tensor(new Float32Array(size), [...shape])];
      });
    return Object.fromEntries(caches);
  }
}

/** Memory of WebAssembly is not collected by itself. */
function release(tensors) {
  for (const tensor of Object.values(tensors)) tensor.delete();
}

/** What is in the zip at the end of a file, stored and not compressed. */
async function readMembers(bytes, url) {
  const damaged = (why) => new Error(`${url} is damaged or cut short (${why}).`);
  const view = new DataView(bytes.buffer);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw damaged("there is no tokenizer at its end");
  const members = {};
  let modelEnd = bytes.length, at = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count--) {
    const size = view.getUint32(at + 24, true), header = view.getUint32(at + 42, true);
    const nameLength = view.getUint16(at + 28, true);
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const data = header + 30 + view.getUint16(header + 26, true) +
      view.getUint16(header + 28, true);
    members[name] = bytes.subarray(data, data + size);
    modelEnd = Math.min(modelEnd, header);
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  for (const name of ["vocabulary.spm", "translation.json", "model.sha256"]) {
    if (!members[name]) throw damaged(`there is no ${name} at its end`);
  }
  if (crypto.subtle) { // with https, or on this computer
    const digest = await crypto.subtle.digest("SHA-256", bytes.subarray(0, modelEnd));
    const text = Array.from(new Uint8Array(digest),
      (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (text !== new TextDecoder().decode(members["model.sha256"])) {
      throw damaged("its SHA-256 is another");
    }
  }
  return members;
}
