"""How codes are rounded where they are stored as small integers.

One place for what training rounds (`layers.DistilledEmbedding` with
`quantization`) and what a file holds: the same operations on the same numbers.

A table `N W` (of codes `N`, after their activation) is also
`C B + 1 (c W)`, with the codes in other coordinates, `C`, and a basis and an
offset that take them back. That is exact, and the choice of `C` decides what
rounding costs:

- int8, one scale for the whole table: each column centred on the middle of
  its range and divided by half of it, so that all columns use all integers;
- int4, one scale for 32 numbers of a row: centred on the mean, in an
  orthonormal basis of what `W` spans, so that rounding costs the table what
  it costs the codes.
"""

from __future__ import annotations

from typing import Any
from typing import NamedTuple

from keras import ops

QUANTIZATIONS = ("int8", "int4")
BLOCK = 32
# Of the largest number of a block: a smaller one clips it, and rounds the
# others more finely.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


class RoundedCodes(NamedTuple):
    """Codes as small integers, and what takes them back to a table.

    Args:
        integers: Float32 `(input_dim, k)` of whole numbers, `k` the rank, for
            int4 rounded up to whole blocks.
        scales: Float32, of one block each: `(input_dim, k / BLOCK)` for int4,
            `(1, 1)` for int8.
        basis: `B`, float32 `(k, output_dim)`.
        offset: `c W`, float32 `(output_dim,)`.
    """

    integers: Any
    scales: Any
    basis: Any
    offset: Any


def check_quantization(name: str, value: Any) -> None:
    """Refuses what is neither `None` nor a rounding.

    Raises:
        ValueError: Naming the argument.
    """
    if value is not None and value not in QUANTIZATIONS:
        raise ValueError(
            f"`{name}` must be None or one of {QUANTIZATIONS}. "
            f"Received: {name}={value!r}"
        )


