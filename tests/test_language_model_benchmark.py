"""The language model's benchmark: its text, its bytes, its report."""

import dataclasses
import json

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
from benchmarks import language_model as benchmark

TINY = dataclasses.replace(benchmark.QUICK, length=4, batch=3)


@pytest.mark.slow
def test_quick_run_reports_and_goes_on(tmp_path, capsys, monkeypatch):
    rows = ["control, rate 1e-03", "ReLU 8x"]
    options = ["--quick", "--work-dir", str(tmp_path), "--rows", *rows]
    benchmark.main(options)
    folder = tmp_path / "quick" / "report"
    report = (folder / "report.md").read_text("utf-8")
    assert report in capsys.readouterr().out
    assert "    python -m benchmarks.language_model --quick" in report
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text("utf-8"))
    teacher, control, student = record["rows"]
    assert [control["row"], student["row"]] == rows
    assert "| control, rate 1e-03 | float32 | 64,000 | 1.0 |  |" in report
    assert "| ReLU 8x | int8 | 1,728 | 37.0 |" in report
    # Everything learns: a guess has a perplexity of 500.
    for row in record["rows"]:
        for stored in row["stored"].values():
            assert stored["perplexity"] < 250
            assert 2 < stored["bits_per_byte"] < 4
    assert len(teacher["validation_nll"]) == 2 * len(control["validation_nll"])
    perplexity = student["stored"]["float32"]["perplexity"]
    assert perplexity < student["before"]["perplexity"]
    # What is there is not trained again.
    monkeypatch.setattr(benchmark, "fit", None)
    monkeypatch.setattr(benchmark, "distil", None)
    benchmark.main(options)
    assert json.loads((folder / "results.json").read_text()) == record


def test_text_has_each_paragraph_once():
    text = benchmark.paragraphs(documents=10)
    kept = [paragraph for part in text.values() for paragraph in part]
    assert len(kept) == len(set(kept)) > 20
    for paragraph in kept:
        assert len(paragraph) >= benchmark.SHORTEST
        assert "\n" not in paragraph and ">>>" not in paragraph


def test_docstrings_of_a_module_and_what_is_in_it(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n'
        '    """Method."""\n    "no docstring"\ndef g(): return "neither"\n'
    )
    assert benchmark._docstrings(path) == ["Module.", "Class.", "Method."]
    path.write_text("not Python")
    assert benchmark._docstrings(path) == []


@pytest.mark.parametrize("number", [5, 12, 30])
def test_every_token_is_predicted_once(number):
    stream = np.arange(number + 1, dtype="int32")
    corpus = benchmark.Corpus({"test": stream}, {})
    predicted = []
    for inputs, labels, weights in corpus.batches("test", TINY):
        assert labels.shape == weights.shape == (3, 4)
        assert keras.ops.all(inputs["padding_mask"] == 1)
        counted = keras.ops.convert_to_numpy(weights) == 1
        tokens = keras.ops.convert_to_numpy(inputs["token_ids"])[counted]
        labels = keras.ops.convert_to_numpy(labels)[counted]
        np.testing.assert_array_equal(tokens + 1, labels)
        predicted += labels.tolist()
    assert predicted == list(range(1, number + 1))


def test_training_batches_are_whole_and_new_in_every_epoch():
    stream = np.arange(100, dtype="int32")
    corpus = benchmark.Corpus({"train": stream}, {})
    batches = corpus.batches("train", TINY, shuffle_seed=0)
    epochs = [
        [keras.ops.convert_to_numpy(labels) for _, labels, _ in batches]
        for _ in range(2)
    ]
    assert len(epochs[0]) == len(batches) == 8
    assert len(np.unique(epochs[0])) == 8 * 3 * 4
    assert not np.array_equal(*epochs)


def test_storing_in_int8_rounds_both_factors():
    teacher = benchmark.build(TINY, seed=0)
    student = kde.compress(teacher, 8.0, verbose=0)
    table = benchmark.table_of(student)
    assert benchmark.table_bytes(teacher, "float32") == 4 * 500 * 32
    assert benchmark.table_bytes(teacher, "int8") == 500 * 32 + 4
    entries = table.rank * (500 + 32)
    assert benchmark.table_bytes(student, "float32") == 4 * entries
    # As the report of an export counts: a scale, and the offset.
    numbers = entries + 4 * (1 + 32)
    assert benchmark.table_bytes(student, "int8") == numbers
    for model in (teacher, student):
        before = np.array(benchmark.table_of(model).embeddings)
        benchmark.store_in_int8(model)
        after = np.array(benchmark.table_of(model).embeddings)
        lost = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert 0 < lost < 0.02
    for row in np.array(table.basis):
        assert len(np.unique(np.abs(row))) <= 128


def test_the_control_is_the_rate_that_validation_prefers():
    results = [
        {"row": row, "validation_nll": [1.0, nll]}
        for row, nll in (
            ("teacher", 1.0),
            ("control, rate 2e-03", 3.0),
            ("control, rate 1e-03", 2.0),
        )
    ]
    assert benchmark.control_of(results) == results[2]
    assert benchmark.control_of(results[:1]) is None
