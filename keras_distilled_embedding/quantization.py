"""Storage formats: how codes become small integers, and what that costs.

The only description of a format. The layer computes with what it rounds, the
planner counts its bytes, the exported file holds its integers.

A factorized table `F W + 1 c`, with the features `F = f(U)`, is also
`C B + 1 o`: the codes in other coordinates `C`, with a basis and an offset
that lead back. That is exact, and the choice of `C` decides what rounding
costs:

- int8, one scale for the whole table: each column is centered on the middle of
  its range and divided by half of it, so that all columns use all integers.
- int4, one scale for 32 numbers of a row: centered on the mean, in an
  orthonormal basis of what `W` spans, so that an error of the codes is an
  error of the table of the same size.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

# Rows that are rounded at a time for a file.
_ROWS_AT_A_TIME = 16_384
# Shares of the largest number of a block that are tried as its scale: a
# smaller one clips that number and rounds the others more finely.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_SMALLEST_SCALE = 2.0**-13  # which float16 and bfloat16 hold


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of storing a matrix as integers.

    Args:
        name: What users call it.
        bits: Bits of an integer.
        block: How many numbers of a row share one scale of two bytes, or
            `None` for one float32 scale for the whole matrix.
    """

    name: str
    bits: int
    block: int | None = None

    def stored_columns(self, columns: int) -> int:
        """Columns in the file, where zeros fill up the last block."""
        block = self.block or 1
        return -(-columns // block) * block

    def table_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix of integers with its scales.

        Args:
            rows: Number of rows.
            columns: Number of columns, before they are filled up.
        """
        columns = self.stored_columns(columns)
        scales = 4 if self.block is None else 2 * rows * (columns // self.block)
        return rows * columns * self.bits // 8 + scales

    def pack(self, integers: np.ndarray) -> np.ndarray:
        """Returns the bytes of integers, the first number in the low bits.

        Args:
            integers: int8 array `(rows, stored_columns)`.
        """
        per_byte = 8 // self.bits
        if per_byte == 1:
            return integers.reshape(-1).view("uint8")
        numbers = integers.reshape(-1, per_byte).view("uint8")
        numbers = numbers & np.uint8(2**self.bits - 1)
        shifts = np.arange(per_byte, dtype="uint8") * np.uint8(self.bits)
        return np.bitwise_or.reduce(numbers << shifts, axis=1)

    def round(
        self, values: Any, largest: float | None = None
    ) -> tuple[Any, Any]:
        """Rounds a matrix.

        Args:
            values: Float32 tensor `(rows, columns)`.
            largest: The largest magnitude of the whole matrix, where `values`
                are some of its rows.

        Returns:
            Whole numbers, float32 `(rows, stored_columns)`, and the scales
            that they are multiplied with: `(1, 1)`, or one a block.
        """
        if self.block is None:
            if largest is None:
                largest = ops.max(ops.abs(values))
            return self._round_with_one_scale(values, largest)
        return self._round_in_blocks(values)

    def _round_with_one_scale(
        self, values: Any, largest: Any
    ) -> tuple[Any, Any]:
        top = float(2 ** (self.bits - 1) - 1)
        scale = ops.divide(ops.cast(largest, "float32"), top)
        scale = ops.where(ops.greater(scale, 0.0), scale, 1.0)
        integers = ops.round(ops.divide(values, scale))
        return ops.clip(integers, -top, top), ops.reshape(scale, (1, 1))

    def _round_in_blocks(self, values: Any) -> tuple[Any, Any]:
        largest, size = float(2 ** (self.bits - 1) - 1), self.block or 1
        rows, columns = values.shape
        stored = self.stored_columns(columns)
        values = ops.pad(values, [[0, 0], [0, stored - columns]])
        blocks = ops.reshape(values, (rows, stored // size, size))
        maxima = ops.max(ops.abs(blocks), axis=-1, keepdims=True)
        best = scales = least = None
        for clip in _CLIPS:
            # As the file holds them: float16 with bfloat16's precision.
            scale = ops.cast(
                ops.cast(ops.multiply(clip / largest, maxima), "bfloat16"),
                "float32",
            )
            scale = ops.maximum(scale, _SMALLEST_SCALE)
            integers = ops.clip(
                ops.round(ops.divide(blocks, scale)), -largest - 1.0, largest
            )
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
        return ops.reshape(best, (rows, stored)), ops.squeeze(scales, axis=-1)


# Matrices of fewer numbers stay floats in a file of integers, as TensorFlow's
# converter has it: rounding them loses much and saves next to nothing.
SMALLEST_ROUNDED = 1024


def matrix_bytes(size: int) -> int:
    """Bytes of a matrix beside the tables, such as a basis, in such a file."""
    return size if size >= SMALLEST_ROUNDED else 4 * size


FORMATS = {
    found.name: found
    for found in (Format("int8", bits=8), Format("int4", bits=4, block=32))
}


def check_quantization(argument: str, value: Any) -> None:
    """Refuses what is neither `None` nor the name of a format.

    Args:
        argument: What the value is called where it is given.
        value: The value.

    Raises:
        ValueError: If it is something else.
    """
    if value is not None and value not in FORMATS:
        raise ValueError(
            f"`{argument}` must be None or one of {tuple(FORMATS)}. "
            f"Received: {argument}={value!r}"
        )


class RoundedTable(NamedTuple):
    """A factorized table as integers: `(scales * integers) basis + offset`.

    Args:
        integers: int8 array `(input_dim, k)`, with `k` the rank filled up to
            the format's columns.
        scales: Float32 array, as `Format.round` returns them.
        basis: `B`, float32 tensor `(k, output_dim)`.
        offset: `o`, float32 tensor `(output_dim,)`.
    """

    integers: Any
    scales: Any
    basis: Any
    offset: Any


def round_factors(
    features: Any, basis: Any, offset: Any, quantization: str
) -> RoundedTable:
    """Rounds a factorized table for a file.

    Args:
        features: `F`, the codes after their activation, float32
            `(input_dim, rank)`.
        basis: `W`, float32 `(rank, output_dim)`.
        offset: `c`, float32 `(output_dim,)`, or `None` for zeros.
        quantization: Name of a format.

    Returns:
        A `RoundedTable`.
    """
    kind = FORMATS[quantization]
    center, forth, back = _coordinates(features, basis, kind)
    rows, rank = features.shape
    integers = np.empty((rows, kind.stored_columns(rank)), "int8")
    scales = []
    for start in range(0, rows, _ROWS_AT_A_TIME):
        chunk = slice(start, start + _ROWS_AT_A_TIME)
        coordinates = ops.matmul(ops.subtract(features[chunk], center), forth)
        # One scale for all: the coordinates of int8 lie between -1 and 1.
        rounded, of_chunk = kind.round(coordinates, largest=1.0)
        integers[chunk] = ops.convert_to_numpy(rounded)
        scales.append(ops.convert_to_numpy(of_chunk))
    new_offset = ops.matmul(center, basis)[0]
    if offset is not None:
        new_offset = ops.add(new_offset, offset)
    padding = integers.shape[1] - rank
    return RoundedTable(
        integers,
        scales[0] if kind.block is None else np.concatenate(scales),
        ops.pad(ops.matmul(back, basis), [[0, padding], [0, 0]]),
        new_offset,
    )


def round_table(table: Any, quantization: str) -> tuple[Any, Any]:
    """Rounds a table that is stored as a whole, in its own coordinates.

    Args:
        table: `E`, float32 `(input_dim, output_dim)`.
        quantization: Name of a format.

    Returns:
        Integers and scales, as those of a `RoundedTable`.
    """
    return FORMATS[quantization].round(table)


def round_codes(features: Any, basis: Any, quantization: str) -> Any:
    """The features that a table has after rounding, in their own coordinates.

    Backward, rounding is taken for the identity (a straight-through
    gradient), and the basis gets no gradient through its part in the rounding.

    Args:
        features: As of `round_factors`.
        basis: As of `round_factors`.
        quantization: Name of a format.

    Returns:
        Float32 `(input_dim, rank)`.
    """
    kind = FORMATS[quantization]
    fixed = ops.stop_gradient(features)
    center, forth, back = _coordinates(fixed, ops.stop_gradient(basis), kind)
    coordinates = ops.matmul(ops.subtract(fixed, center), forth)
    rounded = dequantize(*kind.round(coordinates, largest=1.0))
    rounded = rounded[:, : coordinates.shape[1]]
    rounded = ops.add(ops.matmul(rounded, back), center)
    change = ops.stop_gradient(ops.subtract(rounded, features))
    return ops.add(features, change)


def dequantize(integers: Any, scales: Any) -> Any:
    """Returns the float32 numbers that integers stand for.

    Args:
        integers: As of a `RoundedTable`.
        scales: As of a `RoundedTable`.
    """
    if tuple(scales.shape) == (1, 1):
        return ops.multiply(integers, scales)
    block = integers.shape[1] // scales.shape[1]
    return ops.multiply(integers, ops.repeat(scales, block, axis=1))


def _coordinates(
    features: Any, basis: Any, kind: Format
) -> tuple[Any, Any, Any]:
    """Returns `m`, `T` and the inverse of `T`, for `C = (F - 1 m) T`."""
    if kind.block is None:
        low = ops.min(features, axis=0, keepdims=True)
        high = ops.max(features, axis=0, keepdims=True)
        center = ops.multiply(0.5, ops.add(low, high))
        half = ops.multiply(0.5, ops.subtract(high, low))
        # A constant column has no range.
        half = ops.where(ops.greater(half, 0.0), half, ops.ones_like(half))[0]
        forth, back = ops.diag(ops.divide(1.0, half)), ops.diag(half)
    else:
        center = ops.mean(features, axis=0, keepdims=True)
        # W = R^T Q^T, the rows of Q^T orthonormal: F W = (F R^T) Q^T. Zeros
        # make R square where there are more codes than columns.
        rank, columns = basis.shape
        wide = ops.pad(basis, [[0, 0], [0, max(0, rank - columns)]])
        _, triangle = ops.qr(ops.transpose(wide), mode="reduced")
        # Where W has not full rank, directions without effect stay as small
        # numbers, so that the triangle has an inverse.
        diagonal = ops.diagonal(triangle)
        tiny = ops.multiply(1e-6, ops.max(ops.abs(triangle)))
        lost = ops.less_equal(ops.abs(diagonal), tiny)
        triangle = ops.add(
            triangle,
            ops.diag(ops.where(lost, tiny + 1e-30, ops.zeros_like(diagonal))),
        )
        forth = ops.transpose(triangle)
        back = ops.solve(forth, ops.eye(triangle.shape[0], dtype="float32"))
        # Of an RMS near 1: two bytes hold the scales of neither tiny nor huge
        # numbers.
        squares = ops.matmul(
            ops.var(features, axis=0), ops.mean(ops.square(forth), axis=1)
        )
        unit = ops.where(ops.greater(squares, 0.0), ops.sqrt(squares), 1.0)
        forth, back = ops.divide(forth, unit), ops.multiply(back, unit)
    return center, forth, back
