"""How many bytes and multiplications factors take, by their rank."""

from __future__ import annotations

import bisect
import math
import numbers
from typing import Any

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import as_format
from keras_distilled_embedding.quantization import name_of


def factor_bytes(
    rank: int,
    input_dim: int,
    output_dim: int,
    quantization: str | Format | None = None,
    use_bias: bool = True,
) -> int:
    """Bytes of a factorized table, as `export_litert` stores it.

    As integers: the codes with their scales, the basis in 8 bits, and the
    offset in float32, which holds the center of the codes too. (A basis of
    fewer than 1,024 numbers stays a float: it is counted in 8 bits. A file that
    both looks rows up and projects holds the small basis once more,
    transposed; that is not counted.)

    Args:
        rank: Integer `r`.
        input_dim: Integer, the number of rows `V`.
        output_dim: Integer, the number of columns `d`.
        quantization: A storage format or its name, or `None` for float32.
        use_bias: Whether there is an offset.

    Returns:
        Floats: `4 (r (V + d) + d)`. int8: `r V + 4 + r d + 4 d`. int4 with a
        scale a row, `k` the rank filled up to a multiple of 32:
        `(k / 2 + 2) V + k d + 4 d`. int2 with a scale a row, `k` the rank and
        one more, filled up to a multiple of 4: `(k / 4 + 12) V + k d + 4 d`.

    Example:

    >>> factor_bytes(47, 30522, 384)
    5811864
    >>> factor_bytes(47, 30522, 384, "int8")
    1454122
    >>> factor_bytes(47, 30522, 384, "int4")
    1063860
    >>> factor_bytes(47, 30522, 384, "int2")
    752496
    """
    kind = as_format(quantization)
    if kind is None:
        return 4 * (rank * (input_dim + output_dim) + output_dim * use_bias)
    basis = kind.stored_columns(rank) * output_dim
    return kind.table_bytes(input_dim, rank) + basis + 4 * output_dim


def table_bytes(input_dim: int, output_dim: int) -> int:
    """Bytes of a table in float32, which sizes are compared with."""
    return 4 * input_dim * output_dim


def largest_rank(
    input_dim: int,
    output_dim: int,
    max_bytes: float,
    quantization: str | Format | None = None,
    use_bias: bool = True,
) -> int:
    """The largest rank whose factors take no more bytes; 0 if there is none.

    Args:
        input_dim: Integer, the number of rows `V`.
        output_dim: Integer, the number of columns `d`.
        max_bytes: Number, the most that they may take.
        quantization: A storage format or its name, or `None` for float32.
        use_bias: Whether there is an offset.

    Example:

    >>> largest_rank(30522, 384, 5_860_224)
    47
    """
    # More ranks than this hold nothing more.
    ranks = range(1, min(input_dim, output_dim) + 1)
    return bisect.bisect_right(
        ranks,
        max_bytes,
        key=lambda rank: factor_bytes(
            rank, input_dim, output_dim, quantization, use_bias
        ),
    )


def rank_for_compression(
    input_dim: int,
    output_dim: int,
    compression: float,
    quantization: str | Format | None = None,
    use_bias: bool = True,
) -> int:
    """The largest rank that makes a table so many times smaller.

    Args:
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        compression: Float above 1, bytes of the table in float32 over those
            of its factors.
        quantization: A storage format or its name, or `None` for float32.
        use_bias: Whether there is an offset.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: If `compression` is not above 1, or is more than rank 1
            gives.

    Example:

    >>> rank_for_compression(30522, 384, 8.0)
    47
    >>> rank_for_compression(30522, 384, 8.0, "int8")
    189
    """
    check_compression(compression)

    def ratio(rank: int) -> float:
        stored = factor_bytes(
            rank, input_dim, output_dim, quantization, use_bias
        )
        return table_bytes(input_dim, output_dim) / stored

    # By the ratios themselves, so that one that a rank gives finds that rank.
    ranks = range(1, min(input_dim, output_dim) + 1)
    rank = bisect.bisect_right(
        ranks, -compression, key=lambda rank: -ratio(rank)
    )
    if rank == 0:
        raise ValueError(
            f"`compression` must be at most {_rounded_down(ratio(1))} for a "
            f"table of shape ({input_dim}, {output_dim}) in "
            f"{name_of(quantization)}, what rank 1 gives. "
            f"Received: compression={compression!r}"
        )
    return rank


