"""Which rank makes a table how much smaller, or how little worse."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_distilled_embedding._arguments import as_integer
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table


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


def spread_ranks(
    groups: Sequence[Sequence[Table]],
    max_parameters: Sequence[float] | float,
    lifted: bool,
    hidden_dim: int | None = None,
) -> list[int]:
    """Spends a budget of parameters on several tables, where it helps most.

    Every unit of rank goes to the table that loses the largest further share
    of its (weighted) energy for each parameter: at the end the marginal gains
    of all tables are equal, and the sum of their relative errors is the least
    for the budget.

    Args:
        groups: For each layer its tables, one or (untied) two of one shape,
            which have one rank.
        max_parameters: Of the factors of all tables together.
        lifted: Whether the form is ReLU's, which has one rank more than the
            singular value decomposition that it is equal to.
        hidden_dim: Integer `h`, the width of every funnel, or `None`.

    Returns:
        A rank for each group.

    Raises:
        ValueError: If not even rank 1 of every table fits.
    """
    ranks, spent, offers = [], 0, []
    for index, tables in enumerate(groups):
        sizes = (*tables[0].shape, hidden_dim)
        ranks.append(1)
        spent += len(tables) * num_parameters(1, *sizes)
        cost = len(tables) * _parameters_of_one_rank(*sizes)
        energies = sum(_shares(spectrum_of(table, 1)) for table in tables)
        # What each unit of rank beyond the first gains.
        gains = energies[0 if lifted else 1 :]
        gains = gains[: max(0, largest_useful_rank(*sizes) - 1)]
        offers += [(gain / cost, index, cost) for gain in gains]
    if spent > max_parameters:
        raise ValueError(
            f"a budget of {max_parameters:.0f} parameters is too small: rank "
            f"1 of every table takes {spent}"
        )
    # Of one table the gains fall, so its units are bought in their order.
    for _, index, cost in sorted(offers, key=lambda offer: -offer[0]):
        if spent + cost <= max_parameters:
            ranks[index] += 1
            spent += cost
    return ranks


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
