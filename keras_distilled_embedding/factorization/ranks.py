"""Which rank makes a table how much smaller."""

import math
import numbers

from keras_distilled_embedding._arguments import as_integer


def rank_for_compression(
    input_dim: int, output_dim: int, compression: float
) -> int:
    """Returns the largest rank that compresses a table so much.

    The factors of a table `(V, d)` have `r (V + d)` parameters, so this is
    the largest `r` with `V d / (r (V + d)) >= compression`.

    Args:
        input_dim: positive integer, the number of rows `V`.
        output_dim: positive integer, the number of columns `d`.
        compression: float above 1, parameters of the table over those of its
            factors.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: if `compression` is not above 1, or is more than rank 1
            gives.

    Example:

    >>> rank_for_compression(30522, 384, 8.0)
    47
    """
    input_dim = as_integer("input_dim", input_dim)
    output_dim = as_integer("output_dim", output_dim)
    if not (isinstance(compression, numbers.Real) and compression > 1):
        raise ValueError(
            "compression must be a number greater than 1. "
            f"Received: compression={compression!r}"
        )
    largest = _compression_ratio(1, input_dim, output_dim)
    if compression > largest:
        raise ValueError(
            f"compression={compression!r} is out of reach for a table of "
            f"shape ({input_dim}, {output_dim}): rank 1 compresses it by "
            f"{largest!r}, the largest there is"
        )
    rank = int(largest / compression)
    # The division may round across an integer, in either direction.
    while _compression_ratio(rank + 1, input_dim, output_dim) >= compression:
        rank += 1
    while _compression_ratio(rank, input_dim, output_dim) < compression:
        rank -= 1
    return rank


def validate_rank(rank: int, input_dim: int, output_dim: int) -> None:
    """Checks that factors of this rank are smaller than the table.

    Args:
        rank: positive integer `r` with `r (V + d) < V d`.
        input_dim: positive integer, the number of rows `V`.
        output_dim: positive integer, the number of columns `d`.

    Raises:
        ValueError: if the rank is not a positive integer, or is so large that
            the factors have at least as many parameters as the table.

    Example:

    >>> validate_rank(47, 30522, 384)
    """
    input_dim = as_integer("input_dim", input_dim)
    output_dim = as_integer("output_dim", output_dim)
    rank = as_integer("rank", rank)
    if _compression_ratio(rank, input_dim, output_dim) > 1:
        return
    largest = math.ceil(input_dim * output_dim / (input_dim + output_dim)) - 1
    raise ValueError(
        f"rank={rank} makes a table of shape ({input_dim}, {output_dim}) no "
        f"smaller: {rank * (input_dim + output_dim)} parameters instead of "
        f"{input_dim * output_dim}. "
        + (
            f"Pass a rank of at most {largest}"
            if largest
            else "No rank does: leave this table as it is"
        )
    )


def _compression_ratio(rank: int, input_dim: int, output_dim: int) -> float:
    return input_dim * output_dim / (rank * (input_dim + output_dim))
