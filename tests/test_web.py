"""The page that translates in a browser: its tokenizer, its files, its text."""

import copy
import html.parser
import io
import json
import os
import shutil
import subprocess
import threading
import urllib.request

import keras
import numpy as np
import pytest
import sentencepiece

import keras_distilled_embedding as kde
from examples.nmt import data
from examples.web import __main__ as web
from keras_distilled_embedding_runner import Runner
from tests import chromium
from tests.translators import untrained_translator

interpreter = pytest.importorskip("ai_edge_litert.interpreter")

pytestmark = [
    # TensorFlow's converter, when it reads a SavedModel.
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter.*:UserWarning"),
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="the converter takes TensorFlow's saved models",
    ),
]
needs_node = pytest.mark.skipif(
    shutil.which("node") is None, reason="Node.js is not installed"
)

LENGTH = 20
INDEX = (web.SOURCE / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text():
    return data.load_corpus("cldr").train[:600]


@pytest.fixture(scope="module")
def vocabulary(text):
    return data.Vocabulary.train(text, 500)


# The tokenizer


def tokenize(proto, texts, folder):
    """What the page's script makes of `texts`: ids, and texts of these."""
    path = folder / "pieces.spm"
    path.write_bytes(proto)
    script = f"""
        import {{ readFileSync }} from "node:fs";
        import {{ Tokenizer }} from "{(web.SOURCE / "tokenizer.js").as_uri()}";
        const tokenizer = new Tokenizer(readFileSync({json.dumps(str(path))}));
        const ids = JSON.parse(readFileSync(0)).map((t) => tokenizer.encode(t));
        const texts = ids.map((i) => tokenizer.decode(i));
        console.log(JSON.stringify([ids, texts]));
    """
    return subprocess.run(
        ["node", "--input-type=module", "--eval", script],
        input=json.dumps(texts),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def odd_texts():
    """Of characters that are replaced, dropped, joined or unknown."""
    random = np.random.default_rng(0)
    odd = list(
        "ab z  ▁\t\n\u3000\u00a0ﬁ①½Äßé\u0301A\u030aﾊﾟ㍿ﷺ日한😀\u200b\ufeff’…Ω1"
    )
    texts = ["", " ", "▁", "  a  ", "▁▁a▁", "\u200b", "x" * 300]
    for length in random.integers(1, 30, size=2_000):
        texts.append("".join(random.choice(odd, length)))
        codes = random.integers(1, 0xD800, size=length)
        texts.append("".join(map(chr, codes)))
    return texts


@needs_node
def test_the_ids_are_those_of_sentencepiece(vocabulary, text, tmp_path):
    texts = text.source + text.target + odd_texts()
    done = tokenize(vocabulary.proto, texts, tmp_path)
    assert done.returncode == 0, done.stderr
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.proto)
    expected = pieces.encode(texts)
    assert json.loads(done.stdout) == [expected, pieces.decode(expected)]


@needs_node
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"byte_fallback": True},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"user_defined_symbols": ["<b>"]},
    ],
    ids=str,
)
def test_another_tokenizer_is_refused(text, tmp_path, options):
    """Rather than read with other ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.source),
        model_writer=model,
        vocab_size=400,
        minloglevel=2,
        **options,
    )
    done = tokenize(model.getvalue(), ["a"], tmp_path)
    assert "is not a SentencePiece unigram model" in done.stderr


# The page and its server


class Outline(html.parser.HTMLParser):
    """The elements of a page, which must be closed in order."""

    VOID = {"input", "link", "meta"}

    def __init__(self):
        super().__init__()
        self.open, self.elements = [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_labeled():
    outline = Outline()
    outline.feed(INDEX)
    outline.close()
    assert outline.open == []
    elements = outline.elements

    def attributes(name):
        return [found for tag, found in elements if tag == name]

    ids = [found["id"] for _, found in elements if "id" in found]
    assert len(ids) == len(set(ids))
    labeled = {label["for"] for label in attributes("label")}
    assert {control["id"] for control in attributes("input")} == labeled
    assert all("aria-label" in found for found in attributes("meter"))
    assert attributes("html")[0]["lang"] == "en"
    assert attributes("output")[0]["aria-live"] == "polite"
    assert any(found.get("role") == "status" for _, found in elements)
    assert attributes("noscript")
    for _, found in elements:  # nothing is fetched from elsewhere
        for name in ("href", "src"):
            assert not found.get(name, "").startswith(("http", "//"))


@pytest.fixture
def serve():
    """Serves folders, until the test is over."""
    servers = []

    def start(folder):
        servers.append(web.server(folder, port=0))
        threading.Thread(target=servers[-1].serve_forever).start()
        return servers[-1], f"http://localhost:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_server_tells_what_files_are(serve, tmp_path):
    kinds = {
        "index.html": "text/html; charset=utf-8",
        "page.js": "text/javascript; charset=utf-8",
        "runtime.wasm": "application/wasm",
        "model.tflite": "application/octet-stream",
    }
    for name in kinds:
        (tmp_path / name).write_text(name)
    _, address = serve(tmp_path)
    for name, kind in kinds.items():
        with urllib.request.urlopen(address + name) as response:
            assert response.read().decode() == name
            assert response.headers["Content-Type"] == kind
            assert response.headers["Cache-Control"] == "no-cache"
            policy = response.headers["Cross-Origin-Embedder-Policy"]
            assert policy == "require-corp"


def test_without_npm(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    arguments = ["--folder", str(tmp_path), "--work-dir", str(tmp_path)]
    assert web.main(arguments) == 2
    assert "error: npm is missing: install Node.js" in capsys.readouterr().err


# In a browser


@pytest.fixture(scope="module")
def work_dir(vocabulary, text, tmp_path_factory):
    """As the main job leaves it; untrained, but with opinions."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "vocabulary.spm").write_bytes(vocabulary.proto)
    settings = dict(dataset="cldr", seed=0, batching=dict(widths=[8, LENGTH]))
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "test_source.txt").write_text("\n".join(text.source[:9]) + "\n")
    teacher = untrained_translator(vocabulary.size, LENGTH, end=9)
    teacher.save(folder / "teacher.keras")
    student = kde.compress(teacher, 4.5, quantization="int4", verbose=0)
    kde.save_model(student, folder / "student.keras")
    return folder


