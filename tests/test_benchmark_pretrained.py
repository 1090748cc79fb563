"""The figure of pretrained models: its text, its numbers, its files."""

import gzip
import importlib.util

import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde
from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.figures import pretrained as figure
from benchmarks.methods.nearest import round_to_nearest
from benchmarks.tasks import pretrained
from keras_distilled_embedding.quantization import format_of

WORDS = ["the", "table", "is", "all", "of", "it", "and", "some", "more"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with prose of no sense."""
    folder = tmp_path_factory.mktemp("data")
    write_prose(folder, 60, 12)
    return folder


def write_prose(folder, paragraphs, words):
    random = np.random.default_rng(0)
    with gzip.open(folder / pretrained.PROSE, "wt", encoding="utf-8") as file:
        for _ in range(paragraphs):
            file.write(" ".join(random.choice(WORDS, words)) + "\n")


@pytest.fixture(scope="module")
def task(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return pretrained.PretrainedTask("quick", folder, str(data_dir), 90, 2, 16)


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logits_of(model, pieces):
    """Of every token but the last, from the whole model, in float64."""
    inputs = {"token_ids": pieces, "padding_mask": np.ones_like(pieces)}
    logits = ops.convert_to_numpy(model(inputs))[:, :-1].astype("float64")
    return logits.reshape(-1, logits.shape[-1])


# The numbers


def test_comparison_is_numpys():
    random = np.random.default_rng(1)
    logits, reference = random.normal(size=(2, 7, 11)).astype("float32") * 3
    labels = random.integers(11, size=7).astype("int32")
    nll, same, divergence = map(
        ops.convert_to_numpy, pretrained.compare(logits, reference, labels)
    )
    found, expected = log_softmax(logits), log_softmax(reference)
    np.testing.assert_allclose(nll, -found[np.arange(7), labels], rtol=1e-5)
    np.testing.assert_array_equal(
        same, logits.argmax(axis=1) == reference.argmax(axis=1)
    )
    wanted = (np.exp(expected) * (expected - found)).sum(axis=1)
    np.testing.assert_allclose(divergence, wanted, rtol=1e-4)


def test_the_model_itself_is_at_no_distance(task):
    found = task.evaluate(task.layer)
    logits = log_softmax(logits_of(task.model, task.pieces))
    labels = task.pieces[:, 1:].reshape(-1)
    assert found["tokens"] == len(labels) == 90
    nll = -logits[np.arange(90), labels].mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)
    assert found["agreement"] == 1.0 and found["divergence"] == 0.0


def test_a_layer_is_evaluated_as_the_model_that_has_it(task):
    student = kde.compress(
        task.model, 4.0, calibration_data=task.calibration_data, verbose=0
    )
    found = task.evaluate(student.backbone.token_embedding)
    logits = logits_of(student, task.pieces)
    reference = logits_of(task.model, task.pieces)
    labels = task.pieces[:, 1:].reshape(-1)
    scores, expected = log_softmax(logits), log_softmax(reference)
    nll = -scores[np.arange(90), labels].mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    same = (logits.argmax(axis=1) == reference.argmax(axis=1)).mean()
    assert found["agreement"] == pytest.approx(same)
    divergence = (np.exp(expected) * (expected - scores)).sum(axis=1).mean()
    assert divergence > 1e-5
    assert found["divergence"] == pytest.approx(divergence, abs=1e-6)


@pytest.mark.parametrize("quantization", ["int4", "int2"])
def test_the_rival_has_a_scale_a_row(quantization):
    kind = format_of(quantization)
    random = np.random.default_rng(2)
    table = random.normal(size=(50, 64)) * random.uniform(0.01, 9, (50, 1))
    table = table.astype("float32")
    table[3] = 0.0
    found, number = round_to_nearest(table, kind.name)
    assert number == 50 * (64 * kind.bits // 8 + 2)
    assert all(len(np.unique(row)) <= 2**kind.bits for row in found)
    # No worse in any row than the scale that suits Gaussian numbers.
    scales = kind.step * np.sqrt(np.square(table).mean(axis=1, keepdims=True))
    scales = np.maximum(scales, 1e-30)
    levels = np.clip(np.round(table / scales - kind.shift), *kind.levels)
    plain = np.square((levels + kind.shift) * scales - table).sum(axis=1)
    lost = np.square(found - table).sum(axis=1)
    assert (lost <= 1.05 * plain + 1e-9).all()
    assert lost.sum() <= 0.2 * np.square(table).sum()


# The text


def test_pieces_follow_each_other():
    text = ["abc", "defgh", "ij"]
    pieces = pretrained.cut(text, pretrained._bytes_of, 3, 5, [1])
    assert pieces.dtype == "int32"
    assert (pieces[:, 0] == 1).all()
    assert bytes(pieces[:, 1:].astype("uint8")) == b"abc\ndefgh\nij"
    # The text ends: no piece is filled up.
    assert len(pretrained.cut(text, pretrained._bytes_of, 9, 5, [])) == 2


def test_what_is_evaluated_is_not_calibrated_on(task, data_dir):
    _, text = pretrained.paragraphs(str(data_dir))
    first, second = "\n".join(text[:30]), "\n".join(text[30:])

    def text_of(pieces):
        return bytes(np.asarray(pieces, "uint8")).decode()

    calibration = [batch["token_ids"] for batch in task.calibration_data]
    assert len(np.concatenate(calibration)) == 2
    assert first.startswith(text_of(np.concatenate(calibration)))
    assert second.startswith(text_of(task.pieces))


# The files


class File:
    """The header of a GGUF file."""

    def __init__(self, **fields):
        self._fields = fields

    def field(self, name, default=None):
        return self._fields.get(name.removeprefix("tokenizer.ggml."), default)


def test_byte_pairs_split_digits():
    tokens = ["a", "b", "Ġ", "1", "2", "12", "ab", "Ġab"]
    file = File(
        model="gpt2",
        pre="smollm",
        tokens=tokens,
        merges=["1 2", "a b", "Ġ ab"],
        add_bos_token=False,
    )
    tokenizer = pretrained.Tokenizer(file)
    assert tokenizer.start == []
    found = [tokens[i] for i in tokenizer.encode("ab ab 12")]
    assert found == ["ab", "Ġab", "Ġ", "1", "2"]


def test_another_pre_tokenizer_is_refused():
    with pytest.raises(ValueError, match="Received: 'other'"):
        pretrained.Tokenizer(File(model="gpt2", pre="other"))


def test_sentencepiece_keeps_the_text_and_falls_back_to_bytes():
    letters = ["a", "b", "▁", "ab", "▁ab"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + letters
    file = File(
        model="llama",
        tokens=tokens,
        scores=[0.0] * 260 + [-9.0, -9.0, -9.0, -1.0, -2.0],
        token_type=[3, 3, 3, 2] + [6] * 256 + [1] * 5,
        add_bos_token=True,
        bos_token_id=2,
        eos_token_id=1,
        unknown_token_id=3,
        padding_token_id=0,
    )
    tokenizer = pretrained.Tokenizer(file)
    assert tokenizer.start == [2]
    found = [tokens[i] for i in tokenizer.encode("ab ab  \n")]
    assert found == ["ab", "▁ab", "▁", "▁", "<0x0A>"]


def test_halves_of_what_turns():
    values = np.arange(12.0).reshape(12, 1)
    found = pretrained._halves(values, heads=2).ravel().tolist()
    assert found == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("name", pretrained.SOURCES)
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="make benchmark-models"):
        pretrained.SOURCES[name].path(tmp_path)


def test_distillation_trains_the_table_alone(data_dir, tmp_path):
    task = pretrained.PretrainedTask("quick", tmp_path, data_dir, 200, 2, 32, 9)
    assert len(task.training_data) == 9 and len(task.calibration_data) == 1
    for batch in task.training_data:
        ids = batch["token_ids"]
        assert not (task.pieces[:, None] == ids).all(axis=-1).any()
    student = kde.compress(task.model, 16.0, verbose=0)
    before = {v.path: np.array(v) for v in student.variables}
    loss = task.evaluate(student.backbone.token_embedding)["divergence"]
    assert task.distill(student, 9) == {"steps": 9, "trained_tokens": 9 * 64}
    changed = {
        v.path
        for v in student.variables
        if not np.array_equal(before[v.path], np.array(v))
    }
    table = student.backbone.token_embedding
    assert changed == {v.path for v in table.trainable_variables}
    assert task.evaluate(table)["divergence"] < loss


# The figure


@pytest.mark.slow
def test_rows_are_measured_once(data_dir, tmp_path, monkeypatch, capsys):
    names = ["full table", "int4", "floats 8x, not calibrated", "nearest int2"]

    def run(*rows):
        options = "--quick", "--work-dir", tmp_path, "--data-dir", data_dir
        arguments = ["run", "pretrained", *options, "--rows", *rows]
        assert command.main([*map(str, arguments)]) == 0

    run(*names)
    folder = tmp_path / "quick" / "report"
    found = harness.read_results("pretrained", folder)["rows"]
    assert [row["row"] for row in found] == names
    full, rounded, short, rival = found
    assert full["bytes"] == 4 * 256 * 64 and full["divergence"] == 0.0
    assert 0 < rounded["divergence"] < short["divergence"]
    assert rounded["bytes"] < full["bytes"] / 4
    assert rival["bytes"] == 256 * 64 // 4 + 2 * 256
    assert "| full table |" in capsys.readouterr().out
    monkeypatch.setattr(figure, "make_layer", None)
    run("int4")
    assert harness.read_results("pretrained", folder)["rows"] == found


@pytest.mark.slow
def test_bundles_write_what_keras_does(tmp_path, capsys):
    pytest.importorskip("litert_lm")
    names = ["full, float32", "rank d/8, int8"]
    write_prose(tmp_path, 20, 80)
    options = "--quick", "--work-dir", tmp_path, "--data-dir", tmp_path
    arguments = ["run", "generation", *options, "--threads", 1, "--rows"]
    assert command.main([*map(str, [*arguments, *names])]) == 0
    folder = tmp_path / "quick" / "report"
    found = harness.read_results("generation", folder)["rows"]
    assert [row["row"] for row in found] == names
    full, short = found
    assert full["equal"] == 5 and "equal" not in short
    assert full["divergence"] < 1e-9
    assert full["bundle_bytes"] > full["table_bytes"] == 4 * 258 * 64
    assert short["table_bytes"] < full["table_bytes"] / 16
    assert short["bundle_bytes"] < 0.7 * full["bundle_bytes"]
    for row in found:
        assert all(row[k]["1"] > 0 for k in ("prefill", "decode", "load_s"))
    assert "| full, float32 |" in capsys.readouterr().out
