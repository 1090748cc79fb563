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
# Rows whose mean stands for that of all while the Gram matrix is summed.
SAMPLED_ROWS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The singular value decomposition of `D^1/2 (E - 1 m) L`.

    All but its left side.

    Attributes:
        energies: Squared singular values, float64 `(output_dim,)`,
            descending.
        directions: Right singular vectors, float64
            `(output_dim, output_dim)`, a column for each energy.
        mean: `m`, float64 `(output_dim,)`: the weighted mean of the rows, or
            zeros.
        total: The energy of the table itself, `||D^1/2 E L||^2`.
        dtype: The arithmetic that told the energies apart.
    """

    energies: np.ndarray
    directions: np.ndarray
    mean: np.ndarray
    total: float
    dtype: Any

    def error(self, rank: int) -> float:
        """Eckart-Young: the least share of the energy that a rank loses."""
        lost = self.energies[rank:].sum()
        return float(lost / self.total) if self.total else 0.0

    @property
    def shares(self) -> np.ndarray:
        """The share of the energy that each further rank keeps."""
        return self.energies / self.total if self.total else self.energies


def spectrum_of(
    table: Table, rank: int | Callable[[Spectrum], int], centered: bool
) -> Spectrum:
    """Decomposes a table in one pass, accurately at `rank`.

    The directions are eigenvectors of the Gram matrix `(EL)^T D (EL)`, a
    `V d^2` product. Squaring costs half of the digits: float32, twice as
    fast, tells apart singular values down to about 1e-3 of the largest.
    Where the rank reaches below, float64 does, down to 1e-7. A small table
    is then read a second time; of a large one the first block tells before.
    A table that was decomposed so before is not read again.

    Args:
        table: The table.
        rank: Integer, or a function of the spectrum that returns it.
        centered: Whether the mean of the rows is subtracted first.

    Returns:
        The spectrum.

    Raises:
        ValueError: If rows are not finite.
    """
    known = table.spectra.get(centered)
    if known is None:
        known = _spectrum_of(table, rank, centered)
    elif known.dtype == np.float32 and not _is_resolved(known, table, rank):
        known = _in_float64(table, centered)
    table.spectra[centered] = known
    return known


def _spectrum_of(
    table: Table, rank: int | Callable[[Spectrum], int], centered: bool
) -> Spectrum:
    num_rows, num_columns = table.shape
    if num_rows < num_columns:
        # The whole table is smaller than its Gram matrix.
        check_finite_rows(table.values)
        return _small_spectrum(table, centered)
    if table.num_blocks < PROBED_BLOCKS or _is_enough(
        table.first_block, rank, centered
    ):
        spectrum = _decompose(table, centered, np.float32)
        if spectrum is None:
            check_finite_rows(table.values)  # or else only the squares are not
        elif _is_resolved(spectrum, table, rank):
            return spectrum
    return _in_float64(table, centered)


def _in_float64(table: Table, centered: bool) -> Spectrum:
    spectrum = _decompose(table, centered, np.float64)
    if table.values.dtype == np.float64 or spectrum is None:
        # What float64 holds, float32 may not.
        check_finite_rows(table.values)
    assert spectrum is not None
    return spectrum


def _is_enough(
    block: Table, rank: int | Callable[[Spectrum], int], centered: bool
) -> bool:
    """Whether float32 is, by this block alone."""
    spectrum = _decompose(block, centered, np.float32)
    if spectrum is None:
        return False
    # A block of zeros tells nothing.
    return not spectrum.energies.any() or _is_resolved(spectrum, block, rank)


def _decompose(table: Table, centered: bool, dtype: Any) -> Spectrum | None:
    """The spectrum from the Gram matrix, `None` if that is not finite.

    Blocks are multiplied in `dtype` and added up in float64.
    """
    num_columns = table.shape[1]
    # Rows are taken around the mean of a few of them: the mean of all is
    # known only at the end, and may be large beside the differences.
    shift = _near_mean(table) if centered else np.zeros(num_columns)
    gram = np.zeros((num_columns, num_columns))
    total = np.zeros(num_columns)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in table.blocks(dtype):
            if centered:
                block = block - shift.astype(dtype)
            roots = np.sqrt(table.weights_of(rows)).astype(dtype)
            if table.row_weights is not None:
                block = roots[:, np.newaxis] * block
            total += roots @ block
            gram += block.T @ block
        # From around the shift to around the mean.
        change = total / table.total_weight
        mean = shift + change if centered else shift
        if centered:
            gram -= table.total_weight * np.outer(change, change)
        if table.metric is not None:
            gram = table.metric.T @ gram @ table.metric
    if not np.isfinite(gram).all():
        return None
    energies, directions = np.linalg.eigh(gram)
    energies = np.maximum(energies[::-1], 0.0)
    of_mean = table.total_weight * np.square(table.to_metric(mean)).sum()
    return Spectrum(
        energies, directions[:, ::-1], mean, energies.sum() + of_mean, dtype
    )


def _near_mean(table: Table) -> np.ndarray:
    """A vector near the mean of the rows, from a few of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = table.values[:SAMPLED_ROWS].astype(np.float64).mean(axis=0)
    return mean if np.isfinite(mean).all() else np.zeros_like(mean)


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
    mean_square = spectrum.total / table.total_weight / len(energies)
    rounding = max(rank, 1) * np.finfo(np.float32).eps * energies[0]
    return (
        smallest < mean_square < largest
        and rounding <= TOLERANCE * energies[rank:].sum()
    )


def _small_spectrum(table: Table, centered: bool) -> Spectrum:
    values = table.values.astype(np.float64)
    weights = table.weights_of(slice(None))
    mean = np.zeros(table.shape[1])
    if centered:
        mean = weights @ values / table.total_weight
    roots = np.sqrt(weights)[:, np.newaxis]
    _, singular, directions = np.linalg.svd(
        roots * table.to_metric(values - mean)
    )
    energies = np.zeros(table.shape[1])
    energies[: len(singular)] = singular**2
    total = float(np.square(roots * table.to_metric(values)).sum())
    return Spectrum(energies, directions.T, mean, total, np.float64)
