"""A table that need not fit in memory, and how its errors are weighed.

Whatever reads the table reads it in blocks of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_distilled_embedding.quantization import RoundedCodes

# Entries of the table held in memory at a time (16 MiB in float32).
CHUNK_ENTRIES = 2**22
TABLE_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Directions in which hidden states hardly ever point count as if they had
# this share of the largest second moment, so that the metric has an inverse.
SMALLEST_MOMENT = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table `E` with the norm in which its factors are to be near it.

    The squared norm of a difference `X` is `||D^1/2 X L||_F^2`.

    Args:
        values: `E`, float array of shape `(input_dim, output_dim)`.
        row_weights: The diagonal of `D`, float64 array `(input_dim,)` whose
            largest entry is 1, or `None` for ones.
        metric: `L`, float64 array `(output_dim, output_dim)` with `L L^T` the
            column weights, or `None` for the identity.
        inverse_metric: `L^-1`, or `None`.
    """

    values: np.ndarray
    row_weights: np.ndarray | None = None
    metric: np.ndarray | None = None
    inverse_metric: np.ndarray | None = None
    # What `spectrum_of` has found, by whether the mean is subtracted.
    spectra: dict[bool, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def of(
        cls, values: Any, row_weights: Any = None, column_weights: Any = None
    ) -> Table:
        """Checks what a user gives; reads no row yet.

        Args:
            values: As of `factorize`.
            row_weights: As of `factorize`.
            column_weights: As of `factorize`.

        Returns:
            The table.
        """
        values = as_table(values)
        if row_weights is not None:
            row_weights = as_row_weights(row_weights, len(values))
        return cls(
            values, row_weights, *as_metric(column_weights, values.shape[1])
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    @property
    def is_weighted(self) -> bool:
        return self.row_weights is not None or self.metric is not None

    @property
    def total_weight(self) -> float:
        if self.row_weights is None:
            return float(len(self.values))
        return float(self.row_weights.sum())

    @property
    def num_blocks(self) -> int:
        """How many `blocks` there are."""
        return math.ceil(len(self.values) / _rows_of_a_block(self.values))

    @property
    def first_block(self) -> Table:
        """The first of the `blocks`, a table of its own."""
        rows = slice(_rows_of_a_block(self.values))
        weights = self.row_weights
        return dataclasses.replace(
            self,
            values=self.values[rows],
            row_weights=None if weights is None else weights[rows],
        )

    def blocks(self, dtype: Any = np.float32) -> Iterator[tuple]:
        """Yields slices that cover the rows, and those rows in `dtype`."""
        return row_blocks(self.values, dtype)

    @functools.cached_property
    def farthest_rows(self) -> np.ndarray:
        """Ids of all rows, those farthest from the middle of them first."""
        middle = self.values[:: max(1, len(self.values) // 1000)]
        mean = middle.astype(np.float32).mean(axis=0)
        norms = [squared_norms(block - mean) for _, block in self.blocks()]
        return np.argsort(-np.concatenate(norms), kind="stable")

    def weights_of(self, rows: Any) -> np.ndarray:
        """The float64 weights of some rows."""
        if self.row_weights is None:
            return np.ones(len(self.values[rows]))
        return self.row_weights[rows]

    def to_metric(self, block: np.ndarray) -> np.ndarray:
        """`X L`, in which the plain norm is the weighted one of `X`."""
        if self.metric is None:
            return block
        return block @ self.metric.astype(block.dtype)

    def from_metric(self, basis: np.ndarray) -> np.ndarray:
        """`X` from `X L`."""
        if self.inverse_metric is None:
            return basis
        return basis @ self.inverse_metric

    def rms(self) -> float:
        """The root mean square entry of `D^1/2 E L`, rows by their weight."""
        energy = sum(
            self.weights_of(rows) @ squared_norms(self.to_metric(block))
            for rows, block in self.blocks(np.float64)
        )
        return math.sqrt(energy / self.total_weight / self.shape[1])


def as_table(table: Any) -> np.ndarray:
    table = np.asarray(table)  # Neither copies nor reads a memory map.
    if table.dtype.name not in TABLE_DTYPES:
        raise ValueError(
            f"`table` must have one of the dtypes {TABLE_DTYPES}. "
            f"Received: dtype {table.dtype.name!r}"
        )
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            "`table` must be a non-empty matrix of shape (input_dim, "
            f"output_dim). Received: shape {table.shape}"
        )
    return table


def as_row_weights(row_weights: Any, num_rows: int) -> np.ndarray:
    """Returns float64 weights, the largest of which is 1."""
    weights = _as_numbers("row_weights", row_weights)
    if weights.shape != (num_rows,):
        raise ValueError(
            "`row_weights` must have one weight for each row of the table, "
            f"shape ({num_rows},). Received: shape {weights.shape}"
        )
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError(
            "`row_weights` must be finite and not negative. Received: "
            f"row_weights={weights!r}"
        )
    if weights.max() == 0:
        raise ValueError(
            "`row_weights` must have a positive sum. Received: only zeros"
        )
    return weights / weights.max()


def as_metric(
    column_weights: Any, num_columns: int
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Returns `L` with `L L^T = C`, and its inverse."""
    if column_weights is None:
        return None, None
    weights = _as_numbers("column_weights", column_weights)
    shape = (num_columns, num_columns)
    if weights.shape != shape:
        raise ValueError(
            "`column_weights` must be a second moment of hidden states, of "
            f"shape {shape}. Received: shape {weights.shape}"
        )
    largest = np.abs(weights).max()
    if not np.isfinite(largest) or not np.allclose(
        weights, weights.T, rtol=0, atol=1e-6 * largest
    ):
        raise ValueError(
            "`column_weights` must be finite and symmetric. Received: "
            f"column_weights={weights!r}"
        )
    moments, directions = np.linalg.eigh(weights)
    if moments[-1] <= 0 or moments[0] < -1e-4 * moments[-1]:
        raise ValueError(
            "`column_weights` must be positive semidefinite and not zero. "
            f"Received: eigenvalues from {moments[0]} to {moments[-1]}"
        )
    moments = np.maximum(moments / moments[-1], SMALLEST_MOMENT)
    return directions * np.sqrt(moments), (directions / np.sqrt(moments)).T


def _as_numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be numbers. Received: {value!r}"
        ) from error


def check_finite_rows(table: np.ndarray) -> None:
    """Refuses a table with values that float32 does not hold.

    Args:
        table: floating-point array of shape `(input_dim, output_dim)`.

    Raises:
        ValueError: naming how many rows there are, and the first of them.
    """
    bad_rows = np.concatenate(
        [
            rows.start + np.flatnonzero(~np.isfinite(block).all(axis=1))
            for rows, block in row_blocks(table)
        ]
    )
    if bad_rows.size:
        first = ", ".join(map(str, bad_rows[:5]))
        raise ValueError(
            "`table` must be finite in float32. Received: a table with NaN, "
            f"infinite or too large values in {bad_rows.size} of its "
            f"{len(table)} rows, the first of them {first}"
        )


def row_blocks(
    table: np.ndarray | RoundedCodes, dtype: Any = np.float32
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices that cover the rows, and those rows in `dtype`."""
    num_rows, size = len(table), _rows_of_a_block(table)
    mapping = _mapping(table)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        with np.errstate(over="ignore"):
            block = np.asarray(table[rows], dtype=dtype)
        yield rows, block
        if mapping is not None:
            # Read and no longer needed: not to count as this process's memory.
            mapping.madvise(mmap.MADV_DONTNEED)


def _rows_of_a_block(table: np.ndarray | RoundedCodes) -> int:
    return max(1, CHUNK_ENTRIES // table.shape[1])


def _mapping(array: Any) -> mmap.mmap | None:
    """The file that an array is a view of, where its pages may be dropped."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return None
    while array is not None:
        # With mode "c" they would be lost: changes are in memory alone.
        if isinstance(array, np.memmap) and array.mode in ("r", "r+"):
            return getattr(array, "_mmap")  # noqa: B009
        array = getattr(array, "base", None)
    return None


def squared_norms(block: np.ndarray) -> np.ndarray:
    """The squared norm of every row."""
    return np.einsum("ij,ij->i", block, block)


class LostEnergy:
    """The share of a table's energy that factors lose, summed over blocks.

    Args:
        table: The table.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        # Weighted and plain.
        self._lost = np.zeros(2)
        self._energy = np.zeros(2)

    def add(
        self, rows: slice, block: np.ndarray, reconstruction: np.ndarray
    ) -> None:
        """Adds some rows of the table and what the factors make of them."""
        self._energy += self._energies(rows, block)
        self._lost += self._energies(rows, block - reconstruction)

    def add_projected(
        self,
        rows: slice,
        block: np.ndarray,
        centered: np.ndarray,
        kept: np.ndarray,
    ) -> None:
        """Adds rows and their orthogonal projections, by Pythagoras.

        Args:
            rows: Slice of the rows.
            block: The rows of a table without a metric.
            centered: The same around the offset of the projection.
            kept: The squared norms of the projections of these.
        """
        energies = squared_norms(block).astype(np.float64)
        lost = squared_norms(centered).astype(np.float64) - kept
        weights = self._table.weights_of(rows)
        self._energy += weights @ energies, energies.sum()
        self._lost += weights @ lost, lost.sum()

    def _energies(self, rows: slice, block: np.ndarray) -> np.ndarray:
        plain = squared_norms(block).astype(np.float64)
        if not self._table.is_weighted:
            return np.full(2, plain.sum())
        weighted = plain
        if self._table.metric is not None:
            weighted = squared_norms(self._table.to_metric(block))
        return np.array([self._table.weights_of(rows) @ weighted, plain.sum()])

    @property
    def relative(self) -> float:
        """`||D^1/2 (E - E~) L||_F^2 / ||D^1/2 E L||_F^2`, 0 for 0 / 0."""
        return self._share(0)

    @property
    def relative_unweighted(self) -> float:
        """`||E - E~||_F^2 / ||E||_F^2`, 0 for 0 / 0."""
        return self._share(1)

    def _share(self, index: int) -> float:
        energy = self._energy[index]
        # Of a projection that loses nothing, rounding may be below zero.
        lost = max(self._lost[index], 0.0)
        return float(lost / energy) if energy > 0 else 0.0


def lost_energy(
    table: Table,
    reconstruct: Callable[[slice], np.ndarray],
    dtype: Any = np.float32,
) -> LostEnergy:
    """Measures factors in one pass over the table.

    Args:
        table: The table.
        reconstruct: Function of a slice that returns those rows.
        dtype: Of the arithmetic.
    """
    lost = LostEnergy(table)
    for rows, block in table.blocks(dtype):
        lost.add(rows, block, reconstruct(rows))
    return lost
