"""Factorisation against dense NumPy references."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding.factorization import Factorization
from keras_distilled_embedding.factorization import exact
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import factors as factors_module
from keras_distilled_embedding.factorization import learned
from keras_distilled_embedding.factorization import table as table_module
from keras_distilled_embedding.factorization import training
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.training import RowBatches

# Energy that float32 factors lose by rounding, whatever their rank.
ROUNDING = 1e-12


def random_table(num_rows=60, num_columns=12, seed=0):
    return np.random.default_rng(seed).normal(size=(num_rows, num_columns))


def easy_table(num_rows=300, num_columns=16, rank=4, seed=0):
    """A table of low rank, with a little noise."""
    random = np.random.default_rng(seed)
    codes = random.normal(size=(num_rows, rank))
    table = codes @ random.normal(size=(rank, num_columns))
    return 0.05 * (table + 0.1 * random.normal(size=table.shape))


def decaying_table(span, num_rows=200, num_columns=24, seed=0):
    """A table whose singular values fall from 1 to 1 / span."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.normal(size=(num_rows, num_columns)))[0]
    right = np.linalg.qr(random.normal(size=(num_columns, num_columns)))[0]
    return left * np.geomspace(1, 1 / span, num_columns) @ right


def random_weights(num_rows, seed=1):
    return np.random.default_rng(seed).uniform(size=num_rows) ** 3


def svd_error(table, rank, weights=None):
    """Eckart-Young: the least share of energy lost at this rank."""
    weights = np.ones(len(table)) if weights is None else weights
    scaled = np.sqrt(weights)[:, None] * np.asarray(table, "float64")
    energies = np.linalg.svd(scaled, compute_uv=False) ** 2
    total = energies.sum()
    return energies[rank:].sum() / total if total else 0.0


def dense_error(table, reconstruction, weights=None):
    weights = np.ones(len(table)) if weights is None else weights
    table = np.asarray(table, "float64")
    lost = weights @ np.square(table - reconstruction).sum(axis=1)
    return lost / (weights @ np.square(table).sum(axis=1))


