"""Which rank makes a table how much smaller, or how little worse."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.quantization import integer_bytes
from keras_distilled_embedding.quantization import stored_columns


def num_parameters(
    rank: int, input_dim: int, output_dim: int, hidden_dim: int | None = None
) -> int:
    """Parameters of the factors of a table.

    Args:
        rank: Integer `r`.
        input_dim: Integer, the number of rows `V`.
        output_dim: Integer, the number of columns `d`.
        hidden_dim: Integer `h`, the width of the funnel, or `None`.

    Returns:
        `r (V + d)`, with a funnel `r (V + d + h) + h (d + 1)`.

    Example:

    >>> num_parameters(47, 30522, 384)
    1452582
    """
    hidden_dim = hidden_dim or 0
    return rank * (input_dim + output_dim + hidden_dim) + hidden_dim * (
        output_dim + 1
    )


def factor_bytes(
    rank: int,
    input_dim: int,
    output_dim: int,
    rounding: str | None = None,
    hidden_dim: int | None = None,
    itemsize: int = 4,
) -> int:
    """Bytes of the factors of a table, as `export_litert` stores them.

    As integers, the codes with their scales, the basis in 8 bits and the
    offset in float32. (A file that both looks rows up and projects holds the
    small basis once more, transposed; that is not counted.)

    Args:
        rank: Integer `r`.
        input_dim: Integer, the number of rows `V`.
        output_dim: Integer, the number of columns `d`.
        rounding: `"int8"`, `"int4"`, or `None` for floats.
        hidden_dim: Integer, the width of the funnel, or `None`. Of floats.
        itemsize: Integer, bytes of one float.

    Returns:
        Floats: `itemsize` times their number. int8: `r V + 4 + r d + 4 d`.
        int4, with `k` the rank rounded up to a multiple of 32:
        `k / 2 V + k / 16 V + k d + 4 d`.

    Example:

    >>> factor_bytes(47, 30522, 384)
    5810328
    >>> factor_bytes(47, 30522, 384, "int8")
    1454122
    >>> factor_bytes(47, 30522, 384, "int4")
    1124904
    """
    if rounding is None:
        return itemsize * num_parameters(
            rank, input_dim, output_dim, hidden_dim
        )
    basis = stored_columns(rank, rounding) * output_dim
    return integer_bytes(input_dim, rank, rounding) + basis + 4 * output_dim


def rank_for_compression(
    input_dim: int,
    output_dim: int,
    compression: float,
    hidden_dim: int | None = None,
) -> int:
    """Returns the largest rank that compresses a table so much.

    Args:
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        compression: Float above 1, parameters of the table over those of its
            factors.
        hidden_dim: Positive integer, the width of the funnel, or `None`.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: If `compression` is not above 1, or is more than rank 1
            gives.

    Example:

    >>> rank_for_compression(30522, 384, 8.0)
    47
    >>> rank_for_compression(30522, 384, 8.0, hidden_dim=768)
    36
    """
    sizes = _as_sizes(input_dim, output_dim, hidden_dim)
    if not (isinstance(compression, numbers.Real) and compression > 1):
        raise ValueError(
            "compression must be a number greater than 1. "
            f"Received: compression={compression!r}"
        )
    largest = _compression_ratio(1, *sizes)
    if compression > largest:
        raise ValueError(
            f"compression={compression!r} is out of reach for a table of "
            f"shape ({input_dim}, {output_dim}){_with_funnel(hidden_dim)}: "
            f"rank 1 compresses it by {largest!r}, the largest there is"
        )
    free = input_dim * output_dim / compression - num_parameters(0, *sizes)
    rank = max(1, int(free / _parameters_of_one_rank(*sizes)))
    # The division may round across an integer, in either direction.
    while _compression_ratio(rank + 1, *sizes) >= compression:
        rank += 1
    while _compression_ratio(rank, *sizes) < compression:
        rank -= 1
    return rank


def rank_for_speedup(
    input_dim: int,
    output_dim: int,
    min_speedup: float,
    rounding: str | None = None,
) -> int:
    """Returns the largest rank whose projection is so much cheaper.

    Counted are the multiplications for one hidden state: `V d` with the
    table, `r (V + d)` with its factors. A file in int4 multiplies with whole
    blocks of codes, so there `r` is rounded up to a multiple of 32.

    Args:
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        min_speedup: Float of at least 1.
        rounding: `"int8"`, `"int4"`, or `None` for floats.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: If `min_speedup` is below 1, or more than any rank gives.

    Example:

    >>> rank_for_speedup(30522, 384, 8.0)
    47
    >>> rank_for_speedup(30522, 384, 8.0, "int4")
    32
    """
    input_dim, output_dim, _ = _as_sizes(input_dim, output_dim, None)
    check_speedup(min_speedup)
    # Ranks within a block cost the same: the last of them stands for all.
    block = stored_columns(1, rounding)
    ranks = range(block, output_dim + 1, block)

    def speedup(rank: int) -> float:
        return _compression_ratio(rank, input_dim, output_dim, None)

    fast = [rank for rank in ranks if speedup(rank) >= min_speedup]
    if fast:
        return fast[-1]
    raise ValueError(
        f"min_speedup={min_speedup!r} is out of reach for a table of shape "
        f"({input_dim}, {output_dim}): rank 1"
        + (f", which int4 stores as {block}," if block > 1 else "")
        + f" takes {speedup(block)!r} times fewer multiplications, the most "
        "there is"
    )


def check_speedup(min_speedup: float) -> None:
    """Refuses what is no number of at least 1.

    Raises:
        ValueError: If it is none.
    """
    is_number = isinstance(min_speedup, numbers.Real)
    is_number = is_number and not isinstance(min_speedup, bool)
    if not is_number or not 1 <= min_speedup < float("inf"):
        raise ValueError(
            "`min_speedup` must be a number of at least 1. "
            f"Received: min_speedup={min_speedup!r}"
        )


def validate_rank(
    rank: int, input_dim: int, output_dim: int, hidden_dim: int | None = None
) -> None:
    """Checks that factors of this rank are smaller than the table.

    Args:
        rank: Positive integer `r`.
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        hidden_dim: Positive integer, the width of the funnel, or `None`.

    Raises:
        ValueError: If the rank is not a positive integer, or is so large that
            the factors have at least as many parameters as the table.

    Example:

    >>> validate_rank(47, 30522, 384)
    """
    sizes = _as_sizes(input_dim, output_dim, hidden_dim)
    rank = as_integer("rank", rank)
    largest = largest_useful_rank(*sizes)
    if rank <= largest:
        return
    raise ValueError(
        f"rank={rank}{_with_funnel(hidden_dim)} makes a table of shape "
        f"({input_dim}, {output_dim}) no smaller: "
        f"{num_parameters(rank, *sizes)} parameters instead of "
        f"{input_dim * output_dim}. "
        + (
            f"Pass a rank of at most {largest}"
            if largest > 0
            else "No rank does: leave this table as it is"
            + (", or lower `hidden_dim`" if hidden_dim else "")
        )
    )


def largest_useful_rank(
    input_dim: int, output_dim: int, hidden_dim: int | None = None
) -> int:
    """The largest rank whose factors are smaller than the table; 0 if none."""
    sizes = input_dim, output_dim, hidden_dim
    free = input_dim * output_dim - num_parameters(0, *sizes)
    return max(0, (free - 1) // _parameters_of_one_rank(*sizes))


def as_rank(rank: Any, table_shape: tuple[int, int], function: Callable) -> int:
    """Refuses ranks above the one that can already be exact."""
    rank = as_integer("rank", rank)
    largest = min(table_shape) + (not is_linear(function))
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest} for a table of shape "
            f"{table_shape} and this activation. Received: rank={rank}"
        )
    return rank


def rank_for_error(table: Table, max_error: float, lifted: bool) -> int:
    """Returns the smallest rank whose exact factors lose no more.

    Args:
        table: The table.
        max_error: Float in (0, 1), a bound of `relative_error`.
        lifted: Whether the form is ReLU's, which may need one rank more than
            the singular value decomposition.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: If `max_error` is not between 0 and 1.
    """
    is_number = isinstance(max_error, numbers.Real)
    if not is_number or not 0 < max_error < 1:
        raise ValueError(
            "max_error must be a number between 0 and 1, a share of the "
            f"table's energy. Received: max_error={max_error!r}"
        )

    def smallest(spectrum: Spectrum) -> int:
        errors = [spectrum.error(r) for r in range(len(spectrum.energies))]
        return int(np.argmax(np.array([*errors, 0.0]) <= max_error))

    return max(1, smallest(spectrum_of(table, smallest)) + lifted)


def useful_ranks(largest: int, rounding: str | None) -> list[int]:
    """The ranks up to the largest that no other of the same bytes betters.

    Args:
        largest: Positive integer.
        rounding: `"int8"`, `"int4"`, or `None` for floats.

    Returns:
        All of them, for int4 the last of each block.
    """
    block = stored_columns(1, rounding)
    return [*range(block, largest, block), largest]


def energy_shares(tables: Iterable[Table]) -> np.ndarray:
    """What each further rank keeps of the tables' energies, summed up."""
    return sum(_shares(spectrum_of(table, 1)) for table in tables)


