"""Factors rounded so that the logits change least."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding import factorize
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import expected_error
from keras_distilled_embedding.factorization import rounding
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.quantization import formats_of
from tests.shared import lost_share
from tests.shared import to_numpy

KINDS = [kind for name in QUANTIZATIONS for kind in formats_of(name)]
THREE_BITS = Format("int3", bits=3, scale_bytes=2, shift=0.5)
ROWS, COLUMNS = 3_000, 96


def make_table(rows=ROWS, columns=COLUMNS, seed=0):
    """Rows of many sizes around a mean, in a falling spectrum."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(rows, columns)) * np.geomspace(3, 0.3, columns)
    table *= rng.uniform(0.5, 2, size=(rows, 1))
    turn = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    return (table @ turn + rng.normal(size=columns)).astype("float32")


def make_moment(columns=COLUMNS, seed=1, rank=None):
    """Hidden states of a language model: few directions hold the most."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(columns, columns)))[0]
    sizes = np.geomspace(1500, 0.02, columns)
    if rank is not None:
        sizes[rank:] = 0.0
    return (turn * sizes) @ turn.T


def logit_share(table, found, moment):
    """The share of the logits' energy that is lost, in the mean."""
    change, table = found - table, table.astype("float64")
    energy = np.einsum("ij,jk,ik->", table, moment, table)
    return np.einsum("ij,jk,ik->", change, moment, change) / energy


def round_plainly(table, kind):
    """Every number to the nearest level of its row, and nothing else."""
    center = table.mean(0)
    around = table - center
    scales = STEPS[kind.bits] * np.sqrt(
        np.square(around).mean(1, keepdims=True)
    )
    low, high = kind.levels
    levels = np.clip(np.rint(around / scales - kind.shift), low, high)
    return center + (levels + kind.shift) * scales


STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_against_plain_rounding(bits, monkeypatch):
    """The logits lose less than 0.45 of what plain rounding loses."""
    kind = {2: format_of("int2"), 3: THREE_BITS, 4: format_of("int4")}[bits]
    if bits == 3:
        from keras_distilled_embedding import quantization

        monkeypatch.setitem(quantization._STEPS, 3, STEPS[3])
    table, moment = make_table(), make_moment()
    share = 0.1  # of the plain metric, for the look-up
    metric = (1 - share) * moment * COLUMNS / np.trace(moment)
    metric += share * np.eye(COLUMNS)
    factors = rounding.rounded_factors(
        Table.of(table, None, metric), COLUMNS, kind, False, True
    )
    found = factors.codes @ factors.basis + factors.offset
    plain = round_plainly(table, kind)
    assert logit_share(table, found, moment) < 0.45 * logit_share(
        table, plain, moment
    )
    # And the rows themselves are hardly worse.
    assert lost_share(table, found) < 1.6 * lost_share(table, plain)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.name} {k.multiple}")