# Properties draw a table of every kind that has ever been a special case.
@st.composite
def tables(draw):
    num_rows = draw(st.integers(1, 24))
    num_columns = draw(st.integers(1, 16))
    table = random_table(num_rows, num_columns, draw(st.integers(0, 99)))
    kind = draw(
        st.sampled_from(
            ["dense", "duplicated", "zero rows", "constant", "low rank", "zero"]
        )
    )
    if kind == "duplicated":
        table[num_rows // 2 :] = table[0]
    elif kind == "zero rows":
        table[:: draw(st.integers(1, 3))] = 0
    elif kind == "constant":
        table[:] = 1
    elif kind == "low rank":
        table = np.outer(table[:, 0], table[0])
    elif kind == "zero":
        table[:] = 0
    return table * 10.0 ** draw(st.sampled_from([-20, -3, 0, 3, 15]))


# Exact, without an activation.


@pytest.mark.parametrize("activation", [None, "linear"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(60, 12), (12, 12), (8, 20), (1, 9)])
def test_linear_is_truncated_svd(activation, weighted, shape):
    table = random_table(*shape)
    weights = random_weights(len(table)) if weighted else None
    for rank in {1, min(shape) // 2 or 1, min(shape)}:
        result = factorize(
            table, rank, activation=activation, row_weights=weights
        )
        expected = svd_error(table, rank, weights)
        assert result.relative_error == pytest.approx(
            expected, rel=1e-6, abs=ROUNDING
        )


def test_linear_rows_of_weight_zero_are_projected():
    table = random_table()
    weights = random_weights(len(table))
    weights[:7] = 0
    result = factorize(table, 4, activation=None, row_weights=weights)
    scaled = np.sqrt(weights)[:, None] * table
    directions = np.linalg.svd(scaled, full_matrices=False)[2][:4].T
    np.testing.assert_allclose(
        result.reconstruct(), table @ directions @ directions.T, atol=1e-5
    )


@pytest.mark.parametrize("rank", [4, 12, 20])
def test_linear_keeps_small_singular_values(rank):
    table = decaying_table(span=1e6)
    result = factorize(table, rank, activation=None)
    assert result.relative_error == pytest.approx(
        svd_error(table, rank), rel=0.01
    )


# Exact, ReLU.


@settings(deadline=None, max_examples=100)
@given(tables(), st.data())
def test_relu_error_lies_between_neighbouring_svds(table, data):
    rank = data.draw(st.integers(1, min(table.shape) + 1))
    weighted = data.draw(st.booleans())
    weights = random_weights(len(table)) if weighted else None
    result = factorize(table, rank, row_weights=weights)
    above = svd_error(table, rank - 1, weights) * 1.001 + ROUNDING
    below = svd_error(table, rank, weights) * (1 - 1e-6) - ROUNDING
    assert below <= result.relative_error <= above


@settings(deadline=None, max_examples=50)
@given(tables(), st.data())
def test_relu_leaves_no_code_dead(table, data):
    rank = data.draw(st.integers(1, min(table.shape) + 1))
    codes = factorize(table, rank).codes
    assert (codes > 0).all()
    # Far enough above 0 for the steps of an optimiser, even in rows of zeros.
    scale = np.sqrt(np.square(codes).mean())
    assert codes.min() > 5e-4 * scale


@settings(deadline=None, max_examples=30)
@given(tables(), st.data())
def test_factors_are_balanced_and_finite(table, data):
    rank = data.draw(st.integers(1, min(table.shape)))
    activation = data.draw(st.sampled_from([None, "relu"]))
    result = factorize(table, rank, activation=activation)
    assert np.isfinite(result.codes).all()
    assert np.isfinite(result.basis).all()
    scales = [
        np.sqrt(np.square(factor, dtype="float64").mean())
        for factor in (result.codes, result.basis)
    ]
    if table.any():
        assert scales[0] == pytest.approx(scales[1], rel=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 6, 13])
def test_sweeps_only_lower_the_error(weighted, rank):
    table = random_table()
    weights = random_weights(len(table)) if weighted else None
    errors = []
    for sweeps in (0, 1, 2, 5, 10):
        result = factorize(table, rank, row_weights=weights, sweeps=sweeps)
        errors.append(result.relative_error)
    assert all(b <= a + ROUNDING for a, b in itertools.pairwise(errors))
    if 1 < rank < 13:
        assert errors[-1] < 0.999 * errors[0]


def test_a_sweep_that_raises_the_error_is_dropped(monkeypatch):
    monkeypatch.setattr(exact, "_sweep", lambda table, start, basis: 0 * basis)
    table = random_table()
    result = factorize(table, 6)
    assert result.relative_error == pytest.approx(svd_error(table, 5))


@pytest.mark.parametrize("rank", [2, 3, 5, 16])
def test_simplex_vertices(rank):
    vertices = exact._simplex_vertices(rank)
    assert vertices.shape == (rank, rank - 1)
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), 1)
    np.testing.assert_allclose(vertices.sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(
        vertices.T @ vertices,
        rank / (rank - 1) * np.eye(rank - 1),
        atol=1e-12,
    )


def test_relu_of_rank_one_takes_the_side_with_more_energy():
    column = np.array([[3.0], [4.0], [-1.0]])
    for sign in (-1, 1):
        result = factorize(sign * column @ [[1.0, 2.0]], 1, sweeps=0)
        assert result.relative_error == pytest.approx(1 / 26, rel=0.12)


def test_zero_table():
    for activation in (None, "relu"):
        result = factorize(np.zeros((5, 3)), 2, activation=activation)
        assert result.relative_error == 0
        np.testing.assert_allclose(result.reconstruct(), 0, atol=1e-6)


# The result.


@pytest.mark.parametrize("activation", [None, "relu"])
def test_result_describes_its_factors(activation):
    table = random_table(60, 12)
    weights = random_weights(60)
    result = factorize(table, 5, activation=activation, row_weights=weights)
    assert result.codes.shape == (60, 5)
    assert result.basis.shape == (5, 12)
    assert result.codes.dtype == result.basis.dtype == np.float32
    assert result.activation == activation
    assert result.rank == 5
    assert result.num_parameters == 60 * 5 + 5 * 12
    assert result.compression_ratio == 60 * 12 / (5 * (60 + 12))
    assert result.hidden_kernel is None
    assert result.hidden_bias is None
    assert result.hidden_basis is None
    codes = result.codes if activation is None else np.maximum(result.codes, 0)
    reconstruction = result.reconstruct()
    assert reconstruction.dtype == np.float32
    np.testing.assert_allclose(
        reconstruction, codes @ result.basis, rtol=1e-5, atol=1e-6
    )
    assert result.relative_error == pytest.approx(
        dense_error(table, reconstruction, weights), rel=1e-5
    )
    assert "codes=(60, 5)" in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.codes = None


def test_reconstruct_applies_the_activation():
    codes = np.float32([[-1, 2], [3, -4]])
    basis = np.eye(2, dtype="float32")
    result = Factorization(codes, basis, "relu", 0.0)
    np.testing.assert_array_equal(result.reconstruct(), [[0, 2], [3, 0]])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("table_scale", "weights_scale"),
    [(1e10, 1e9), (1e-10, 1.0), (1.0, 1e200), (1.0, 1e-200)],
)
def test_only_proportions_of_weights_and_scale_of_table_matter(
    activation, rank, table_scale, weights_scale
):
    table, weights = random_table(), random_weights(60)
    table[3] = 0.0
    plain = factorize(table, rank, activation=activation, row_weights=weights)
    scaled = factorize(
        table_scale * table,
        rank,
        activation=activation,
        row_weights=weights_scale * weights,
    )
    np.testing.assert_allclose(
        scaled.reconstruct() / table_scale, plain.reconstruct(), atol=1e-4
    )


