"""Ranks by size, by error, and for several tables together."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras_distilled_embedding.factorization.ranks import num_parameters

from keras_distilled_embedding import factorize
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import allocate_ranks
from keras_distilled_embedding.factorization import energy_shares
from keras_distilled_embedding.factorization import is_lifted
from keras_distilled_embedding.factorization import largest_useful_rank
from keras_distilled_embedding.factorization import rank_for_compression
from keras_distilled_embedding.factorization import rank_for_error
from keras_distilled_embedding.factorization import rank_for_speedup
from keras_distilled_embedding.factorization import useful_ranks
from keras_distilled_embedding.factorization import validate_rank


def table_with_spectrum(num_rows, values, seed=0):
    random = np.random.default_rng(seed)
    size = len(values)
    left = np.linalg.qr(random.normal(size=(num_rows, size)))[0]
    right = np.linalg.qr(random.normal(size=(size, size)))[0]
    return left * values @ right


@settings(deadline=None)
@given(
    st.integers(1, 10**6),
    st.integers(1, 10**4),
    st.floats(1.0, 1e4, exclude_min=True),
)
def test_rank_for_compression_is_the_largest(input_dim, output_dim, ratio):
    def reached(rank):
        return input_dim * output_dim / (rank * (input_dim + output_dim))

    if reached(1) < ratio:
        with pytest.raises(ValueError, match="out of reach"):
            rank_for_compression(input_dim, output_dim, ratio)
        return
    rank = rank_for_compression(input_dim, output_dim, ratio)
    assert reached(rank) >= ratio > reached(rank + 1)
    validate_rank(rank, input_dim, output_dim)


@pytest.mark.parametrize(
    ("input_dim", "output_dim"), [(30522, 384), (8000, 256)]
)
def test_rank_for_compression_survives_rounding(input_dim, output_dim):
    for rank in range(2, 60):
        ratio = input_dim * output_dim / (rank * (input_dim + output_dim))
        assert rank_for_compression(input_dim, output_dim, ratio) == rank
        above = np.nextafter(ratio, np.inf)
        assert rank_for_compression(input_dim, output_dim, above) == rank - 1


def test_measured_ranks():
    ranks = [rank_for_compression(30522, 384, c) for c in (4, 8, 16)]
    assert ranks == [94, 47, 23]


@pytest.mark.parametrize("compression", [1, 0.5, 0, -2, float("nan"), "8"])
def test_compression_must_exceed_one(compression):
    with pytest.raises(ValueError, match=r"compression must be .*Received"):
        rank_for_compression(1000, 64, compression)


def test_compression_out_of_reach_names_the_largest():
    largest = 1000 * 64 / 1064
    with pytest.raises(ValueError, match=f"by {largest!r}, the largest"):
        rank_for_compression(1000, 64, 100)
    assert rank_for_compression(1000, 64, largest) == 1


@pytest.mark.parametrize(
    ("rank", "match"),
    [
        (0, "`rank` must be a positive integer.*rank=0"),
        (-3, "rank=-3"),
        (1.5, "rank=1.5"),
        (True, "rank=True"),
        (None, "rank=None"),
        (
            61,
            r"rank=61 .*shape \(1000, 64\) no smaller: 64904 parameters "
            "instead of 64000.*at most 60",
        ),
    ],
)
def test_validate_rank(rank, match):
    validate_rank(np.int64(60), 1000, 64)
    with pytest.raises(ValueError, match=match):
        validate_rank(rank, 1000, 64)


def test_validate_rank_of_equal_size():
    validate_rank(1, 4, 4)
    with pytest.raises(ValueError, match="at most 1"):
        validate_rank(2, 4, 4)
    with pytest.raises(ValueError, match="No rank does"):
        validate_rank(1, 2, 2)


@pytest.mark.parametrize("name", ["input_dim", "output_dim"])
@pytest.mark.parametrize("size", [0, -1, 2.0, None])
def test_sizes_must_be_positive_integers(name, size):
    sizes = {"input_dim": 1000, "output_dim": 64, name: size}
    with pytest.raises(
        ValueError, match=f"`{name}` must be a positive integer"
    ):
        validate_rank(4, **sizes)
    with pytest.raises(
        ValueError, match=f"`{name}` must be a positive integer"
    ):
        rank_for_compression(compression=8.0, **sizes)


@settings(deadline=None)
@given(
    st.integers(2, 10**5),
    st.integers(2, 10**3),
    st.integers(1, 2000),
    st.floats(1.0, 100.0, exclude_min=True),
)
def test_rank_for_compression_counts_the_funnel(rows, columns, hidden, ratio):
    def parameters(rank):
        funnel = rank * hidden + hidden + hidden * columns
        return rank * (rows + columns) + funnel

    assert parameters(7) == num_parameters(7, rows, columns, hidden)
    if rows * columns / parameters(1) < ratio:
        with pytest.raises(ValueError, match="hidden_dim"):
            rank_for_compression(rows, columns, ratio, hidden)
        return
    rank = rank_for_compression(rows, columns, ratio, hidden)
    assert rows * columns / parameters(rank) >= ratio
    assert rows * columns / parameters(rank + 1) < ratio


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 20))
def test_largest_useful_rank(rows, columns, hidden):
    rank = largest_useful_rank(rows, columns, hidden or None)
    if rank:
        assert num_parameters(rank, rows, columns, hidden) < rows * columns
        validate_rank(rank, rows, columns, hidden or None)
    assert num_parameters(rank + 1, rows, columns, hidden) >= rows * columns
    with pytest.raises(ValueError, match="no smaller"):
        validate_rank(rank + 1, rows, columns, hidden or None)


# By multiplications.


@settings(deadline=None)
@given(
    st.integers(1, 10**6),
    st.integers(1, 2_000),
    st.floats(1.0, 300.0),
    st.sampled_from([None, "int8", "int4"]),
)
def test_rank_for_speedup_is_the_largest(rows, columns, ratio, rounding):
    def reached(rank):
        # int4 multiplies with whole blocks of 32.
        width = -(-rank // 32) * 32 if rounding == "int4" else rank
        return rows * columns / (width * (rows + columns))

    if reached(1) < ratio:
        with pytest.raises(ValueError, match=f"{reached(1)!r} times fewer"):
            rank_for_speedup(rows, columns, ratio, rounding)
        return
    rank = rank_for_speedup(rows, columns, ratio, rounding)
    assert reached(rank) >= ratio > reached(rank + 1)


def test_speedup_is_exact_where_a_rank_gives_it():
    ratio = 30522 * 384 / (47 * (30522 + 384))
    assert rank_for_speedup(30522, 384, ratio) == 47
    assert rank_for_speedup(30522, 384, np.nextafter(ratio, np.inf)) == 46


@pytest.mark.parametrize("ratio", [0.99, 0, -2, np.nan, np.inf, "2", True])
def test_bad_speedup(ratio):
    with pytest.raises(ValueError, match="at least 1. Received: min_speedup="):
        rank_for_speedup(1000, 64, ratio)


# By error.


@pytest.mark.parametrize("max_error", [0.9, 0.5, 0.1, 1e-3, 1e-9])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rank_for_error_is_the_smallest(max_error, activation, weighted):
    table = table_with_spectrum(200, np.geomspace(1, 1e-4, 24))
    weights = np.geomspace(1, 0.01, 200) if weighted else None
    lifted = activation == "relu"
    rank = rank_for_error(Table.of(table, weights), max_error, lifted)

    def error(rank, activation):
        return factorize(
            table, rank, activation=activation, row_weights=weights
        ).relative_error

    if rank <= 24 + lifted:
        assert error(rank, activation) <= max_error * (1 + 1e-3)
    if rank - lifted > 1:
        assert error(rank - lifted - 1, None) > max_error


@pytest.mark.parametrize("activation", ["relu", keras.ops.relu, "tanh"])
def test_only_the_linear_form_needs_no_rank_more(activation):
    assert is_lifted(activation)
    for linear in (None, "linear", keras.activations.linear):
        assert not is_lifted(linear)


@pytest.mark.parametrize("max_error", [0, 1, -0.1, 2, "0.1", None, np.nan])
def test_bad_max_error(max_error):
    with pytest.raises(ValueError, match="max_error must be .*Received"):
        rank_for_error(Table.of(np.ones((9, 3))), max_error, False)


# Several tables together.


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("hidden_dim", [None, 5])
def test_the_spread_is_the_best_there_is(lifted, hidden_dim):
    """Against every possible pair of ranks."""
    tables = [
        table_with_spectrum(60, np.geomspace(1, 0.2, 12), seed=1),
        table_with_spectrum(40, np.geomspace(1, 0.01, 10), seed=2),
    ]
    energies = [
        np.linalg.svd(t, compute_uv=False) ** 2 / np.square(t).sum()
        for t in tables
    ]

    def cost(ranks):
        return sum(
            num_parameters(r, *t.shape, hidden_dim)
            for r, t in zip(ranks, tables)
        )

    def error(ranks):
        return sum(e[r - lifted :].sum() for r, e in zip(ranks, energies))

    shares = [energy_shares([Table.of(t)]) for t in tables]
    limits = [largest_useful_rank(*t.shape, hidden_dim) for t in tables]
    costs = [
        {
            rank: num_parameters(rank, *t.shape, hidden_dim)
            for rank in useful_ranks(limit, None)
        }
        for t, limit in zip(tables, limits)
    ]
    for budget in range(cost((1, 1)), cost(limits) + 50, 37):
        ranks = allocate_ranks(shares, costs, budget, lifted)
        assert cost(ranks) <= budget
        assert all(1 <= r <= limit for r, limit in zip(ranks, limits))
        # Greedy is exact up to the last unit that does not fit.
        smaller = budget - max(sum(t.shape) for t in tables)
        best = min(
            (
                error(pair)
                for pair in itertools.product(
                    *(range(1, limit + 1) for limit in limits)
                )
                if cost(pair) <= smaller
            ),
            default=np.inf,
        )
        assert error(ranks) <= best + 1e-9


def test_the_spread_follows_the_spectra():
    flat = Table.of(table_with_spectrum(100, np.ones(16), seed=1))
    steep = Table.of(table_with_spectrum(100, 0.1 ** np.arange(16), seed=2))
    once = {rank: rank * 116 for rank in range(1, 14)}
    twice = {rank: 2 * cost for rank, cost in once.items()}
    shares = [energy_shares([flat]), energy_shares([steep])]
    flat_rank, steep_rank = allocate_ranks(shares, [once, once], 1160, False)
    assert steep_rank <= 3
    assert flat_rank + steep_rank == 10
    # Untied tables of one layer have one rank, and cost twice.
    shares[0] = energy_shares([flat, flat])
    ranks = allocate_ranks(shares, [twice, once], 1160, False)
    assert 2 * ranks[0] + ranks[1] in (9, 10)


def test_a_budget_that_is_too_small():
    shares = energy_shares([Table.of(np.ones((9, 3)))])
    with pytest.raises(ValueError, match="23 is too small.* ranks .*take 24"):
        allocate_ranks([shares, shares], [{1: 12}, {1: 12}], 23, False)