def stored_columns(columns: int, rounding: str | None) -> int:
    """Columns that a matrix has where it is stored: int4 fills up blocks."""
    return -(-columns // BLOCK) * BLOCK if rounding == "int4" else columns


def integer_bytes(rows: int, columns: int, rounding: str) -> int:
    """Bytes of a matrix of integers, with its scales."""
    if rounding == "int8":
        return rows * columns + 4  # one scale, float32
    columns = stored_columns(columns, rounding)
    return rows * (columns // 2 + 2 * columns // BLOCK)  # scales of 2 bytes


def round_codes(codes: Any, basis: Any, rounding: str) -> RoundedCodes:
    """Rounds the codes of a table.

    Args:
        codes: `N`, after the activation, float32 `(input_dim, rank)`.
        basis: `W`, float32 `(rank, output_dim)`.
        rounding: `"int8"` or `"int4"`.

    Returns:
        `RoundedCodes`, as tensors.
    """
    coordinates, center, back = _coordinates(codes, basis, rounding)
    integers, scales = _round(coordinates, rounding)
    new_basis = ops.matmul(back, basis)
    padding = integers.shape[1] - new_basis.shape[0]
    return RoundedCodes(
        integers,
        scales,
        ops.pad(new_basis, [[0, padding], [0, 0]]),
        ops.matmul(center, basis)[0],
    )


def round_table(table: Any, rounding: str) -> tuple[Any, Any]:
    """Rounds a table that is stored as a whole, as it is.

    Args:
        table: `E`, float32 `(input_dim, output_dim)`.
        rounding: `"int8"`, with one scale, or `"int4"`, with one for a block.

    Returns:
        Integers and scales, as those of `RoundedCodes`.
    """
    if rounding == "int8":
        scale = ops.divide(ops.max(ops.abs(table)), 127.0)
        scale = ops.reshape(ops.where(scale > 0.0, scale, 1.0), (1, 1))
        return ops.round(ops.divide(table, scale)), scale
    return _round(table, rounding)


def round_in_place(codes: Any, basis: Any, rounding: str) -> Any:
    """The codes that a table has after rounding, in their own coordinates.

    Backwards rounding is taken for the identity (a straight-through
    gradient), and the basis gets no gradient from how it steers the rounding.

    Args:
        codes: As of `round_codes`.
        basis: As of `round_codes`.
        rounding: As of `round_codes`.

    Returns:
        Float32 `(input_dim, rank)`.
    """
    fixed = ops.stop_gradient(codes)
    coordinates, center, back = _coordinates(
        fixed, ops.stop_gradient(basis), rounding
    )
    rounded = dequantize(*_round(coordinates, rounding))
    rounded = rounded[:, : coordinates.shape[1]]
    rounded = ops.add(ops.matmul(rounded, back), center)
    return ops.add(codes, ops.stop_gradient(ops.subtract(rounded, codes)))


def _coordinates(codes: Any, basis: Any, rounding: str) -> tuple[Any, Any, Any]:
    """`C = (N - 1 c) T`, `c` and the inverse of `T`."""
    if rounding == "int8":
        low = ops.min(codes, axis=0, keepdims=True)
        high = ops.max(codes, axis=0, keepdims=True)
        center = ops.multiply(0.5, ops.add(low, high))
        half = ops.multiply(0.5, ops.subtract(high, low))
        # A column of one number has no range.
        half = ops.where(ops.greater(half, 0.0), half, ops.ones_like(half))[0]
        forth, back = ops.diag(ops.divide(1.0, half)), ops.diag(half)
    else:
        center = ops.mean(codes, axis=0, keepdims=True)
        # W = R^T Q^T, the rows of Q^T orthonormal: N W = (N R^T) Q^T.
        _, triangle = ops.qr(ops.transpose(basis), mode="reduced")
        size = triangle.shape[0]
        # Where W has not full rank, its directions without effect stay.
        tiny = ops.multiply(1e-6, ops.max(ops.abs(triangle)))
        diagonal = ops.diagonal(triangle)
        lost = ops.less_equal(ops.abs(diagonal), tiny)
        triangle = ops.add(
            triangle,
            ops.diag(ops.where(lost, tiny + 1e-30, ops.zeros_like(diagonal))),
        )
        forth = ops.transpose(triangle)
        back = ops.solve(forth, ops.eye(size, dtype="float32"))
    centred = ops.subtract(codes, center)
    return ops.matmul(centred, forth), center, back


def _round(coordinates: Any, rounding: str) -> tuple[Any, Any]:
    """Integers, and the scales of their blocks, which zeros fill up."""
    if rounding == "int8":
        # In [-1, 1] by construction.
        integers = ops.round(ops.multiply(127.0, coordinates))
        return (
            ops.clip(integers, -127.0, 127.0),
            ops.full((1, 1), 1 / 127.0, "float32"),
        )
    rows, rank = coordinates.shape
    columns = stored_columns(rank, rounding)
    coordinates = ops.pad(coordinates, [[0, 0], [0, columns - rank]])
    blocks = ops.reshape(coordinates, (rows, columns // BLOCK, BLOCK))
    largest = ops.max(ops.abs(blocks), axis=-1, keepdims=True)
    best, scales, least = None, None, None
    for clip in _CLIPS:
        # As they are stored: float16 numbers of bfloat16's precision.
        scale = ops.cast(
            ops.cast(ops.multiply(clip / 7.0, largest), "bfloat16"), "float32"
        )
        scale = ops.where(ops.greater(scale, 1e-4), scale, 1e-4)
        integers = ops.clip(ops.round(ops.divide(blocks, scale)), -8.0, 7.0)
        error = ops.sum(
            ops.square(ops.subtract(ops.multiply(integers, scale), blocks)),
            axis=-1,
            keepdims=True,
        )
        if best is None:
            best, scales, least = integers, scale, error
            continue
        better = ops.less(error, least)
        best = ops.where(better, integers, best)
        scales = ops.where(better, scale, scales)
        least = ops.where(better, error, least)
    return ops.reshape(best, (rows, columns)), ops.squeeze(scales, axis=-1)


def dequantize(integers: Any, scales: Any) -> Any:
    """The numbers that integers stand for, float32.

    Args:
        integers: As of `RoundedCodes`.
        scales: As of `RoundedCodes`.
    """
    if tuple(scales.shape) == (1, 1):
        return ops.multiply(integers, scales)
    return ops.multiply(integers, ops.repeat(scales, BLOCK, axis=1))
