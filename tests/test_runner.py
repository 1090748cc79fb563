"""Step by step on a device: the signatures, the file, its runner."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
import keras_distilled_embedding_runner as runner_file
from examples.nmt import data
from examples.nmt.stepwise import embed_vocabulary
from examples.nmt.stepwise import stepwise_signatures
from keras_distilled_embedding.export.tokenizers import StoredVocabulary
from keras_distilled_embedding.export.tokenizers import append_tokenizer
from keras_distilled_embedding_runner import DIGEST as DIGEST_MEMBER
from keras_distilled_embedding_runner import SENTENCEPIECE as VOCABULARY_MEMBER
from keras_distilled_embedding_runner import SETTINGS as SETTINGS_MEMBER
from keras_distilled_embedding_runner import Runner
from tests.keras_search import translate
from tests.translators import untrained_translator

interpreter = pytest.importorskip("ai_edge_litert.interpreter")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

pytestmark = [
    # TensorFlow's converter, when it reads a SavedModel.
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter.*:UserWarning"),
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="the converter takes TensorFlow's saved models",
    ),
]

BATCHING = data.Batching(widths=(8, 12, 20), tokens=96)
LENGTH = BATCHING.max_length
RUNNER = Path(runner_file.__file__)


@pytest.fixture(scope="module")
def text():
    return data.load_corpus("cldr").train[:600]


@pytest.fixture(scope="module")
def sentences(text):
    """Thirty, drawn from all that are short enough."""
    chosen = np.random.default_rng(0).permutation(len(text))
    short = [text.source[i] for i in chosen if len(text.source[i]) < 25]
    return short[:30]


@pytest.fixture(scope="module")
def vocabulary(text):
    return data.Vocabulary.train(text, 500)


@pytest.fixture(scope="module")
def vocabulary_path(vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "pieces.spm"
    path.write_bytes(vocabulary.proto)
    return path


@pytest.fixture(scope="module")
def teacher(vocabulary):
    """A small translator with weights large enough to have opinions."""
    return untrained_translator(vocabulary.size, LENGTH, end=5)


@pytest.fixture(scope="module")
def exported(teacher, vocabulary_path, tmp_path_factory):
    """Model, file and file with its tokenizer: dense and compressed."""
    models = {
        "dense": teacher,
        # Of a rank at which some translations still end.
        "student": kde.compress(teacher, rank=11, verbose=0),
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        bare, whole = (folder / f"{name}{end}.tflite" for end in ("", "_whole"))
        report = kde.export_litert(
            model,
            bare,
            signatures=stepwise_signatures(model, LENGTH),
            verbose=False,
        )
        assert report.tables == {"token_embedding": 1}
        shutil.copy(bare, whole)
        embed_vocabulary(whole, vocabulary_path, model, LENGTH)
        models[name] = (model, bare, whole)
    return models


@pytest.fixture(params=["dense", "student"])
def files(request, exported):
    """One and the other."""
    return exported[request.param]


@pytest.fixture
def bare_path(exported):
    return exported["student"][1]


@pytest.fixture
def whole_path(exported):
    return exported["student"][2]


@pytest.fixture
def path(whole_path, tmp_path):
    """One to be changed."""
    return Path(shutil.copy(whole_path, tmp_path / "model.tflite"))


def make_ids(batch, length, seed=0):
    """Random ids, of which all rows but the first end in padding."""
    random = np.random.default_rng(seed)
    ids = random.integers(4, 500, size=(batch, length)).astype("int32")
    for row in range(1, batch):
        ids[row, length - min(row, length - 1) :] = data.PAD_ID
    return ids


# The signatures


def logits_by_step(encode, decode, source, target):
    """The logits after every token of `target`, and the last caches."""
    cross = encode(source=source)
    shape = (len(target), 2, LENGTH, 8)
    names = [f"self_{kind}_{i}" for kind in ("key", "value") for i in (0, 1)]
    caches = {name: np.zeros(shape, "float32") for name in names}
    logits = []
    for position in range(target.shape[1]):
        caches = dict(
            decode(
                token=target[:, position : position + 1],
                position=np.array([position], "int32"),
                **cross,
                **caches,
            )
        )
        logits.append(caches.pop("logits"))
        assert {c.shape for c in caches.values()} == {shape}
    return np.stack(logits, axis=1), caches


def from_keras(part):
    def call(**inputs):
        outputs = part(inputs, training=False)
        return {k: keras.ops.convert_to_numpy(v) for k, v in outputs.items()}

    return call


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("where", ["Keras", "LiteRT"])
def test_steps_equal_the_full_model(files, where, batch):
    model, bare_path, _ = files
    if where == "Keras":
        parts = stepwise_signatures(model, LENGTH)
        encode, decode = map(from_keras, (parts["encode"], parts["decode"]))
    else:
        file = interpreter.Interpreter(str(bare_path))
        encode, decode = map(file.get_signature_runner, ("encode", "decode"))
    for seed, lengths in enumerate([(3, LENGTH), (11, 5), (LENGTH, 2)]):
        source, target = (make_ids(batch, n, seed) for n in lengths)
        target[:, 0] = data.BOS_ID
        expected = model({"source": source, "target": target}, training=False)
        logits, caches = logits_by_step(encode, decode, source, target)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        # Nothing is written where no token has been.
        assert not any(c[:, :, lengths[1] :].any() for c in caches.values())
        assert all(c[:, :, lengths[1] - 1].any() for c in caches.values())


def test_hypotheses_share_what_is_known_of_their_sentence(files):
    model, bare_path, _ = files
    file = interpreter.Interpreter(str(bare_path))
    encode, decode = map(file.get_signature_runner, ("encode", "decode"))
    source, target = make_ids(1, 6), make_ids(4, 5)
    logits, _ = logits_by_step(encode, decode, source, target)
    expected = model(
        {"source": np.repeat(source, 4, axis=0), "target": target},
        training=False,
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_file_holds_one_table_and_builtin_operators(files):
    model, bare_path, _ = files
    content = bare_path.read_bytes()
    layer = model.get_layer("token_embedding")
    if hasattr(layer, "codes"):
        codes = np.maximum(keras.ops.convert_to_numpy(layer.codes), 0)
        codes = codes - keras.ops.convert_to_numpy(layer.center)
    else:
        codes = keras.ops.convert_to_numpy(layer.embeddings)
    copies = (content.count(a.tobytes()) for a in (codes, codes.T))
    assert sum(copies) == 1
    file = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    assert all(code.customCode is None for code in file.operatorCodes)
    names = {signature.signatureKey for signature in file.signatureDefs}
    assert names == {b"encode", b"decode"}


def test_a_step_resizes_no_cache_and_transposes_none(bare_path):
    file = schema.ModelT.InitFromObj(
        schema.Model.GetRootAs(bare_path.read_bytes(), 0)
    )
    (graph,) = [g for g in file.subgraphs if g.name == b"decode"]
    kinds = [
        file.operatorCodes[operator.opcodeIndex].builtinCode
        for operator in graph.operators
    ]
    operators = schema.BuiltinOperator
    assert kinds.count(operators.DYNAMIC_UPDATE_SLICE) == 4
    assert kinds.count(operators.BATCH_MATMUL) == 8
    assert operators.TRANSPOSE not in kinds
    assert operators.SHAPE not in kinds


@pytest.mark.parametrize("max_length", [0, LENGTH + 1])
def test_caches_have_positions_of_the_model(teacher, max_length):
    with pytest.raises(
        ValueError, match=f"1 to .* {LENGTH}.*max_length={max_length}"
    ):
        stepwise_signatures(teacher, max_length)


# Translating


@pytest.mark.parametrize("num_beams", [1, 4])
def test_the_text_is_that_of_keras(files, vocabulary, sentences, num_beams):
    model, _, path = files
    expected = translate(model, vocabulary, sentences, LENGTH, num_beams)
    runner = Runner(path)
    found = [runner.generate(s, num_beams=num_beams) for s in sentences]
    assert found == expected
    # Some end by themselves, some at the longest there is.
    lengths = [len(row) for row in vocabulary.encode(expected).to_list()]
    assert min(lengths) < LENGTH // 2 < max(lengths)
    # Each as if it were the first.
    assert runner.generate(sentences[0], num_beams=num_beams) == expected[0]


def test_threads(whole_path, sentences):
    one = Runner(whole_path)
    two = Runner(str(whole_path), num_threads=2)
    assert one.max_length == two.max_length == LENGTH
    for sentence in sentences[:3]:
        assert one.generate(sentence) == two.generate(sentence)


@pytest.mark.parametrize("sentence", ["", "  "])
def test_an_empty_sentence_stays_empty(whole_path, sentence):
    assert Runner(whole_path).generate(sentence) == ""


def test_the_longest_sentence(whole_path, vocabulary):
    runner = Runner(whole_path)
    sentence = ""
    for count in itertools.count(1):  # one piece more at a time
        longer = " ".join("a" * count)
        if vocabulary.encode([longer]).row_lengths()[0] > LENGTH:
            break
        sentence = longer
    assert runner.generate(sentence) is not None
    length = int(vocabulary.encode([longer]).row_lengths()[0])
    with pytest.raises(
        ValueError, match=f"`prompt`.* {LENGTH} tokens.*{length} tokens"
    ):
        runner.generate(longer)


@pytest.mark.parametrize("num_beams", [0, -1, 1.5, None])
def test_bad_beams(whole_path, num_beams):
    runner = Runner(whole_path)
    with pytest.raises(ValueError, match=f"`num_beams`.*={num_beams}"):
        runner.generate("a", num_beams=num_beams)


def test_not_one_sentence(whole_path):
    with pytest.raises(TypeError, match=r"one text.*\['a', 'b'\]"):
        Runner(whole_path).generate(["a", "b"])


# Files


def test_the_file_reads_as_a_model_and_as_a_zip(
    bare_path, whole_path, vocabulary
):
    content = whole_path.read_bytes()
    assert content.startswith(bare_path.read_bytes())
    with zipfile.ZipFile(whole_path) as archive:
        assert archive.testzip() is None
        assert archive.read(VOCABULARY_MEMBER) == vocabulary.proto
        assert json.loads(archive.read(SETTINGS_MEMBER)) == {
            "pad_id": data.PAD_ID,
            "bos_id": data.BOS_ID,
            "eos_id": data.EOS_ID,
            "max_length": LENGTH,
        }
        digest = hashlib.sha256(bare_path.read_bytes()).hexdigest()
        assert archive.read(DIGEST_MEMBER).decode() == digest
        # What stands uncompressed can be mapped.
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
    file = interpreter.Interpreter(model_content=content)
    assert set(file.get_signature_list()) == {"encode", "decode"}


@pytest.fixture
def embed(exported, vocabulary_path):
    """Puts a tokenizer into a file of the student."""

    def embed(path, vocabulary=vocabulary_path):
        embed_vocabulary(path, vocabulary, exported["student"][0], LENGTH)

    return embed


def test_a_second_tokenizer_replaces_the_first(path, text, embed):
    content = path.read_bytes()
    embed(path)
    assert path.read_bytes() == content

    other = data.Vocabulary.train(text[:300], 500)
    other_path = path.with_name("other.spm")
    other_path.write_bytes(other.proto)
    embed(str(path), str(other_path))
    with zipfile.ZipFile(path) as archive:
        assert archive.read(VOCABULARY_MEMBER) == other.proto
        assert len(archive.namelist()) == 3
    embed(path)
    assert path.read_bytes() == content


def test_other_associated_files_stay(bare_path, embed, tmp_path):
    path = tmp_path / "model.tflite"
    shutil.copy(bare_path, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.txt", "a\nb\n")
    for _ in range(2):
        embed(path)
        with zipfile.ZipFile(path) as archive:
            assert archive.read("labels.txt") == b"a\nb\n"
            assert len(archive.namelist()) == 4
    assert path.read_bytes().startswith(bare_path.read_bytes())


def test_a_failure_leaves_the_old_file(path, embed, monkeypatch):
    def fail(*args):
        raise OSError("no luck")

    content = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no luck"):
        embed(path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def replace_tokenizer(path, bare_path, content):
    """As nobody would, without a look at it."""
    shutil.copy(bare_path, path)
    vocabulary = StoredVocabulary(content, is_sentencepiece=True)
    settings = {"pad_id": 0, "bos_id": 2, "eos_id": 3, "max_length": LENGTH}
    append_tokenizer(path, path, vocabulary, settings)


@pytest.mark.parametrize("size", [400, 600])
def test_what_does_not_belong_together(path, bare_path, text, embed, size):
    other = data.Vocabulary.train(text, size)
    other_path = path.with_name("other.spm")
    other_path.write_bytes(other.proto)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"{size} pieces for a model of 500"):
        embed(path, other_path)
    assert path.read_bytes() == content
    replace_tokenizer(path, bare_path, other.proto)
    if size > 500:  # fewer may be: some models have rows to spare
        with pytest.raises(ValueError, match="600 pieces for a model of 500"):
            Runner(path)


def test_missing_files(path, vocabulary_path, embed):
    missing = path.with_name("missing")
    with pytest.raises(
        FileNotFoundError, match="`model_path`.*missing.*does not exist"
    ):
        Runner(missing)
    for arguments in ((missing,), (path, missing)):
        with pytest.raises(FileNotFoundError, match="missing"):
            embed(*arguments)
    with pytest.raises(FileNotFoundError, match="`model_path`.*a folder"):
        Runner(path.parent)


def test_no_tokenizer_at_all(bare_path):
    with pytest.raises(
        ValueError, match=r"`model_path` must carry a tok.*student\.tflite"
    ):
        Runner(bare_path)


def test_a_tokenizer_that_is_none(path, bare_path, embed):
    foreign = path.with_name("foreign.spm")
    foreign.write_bytes(b"no pieces here")
    with pytest.raises(
        ValueError, match=r"`vocabulary_path`.*14 bytes of .*foreign\.spm"
    ):
        embed(path, foreign)
    replace_tokenizer(path, bare_path, b"no pieces here")
    with pytest.raises(
        ValueError, match=r"`model_path` must carry .*14 bytes in .*\.tflite"
    ):
        Runner(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_model(bare_path, tmp_path, share):
    content = bare_path.read_bytes()
    path = tmp_path / "model.tflite"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="`model_path`.*complete"):
        Runner(path)


def test_a_truncated_tokenizer(path):
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="`model_path`.*cut short"):
        Runner(path)


def test_a_damaged_tokenizer(path, vocabulary):
    content = bytearray(path.read_bytes())
    content[content.index(vocabulary.proto) + 100] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="`model_path`.*damaged"):
        Runner(path)


def test_a_bit_that_flipped(path, bare_path):
    """Wherever it is, the interpreter does not get to see it."""
    whole, size = path.read_bytes(), bare_path.stat().st_size
    rng = np.random.default_rng(0)
    for position in [0, 4, size - 1, *rng.integers(size, size=40)]:
        content = bytearray(whole)
        content[position] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="`model_path`.*damaged"):
            Runner(path)


def test_associated_files_that_are_compressed(bare_path, tmp_path):
    """A few bytes of them could fill any memory."""
    path = tmp_path / "model.tflite"
    shutil.copy(bare_path, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(VOCABULARY_MEMBER, bytes(10_000_000))
    with pytest.raises(ValueError, match="`model_path`.*compressed"):
        Runner(path)


@pytest.mark.parametrize(
    "content",
    [b"PK" * 500, b"\0" * 99, np.random.default_rng(0).bytes(9_999)],
    ids=["text", "zeros", "noise"],
)
def test_a_foreign_file(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="`model_path` must be a LiteRT file"):
        Runner(path)


@pytest.mark.parametrize("signatures", ["encode alone", "prefixes", "none"])
def test_other_signatures(teacher, path, signatures):
    if signatures == "none":
        layers = [keras.Input((2,)), keras.layers.Dense(2)]
        kde.export_litert(keras.Sequential(layers), path, verbose=False)
    else:
        parts = {"encode": stepwise_signatures(teacher, 8)["encode"]}
        if signatures == "prefixes":
            parts["decode"] = teacher
        kde.export_litert(teacher, path, signatures=parts, verbose=False)
    with pytest.raises(
        ValueError, match=r"`model_path`.*`encode` and `decode`.*Received"
    ):
        Runner(path)


@pytest.mark.parametrize("num_threads", [0, "2"])
def test_bad_threads(whole_path, num_threads):
    with pytest.raises(
        ValueError, match=f"`num_threads`.*={re.escape(repr(num_threads))}"
    ):
        Runner(whole_path, num_threads=num_threads)


# The command


def run(*arguments, python=(sys.executable, "-I"), **options):
    return subprocess.run(
        [*python, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        **options,
    )


def test_the_command(whole_path, sentences):
    runner = Runner(whole_path)
    few = sentences[:3]
    done = run(RUNNER, whole_path, *few)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [runner.generate(s) for s in few]

    arguments = [whole_path, "--beams", "4", "--threads", "2"]
    expected = [runner.generate(s, num_beams=4) for s in few]
    done = run(RUNNER, *arguments, *few)
    assert done.stdout.splitlines() == expected
    done = run(RUNNER, *arguments, input="\n".join(few) + "\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected


def test_a_bad_line_leaves_the_others_in_step(whole_path, sentences, capsys):
    lines = [sentences[0], "a " * 100, "", sentences[1]]
    assert runner_file.main([str(whole_path), *lines]) == 1
    output, error = capsys.readouterr()
    runner = Runner(whole_path)
    first, last = map(runner.generate, sentences[:2])
    assert output.split("\n") == [first, "", "", last, ""]
    assert error.startswith("error in prompt 2: `prompt` must have 1 to 20 tok")


def test_the_runner_imports_neither_keras_nor_the_repository(whole_path):
    code = (
        "import runpy, sys; names = runpy.run_path(sys.argv[1]); "
        "names['Runner'](sys.argv[2]).generate('a'); "
        "print({m.split('.')[0] for m in sys.modules})"
    )
    done = run("-c", code, RUNNER, whole_path)
    assert done.returncode == 0, done.stderr
    loaded = set(re.findall(r"\w+", done.stdout))
    assert {"numpy", "sentencepiece", "ai_edge_litert"} <= loaded
    assert not loaded & {
        "keras",
        "tensorflow",
        "examples",
        "keras_nlp",
        "keras_distilled_embedding",
    }


@pytest.mark.slow
def test_on_a_device(whole_path, sentences, tmp_path):
    """In an environment of three packages, the runner and the model."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["ai-edge-litert", "numpy", "sentencepiece"]
    done = run("-m", "pip", "install", "-q", *packages, python=[python])
    assert done.returncode == 0, done.stderr
    device = tmp_path / "device"
    device.mkdir()
    shutil.copy(RUNNER, device)
    shutil.copy(whole_path, device / "model.tflite")
    device_python = dict(python=[python, "-I"], cwd=device)
    for module in ("keras", "tensorflow", "keras_distilled_embedding"):
        done = run("-c", f"import {module}", **device_python)
        assert "ModuleNotFoundError" in done.stderr
    runner = Runner(whole_path)
    for beams in (1, 4):
        done = run(
            RUNNER.name,
            "model.tflite",
            "--beams",
            beams,
            input="\n".join(sentences),
            **device_python,
        )
        assert done.returncode == 0, done.stderr
        expected = [runner.generate(s, num_beams=beams) for s in sentences]
        assert done.stdout.splitlines() == expected
