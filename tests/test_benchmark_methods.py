"""The methods of the benchmarks: each is what it is called."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import methods
from benchmarks.figures import factorization
from benchmarks.methods import METHODS
from benchmarks.methods import Table
from benchmarks.methods import product_quantization
from benchmarks.methods import residual_quantization
from benchmarks.methods import storage
from benchmarks.methods import tensor_train
from benchmarks.methods.base import Approximation
from benchmarks.methods.rival import ArrayTable
from benchmarks.tasks.students import evaluate_stored
from examples.nmt.model import build_transformer
from keras_distilled_embedding.factorization import learned
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import round_to_int8

RIVALS = ("GroupReduce", "Tensor-Train", "product quantization")
CODED = ("residual quantization", "CARVQ")


def make_table(rows=600, columns=24, with_states=False):
    random = np.random.default_rng(0)
    basis = random.normal(size=(columns, columns))
    basis *= np.arange(1, columns + 1)[:, np.newaxis] ** -0.5
    moment = np.diag(np.geomspace(1, 0.01, columns)) if with_states else None
    return Table(
        (random.normal(size=(rows, columns)) @ basis).astype("float32"),
        (10_000 / np.arange(1, rows + 1) ** 1.2).astype(int),
        moment,
    )


@pytest.fixture
def few_epochs(monkeypatch):
    """What is learned is then worse, and takes a tenth of the time."""
    monkeypatch.setattr(learned, "EPOCHS", 6)


def lost(made, table, weights=None):
    weights = np.ones(len(table.values)) if weights is None else weights
    energy = weights @ np.square(table.values).sum(axis=1)
    return weights @ np.square(made.values - table.values).sum(axis=1) / energy


class ToyTask:
    """A translation model with a table of 400 x 64, untrained."""

    def __init__(self):
        self.model = build_transformer(
            400, 8, d_model=64, num_layers=1, num_heads=2, feed_forward_dim=16
        )
        layer = self.model.get_layer("token_embedding")
        self.table = Table(
            np.array(layer.embeddings), np.arange(400, 0, -1), np.eye(64)
        )
        self.vocabulary_size = 400

    def teacher(self, dropout=0.0):
        return self.model

    def with_table(self, embedding, dropout=0.0):
        return build_transformer(
            400,
            8,
            d_model=64,
            num_layers=1,
            num_heads=2,
            feed_forward_dim=16,
            embedding=embedding,
        )


# All methods


def test_there_are_ours_and_rivals():
    assert {*RIVALS, *CODED, "ours", "truncated SVD"} <= METHODS.keys()
    assert {"round to nearest, int8", "full table, int4"} <= METHODS.keys()
    assert [METHODS[name].name for name in METHODS] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_within_their_bytes_and_gain_by_more(
    name, few_epochs, monkeypatch
):
    monkeypatch.setattr(residual_quantization, "EPOCHS", 3)
    # int4 comes in blocks of 32 columns.
    columns = 96 if name in ("ours, int4", "ours, auto") else 24
    table = make_table(9_000, columns, with_states=True)
    errors = []
    for ratio in (8, 4, 2):
        budget = table.values.nbytes // ratio
        made = METHODS[name].approximate(table, budget)
        if METHODS[name].fixed_size:
            made = METHODS[name].approximate(table, table.values.nbytes)
            shrinks = 1 if name.endswith("float32") else 3
            assert made.num_bytes <= table.values.nbytes / shrinks
            return
        assert made.values.shape == table.values.shape
        assert made.num_bytes <= budget
        at_its_end = made.details.get("rank") == columns
        assert made.num_bytes > 0.5 * budget or at_its_end
        weighted = "weighted" in name or name == "GroupReduce"
        weights = table.weights if weighted else None
        if "columns" in name:
            root = np.sqrt(table.second_moment)
            made = Approximation(made.values @ root, 0)
            states = Table(table.values @ root, table.counts)
            errors.append(lost(made, states, weights))
        else:
            errors.append(lost(made, table, weights))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if not METHODS[name].fixed_size]
)
def test_methods_say_when_a_budget_is_too_small(name):
    table = make_table(with_states=True)
    assert METHODS[name].approximate(table, 300) is None


def test_columns_are_weighed_where_the_states_are_known():
    method = METHODS["ours, rows and columns weighted"]
    assert method.approximate(make_table(), 10**5) is None


def test_a_name_stands_for_one_method():
    with pytest.raises(ValueError, match="already registered: 'ours'"):
        methods.Rival("ours", None, None)


# The package's own


@pytest.mark.parametrize("name", ["ours", "ours, no activation"])
def test_ours_is_the_affine_optimum(name):
    table = make_table()
    row = factorization.measure_error("quick", table, name, 4.0)
    rank = row["details"]["rank"]
    values = table.values.astype("float64")
    singular = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    best = np.square(singular[rank:]).sum() / np.square(values).sum()
    assert row["affine"] == pytest.approx(best, rel=1e-9)
    assert row["error"] == pytest.approx(best, rel=1e-5)
    assert row["error"] < row["svd"]


def test_truncated_svd_is_the_optimum_of_its_rank():
    table = make_table()
    budget = 4 * 8 * (600 + 24)
    made = METHODS["truncated SVD"].approximate(table, budget)
    left, singular, right = np.linalg.svd(table.values, full_matrices=False)
    np.testing.assert_allclose(
        made.values, left[:, :8] * singular[:8] @ right[:8], atol=1e-4
    )
    assert made.num_bytes == budget
    assert made.details["rank"] == 8


def test_auto_is_the_best_of_all_formats():
    table = make_table()
    budget = table.values.nbytes // 8
    names = ["ours", *(f"ours, {name}" for name in QUANTIZATIONS)]
    made = [METHODS[name].approximate(table, budget) for name in names]
    best = METHODS["ours, auto"].approximate(table, budget)
    assert lost(best, table) == min(lost(m, table) for m in made if m)


# Rivals


def test_group_reduce_beats_one_svd_where_frequencies_matter():
    table = make_table()
    budget = table.values.nbytes // 4
    ours, theirs = (
        lost(METHODS[name].approximate(table, budget), table, table.weights)
        for name in ("GroupReduce", "truncated SVD")
    )
    assert ours < 0.7 * theirs


def test_tensor_train_is_exact_at_full_rank():
    table = make_table(rows=60)
    assert np.prod(tensor_train._dims((60, 24))[::2]) >= 60
    made = METHODS["Tensor-Train"].approximate(table, 10**7)
    np.testing.assert_allclose(made.values, table.values, atol=1e-4)


def nearest(values, bits):
    """In NumPy: levels of a scale a row around the columns' means."""
    centered = values - values.mean(axis=0)
    step = {4: 0.3352, 2: 0.9957}[bits]
    scales = step * np.sqrt(np.square(centered).mean(axis=1, keepdims=True))
    if bits == 4:  # of two bytes
        scales = np.array(ops.cast(ops.cast(scales, "bfloat16"), "float32"))
    shift = 0.5 if bits == 2 else 0.0
    half = 2 ** (bits - 1)
    levels = np.clip(np.round(centered / scales - shift), -half, half - 1)
    return (levels + shift) * scales + values.mean(axis=0)