def allocate_ranks(
    shares: Sequence[np.ndarray],
    costs: Sequence[Mapping[int, float]],
    budget: float,
    lifted: bool,
) -> list[int]:
    """Spends a budget on several tables, where it helps most.

    Every step to a larger rank is taken by the table that loses the largest
    further share of its (weighted) energy for its cost: at the end the
    marginal gains of all tables are equal, and the sum of their relative
    errors is the least for the budget, up to a last step that does not fit.

    Args:
        shares: For each layer the `energy_shares` of its tables.
        costs: For each layer the ranks to choose from, ascending, and what
            each costs; every step costs as much.
        budget: For all layers together.
        lifted: Whether the form is ReLU's, which has one rank more than the
            singular value decomposition that it is equal to.

    Returns:
        A rank for each layer.

    Raises:
        ValueError: If not even the smallest ranks fit.
    """
    ranks = [list(prices) for prices in costs]
    spent, offers = 0, []
    for index, (energies, prices) in enumerate(zip(shares, costs)):
        spent += prices[ranks[index][0]]
        for smaller, larger in itertools.pairwise(prices):
            cost = prices[larger] - prices[smaller]
            gain = energies[smaller - lifted : larger - lifted].sum()
            offers.append((gain / cost, index, cost))
    if spent > budget:
        raise ValueError(
            f"a budget of {budget:.0f} is too small: the smallest ranks of "
            f"all tables take {spent}"
        )
    taken = [0] * len(ranks)
    # Of one table the gains fall, so its steps are bought in their order.
    for _, index, cost in sorted(offers, key=lambda offer: -offer[0]):
        if spent + cost <= budget:
            taken[index] += 1
            spent += cost
    return [options[step] for options, step in zip(ranks, taken)]


def _shares(spectrum: Spectrum) -> np.ndarray:
    total = spectrum.energies.sum()
    return spectrum.energies / total if total else spectrum.energies


def _as_sizes(
    input_dim: Any, output_dim: Any, hidden_dim: Any
) -> tuple[int, int, int | None]:
    return (
        as_integer("input_dim", input_dim),
        as_integer("output_dim", output_dim),
        as_integer("hidden_dim", hidden_dim, or_none=True),
    )


def _with_funnel(hidden_dim: int | None) -> str:
    return f" with hidden_dim={hidden_dim}" if hidden_dim else ""


def _parameters_of_one_rank(
    input_dim: int, output_dim: int, hidden_dim: int | None
) -> int:
    return input_dim + output_dim + (hidden_dim or 0)


def _compression_ratio(
    rank: int, input_dim: int, output_dim: int, hidden_dim: int | None
) -> float:
    parameters = num_parameters(rank, input_dim, output_dim, hidden_dim)
    return input_dim * output_dim / parameters
