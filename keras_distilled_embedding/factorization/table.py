"""A table that need not fit in memory, read in chunks of rows.

What does not train is NumPy, in float64 and one chunk at a time.
"""

import math
from collections.abc import Iterator

import numpy as np

# Entries of the table held in float64 at a time (8 MiB).
CHUNK_ENTRIES = 2**20
TABLE_DTYPES = ("float16", "bfloat16", "float32", "float64")


def as_table(table) -> np.ndarray:
    table = np.asarray(table)  # Neither copies nor reads a memory map.
    if table.dtype.name not in TABLE_DTYPES:
        raise ValueError(
            f"table must have one of the dtypes {TABLE_DTYPES}. "
            f"Received: dtype {table.dtype.name!r}"
        )
    if table.ndim != 2 or table.size == 0:
        raise ValueError(
            "table must be a non-empty matrix of shape (input_dim, "
            f"output_dim). Received: shape {table.shape}"
        )
    return table


def as_row_weights(row_weights, num_rows: int) -> np.ndarray:
    """Returns float64 weights, the largest of which is 1."""
    if row_weights is None:
        return np.ones(num_rows)
    try:
        weights = np.asarray(row_weights).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"row_weights must be numbers. Received: {row_weights!r}"
        ) from error
    if weights.shape != (num_rows,):
        raise ValueError(
            "row_weights must have one weight for each row of the table, "
            f"shape ({num_rows},). Received: shape {weights.shape}"
        )
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError(
            "row_weights must be finite and not negative. Received: "
            f"row_weights={weights!r}"
        )
    if weights.max() == 0:
        raise ValueError(
            "row_weights must have a positive sum. Received: only zeros"
        )
    return weights / weights.max()


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
            for rows, block in row_blocks(table, dtype=np.float32)
        ]
    )
    if bad_rows.size:
        first = ", ".join(map(str, bad_rows[:5]))
        raise ValueError(
            "table must be finite in float32. Received: a table with NaN, "
            f"infinite or too large values in {bad_rows.size} of its "
            f"{len(table)} rows, the first of them {first}"
        )


def row_blocks(
    table: np.ndarray, dtype=np.float64
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields slices that cover the rows, and those rows in `dtype`."""
    num_rows, num_columns = table.shape
    size = max(1, CHUNK_ENTRIES // num_columns)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        with np.errstate(over="ignore"):
            block = np.asarray(table[rows], dtype=dtype)
        yield rows, block


def project(table: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns `E V`, float64, for `directions` `V` `(output_dim, k)`."""
    return np.concatenate(
        [block @ directions for _, block in row_blocks(table)]
    )


def relative_error(
    table: np.ndarray,
    weights: np.ndarray,
    activations: np.ndarray,
    basis: np.ndarray,
) -> float:
    """Returns `||D^1/2 (E - f(U) W)||_F^2 / ||D^1/2 E||_F^2`."""
    basis = basis.astype(np.float64)
    lost = energy = 0.0
    for rows, block in row_blocks(table):
        residual = block - activations[rows].astype(np.float64) @ basis
        lost += weights[rows] @ np.square(residual).sum(axis=1)
        energy += weights[rows] @ np.square(block).sum(axis=1)
    return float(lost / energy) if energy > 0 else 0.0


def weighted_rms(table: np.ndarray, weights: np.ndarray) -> float:
    """Returns the root mean square entry, rows weighted."""
    energy = sum(
        weights[rows] @ np.square(block).mean(axis=1)
        for rows, block in row_blocks(table)
    )
    return math.sqrt(energy / weights.sum())