@pytest.mark.parametrize(("bits", "row_bytes"), [(8, 96), (4, 50), (2, 37)])
def test_full_tables_are_rounded_as_they_are_stored(bits, row_bytes):
    table = make_table(columns=96)
    made = METHODS[f"round to nearest, int{bits}"].approximate(table, 0)
    if bits == 8:
        integers, scale = round_to_int8(table.values)
        expected, others = integers * scale, 4
    else:
        expected, others = nearest(table.values, bits), 4 * 96
        # A number in the middle of two levels may fall to either.
        differ = np.abs(made.values - expected) > 1e-5
        assert differ.mean() < 1e-3
        expected = np.where(differ, made.values, expected)
    np.testing.assert_allclose(made.values, expected, atol=1e-5)
    assert made.num_bytes == 600 * row_bytes + others


def test_full_tables_lose_less_in_coordinates_that_suit_rounding():
    table = make_table(3_000, columns=96)
    for name in ("int4", "int2"):
        plain, ours = (
            METHODS[f"{kind}, {name}"].approximate(table, table.values.nbytes)
            for kind in ("round to nearest", "full table")
        )
        assert ours.details["rank"] == 96
        assert ours.num_bytes < 1.2 * plain.num_bytes
        assert lost(ours, table) < 0.9 * lost(plain, table)