def test_counts_weigh_like_repeated_rows():
    table = random_table(10, 6)
    counts = np.array([1, 2, 3, 0, 1, 4, 1, 1, 2, 1])
    weighted = factorize(table, 3, activation=None, row_weights=counts)
    repeated = factorize(np.repeat(table, counts, axis=0), 3, activation=None)
    assert weighted.relative_error == pytest.approx(repeated.relative_error)


# Learned.


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(learned, "MAX_EPOCHS", 3)
    monkeypatch.setattr(learned, "STEPS_PER_EPOCH", 10)


@pytest.mark.parametrize("activation", ["relu", None, "tanh"])
def test_learned_comes_near_the_svd(activation):
    table = 100 * easy_table()
    result = factorize(
        table, 6, activation=activation, method="learned", seed=2**40
    )
    best = svd_error(table, 6)
    assert best < result.relative_error < 1.5 * best
    assert result.relative_error == pytest.approx(
        dense_error(table, result.reconstruct()), rel=1e-3
    )


def test_learned_weighs_rows(monkeypatch):
    monkeypatch.setattr(learned, "MAX_EPOCHS", 8)
    table = random_table(200, 16)
    weights = np.where(np.arange(200) < 20, 1.0, 1e-3)
    weighted = factorize(table, 6, method="learned", row_weights=weights)
    plain = factorize(table, 6, method="learned")
    assert weighted.relative_error < 0.9 * dense_error(
        table, plain.reconstruct(), weights
    )


def test_learned_is_determined_by_its_seed(short_training):
    table = easy_table()
    keras.utils.set_random_seed(1)
    first = factorize(table, 6, method="learned", seed=3)
    keras.utils.set_random_seed(2)
    second = factorize(table, 6, method="learned", seed=3)
    other = factorize(table, 6, method="learned", seed=4)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.basis, second.basis)
    assert not np.array_equal(first.codes, other.codes)


