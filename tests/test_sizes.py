"""Bytes and ranks, by size, by error, and for several tables together."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding import factorize
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import allocate_ranks
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import spectrum_of
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.quantization import formats_of
from keras_distilled_embedding.quantization import stored_factors
from keras_distilled_embedding.sizes import check_rank
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import largest_rank
from keras_distilled_embedding.sizes import rank_for_compression
from keras_distilled_embedding.sizes import rank_for_speedup
from keras_distilled_embedding.sizes import table_bytes
from keras_distilled_embedding.targets import Target
from tests.shared import random_table
from tests.shared import stored_bytes
from tests.shared import stored_columns
from tests.shared import table_with_spectrum

KINDS = [None, *(kind for name in QUANTIZATIONS for kind in formats_of(name))]
KIND = st.sampled_from(KINDS)


def name_of(kind):
    """For the names of tests."""
    if kind is None:
        return None
    return f"{kind.name}, {'rows' if kind.has_row_scales else 'columns'}"


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
@pytest.mark.parametrize("rank", [1, 9, 32, 40])
@pytest.mark.parametrize("use_bias", [True, False])
def test_bytes_are_those_of_the_arrays_of_a_file(kind, rank, use_bias):
    table = random_table(150, 48)
    form = {"activation": None, "use_bias": use_bias}
    if kind is not None:
        form |= {"quantization": kind.name, "row_scales": kind.has_row_scales}
    factors = factorize(table, rank, **form)
    arrays = [factors.codes, factors.basis, factors.offset]
    if kind is not None:
        stored = stored_factors(
            factors.codes,
            factors.center,
            factors.scales,
            factors.basis,
            factors.offset,
            kind,
        )
        scales = [stored.scales]
        if kind.scale_bytes == 2:
            scales = [stored.scales.astype("float16")]
        if kind.scale_bytes == 12:  # with the zero points of LiteRT
            scales += [np.zeros(150, "int64")]
        basis = stored.basis.astype("int8")
        # The center of the codes needs an offset of its own.
        arrays = [kind.pack(stored.integers), *scales, basis, stored.offset]
    expected = sum(array.nbytes for array in arrays if array is not None)
    assert factor_bytes(rank, 150, 48, kind, use_bias) == expected
    name = kind and kind.name
    by_row = kind is None or kind.has_row_scales
    assert stored_bytes(rank, 150, 48, name, use_bias, by_row) == expected
    if by_row or name == "int8":
        assert factor_bytes(rank, 150, 48, name, use_bias) == expected
    assert table_bytes(150, 48) == table.nbytes


# By bytes


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 10**6),
    st.integers(1, 10**4),
    st.floats(1.0, 1e4, exclude_min=True),
    KIND,
    st.booleans(),
)
def test_rank_for_compression_is_the_largest(
    rows, columns, ratio, kind, use_bias
):
    form = rows, columns, kind, use_bias

    def reached(rank):
        return table_bytes(rows, columns) / factor_bytes(rank, *form)

    if reached(1) < ratio:
        limit = np.floor(100 * reached(1)) / 100
        with pytest.raises(ValueError, match=f"at most {limit:.2f} "):
            rank_for_compression(rows, columns, ratio, *form[2:])
        return
    rank = rank_for_compression(rows, columns, ratio, *form[2:])
    assert reached(rank) >= ratio
    assert reached(rank + 1) < ratio or rank == min(rows, columns)
    budget = table_bytes(rows, columns) / ratio
    assert largest_rank(rows, columns, budget, *form[2:]) == rank
    assert check_rank(rank, *form) == rank


@pytest.mark.parametrize(("rows", "columns"), [(30522, 384), (8000, 256)])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_ratio_that_a_rank_gives_exactly(rows, columns, quantization):
    for rank in range(2, 60):
        stored = factor_bytes(rank, rows, columns, quantization)
        ratio = table_bytes(rows, columns) / stored
        found = [
            rank_for_compression(rows, columns, asked, quantization)
            for asked in (ratio, np.nextafter(ratio, np.inf))
        ]
        assert found == [rank, rank - 1]
        assert largest_rank(rows, columns, stored, quantization) == rank
        assert largest_rank(rows, columns, stored - 1, quantization) == rank - 1


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        (None, [94, 47, 23]),
        ("int8", [379, 189, 94]),
        # Multiples of 32, and 2 bytes a row.
        ("int4", [384, 352, 160]),
        (format_of("int4", row_scales=False), [384, 374, 186]),
        # 12 bytes a row.
        ("int2", [384, 384, 315]),
        (format_of("int2", row_scales=False), [384, 384, 364]),
    ],
)
def test_ranks_of_minilm(kind, ranks):
    found = [
        rank_for_compression(30522, 384, ratio, kind) for ratio in (4, 8, 16)
    ]
    assert found == ranks


@pytest.mark.parametrize("compression", [1, 0.5, 0, -2, np.nan, np.inf, "8"])
def test_bad_compression(compression):
    with pytest.raises(ValueError, match=r"`compression` must be .*Received"):
        rank_for_compression(1000, 64, compression)


@pytest.mark.parametrize(
    ("rank", "match"),
    [
        (0, "`rank` must be a positive integer.*rank=0"),
        (-3, "rank=-3"),
        (1.5, "rank=1.5"),
        (True, "rank=True"),
        (None, "rank=None"),
        (61, r"at most 60, .*shape \(1000, 64\) gets no smaller.*rank=61"),
    ],
)
def test_check_rank(rank, match):
    assert check_rank(np.int64(60), 1000, 64) == 60
    with pytest.raises(ValueError, match=match):
        check_rank(rank, 1000, 64)


def test_factors_have_to_be_smaller_than_the_table():
    assert check_rank(1, 4, 4, use_bias=False) == 1
    with pytest.raises(ValueError, match="at most 1, "):
        check_rank(2, 4, 4, use_bias=False)  # 16 numbers in either form
    with pytest.raises(ValueError, match=r"No rank .* \(2, 2\) smaller"):
        check_rank(1, 2, 2)
    assert check_rank(64, 1000, 64, "int8") == 64  # a quarter of the bytes


# By multiplications


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 10**6),
    st.integers(1, 2_000),
    st.floats(1.0, 300.0),
    KIND,
)
def test_rank_for_speedup_is_the_largest(rows, columns, ratio, kind):
    def reached(rank):
        # Few bits are multiplied in whole groups.
        form = (None,) if kind is None else (kind.name, kind.has_row_scales)
        width = stored_columns(rank, *form)
        return rows * columns / (width * (rows + columns))

    if reached(1) < ratio:
        limit = np.floor(100 * reached(1)) / 100
        with pytest.raises(ValueError, match=f"at most {limit:.2f} "):
            rank_for_speedup(rows, columns, ratio, kind)
        return
    rank = rank_for_speedup(rows, columns, ratio, kind)
    assert reached(rank) >= ratio > reached(rank + 1)


def test_speedup_is_exact_where_a_rank_gives_it():
    ratio = 30522 * 384 / (47 * (30522 + 384))
    assert rank_for_speedup(30522, 384, ratio) == 47
    assert rank_for_speedup(30522, 384, np.nextafter(ratio, np.inf)) == 46


@pytest.mark.parametrize("ratio", [0.99, 0, -2, np.nan, np.inf, "2", True])
def test_bad_speedup(ratio):
    with pytest.raises(ValueError, match="at least 1. Received: min_speedup="):
        rank_for_speedup(1000, 64, ratio)


# By error


def target_of(rows, columns):
    layer = keras.layers.ReversibleEmbedding(rows, columns)
    layer.build()
    return Target(layer)


@pytest.mark.parametrize("max_error", [0.9, 0.5, 0.1, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
def test_rank_for_error_is_the_smallest(
    max_error, activation, use_bias, weighted
):
    table = table_with_spectrum(200, np.geomspace(1, 1e-4, 24))
    weights = np.geomspace(1, 0.01, 200) if weighted else None
    form = {"activation": activation, "use_bias": use_bias}
    request = SizeRequest(max_error=max_error, quantization=None, **form)
    tables = {target_of(200, 24): [Table.of(table, weights)]}

    def error(rank):
        return factorize(
            table, rank, row_weights=weights, **form
        ).relative_error

    if max_error == 1e-9:  # takes as many numbers as the table has
        assert error(check_rank(21, 200, 24, use_bias=use_bias)) > max_error
        with pytest.raises(ValueError, match="too small.*max_error=1e-09"):
            plan(tables, request, optional=False)
        return
    (rank,) = plan(tables, request, optional=False).ranks.values()
    assert error(rank) <= max_error * (1 + 1e-3)
    if rank > 1:
        assert error(rank - 1) > max_error


@pytest.mark.parametrize("max_error", [0, 1, -0.1, 2, "0.1", np.nan])
def test_bad_max_error(max_error):
    with pytest.raises(ValueError, match="`max_error` must be .*Received"):
        SizeRequest(max_error=max_error)


# Several tables together


def shares_of(*tables):
    spectra = [spectrum_of(Table.of(table), 1, False) for table in tables]
    return sum(spectrum.shares for spectrum in spectra)


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_spread_is_the_best_there_is(skipped, quantization):
    """Against every possible pair of ranks."""
    tables = [
        table_with_spectrum(60, np.geomspace(1, 0.2, 12), seed=1),
        table_with_spectrum(40, np.geomspace(1, 0.01, 10), seed=2),
    ]
    energies = [
        np.linalg.svd(t, compute_uv=False) ** 2 / np.square(t).sum()
        for t in tables
    ]
    prices = [
        {
            rank: factor_bytes(rank, *t.shape, quantization)
            for rank in range(1, 10)
        }
        for t in tables
    ]

    def cost(ranks):
        return sum(price[rank] for rank, price in zip(ranks, prices))

    def error(ranks):
        return sum(e[r - skipped :].sum() for r, e in zip(ranks, energies))

    shares = [shares_of(table) for table in tables]
    step = max(price[2] - price[1] for price in prices)
    for budget in range(cost((1, 1)), cost((9, 9)) + step, step // 2):
        ranks = allocate_ranks(shares, prices, budget, skipped)
        assert cost(ranks) <= budget
        # Greedy is exact up to the last unit that does not fit.
        best = min(
            (
                error(pair)
                for pair in itertools.product(*prices)
                if cost(pair) <= budget - step
            ),
            default=np.inf,
        )
        assert error(ranks) <= best + 1e-9


def test_the_spread_follows_the_spectra():
    flat = table_with_spectrum(100, np.ones(16), seed=1)
    steep = table_with_spectrum(100, 0.1 ** np.arange(16), seed=2)
    once = {rank: rank * 116 for rank in range(1, 14)}
    twice = {rank: 2 * cost for rank, cost in once.items()}
    shares = [shares_of(flat), shares_of(steep)]
    flat_rank, steep_rank = allocate_ranks(shares, [once, once], 1160)
    assert steep_rank <= 3
    assert flat_rank + steep_rank == 10
    # Untied tables of one layer have one rank, and cost twice.
    shares[0] = shares_of(flat, flat)
    ranks = allocate_ranks(shares, [twice, once], 1160)
    assert 2 * ranks[0] + ranks[1] in (9, 10)


def test_a_budget_that_is_too_small():
    shares = shares_of(np.ones((9, 3)))
    with pytest.raises(ValueError, match="too small.* 24 bytes.*max_bytes=23"):
        allocate_ranks([shares, shares], [{1: 12}, {1: 12}], 23)