@pytest.mark.parametrize("uses_relu", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_factors_lie_on_their_grid(kind, uses_relu, use_bias):
    """What training starts from is what a file holds, to the last bit."""
    if not rounding.can_round(kind, uses_relu, use_bias):
        pytest.skip("refused")
    table = make_table(rows=700)
    factors = factorize(
        table,
        40,
        activation="relu" if uses_relu else None,
        use_bias=use_bias,
        quantization=kind.name,
        row_scales=kind.has_row_scales,
    )
    codes = factors.codes
    features = np.maximum(codes, 0) if uses_relu else codes
    np.testing.assert_array_equal(features, codes)  # none is dead
    assert (factors.offset is None) == (not use_bias)
    rounded = to_numpy(kind.round(features, factors.center, factors.scales))
    np.testing.assert_allclose(rounded, features, rtol=1e-5, atol=1e-6)
    found = features @ factors.basis
    if use_bias:
        found = found + factors.offset
    assert factors.relative_error == pytest.approx(
        lost_share(table, found), rel=1e-2, abs=1e-5
    )


def test_rounding_is_no_better_than_the_rank_and_comes_near_it():
    table = make_table()
    for rank in (24, 96):
        exact = factorize(table, rank).relative_error
        lost = [
            factorize(table, rank, quantization=name).relative_error
            for name in ("int8", "int4", "int2")
        ]
        assert exact <= lost[0] < lost[1] < lost[2]
        assert lost[0] - exact < 3e-4
        assert lost[1] - exact < 0.02 * (1 - exact)
        assert lost[2] - exact < 0.13 * (1 - exact)


def test_row_scales_matter_at_two_bits():
    """Rows of many sizes cannot share a scale of four levels."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2_000, 64)) * np.geomspace(0.2, 5, 2_000)[:, None]
    by_row, by_column = (
        factorize(table, 64, quantization="int2", row_scales=rows)
        for rows in (True, False)
    )
    assert by_row.scales.shape == (2_000, 1)
    assert by_column.scales.shape == (1, 64)
    assert by_row.relative_error < 0.7 * by_column.relative_error
    for found in (by_row, by_column):
        assert lost_share(table, found.reconstruct()) == pytest.approx(
            found.relative_error, rel=1e-3
        )


def test_basis_is_the_least_squares_fit_in_any_metric():
    table, moment = make_table(), make_moment()
    weights = np.random.default_rng(0).uniform(0.1, 3, ROWS)
    found = factorize(
        table,
        32,
        activation=None,
        quantization="int2",
        row_weights=weights,
        column_weights=moment,
    )
    ones = np.hstack([found.codes, np.ones((ROWS, 1))])
    roots = np.sqrt(weights)[:, None]
    fit = np.linalg.lstsq(roots * ones, roots * table, rcond=None)[0]
    best = ones @ fit
    np.testing.assert_allclose(
        found.reconstruct(), best, rtol=2e-2, atol=2e-3 * np.abs(table).max()
    )


def test_rows_are_rounded_in_chunks(monkeypatch):
    """With the same result, whatever fits in memory."""
    from keras_distilled_embedding.factorization import table as tables

    whole = factorize(make_table(), 32, quantization="int4")
    monkeypatch.setattr(rounding, "_ROWS_AT_A_TIME", 130)
    monkeypatch.setattr(tables, "CHUNK_ENTRIES", 500 * COLUMNS)
    parts = factorize(make_table(), 32, quantization="int4")
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-2)
    assert lost_share(make_table(), parts.reconstruct()) == pytest.approx(
        parts.relative_error, rel=1e-3
    )


def test_feedback_is_that_of_the_definition():
    """One number at a time, against the inverse of the metric that is left.

    Optimal brain surgery: a column's error is made up for by the columns still
    to come, `-error / (H^-1)_jj (H^-1)_j`, and `H^-1` loses that column.
    """
    rng = np.random.default_rng(0)
    size, kind = 7, format_of("int4")
    metric = rng.normal(size=(size, 3 * size))
    metric = metric @ metric.T
    codes = rng.normal(size=(5, size)).astype("float32")
    scales = np.full((5, 1), 0.25, "float32")
    damped = metric + 1e-4 * np.trace(metric) / size * np.eye(size)
    expected, left = np.empty((5, size)), codes.astype(float).copy()
    for j in range(size):
        expected[:, j] = np.clip(np.rint(left[:, j] / 0.25), -8, 7)
        error = left[:, j] - 0.25 * expected[:, j]
        inverse = np.linalg.inv(damped[j:, j:])
        left[:, j + 1 :] -= np.outer(error, inverse[0, 1:] / inverse[0, 0])
    found = rounding.feed_back(
        codes, scales, rounding.feedback_factor(metric), kind
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.name} {k.multiple}")
@pytest.mark.parametrize("rank", [20, 96])
@pytest.mark.parametrize("weighted", [False, True])
def test_expected_error(kind, rank, weighted):
    moment = make_moment() + 10 * np.eye(COLUMNS) if weighted else None
    found = factorize(
        make_table(),
        rank,
        quantization=kind.name,
        row_scales=kind.has_row_scales,
        column_weights=moment,
    )
    table = Table.of(make_table(), None, moment)
    assert expected_error(table, rank, kind, True, True) == pytest.approx(
        found.relative_error, rel=0.25
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(1, 24),
    kind=st.sampled_from(KINDS),
    uses_relu=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    case=st.sampled_from(
        ["plain", "duplicates", "zero rows", "one row", "zeros"]
    ),
    moment_rank=st.sampled_from([None, 0, 1, 5]),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_any_table(
    rows, columns, kind, uses_relu, scale, case, moment_rank, seed, data
):
    """Finite, on its grid, and never worse than leaving the mean."""
    rng = np.random.default_rng(seed)
    table = scale * rng.normal(size=(rows, columns)).astype("float32")
    if case == "duplicates":
        table[::2] = table[0]
    if case == "zero rows":
        table[::2] = 0.0
    if case == "one row":
        table[:] = table[0]
    if case == "zeros":
        table[:] = 0.0
    rank = data.draw(st.integers(1, min(rows, columns)))
    moment = None
    if moment_rank is not None:
        moment = make_moment(columns, seed, rank=max(1, moment_rank))
    table = Table.of(table, None, moment)
    factors = rounding.rounded_factors(table, rank, kind, uses_relu, True)
    features = np.maximum(factors.codes, 0) if uses_relu else factors.codes
    for array in factors[:3]:
        assert np.isfinite(array).all()
    rounded = to_numpy(kind.round(features, factors.center, factors.scales))
    size = np.abs(features).max() or 1.0
    np.testing.assert_allclose(rounded, features, rtol=1e-4, atol=1e-4 * size)
    around = table.values - table.values.mean(0)
    found = rounded @ factors.basis + factors.offset - table.values.mean(0)
    weights = np.eye(columns) if moment is None else moment
    energy = np.einsum("ij,jk,ik->", around, weights, around)
    change = found - around
    lost = np.einsum("ij,jk,ik->", change, weights, change)
    assert lost <= 1.02 * energy + 1e-6 * np.square(table.values).sum()


def test_other_activations_get_a_grid_for_their_features():
    table = make_table(rows=300, columns=16)
    found = factorize(
        table, 8, activation="tanh", method="learned", quantization="int4"
    )
    features = np.tanh(found.codes)
    rounded = to_numpy(
        format_of("int4").round(features, found.center, found.scales)
    )
    np.testing.assert_allclose(
        found.reconstruct(), rounded @ found.basis + found.offset, rtol=1e-4
    )
    assert lost_share(table, found.reconstruct()) == pytest.approx(
        found.relative_error, rel=1e-3
    )


def test_learned_factors_are_rounded_like_exact_ones():
    table = make_table(rows=600, columns=32)
    learned, exact = (
        factorize(table, 16, method=method, quantization="int2")
        for method in ("learned", "exact")
    )
    assert learned.relative_error < 1.1 * exact.relative_error


def test_two_bits_want_an_offset_with_relu():
    table = make_table(rows=100, columns=8)
    with pytest.raises(ValueError, match=r"use_bias=True, or row_scales=False"):
        factorize(table, 4, quantization="int2", use_bias=False)
    for options in ({"row_scales": False}, {"activation": None}):
        found = factorize(
            table, 4, quantization="int2", use_bias=False, **options
        )
        assert found.offset is None and found.relative_error < 1


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_layer_from_an_embedding(quantization, tie_weights):
    keras.utils.set_random_seed(0)
    embedding = keras.layers.ReversibleEmbedding(
        400, 32, tie_weights=tie_weights, embeddings_initializer="normal"
    )
    embedding.build()
    layer = DistilledEmbedding.from_embedding(
        embedding, rank=32, quantization=quantization
    )
    lost = {"int8": 3e-4, "int4": 0.015, "int2": 0.125}[quantization]
    assert lost_share(to_numpy(embedding.embeddings), layer.embeddings) < lost
    if not tie_weights:
        kernel = to_numpy(embedding.reverse_embeddings)
        assert lost_share(kernel, layer.reverse_embeddings) < lost


@pytest.mark.slow
def test_time_and_memory_of_a_large_table():
    """262,144 x 640 within a minute of processor time on two cores."""
    import time

    rng = np.random.default_rng(0)
    table = rng.standard_normal((262_144, 640), "float32")
    start = time.process_time()
    found = factorize(table, 640, activation=None, quantization="int4")
    seconds = time.process_time() - start
    assert found.relative_error < 0.02
    assert seconds < 120