@pytest.fixture(scope="module")
def site(work_dir, tmp_path_factory):
    """The page, built, with the translators of `work_dir`."""
    if None in (chromium.find(), shutil.which("npm")):
        pytest.skip("Chromium or npm is not installed")
    folder = tmp_path_factory.mktemp("site")
    web.bundle(folder)
    web.export(work_dir, folder)
    return folder


@pytest.fixture
def page(site, tmp_path):
    with chromium.Page(tmp_path / "profile") as page:
        yield page


def open_page(page, address):
    """What the page says once it is ready, or cannot be."""
    page.call("Page.navigate", url=address)
    page.wait(f"location.href == {json.dumps(address)}")
    status = "document.querySelector('[role=status]')?.textContent"
    page.wait(f"{status} && !/Loading|Ready[.]/.test({status})")
    return page.evaluate(status)


def translate(page, sentence):
    """Types and submits; text and ids of each translator."""
    page.evaluate(
        f"""{{
            const form = document.querySelector("form");
            form.text.value = {json.dumps(sentence)};
            form.querySelector("[name=go]").click();
        }}"""
    )
    page.wait("!document.querySelector('[name=go]').disabled")
    return page.evaluate(
        """Array.from(document.querySelectorAll("output"), (output) =>
            [output.textContent, JSON.parse(output.dataset.ids)])"""
    )


@pytest.mark.slow
def test_the_page_translates_as_python_does(page, site, serve, text):
    """With a network, and without one."""
    server, address = serve(site)
    assert open_page(page, address).startswith("Ready, and kept")
    assert page.evaluate("crossOriginIsolated")
    index = json.loads((site / "translators.json").read_text())
    sentences = [s for s in text.source if len(s) < 25][:20]
    found = [translate(page, sentence) for sentence in sentences]
    first = copy.deepcopy(found[0])
    ended = 0
    for column, translator in enumerate(index["translators"]):
        path = site / translator["file"]
        runner = Runner(path)
        for sentence, cards in zip(sentences, found):
            shown, ids = cards[column]
            if ids[-1] == data.EOS_ID:
                del ids[-1]
                ended += 1
            assert ids == list(runner.stream_ids(sentence))
            assert shown == runner.generate(sentence)
    assert len({shown for cards in found for shown, _ in cards}) > 20
    assert 0 < ended < 2 * len(sentences)
    shown = "Array.from(document.querySelectorAll('.bytes, .table'), (e) => "
    shown = page.evaluate(shown + "Number(e.textContent.replaceAll(',', '')))")
    files = [translator["file"] for translator in index["translators"]]
    assert shown[::2] == [(site / file).stat().st_size for file in files]
    assert shown[1::2] == [500 * 16 + 4, index["translators"][1]["table_bytes"]]
    assert shown[3] < shown[1]

    (refused, no_ids), _ = translate(page, "a " * 60)
    assert refused.startswith("The text has 121 tokens, and the model reads 20")
    assert no_ids == []
    server.shutdown()
    server.server_close()
    assert open_page(page, address + "?again").startswith("Ready")
    assert translate(page, sentences[0]) == first


@pytest.mark.slow
def test_what_is_missing_or_broken_is_told(page, site, serve, tmp_path):
    damaged_site = shutil.copytree(site, tmp_path / "site")
    _, address = serve(damaged_site)
    teacher = damaged_site / "teacher.tflite"
    student = damaged_site / "student.tflite"
    content = bytearray(teacher.read_bytes())
    content[1_000] ^= 1
    teacher.write_bytes(content)
    student.write_bytes(student.read_bytes()[:-100])
    told = (
        "Array.from(document.querySelectorAll('output'), (o) => o.textContent)"
    )

    assert open_page(page, address) == "No translator could be loaded."
    damaged, short = page.evaluate(told)
    assert "teacher.tflite is damaged or cut short (its SHA-256" in damaged
    assert "student.tflite is damaged or cut short (there is no" in short

    shutil.copy(site / teacher.name, teacher)
    # HTTP tells times in seconds: later than when it was damaged.
    os.utime(teacher, (teacher.stat().st_mtime + 5,) * 2)
    os.remove(student)
    assert open_page(page, address + "?2").startswith("Ready")
    assert (
        "student.tflite is missing (HTTP status 404)" in page.evaluate(told)[1]
    )

    page.call("Page.enable")
    page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="delete globalThis.WebAssembly",
    )
    assert "no WebAssembly" in open_page(page, address + "?3")
