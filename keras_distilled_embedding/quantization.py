"""Storage formats: how codes become small integers, and what that costs.

The only description of a format. The layer computes with what it rounds, the
planner counts its bytes, the exported file holds its integers.

The features `F = f(U)` of a factorized table `F W + 1 c` are rounded to

```
F~ = 1 m + s * (Q + shift)
```

with whole numbers `Q`, a center `m` of one number a column, and scales `s`: one
a row, or one a column. The center and the scales of columns cost a file
nothing, the offset and the basis take them up; a scale a row costs bytes, and
makes two bits as good as they can be. What is rounded matters as much as how:
`factorization.rounding` finds the coordinates.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

# Rows that are rounded at a time for a file.
_ROWS_AT_A_TIME = 16_384
# The steps of a uniform quantizer that loses least of Gaussian numbers of unit
# variance, by its bits; of 8 bits, the largest of a million numbers fits.
_STEPS = {2: 0.9957, 4: 0.3352, 8: 0.04}
# Scales of two bytes are kept above this: float16 and bfloat16 hold it.
_SMALLEST_SCALE = 2.0**-13


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of storing a matrix of codes as integers.

    Args:
        name: What users call it.
        bits: Bits of an integer.
        scale_bytes: What LiteRT needs for the scale of a row: 2 where a row
            is one block, 12 where it is a channel (a float32 and the int64
            of its zero point). 0: one scale a column.
        multiple: LiteRT takes rows of multiples of so many integers.
        shift: How far the levels are from whole numbers, in steps.
        is_delegated: Whether XNNPACK computes the product, or LiteRT's own
            loop, about ten times slower.
    """

    name: str
    bits: int
    scale_bytes: int = 0
    multiple: int = 1
    shift: float = 0.0
    is_delegated: bool = True

    @property
    def has_row_scales(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.scale_bytes > 0

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        half = 2 ** (self.bits - 1)
        # -128 would only make 8 bits lopsided.
        return -half + (self.bits == 8), half - 1

    @property
    def step(self) -> float:
        """The scale that suits Gaussian numbers of unit variance."""
        return _STEPS[self.bits]

    def stored_columns(self, columns: int) -> int:
        """Columns in the file.

        A shift of the levels by a part of a step is constant for one scale a
        column, and goes into the offset; with a scale a row it is a column of
        ones more. Zeros fill up the last `multiple`.
        """
        columns += self.has_row_scales and self.shift != 0
        return -(-columns // self.multiple) * self.multiple

    def table_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix of integers with its scales.

        Args:
            rows: Number of rows.
            columns: Number of columns, before they are filled up.
        """
        stored = self.stored_columns(columns)
        scales = rows * self.scale_bytes if self.has_row_scales else 4
        return rows * stored * self.bits // 8 + scales

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

    def grid(self, features: Any) -> tuple[Any, Any]:
        """The center and the scales that suit features as they are.

        Args:
            features: Float32 tensor `(rows, columns)`.

        Returns:
            Center `(columns,)`, and scales `(rows, 1)` or `(1, columns)`.
        """
        if self.bits == 8:
            low, high = ops.min(features, axis=0), ops.max(features, axis=0)
            center = ops.multiply(0.5, ops.add(low, high))
            scales = ops.divide(ops.subtract(high, low), 2 * self.levels[1])
            return center, ops.expand_dims(self.stored_scales(scales), 0)
        center = ops.mean(features, axis=0)
        squares = ops.square(ops.subtract(features, center))
        axis = 1 if self.has_row_scales else 0
        variances = ops.mean(squares, axis=axis, keepdims=True)
        return center, self.stored_scales(
            ops.multiply(self.step, ops.sqrt(variances))
        )

    def stored_scales(self, scales: Any) -> Any:
        """Scales as a file holds them: positive, those of two bytes rounded.

        To what float16 and bfloat16 both hold: the file has the one, XNNPACK
        makes the other of it.
        """
        if self.scale_bytes != 2:
            return ops.maximum(scales, 1e-30)
        scales = ops.cast(ops.cast(scales, "bfloat16"), "float32")
        return ops.maximum(scales, _SMALLEST_SCALE)

    def integers(self, features: Any, center: Any, scales: Any) -> Any:
        """The nearest whole numbers `Q`, float32, as large as `features`."""
        steps = ops.divide(ops.subtract(features, center), scales)
        return ops.clip(
            ops.round(ops.subtract(steps, self.shift)), *self.levels
        )

    def round(
        self, features: Any, center: Any, scales: Any, centered: bool = False
    ) -> Any:
        """Rounds features, so that they can be trained.

        Backward, rounding is taken for the identity (a straight-through
        gradient). The scales get the gradient of what they are multiplied
        with, the levels.

        Args:
            features: `F`, or some of its rows, float32 `(..., columns)`.
            center: `m`, float32 `(columns,)`.
            scales: `s`, float32 `(..., 1)` or `(1, columns)`.
            centered: Whether the center is to be left out.

        Returns:
            `F~`, or `F~ - 1 m`, like `features`.
        """
        features = ops.convert_to_tensor(features)  # also of `RoundedCodes`
        fixed = ops.stop_gradient(features)
        # Subtracted, for an exact zero that has a gradient.
        step = ops.subtract(
            ops.stop_gradient(self.stored_scales(scales)),
            ops.subtract(ops.stop_gradient(scales), scales),
        )
        # Few large arrays at a time, where no compiler plans them.
        rounded = ops.multiply(
            ops.add(
                self.integers(fixed, center, ops.stop_gradient(step)),
                self.shift,
            ),
            step,
        )
        if not centered:
            rounded = ops.add(rounded, center)
        return ops.subtract(rounded, ops.subtract(fixed, features))


# By name and by whether each row has a scale of its own.
_FORMATS = {
    (found.name, found.has_row_scales): found
    for found in (
        Format("int8", bits=8),
        Format("int4", bits=4, scale_bytes=2, multiple=32),
        Format("int4", bits=4, multiple=2),
        Format("int2", bits=2, scale_bytes=12, multiple=4, shift=0.5),
        Format("int2", bits=2, multiple=4, shift=0.5, is_delegated=False),
    )
}
QUANTIZATIONS = tuple(dict.fromkeys(name for name, _ in _FORMATS))


def formats_of(quantization: str) -> list[Format]:
    """The formats of that name, that with a scale a row first."""
    return [found for found in _FORMATS.values() if found.name == quantization]


def format_of(quantization: str, row_scales: bool = True) -> Format:
    """The format of that name, with a scale a row or without, if it can be.

    Args:
        quantization: Name of a format.
        row_scales: Whether each row is to have a scale of its own; 8 bits
            have none.
    """
    found = _FORMATS.get((quantization, row_scales))
    return found or formats_of(quantization)[0]


def as_format(quantization: str | Format | None) -> Format | None:
    """The format of that name, with a scale a row, or the format itself."""
    if isinstance(quantization, str):
        return format_of(quantization)
    return quantization


def name_of(quantization: str | Format | None) -> str:
    """What errors and reports call a format, or none."""
    kind = as_format(quantization)
    return "floats" if kind is None else kind.name


# Matrices of fewer numbers stay floats in a file of integers, as TensorFlow's
# converter has it: rounding them loses much and saves next to nothing.
SMALLEST_ROUNDED = 1024


def matrix_bytes(size: int) -> int:
    """Bytes of a matrix beside the tables, such as a basis, in such a file."""
    return size if size >= SMALLEST_ROUNDED else 4 * size


def check_quantization(argument: str, value: Any) -> None:
    """Refuses what is neither `None` nor the name of a format.

    Args:
        argument: What the value is called where it is given.
        value: The value.

    Raises:
        ValueError: If it is something else.
    """
    if value is not None and value not in QUANTIZATIONS:
        raise ValueError(
            f"`{argument}` must be None or one of {QUANTIZATIONS}. "
            f"Received: {argument}={value!r}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedCodes:
    """Codes as integers, `1 m + s * (Q + shift)`, read as an array is.

    In floats the codes of a large table can be most of a model's memory:
    whoever has a use for some rows at a time reads `codes[rows]`.

    Args:
        integers: `Q`, int8 `(input_dim, rank)`.
        center: `m`, float32 `(rank,)`.
        scales: `s`, float32 `(input_dim, 1)` or `(1, rank)`.
        kind: The format.
    """

    integers: np.ndarray
    center: np.ndarray
    scales: np.ndarray
    kind: Format
    dtype = np.dtype("float32")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape

    @property
    def size(self) -> int:
        return self.integers.size

    def __len__(self) -> int:
        return len(self.integers)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """The float32 codes of some rows."""
        scales = self.scales[rows] if self.kind.has_row_scales else self.scales
        levels = self.integers[rows] + np.float32(self.kind.shift)
        return levels * scales + self.center

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class StoredFactors(NamedTuple):
    """A factorized table as integers: `(scales * integers) basis + offset`.

    Args:
        integers: int8 array `(input_dim, k)`, with `k` the rank filled up to
            the format's columns.
        scales: Float32 array `(input_dim, 1)`, or `(1, 1)`.
        basis: Float32 array `(k, output_dim)`.
        offset: Float32 array `(output_dim,)`.
    """

    integers: np.ndarray
    scales: np.ndarray
    basis: np.ndarray
    offset: np.ndarray


def stored_factors(
    features: np.ndarray | RoundedCodes,
    center: np.ndarray,
    scales: np.ndarray,
    basis: np.ndarray,
    offset: np.ndarray | None,
    kind: Format,
) -> StoredFactors:
    """The integers of a factorized table, and what they are multiplied with.

    Args:
        features: `F`, the codes after their activation, float32
            `(input_dim, rank)`.
        center: `m`, float32 `(rank,)`.
        scales: `s`, float32 `(input_dim, 1)` or `(1, rank)`.
        basis: `W`, float32 `(rank, output_dim)`.
        offset: `c`, float32 `(output_dim,)`, or `None` for zeros.
        kind: The format.
    """
    rows, rank = features.shape
    scales = np.asarray(kind.stored_scales(scales), "float32")
    stored = np.zeros((kind.stored_columns(rank), basis.shape[1]), "float32")
    stored[:rank] = basis
    integers = np.zeros((rows, len(stored)), "int8")
    for start in range(0, rows, _ROWS_AT_A_TIME):
        chunk = slice(start, start + _ROWS_AT_A_TIME)
        integers[chunk, :rank] = ops.convert_to_numpy(
            kind.integers(
                features[chunk],
                center,
                scales[chunk] if kind.has_row_scales else scales,
            )
        )
    constant = center
    if not kind.has_row_scales:
        stored[:rank] *= scales.T
        constant = center + kind.shift * scales[0]
    elif kind.shift:
        stored[rank] = kind.shift * basis.sum(axis=0)
        integers[:, rank] = 1
    new_offset = constant @ basis
    if offset is not None:
        new_offset = new_offset + offset
    return StoredFactors(
        integers,
        scales if kind.has_row_scales else np.ones((1, 1), "float32"),
        stored,
        new_offset,
    )


def round_to_int8(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a table that is stored as a whole, with one scale.

    Args:
        table: `E`, float32 `(input_dim, output_dim)`.

    Returns:
        Integers, int8 as large as the table, and their scale `(1, 1)`.
    """
    largest = max(float(table.max()), -float(table.min()))
    scale = np.full((1, 1), largest / 127 or 1.0, "float32")
    integers = np.empty(table.shape, "int8")
    for start in range(0, len(table), _ROWS_AT_A_TIME):
        chunk = slice(start, start + _ROWS_AT_A_TIME)
        integers[chunk] = np.clip(np.round(table[chunk] / scale), -127, 127)
    return integers, scale
