"""The translation benchmark: its batches, its search, the rivals' tables."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import rivals
from benchmarks.translation import __main__ as command
from benchmarks.translation import grid
from benchmarks.translation import report
from benchmarks.translation import rows
from benchmarks.translation import tables
from benchmarks.translation import task as tasks
from examples.nmt.model import build_transformer
from examples.nmt.pipeline import PRESETS
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_codes
from keras_distilled_embedding.quantization import round_table

SHAPE = 210, 24
WIDTHS = 6, 10


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    scales = np.arange(1, SHAPE[1] + 1) ** -0.7
    return (random.normal(size=SHAPE) * scales).astype("float32")


@pytest.fixture
def weights():
    return 1_000.0 / np.arange(1, SHAPE[0] + 1)


def pairs(number, seed=0, longest=12):
    random = np.random.default_rng(seed)

    def side():
        lengths = random.integers(1, longest, size=number)
        return [
            np.append(random.integers(4, 50, size=n), tasks.EOS_ID).astype(
                "int32"
            )
            for n in lengths
        ]

    return tasks.Pairs(side(), side())


# The rivals' tables


@pytest.mark.parametrize(
    "approximate, layer",
    [
        (rivals.group_reduce, tables.GroupedTable),
        (rivals.tensor_train, tables.TensorTrainTable),
        (rivals.product_quantization, tables.ProductQuantizedTable),
        (tables.nested_ranks, tables.NestedTable),
    ],
    ids=["grouped", "tensor train", "product quantised", "nested"],
)
def test_layer_starts_from_the_approximation(
    approximate, layer, table, weights, monkeypatch
):
    monkeypatch.setattr(rivals, "NUM_CENTROIDS", 8)
    budget = table.nbytes // 4
    made = approximate(table, weights, budget)
    assert 0 < made.num_bytes <= budget
    new = layer(SHAPE, made)
    np.testing.assert_allclose(
        ops.convert_to_numpy(new.table()), made.values, atol=1e-5
    )
    ids = np.array([[0, 3], [SHAPE[0] - 1, 7]])
    np.testing.assert_allclose(new(ids), made.values[ids], atol=1e-5)
    hidden = np.random.default_rng(1).normal(size=(2, 5, SHAPE[1]))
    hidden = hidden.astype("float32")
    np.testing.assert_allclose(
        new(hidden, reverse=True), hidden @ made.values.T, atol=1e-4
    )
    # All that is stored is trained, but for codes and names of groups.
    entries = sum(int(np.prod(w.shape)) for w in new.trainable_weights)
    assert 4 * entries <= made.num_bytes <= 4 * entries + 24 * SHAPE[0]


def test_nested_ranks_keep_frequent_rows_better(table, weights):
    budget = table.nbytes // 4
    made = tables.nested_ranks(table, weights, budget)
    rank = budget // 4 // sum(SHAPE)
    gram = (weights[:, None] * table).T @ table
    basis = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    uniform = table @ basis @ basis.T

    def error(values):
        return weights @ np.square(table - values).sum(axis=1)

    assert error(made.values) < error(uniform)


@pytest.mark.parametrize("rounding", ["int8", "int4"])
def test_rounded_table_is_the_stored_one(table, rounding):
    wide = np.tile(table, 4)  # whole blocks
    layer = tables.RoundedTable(wide, rounding)
    stored = dequantize(*round_table(ops.convert_to_tensor(wide), rounding))
    np.testing.assert_allclose(layer.table(), stored, atol=1e-6)
    bits = {"int8": 8, "int4": 4.5}[rounding]
    assert layer.num_bytes == pytest.approx(wide.size * bits / 8, abs=8)


def test_grouped_factors_are_rounded_like_ours(table, weights):
    made = rivals.group_reduce(table, weights, table.nbytes // 4)
    layer = tables.GroupedTable(SHAPE, made)
    layer.quantization = "int8"
    expected = np.zeros(SHAPE)
    for group, (codes, basis) in enumerate(
        zip(made.parts["codes"], made.parts["bases"])
    ):
        found = round_codes(codes, basis, "int8")
        values = dequantize(found.integers, found.scales) @ found.basis
        chosen = made.parts["groups"] == group
        expected[chosen] = values + found.offset
    np.testing.assert_allclose(layer.table(), expected, atol=1e-4)
    assert layer.num_bytes_int8 < made.num_bytes / 2


# Batches


def test_validation_batches_hold_every_pair_once():
    data = pairs(57)
    batches = tasks.PairBatches(data, WIDTHS, tokens=60)
    seen = []
    for index in range(len(batches)):
        inputs, labels, weights = batches[index]
        assert labels.shape in {(10, 6), (6, 10)}
        np.testing.assert_array_equal(weights, labels != tasks.PAD_ID)
        assert (inputs["target"][:, 0] == tasks.BOS_ID).all()
        np.testing.assert_array_equal(inputs["target"][:, 1:], labels[:, :-1])
        for source, target in zip(inputs["source"], labels):
            if target.any():
                seen.append((*source[source > 0], *target[target > 0]))
    wanted = [
        (*s, *t)
        for s, t in zip(data.source, data.target)
        if max(len(s), len(t)) <= WIDTHS[-1]
    ]
    assert sorted(seen) == sorted(wanted)


def test_training_batches_are_complete_and_change_their_order():
    batches = tasks.PairBatches(pairs(200), WIDTHS, tokens=60, seed=1)
    first = [batches[i][1].tobytes() for i in range(len(batches))]
    assert all(batches[i][2].any(axis=1).all() for i in range(len(batches)))
    batches.on_epoch_end()
    second = [batches[i][1].tobytes() for i in range(len(batches))]
    assert first != second
    assert sorted(first) == sorted(second)


# Search


def test_search_takes_the_likeliest_token_each_time():
    model = build_transformer(
        50, 10, d_model=16, num_layers=1, num_heads=2, feed_forward_dim=16
    )
    # Far from uniform, so that ties decide nothing.
    model.set_weights([4.0 * w for w in model.get_weights()])
    data = pairs(9, longest=8)
    shape = types.SimpleNamespace(widths=WIDTHS)
    task = types.SimpleNamespace(
        max_length=10,
        pairs=lambda split: data,
        setting=types.SimpleNamespace(shape=shape),
    )
    found = tasks.translate(model, task, "test")
    assert len(found) == len(data)
    assert len({row.tobytes() for row in found}) > 3
    for source, row in zip(data.source, found):
        target = [tasks.BOS_ID]
        while len(target) < 10:
            padded = target + [tasks.PAD_ID] * (10 - len(target))
            inputs = {
                "source": source[None],
                "target": np.array([padded], "int32"),
            }
            logits = model(inputs)[0, len(target) - 1]
            target.append(int(np.argmax(logits)))
            if target[-1] == tasks.EOS_ID:
                break
        expected = [i for i in target[1:] if i != tasks.EOS_ID]
        assert row.tolist() == expected


# The grid


def test_rows_have_names_of_their_own():
    for name in tasks.SETTINGS:
        found = grid.rows(name)
        assert len({row.slug for row in found}) == len(found)
        assert {row.method for row in found} == set(grid.METHODS)


def test_everything_but_the_loss_is_the_recipe_of_all():
    task = types.SimpleNamespace(setting=tasks.SETTINGS["multi30k"])
    base = task.setting.student
    assert grid.recipe(grid.Row("GroupReduce", 8.0), task) == base
    assert grid.recipe(grid.Row(grid.OURS, 8.0), task) == base
    both = grid.recipe(grid.Row(grid.OURS, 8.0, "both"), task)
    assert both == dataclasses.replace(base, embedding_weight=0.1)
    control = grid.recipe(grid.Row(grid.CONTROL), task)
    assert control.epochs == base.epochs
    assert control.student_loss_weight == 1.0


def test_what_nothing_is_small_enough_for_is_left_out():
    teacher = build_transformer(
        400, 8, d_model=64, num_layers=1, num_heads=2, feed_forward_dim=16
    )
    task = types.SimpleNamespace(
        vocabulary_size=400,
        table_bytes=4 * 400 * 64,
        token_frequencies=np.ones(400),
        setting=types.SimpleNamespace(shape=types.SimpleNamespace(d_model=64)),
        teacher=lambda: teacher,
    )
    make = grid.METHODS["ours, int4"]
    table = make(task, 8.0).get_layer("token_embedding")
    assert (table.quantization, table.rank) == ("int4", 32)
    assert make(task, 64.0) is None
    assert grid.METHODS[grid.FUNNEL](task, 64.0) is None


@pytest.mark.parametrize("name", ["multi30k", "cldr"])
def test_the_teacher_is_the_examples(name):
    """Which cannot be imported where there is no TensorFlow."""
    setting, example = tasks.SETTINGS[name], PRESETS[name]
    shape = dataclasses.asdict(setting.shape)
    batching = shape.pop("widths"), shape.pop("tokens")
    assert batching == (example.batching.widths, example.batching.tokens)
    assert shape == {key: getattr(example, key) for key in shape}
    assert setting.teacher == example.teacher
    assert setting.vocabulary_size == example.vocabulary_size
    if name == "multi30k":
        assert setting.student == example.student


def test_paired_test_finds_what_is_the_same():
    lines = tuple(f"a sentence with the number {i} in it" for i in range(50))
    worse = tuple(line.replace("sentence", "word") for line in lines)

    def entry(name, text):
        return report.Entry(
            "quick", 0, 1, name, "float32", 1, 1.0, translations=text
        )

    entries = [entry("a", lines), entry("b", worse), entry("c", lines)]
    metric = report.sacrebleu.metrics.BLEU(references=[list(lines)])
    found = report.paired_test(entries, metric)
    assert found[entries[0]].score == pytest.approx(100)
    assert found[entries[1]].p_value < 0.05
    assert found[entries[2]].p_value > 0.5


# A machine without TensorFlow, and without what reads and judges text.
WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("tensorflow", "tensorflow_text", "sentencepiece",
                   "sacrebleu"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from benchmarks.translation.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_rows_files_and_report(tmp_path, capsys):
    work = ["--work-dir", str(tmp_path / "work")]
    quick = [*work, "--task", "quick"]
    chosen = ["--sizes", "1", "8", "--losses", "logits", "--methods"]
    chosen += [grid.CONTROL, grid.OURS, "GroupReduce"]
    command.main(["prepare", *quick])
    # The teacher and one row on JAX alone, the others here.
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, "run"]
        + [*quick, *chosen[:-2], grid.CONTROL],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        cwd=Path(__file__).parents[1],
        check=True,
    )
    command.main(["run", *quick, *chosen])
    capsys.readouterr()
    command.main(["run", *quick, *chosen])  # all is there
    assert capsys.readouterr().out == ""
    command.main(["files", *quick, *chosen, "--rounds", "1"])
    output = tmp_path / "report"
    command.main(["report", *work, "--output", str(output)])
    record = json.loads((output / "results.json").read_text())
    entries = {report.label(e): e for e in record["entries"]}
    wanted = {report.TEACHER, grid.CONTROL, "ours", "GroupReduce"}
    assert wanted | {f"{n}, int8" for n in ("ours", "GroupReduce")} <= set(
        entries
    )
    for entry in entries.values():
        assert 0 <= entry["bleu"] <= 100
        assert entry["ratio"] >= 0.97
    assert entries["ours"]["ratio"] >= 8
    assert entries["ours, int8"]["ratio"] > 25
    assert entries["ours, int8"]["file_bytes"] < entries["ours"]["file_bytes"]
    assert entries["ours"]["ms"] > 0
    rivals_met = {d["rival"] for d in record["duels"]["quick, seed 0"]}
    assert {"GroupReduce", "GroupReduce, int8"} <= rivals_met
    control = entries[grid.CONTROL]["environment"]
    assert control.endswith("Keras on jax")
    text = (output / "report.md").read_text()
    assert all(f"| {name} |" in text for name in entries)
    assert (output / "quick_bytes.png").read_bytes().startswith(b"\x89PNG")
    # What another machine had done stays in the report.
    other = {**record["entries"][0], "seed": 7}
    record["entries"].append(other)
    (output / "results.json").write_text(json.dumps(record))
    command.main(["report", *work, "--output", str(output)])
    record = json.loads((output / "results.json").read_text())
    assert other in record["entries"]


def test_a_row_in_another_process_is_left_to_it(tmp_path):
    path = tmp_path / "row.lock"
    with rows._claimed(path) as first, rows._claimed(path) as second:
        assert (first, second) == (True, False)
    with rows._claimed(path) as again:
        assert again


def test_task_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare --task quick"):
        tasks.Task("quick", tmp_path)


def test_keras_layers_are_found_by_name():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="token_embedding")]
    )
    assert rows.table_of(model).units == 2