def test_learned_ignores_the_global_dtype_policy(short_training):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        low = factorize(easy_table(), 6, method="learned")
    finally:
        keras.config.set_dtype_policy("float32")
    full = factorize(easy_table(), 6, method="learned")
    np.testing.assert_array_equal(low.codes, full.codes)


def test_learned_relu_leaves_no_code_dead(short_training):
    codes = factorize(random_table(), 1, method="learned").codes
    assert (codes > 0).all()


def shifted_relu(codes):
    return keras.ops.relu(codes - 1.0)


def test_learned_revives_rows_that_are_dead_from_the_start(short_training):
    # Codes of rank 1 below 1, five of six at the start, have no gradient.
    result = factorize(
        easy_table(), 1, activation=shifted_relu, method="learned"
    )
    assert (result.codes > 1).all()
    assert result.activation is shifted_relu


def test_planted_dead_rows_take_the_live_codes_that_fit_best():
    codes = np.float32([[1, 0], [-1, -2], [0, 2], [-3, 0]])
    # The last is nearer to the shorter row, at a larger angle.
    table = np.array([[1.0, 0], [0.1, 1], [0, 2], [0.5, 0.9]])
    revived = learned._revive_dead_rows(
        table,
        codes,
        np.eye(2, dtype="float32"),
        keras.activations.relu,
        np.random.default_rng(0),
    )
    np.testing.assert_array_equal(revived, codes[[0, 2, 2, 0]])
    assert codes[1, 0] == -1  # The given codes are untouched.


def test_nothing_is_revived_where_all_rows_are_alike():
    for codes in (np.ones((3, 2), "float32"), -np.ones((3, 2), "float32")):
        revived = learned._revive_dead_rows(
            np.ones((3, 4)),
            codes,
            np.ones((2, 4), "float32"),
            keras.activations.relu,
            np.random.default_rng(0),
        )
        np.testing.assert_array_equal(revived, codes)


def test_plateau_keeps_the_best_weights_and_stops():
    model = keras.Sequential(
        [
            keras.Input((), dtype="int32"),
            keras.layers.Embedding(3, 2),
            keras.layers.Dense(2, use_bias=False),
        ]
    )
    model.compile("adam", "mse")
    callback = learned._ReduceOnPlateau(lambda codes, basis: codes + 1)
    callback.set_model(model)
    callback.on_train_begin()
    model.stop_training = False
    for epoch, loss in enumerate([0.5, 0.1, float("nan"), 0.2]):
        filled = [np.full(w.shape, epoch, "float32") for w in model.weights]
        model.set_weights(filled)
        callback.on_epoch_end(epoch, {"loss": loss})
    codes, basis = model.get_weights()
    assert (codes == 2).all()
    assert (basis == 1).all()
    learning_rate = float(model.optimizer.learning_rate)
    assert learning_rate < learned.LEARNING_RATE
    epochs = 0
    while not model.stop_training:
        callback.on_epoch_end(epochs, {"loss": 0.0999})
        epochs += 1
    assert epochs == learned.PATIENCE * learned.MAX_CUTS
    callback.on_train_end()


def test_large_factors_are_balanced_in_place():
    codes, basis = random_table(60, 4), random_table(4, 12)
    codes = codes.astype("float32")
    product = codes @ basis
    balanced, scaled = exact.balance(codes, basis)
    assert balanced is codes  # a copy would be as large as the codes
    np.testing.assert_allclose(balanced @ scaled, product, rtol=1e-4)