def rank_for_speedup(
    input_dim: int,
    output_dim: int,
    min_speedup: float,
    quantization: str | Format | None = None,
) -> int:
    """The largest rank whose projection is so much cheaper.

    Counted are the multiplications for one hidden state: `V d` with the
    table, `r (V + d)` with its factors. A file in int4 multiplies with whole
    blocks of codes, so there `r` is filled up to a multiple of 32.

    Args:
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        min_speedup: Float of at least 1.
        quantization: A storage format or its name, or `None` for float32.

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
    check_speedup(min_speedup)
    rank = rank_for_products(
        input_dim, output_dim, 1 / min_speedup, quantization
    )
    if rank == 0:
        most = 1 / share_of_products(1, input_dim, output_dim, quantization)
        raise ValueError(
            f"`min_speedup` must be at most {_rounded_down(most)} for a table "
            f"of shape ({input_dim}, {output_dim}) in "
            f"{name_of(quantization)}, what the smallest factors give. "
            f"Received: min_speedup={min_speedup!r}"
        )
    return rank


def rank_for_products(
    input_dim: int,
    output_dim: int,
    products: float,
    quantization: str | Format | None = None,
) -> int:
    """The largest rank whose projection takes no more multiplications.

    Args:
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        products: Float, the most that it may take, over `V d` of the table.
        quantization: A storage format or its name, or `None` for float32.

    Returns:
        The rank, 0 if there is none.
    """
    return bisect.bisect_right(
        range(1, output_dim + 1),
        products,
        key=lambda rank: share_of_products(
            rank, input_dim, output_dim, quantization
        ),
    )


def share_of_products(
    rank: int,
    input_dim: int,
    output_dim: int,
    quantization: str | Format | None = None,
) -> float:
    """Multiplications of a projection over the `V d` with the table.

    Args:
        rank: Positive integer, which a file may fill up.
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        quantization: A storage format or its name, or `None` for float32.
    """
    kind = as_format(quantization)
    columns = rank if kind is None else kind.stored_columns(rank)
    return columns * (input_dim + output_dim) / (input_dim * output_dim)


def check_rank(
    rank: Any,
    input_dim: int,
    output_dim: int,
    quantization: str | Format | None = None,
    use_bias: bool = True,
) -> int:
    """Refuses ranks whose factors are no smaller than the table.

    Args:
        rank: Positive integer `r`.
        input_dim: Positive integer, the number of rows `V`.
        output_dim: Positive integer, the number of columns `d`.
        quantization: A storage format or its name, or `None` for float32.
        use_bias: Whether there is an offset.

    Returns:
        The rank.

    Raises:
        ValueError: If the rank is not a positive integer, or so large that
            the factors take as many bytes as the table in float32.

    Example:

    >>> check_rank(47, 30522, 384)
    47
    """
    rank = as_integer("rank", rank)
    largest = largest_rank(
        input_dim,
        output_dim,
        table_bytes(input_dim, output_dim) - 1,
        quantization,
        use_bias,
    )
    if rank > largest:
        raise ValueError(
            f"`rank` must be at most {largest}, or a table of shape "
            f"({input_dim}, {output_dim}) gets no smaller in "
            f"{name_of(quantization)}. Received: rank={rank}"
            if largest
            else f"No rank makes a table of shape ({input_dim}, {output_dim}) "
            f"smaller: leave it as it is. Received: rank={rank}"
        )
    return rank


def check_compression(compression: Any) -> None:
    """Refuses what is not a number above 1.

    Raises:
        ValueError: If it is none.
    """
    if not _is_number(compression) or not 1 < compression < float("inf"):
        raise ValueError(
            "`compression` must be a number greater than 1. "
            f"Received: compression={compression!r}"
        )


def check_speedup(min_speedup: Any) -> None:
    """Refuses what is not a number of at least 1.

    Raises:
        ValueError: If it is none.
    """
    if not _is_number(min_speedup) or not 1 <= min_speedup < float("inf"):
        raise ValueError(
            "`min_speedup` must be a number of at least 1. "
            f"Received: min_speedup={min_speedup!r}"
        )


def _rounded_down(limit: float) -> str:
    """A limit with two decimals, which is allowed itself."""
    return f"{math.floor(100 * limit) / 100:.2f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