@pytest.mark.parametrize("rows", [400, 401])
def test_codes_of_residual_quantization_stand_for_sums_of_entries(rows):
    table = make_table(rows, columns=20)  # the last group is half zeros
    rival = METHODS["residual quantization"]
    arrays = rival.fit(table.values, None, table.values.nbytes // 4)
    groups, books = arrays["groups"], arrays["codebooks"].astype("float32")
    assert set(groups) == {0, 1, 2}
    assert books.shape == (len(groups), 16, 8)
    left = np.zeros((rows, 24), "float32")
    left[:, :20] = table.values
    losses = [np.square(left).sum()]
    for packed, group, book in zip(arrays["codes"], groups, books):
        codes = np.stack([packed % 16, packed // 16], axis=1).reshape(-1)
        of_group = left[:, 8 * group : 8 * group + 8]
        # The nearest entry, of the group that had lost most.
        distances = np.square(of_group[:, np.newaxis] - book).sum(axis=2)
        chosen = distances[np.arange(rows), codes[:rows]]
        np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-4)
        energies = np.square(left).reshape(rows, 3, 8).sum(axis=(0, 2))
        assert energies[group] == pytest.approx(energies.max())
        of_group -= book[codes[:rows]]
        losses.append(np.square(left).sum())
    assert losses == sorted(losses, reverse=True)
    made = rival.approximate(table, table.values.nbytes // 4)
    np.testing.assert_allclose(
        made.values, table.values - left[:, :20], atol=1e-4
    )
    # Half a byte a code, two an entry's number, two that name the group.
    code_bytes = len(groups) * -(-rows // 2)
    assert made.num_bytes == code_bytes + 2 * books.size + 2 * len(groups)


def test_the_adaptor_corrects_what_the_codes_have_lost(monkeypatch):
    monkeypatch.setattr(residual_quantization, "BATCH", 100)
    random = np.random.default_rng(0)
    # Rows that one number each tells, and too few bytes for codes of all
    # twelve groups of columns.
    line = random.normal(size=(2_000, 1)) @ random.normal(size=(1, 96))
    table = Table(line.astype("float32"), np.ones(2_000))
    budget = 10 * (1_000 + 256 + 2)
    alone, corrected = (
        METHODS[name].approximate(table, budget) for name in CODED
    )
    assert alone.num_bytes == budget
    assert corrected.num_bytes <= budget
    assert corrected.details["tokens"] == [2_000, 1]
    assert lost(corrected, table) < 0.5 * lost(alone, table)
    arrays = METHODS["CARVQ"].fit(table.values, None, budget)
    names = {array.dtype.name for array in arrays.values()}
    assert names == {"float16", "uint8", "uint16"}


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_are_layers_that_start_from_the_approximation(name, monkeypatch):
    monkeypatch.setattr(product_quantization, "NUM_CENTROIDS", 8)
    table = make_table(rows=210)
    budget = table.values.nbytes // 4
    made = METHODS[name].approximate(table, budget)
    layer = METHODS[name].layer(table, budget)
    ids = np.array([[0, 3], [209, 7]])
    np.testing.assert_allclose(layer(ids), made.values[ids], atol=1e-5)
    hidden = np.random.default_rng(1).normal(size=(2, 5, 24)).astype("float32")
    np.testing.assert_allclose(
        layer(hidden, reverse=True), hidden @ made.values.T, atol=1e-4
    )
    # Floats are trained, integers stay.
    entries = sum(int(np.prod(w.shape)) for w in layer.trainable_weights)
    integers = sum(
        array.nbytes
        for array in layer.arrays.values()
        if np.issubdtype(array.dtype, np.integer)
    )
    assert made.num_bytes == layer.num_bytes() == 4 * entries + integers
    assert layer.num_bytes("int8") < layer.num_bytes() / 3 + integers


def test_rivals_learn():
    table = make_table(rows=210)
    layer = METHODS["GroupReduce"].layer(table, table.values.nbytes // 4)
    ids = keras.Input((3,), dtype="int32")
    model = keras.Model(ids, layer(layer(ids), reverse=True))
    assert model.output_shape == (None, 3, 210)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    x = np.arange(210).reshape(-1, 3)
    history = model.fit(x, (x + 1) % 210, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_rounded_rivals_compute_with_what_a_file_holds():
    table = make_table()
    layer = METHODS["GroupReduce"].layer(table, table.values.nbytes // 4)
    floats = ops.convert_to_numpy(layer.embeddings)
    storage.store_as(layer, "int8")
    groups = layer.arrays["groups"]
    expected = np.zeros_like(floats)
    for group in range(groups.max() + 1):
        codes, basis = (
            np.multiply(*round_to_int8(layer.arrays[f"{n}_{group}"]))
            for n in ("codes", "basis")
        )
        expected[groups == group] = codes @ basis
    np.testing.assert_allclose(layer.embeddings, expected, atol=1e-4)
    assert np.abs(expected - floats).max() > 1e-3


# Adding one

README = Path(methods.__file__).parents[1] / "README.md"


def test_ten_lines_add_a_rival():
    (code,) = re.findall("```python\n(.*?)```", README.read_text("utf-8"), re.S)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len([line for line in lines if "import" not in line]) <= 11
    try:
        exec(code, {})
        table = make_table()
        budget = table.values.nbytes // 4
        row = factorization.measure_error("quick", table, "frequent rows", 4.0)
        assert 0.9 * budget < row["num_bytes"] <= budget
        assert row["weighted_error"] < 0.3 < row["error"] < 1
        task = ToyTask()
        student = METHODS["frequent rows"].student(task, 4 * 400 * 64 // 4)
        layer = storage.table_layer(student)
        assert [w.name for w in layer.trainable_weights] == ["rows"]
        assert METHODS["frequent rows"].student(task, 1_000) is None
    finally:
        del METHODS["frequent rows"]


# Students


@pytest.mark.parametrize(
    "name", ["ours", "ours, rows weighted", "the paper's recipe", "GroupReduce"]
)
def test_a_student_has_the_table_of_its_method(name, few_epochs):
    task = ToyTask()
    budget = task.table.values.nbytes // 8
    student = METHODS[name].student(task, budget)
    layer = storage.table_layer(student)
    made = METHODS[name].approximate(task.table, budget)
    np.testing.assert_allclose(layer.embeddings, made.values, atol=1e-5)
    assert storage.table_bytes(layer) == made.num_bytes <= budget


def test_students_are_trained_as_they_are_stored():
    task = ToyTask()
    bytes_of_full = task.table.values.nbytes
    student = METHODS["ours, int4"].student(task, bytes_of_full // 8)
    layer = storage.table_layer(student)
    # With 400 rows, scales of columns leave room for the larger rank.
    form = layer.quantization, layer.row_scales, layer.rank
    assert form == ("int4", False, 46)
    assert storage.table_bytes(layer, "int4") <= bytes_of_full // 8
    assert METHODS["ours, int4"].student(task, bytes_of_full // 200) is None
    full = METHODS["full table, int4"].student(task, bytes_of_full)
    layer = storage.table_layer(full)
    assert (layer.quantization, layer.rank) == ("int4", 64)
    assert storage.table_bytes(layer, "int4") == 400 * 34 + 64 * 64 + 4 * 64
    made = METHODS["full table, int4"].approximate(task.table, bytes_of_full)
    np.testing.assert_allclose(layer.embeddings, made.values, atol=1e-5)


def test_calibrated_students_keep_the_logits_of_what_is_read():
    task = ToyTask()
    random = np.random.default_rng(0)
    # Of few tokens: few directions of hidden states.
    batch = {
        side: random.integers(3, 20, size=(64, 8)).astype("int32")
        for side in ("source", "target")
    }
    task.calibration_data = [batch]
    logits = task.model.predict(batch, verbose=0)
    lost = {}
    for name in ("ours, int4", "ours, int4, calibrated"):
        student = METHODS[name].student(task, task.table.values.nbytes // 12)
        found = student.predict(batch, verbose=0)
        lost[name] = np.square(found - logits).sum() / np.square(logits).sum()
    assert lost["ours, int4, calibrated"] < 0.5 * lost["ours, int4"]


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("Tensor-Train", ["float32", "int8"]),
        # Nothing of it is a float of more than 16 bits.
        ("residual quantization", ["float32"]),
        ("ours, int4", ["int4"]),
    ],
)
def test_students_are_evaluated_once_in_each_form(name, forms):
    task = ToyTask()
    evaluated = []
    task.evaluate = lambda model: evaluated.append(model) or {"found": 1}
    student = METHODS[name].student(task, task.table.values.nbytes // 4)
    stored = evaluate_stored(task, student)
    assert list(stored) == forms
    assert evaluated == [student] * len(forms)
    sizes = [form["table_bytes"] for form in stored.values()]
    assert sizes == sorted({*sizes}, reverse=True)


def test_tables_are_stored_in_int8():
    dense = keras.layers.ReversibleEmbedding(500, 32, name="token_embedding")
    dense.build()
    factors = DistilledEmbedding(500, 32, 4, name="token_embedding")
    factors.build()
    assert storage.table_bytes(dense) == 4 * 500 * 32
    assert storage.table_bytes(dense, "int8") == 500 * 32 + 4
    entries = 4 * (500 + 32)
    # A scale, and the offset.
    assert storage.table_bytes(factors) == 4 * (entries + 32)
    assert storage.table_bytes(factors, "int8") == entries + 4 * (1 + 32)
    for layer in (dense, factors):
        before = np.array(layer.embeddings)
        storage.store_as(layer, "int8")
        after = np.array(layer.embeddings)
        difference = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert 0 < difference < 0.02
    for column in np.array(factors.basis).T:
        steps = column / np.abs(column).max() * 127
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_the_table_is_found_by_its_name():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="token_embedding")]
    )
    assert storage.table_layer(model).units == 2
    assert isinstance(
        METHODS["round to nearest, int8"].layer(make_table(), 0), ArrayTable
    )