def test_batches_have_one_shape_and_visit_every_row():
    table, weights = random_table(30, 3), random_weights(30)
    random = np.random.default_rng(0)
    batches = RowBatches(Table.of(table, weights), 7, 2, random)
    assert len(batches) == 5
    orders = []
    for _ in range(2):
        ids, rows, row_weights = zip(*(batches[i] for i in range(5)))
        assert {len(x) for x in ids} == {7}
        ids = np.concatenate(ids)
        assert set(ids) == set(range(30))
        np.testing.assert_allclose(
            np.concatenate(rows) * batches.scale, table[ids], rtol=1e-5
        )
        np.testing.assert_allclose(
            np.concatenate(row_weights),
            weights[ids] / weights.mean(),
            rtol=1e-5,
        )
        orders.append(ids)
        batches.on_epoch_end()
    assert not np.array_equal(*orders)


# Inputs.


@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"]
)
@pytest.mark.parametrize("method", ["exact", "learned"])
def test_float_dtypes(short_training, dtype, method):
    table = random_table().astype(dtype)
    result = factorize(table, 4, method=method)
    expected = factorize(table.astype("float64"), 4, method=method)
    assert result.codes.dtype == np.float32
    assert result.relative_error == pytest.approx(
        expected.relative_error, rel=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_variables_and_lists(dtype):
    table = keras.ops.cast(random_table(), dtype)
    expected = factorize(np.asarray(table), 4).codes
    variable = keras.Variable(table, dtype=dtype)
    for tensor in (table, variable):
        np.testing.assert_array_equal(factorize(tensor, 4).codes, expected)
    assert factorize([[1.0, 2.0], [3.0, 5.0]], 2).codes.shape == (2, 2)
    ones = keras.ops.ones(60)
    # Another product in BLAS: equal but for the order of its sums.
    np.testing.assert_allclose(
        factorize(table, 4, row_weights=ones).codes, expected, rtol=1e-3
    )


@pytest.mark.parametrize("method", ["exact", "learned"])
def test_memory_map_is_read_in_chunks(
    monkeypatch, tmp_path, short_training, method
):
    table = random_table().astype("float32")
    np.save(tmp_path / "table.npy", table)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    expected = factorize(table, 4, method=method)
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 12 * 7)
    sizes = [len(block) for _, block in table_module.row_blocks(mapped)]
    assert sizes == [7] * 8 + [4]
    result = factorize(mapped, 4, method=method)
    np.testing.assert_allclose(
        result.reconstruct(), expected.reconstruct(), atol=1e-4
    )


def resident_bytes(path):
    """Of a mapped file, in this process."""
    resident, in_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:  # the head of a mapping
            in_file = line.endswith(str(path))
        elif in_file and line.startswith("Rss:"):
            resident += 1024 * int(line.split()[1])
    return resident


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_memory_map_does_not_stay_resident(monkeypatch, tmp_path):
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 64 * 100)
    path = tmp_path / "table.npy"
    np.save(path, random_table(20_000, 64).astype("float16"))
    mapped = np.load(path, mmap_mode="r")
    np.add.reduce(mapped[:10_000])
    assert resident_bytes(path) >= mapped.nbytes // 2
    factorize(mapped, 4)
    assert resident_bytes(path) < mapped.nbytes // 20


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_changes_of_a_memory_map_survive(tmp_path, mode):
    """With mode "c" they are in memory alone."""
    path = tmp_path / "table.npy"
    table = random_table()
    np.save(path, table)
    mapped = np.load(path, mmap_mode=mode)
    if mode != "r":
        mapped[3] = table[3] = 7.0
    factorize(mapped[:50], 4)
    np.testing.assert_array_equal(mapped, table)


