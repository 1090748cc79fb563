"""The figure of a real translator: its text, its numbers, its students."""

import gzip
import importlib.util

import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde
from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.figures import translator as figure
from benchmarks.tasks import translator
from benchmarks.tasks import translator_students
from benchmarks.tasks.marian import EOS
from benchmarks.tasks.marian_file import TABLE


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return translator.TranslatorTask(folder, None, 12, 200, is_quick=True)


@pytest.fixture
def student(task):
    return kde.compress(
        task.model, 8.0, calibration_data=task.calibration_data, verbose=0
    )


def log_softmax(logits):
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# The text


def test_batches_have_every_pair_once():
    chance = np.random.default_rng(0)
    pairs = [
        tuple([*chance.integers(1, 9, n), EOS] for n in lengths)
        for lengths in chance.integers(1, 20, (30, 2))
    ]
    found = []
    for inputs, labels, weights in translator.batches(pairs, 64):
        assert max(labels.size, inputs["source"].size) <= 64
        assert (inputs["target"][:, 0] == EOS).all()
        np.testing.assert_array_equal(inputs["target"][:, 1:], labels[:, :-1])
        for source, label, weight in zip(inputs["source"], labels, weights):
            end = int(weight.sum())
            assert (weight[:end] == 1).all() and (label[end:] == EOS).all()
            source = source.tolist()
            source = source[: source.index(EOS) + 1]
            found.append((source, label[:end].tolist()))
    assert sorted(found) == sorted(pairs)


def test_the_corpus_is_read_by_split(tmp_path):
    path = tmp_path / translator.CORPUS
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("train\tman\tls\tlist\tlistar\ndev\tman\tls\ta\tb\n")
        file.write("test\tman\tcp\tcopy\tcópia\n")
    assert translator.read_corpus(str(tmp_path)) == {
        "train": [("list", "listar")],
        "test": [("copy", "cópia")],
    }


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        translator.read_corpus(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="make benchmark-models"):
        translator.model_folder()


def test_the_training_text_is_translated_once(task, monkeypatch):
    monkeypatch.setattr(translator, "LABELLED_AT_A_TIME", 4)
    found = task.labelled(6)
    assert len(found) == 6
    (expected,) = task.translator.translate([found[5][0]])
    assert found[5][1] == [*expected, EOS]
    monkeypatch.setattr(translator, "_translated", None)
    assert task.labelled(6) == found


# The numbers


def test_the_model_itself_is_at_no_distance(task):
    found = task.evaluate(task.model)
    assert found["agreement"] == 1.0 and found["divergence"] == 0.0
    assert found["tokens"] == sum(len(t.encode()) + 1 for _, t in task.texts)
    scores = figure.scores(task, task.translations)
    assert scores["same"] == 1.0 and scores["p_value"] == 1.0


def test_distances_are_numpys(task, student):
    found = task.evaluate(student)
    sums, number = np.zeros(3), 0
    for source, target in task.texts:
        label = np.array([*target.encode(), EOS])
        inputs = {
            "source": np.array([[*source.encode(), EOS]], "int32"),
            "target": np.array([[EOS, *label[:-1]]], "int32"),
        }
        scores, expected = (
            log_softmax(ops.convert_to_numpy(m(inputs))[0].astype("float64"))
            for m in (student, task.model)
        )
        number += len(label)
        sums += (
            -scores[np.arange(len(label)), label].sum(),
            (scores.argmax(-1) == expected.argmax(-1)).sum(),
            (np.exp(expected) * (expected - scores)).sum(),
        )
    names = "nats", "agreement", "divergence"
    assert found["tokens"] == number
    for name, value in zip(names, sums / number):
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6)


# The students


@pytest.mark.parametrize("train", ["tables", "all"])
def test_distillation_trains_the_table_or_all(train, task, student):
    before = {v.path: np.array(v) for v in student.variables}
    found = translator_students.distill(student, task, 30, 4, 1e-2, train)
    changed = {
        v.path
        for v in student.variables
        if not np.array_equal(before[v.path], np.array(v))
    }
    of_table = {v.path for v in student.get_layer(TABLE).trainable_variables}
    expected = {v.path for v in student.trainable_variables}
    assert of_table < expected
    assert changed == (of_table if train == "tables" else expected)
    assert found["steps"] == 4 and found["trained_tokens"] > 0


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path, monkeypatch, capsys):
    names = ["full table", "int4", "nearest int4", "32x, distilled"]

    def run(*rows):
        options = "--quick", "--work-dir", tmp_path, "--rows", *rows
        assert command.main([*map(str, ["run", "translator", *options])]) == 0

    run(*names)
    folder = tmp_path / "quick" / "report"
    found = harness.read_results("translator", folder)["rows"]
    assert [row["row"] for row in found] == names
    full, rounded, rival, trained = found
    assert full["bytes"] == 4 * 256 * 32 and full["divergence"] == 0.0
    assert full["file_same"] > 0.9
    assert 0 < rounded["divergence"] < trained["divergence"]
    assert rival["bytes"] == 256 * 32 // 2 + 2 * 256
    assert trained["file_bytes"] < full["file_bytes"]
    assert "| full table |" in capsys.readouterr().out
    assert (folder / "bleu.png").exists()
    monkeypatch.setattr(figure, "make_model", None)
    run("int4")
    assert harness.read_results("translator", folder)["rows"] == found
