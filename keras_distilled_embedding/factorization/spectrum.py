"""The singular values of a table, and the directions that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import check_finite_rows

# How much of the energy that a rank loses may be due to rounding.
TOLERANCE = 1e-4
# Mean squares of entries that float32 can still square and add up.
FLOAT32_RANGE = (1e-25, 1e25)
# From so many blocks on, a look at the first one is worth a pass over all.
PROBED_BLOCKS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition of `D^1/2 E L`, but for its left side.

    Attributes:
        energies: Squared singular values, float64 `(output_dim,)`,
            descending.
        directions: Right singular vectors, float64
            `(output_dim, output_dim)`, a column for each energy.
        dtype: The arithmetic that told them apart.
    """

    energies: np.ndarray
    directions: np.ndarray
    dtype: Any

    def error(self, rank: int) -> float:
        """Eckart-Young: the least share of the energy that a rank loses."""
        total = self.energies.sum()
        return float(self.energies[rank:].sum() / total) if total else 0.0


def spectrum_of(
    table: Table, rank: int | Callable[[Spectrum], int]
) -> Spectrum:
    """Decomposes a table in one pass, accurately at `rank`.

    The directions are eigenvectors of the Gram matrix `(EL)^T D (EL)`, a
    `V d^2` product. Squaring costs half of the digits: float32, twice as
    fast, tells apart singular values down to about 1e-3 of the largest.
    Where the rank reaches below, float64 does, down to 1e-7. A small table
    is then read a second time; of a large one the first block tells before.

    Args:
        table: The table.
        rank: Integer, or a function of the spectrum that returns it.

    Returns:
        The spectrum.

    Raises:
        ValueError: If rows are not finite.
    """
    num_rows, num_columns = table.shape
    if num_rows < num_columns:
        # The whole table is smaller than its Gram matrix.
        check_finite_rows(table.values)
        return _small_spectrum(table)
    if table.num_blocks < PROBED_BLOCKS or _is_enough(table.first_block, rank):
        gram = _gram(table, np.float32)
        if not np.isfinite(gram).all():
            check_finite_rows(table.values)  # or else only the squares are not
        else:
            spectrum = _decompose(gram, np.float32)
            if _is_resolved(spectrum, table, rank):
                return spectrum
    gram = _gram(table, np.float64)
    if table.values.dtype == np.float64 or not np.isfinite(gram).all():
        # What float64 holds, float32 may not.
        check_finite_rows(table.values)
    return _decompose(gram, np.float64)


def _is_enough(block: Table, rank: int | Callable[[Spectrum], int]) -> bool:
    """Whether float32 is, by this block alone."""
    gram = _gram(block, np.float32)
    if not np.isfinite(gram).all():
        return False
    # A block of zeros tells nothing.
    return not gram.any() or _is_resolved(
        _decompose(gram, np.float32), block, rank
    )


def _gram(table: Table, dtype: Any) -> np.ndarray:
    """Blocks are multiplied in `dtype` and added up in float64."""
    num_columns = table.shape[1]
    gram = np.zeros((num_columns, num_columns))
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in table.blocks(dtype):
            if table.row_weights is not None:
                roots = np.sqrt(table.row_weights[rows]).astype(dtype)
                block = roots[:, np.newaxis] * block
            gram += block.T @ block
        if table.metric is not None:
            gram = table.metric.T @ gram @ table.metric
    return gram


def _decompose(gram: np.ndarray, dtype: Any) -> Spectrum:
    energies, directions = np.linalg.eigh(gram)
    return Spectrum(np.maximum(energies[::-1], 0.0), directions[:, ::-1], dtype)


def _is_resolved(
    spectrum: Spectrum, table: Table, rank: int | Callable[[Spectrum], int]
) -> bool:
    """Whether rounding changes the error at this rank by next to nothing.

    Each of the `rank` directions may lose about `eps` times the largest
    energy.
    """
    if callable(rank):
        rank = rank(spectrum)
    energies = spectrum.energies
    smallest, largest = FLOAT32_RANGE
    mean_square = energies.sum() / table.total_weight / len(energies)
    rounding = rank * np.finfo(np.float32).eps * energies[0]
    return (
        smallest < mean_square < largest
        and rounding <= TOLERANCE * energies[rank:].sum()
    )


def _small_spectrum(table: Table) -> Spectrum:
    roots = np.sqrt(table.weights_of(slice(None)))[:, np.newaxis]
    scaled = roots * table.to_metric(table.values.astype(np.float64))
    _, values, directions = np.linalg.svd(scaled)
    energies = np.zeros(table.shape[1])
    energies[: len(values)] = values**2
    return Spectrum(energies, directions.T, np.float64)