def test_table_and_weights_are_left_unchanged():
    table, weights = random_table(), random_weights(60)
    copies = table.copy(), weights.copy()
    factorize(table, 4, row_weights=weights)
    np.testing.assert_array_equal(table, copies[0])
    np.testing.assert_array_equal(weights, copies[1])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"table": np.ones((4, 5), "int64")}, "table must .* Received.*int64"),
        ({"table": np.ones((4, 5), "complex64")}, "table must .*complex64"),
        ({"table": np.ones(4)}, r"matrix of shape.*Received: shape \(4,\)"),
        ({"table": np.ones((2, 3, 4))}, r"Received: shape \(2, 3, 4\)"),
        ({"table": np.ones((0, 4))}, r"non-empty.*Received: shape \(0, 4\)"),
        ({"rank": 0}, "`rank` must be a positive integer.*rank=0"),
        ({"rank": 2.0}, "`rank` must be a positive integer.*rank=2.0"),
        ({"rank": True}, "`rank` must be a positive integer.*rank=True"),
        ({"rank": "8"}, "`rank` must be a positive integer.*rank='8'"),
        ({"rank": 14}, "rank must be at most 13 .*rank=14"),
        (
            {"rank": 13, "activation": None},
            "rank must be at most 12 .*rank=13",
        ),
        ({"method": "svd"}, "method must be one of .*exact.*learned.*'svd'"),
        ({"activation": "rleu"}, "activation must be None.*'rleu'"),
        ({"activation": 3}, "activation must be None.*activation=3"),
        ({"activation": "tanh"}, "pass method=\"learned\".*'tanh'"),
        ({"hidden_dim": 0}, "`hidden_dim` must be a positive integer or None"),
        ({"hidden_activation": "gleu"}, "hidden_activation must .*'gleu'"),
        ({"sweeps": -1}, "`sweeps` must be an integer of at least 0"),
        ({"column_weights": np.ones(12)}, r"column_weights .*\(12, 12\)"),
        ({"column_weights": -np.eye(12)}, "positive semidefinite"),
        ({"column_weights": np.zeros((12, 12))}, "not zero"),
        ({"column_weights": np.tri(12)}, "symmetric"),
        ({"column_weights": np.full((12, 12), np.nan)}, "finite"),
        ({"seed": -1}, "`seed` must be an integer of at least 0.*seed=-1"),
        ({"seed": None}, "`seed` must be an integer.*seed=None"),
        ({"row_weights": ["a"] * 60}, "row_weights must be numbers"),
        ({"row_weights": np.ones(3)}, r"row_weights .*\(60,\).*\(3,\)"),
        ({"row_weights": np.ones((60, 1))}, r"row_weights .*\(60, 1\)"),
        ({"row_weights": np.zeros(60)}, "row_weights must have a positive sum"),
        ({"row_weights": -np.ones(60)}, "row_weights .* not negative"),
        ({"row_weights": np.full(60, np.nan)}, "row_weights must be finite"),
        ({"row_weights": np.full(60, np.inf)}, "row_weights must be finite"),
    ],
)
def test_bad_arguments(arguments, match):
    arguments = {"table": random_table(), "rank": 4, **arguments}
    with pytest.raises(ValueError, match=match):
        factorize(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_bad_rows_are_named(monkeypatch, value):
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 12 * 7)
    table = random_table()
    table[[3, 8, 9, 30, 31, 58, 59], 2] = value
    with pytest.raises(ValueError, match=r"7 of its 60 rows.*3, 8, 9, 30, 31$"):
        factorize(table, 4)


@pytest.mark.parametrize("activation", [keras.activations.relu, keras.ops.relu])
def test_relu_callables_are_exact(activation):
    result = factorize(random_table(), 4, activation=activation)
    assert result.activation is activation
    np.testing.assert_array_equal(
        result.codes, factorize(random_table(), 4).codes
    )


def test_linear_callable_is_exact():
    result = factorize(random_table(), 4, activation=keras.activations.linear)
    np.testing.assert_array_equal(
        result.codes, factorize(random_table(), 4, activation=None).codes
    )


# Verbosity.


def test_verbose_prints_one_line(capsys, short_training):
    for method in ("exact", "learned"):
        factorize(random_table(), 4, method=method)
        assert capsys.readouterr().out == ""
        factorize(random_table(), 4, method=method, verbose=1)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert "relative error" in lines[0]


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_bar_on_a_terminal(monkeypatch, short_training, with_rich):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    with training.progress_bar(verbose=1, total=3) as callbacks:
        assert len(callbacks) == with_rich
    factorize(random_table(), 4, method="learned", verbose=1)


def test_import_needs_only_numpy_and_keras():
    code = (
        "import sys, keras; before = set(sys.modules)\n"
        "import keras_distilled_embedding.factorization\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
        "bad = new & {'keras_hub', 'tensorflow_text', 'matplotlib'}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Weights of columns.


def random_moment(num_columns, seed=2):
    random = np.random.default_rng(seed)
    states = random.normal(size=(50, num_columns)) * np.geomspace(
        3, 0.1, num_columns
    )
    return states.T @ states / len(states)


def logits_error(table, reconstruction, weights, moment):
    """Of the logits of states with this second moment, by definition."""
    root = np.linalg.cholesky(moment)
    return dense_error(table @ root, reconstruction @ root, weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_column_weights_give_the_best_logits(weighted, rank):
    table, moment = random_table(), random_moment(12)
    weights = random_weights(60) if weighted else None
    root = np.linalg.cholesky(moment)
    best = svd_error(table @ root, rank, weights)
    linear = factorize(
        table,
        rank,
        activation=None,
        row_weights=weights,
        column_weights=moment,
    )
    assert linear.relative_error == pytest.approx(best, rel=1e-5)
    for result in (
        linear,
        factorize(table, rank, row_weights=weights, column_weights=moment),
    ):
        assert result.relative_error == pytest.approx(
            logits_error(table, result.reconstruct(), weights, moment),
            rel=1e-5,
        )
        assert result.unweighted_error == pytest.approx(
            dense_error(table, result.reconstruct()), rel=1e-5
        )


@pytest.mark.parametrize("rank", [2, 6, 12])
def test_column_weighted_relu_lies_between_neighbouring_svds(rank):
    table, moment = random_table(), random_moment(12)
    weights = random_weights(60)
    root = np.linalg.cholesky(moment)
    for sweeps in (0, 5):
        error = factorize(
            table,
            rank,
            row_weights=weights,
            column_weights=moment,
            sweeps=sweeps,
        ).relative_error
        above = svd_error(table @ root, rank - 1, weights)
        below = svd_error(table @ root, rank, weights)
        assert below * (1 - 1e-5) <= error <= above * 1.001


@pytest.mark.parametrize("directions", [1, 3])
def test_column_weights_that_are_singular(directions):
    moment = np.zeros((12, 12))
    moment[:directions, :directions] = random_moment(directions)
    result = factorize(random_table(), 4, column_weights=moment)
    assert result.relative_error < 1e-5
    np.testing.assert_allclose(
        result.reconstruct()[:, :directions],
        random_table()[:, :directions],
        atol=0.02,
    )


def test_column_weights_may_be_negative_by_rounding():
    """By 1e-4 of the largest, however small the others are."""
    moments = np.full(12, 1e-9)
    moments[3:5] = 1.0, -5e-5
    factorize(random_table(), 4, column_weights=np.diag(moments))
    moments[4] = -2e-4
    with pytest.raises(ValueError, match="positive semidefinite"):
        factorize(random_table(), 4, column_weights=np.diag(moments))


def test_unweighted_error_is_the_plain_one():
    table, weights = random_table(), random_weights(60)
    result = factorize(table, 4, row_weights=weights)
    assert result.unweighted_error == pytest.approx(
        dense_error(table, result.reconstruct()), rel=1e-5
    )
    assert result.unweighted_error > svd_error(table, 4)
    plain = factorize(table, 4)
    assert plain.unweighted_error == plain.relative_error


def test_learned_weighs_columns(monkeypatch):
    monkeypatch.setattr(learned, "MAX_EPOCHS", 8)
    table, moment = random_table(200, 12), random_moment(12)
    errors = [
        logits_error(
            table,
            factorize(
                table, 4, method="learned", column_weights=given
            ).reconstruct(),
            None,
            moment,
        )
        for given in (None, moment)
    ]
    assert errors[1] < 0.9 * errors[0]


# Passes over the table, and their arithmetic.


class CountingArray(np.ndarray):
    """Counts how often each row is read."""

    def __getitem__(self, key):
        part = super().__getitem__(key)
        if isinstance(key, slice):
            self.reads[key] += 1
        return np.asarray(part)


def counting(table):
    array = np.asarray(table, "float32").view(CountingArray)
    array.reads = np.zeros(len(table), int)
    return array


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("span", "scale"),
    [(10.0, 1.0), (1e5, 1.0), (10.0, 1e25)],
    ids=["float32", "float64", "too large for squares in float32"],
)
def test_the_closed_form_takes_two_passes(monkeypatch, activation, span, scale):
    """Whether float32 is enough or not; the first block is looked at before."""
    table = counting(scale * decaying_table(span))
    rows, columns = table.shape
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", columns * (rows // 9))
    monkeypatch.setattr(
        factors_module.Table,
        "of",
        classmethod(lambda cls, values, *_: cls(values)),
    )
    rank = 20
    result = factorize(table, rank, activation=activation, sweeps=0)
    assert (table.reads[: rows // 9] == 3).all()
    assert (table.reads[rows // 9 :] == 2).all()
    lowest = svd_error(table, rank)
    assert lowest * 0.999 < result.relative_error
    above = svd_error(table, rank - (activation is not None))
    assert result.relative_error < above * 1.001


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("moment", [None, "of columns"])
@pytest.mark.parametrize("rank", [1, 2, 7, 12])
def test_the_error_of_a_large_table_is_what_it_loses(
    monkeypatch, activation, weighted, moment, rank
):
    """Of a projection it follows from norms there, and is not measured."""
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 12 * 7)
    table = random_table().astype("float32")
    weights = random_weights(60) if weighted else None
    moment = random_moment(12) if moment else None
    result = factorize(
        table,
        rank,
        activation=activation,
        row_weights=weights,
        column_weights=moment,
        sweeps=0,
    )
    reconstruction = result.reconstruct().astype("float64")
    expected = (
        dense_error(table, reconstruction, weights)
        if moment is None
        else logits_error(table, reconstruction, weights, moment)
    )
    assert result.relative_error == pytest.approx(expected, rel=1e-4, abs=1e-10)
    assert result.unweighted_error == pytest.approx(
        dense_error(table, reconstruction), rel=1e-4, abs=1e-10
    )


def test_a_table_of_few_rows_has_an_energy_for_each_column():
    table = random_table(5, 12)
    spectrum = spectrum_of(Table.of(table), 3)
    energies = np.linalg.svd(table, compute_uv=False) ** 2
    np.testing.assert_allclose(spectrum.energies, [*energies, *np.zeros(7)])
    assert spectrum.directions.shape == (12, 12)


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_squares_that_float32_cannot_add_up_are_left_to_float64(scale):
    table = Table.of(scale * random_table())
    spectrum = spectrum_of(table, 4)
    assert spectrum.dtype == np.float64
    assert spectrum.error(4) == pytest.approx(svd_error(table.values, 4))


@pytest.mark.parametrize("span", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", [2, 4, 12, 20, 23])
def test_float32_is_used_where_it_is_enough(span, rank):
    table = Table.of(decaying_table(span).astype("float32"))
    spectrum = spectrum_of(table, rank)
    exact_error = svd_error(table.values, rank)
    assert spectrum.error(rank) == pytest.approx(exact_error, rel=1e-3)
    if span == 10 and rank <= 12:
        assert spectrum.dtype == np.float32
    if span == 1e6 and rank >= 12:
        assert spectrum.dtype == np.float64


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_scales_whose_squares_float32_does_not_hold(scale):
    table = random_table().astype("float32")
    result = factorize(np.float32(scale) * table, 4)
    plain = factorize(table, 4)
    assert result.relative_error == pytest.approx(
        plain.relative_error, rel=1e-3
    )
