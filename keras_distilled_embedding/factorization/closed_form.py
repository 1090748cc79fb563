"""Factors in closed form, and alternating least squares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_distilled_embedding.factorization.spectrum import FLOAT32_RANGE
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import LostEnergy
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import lost_energy
from keras_distilled_embedding.factorization.table import row_blocks
from keras_distilled_embedding.factorization.table import squared_norms

# Smallest entry of an exact ReLU code, relative to the RMS of its row. ReLU
# has no gradient at 0, so every coefficient starts this far above it: enough
# to survive the first steps of an optimiser. On real tables, even a margin of
# 0.2 costs less than 1e-4 of the error.
MARGIN = 0.05
# A row of zeros has no scale of its own: rows count as no smaller than this
# share of the table's RMS.
SMALLEST_ROW_SCALE = 0.1
# A share of the energy that is no more than rounding: sweeps gain nothing.
NEGLIGIBLE = 1e-10


@dataclasses.dataclass(frozen=True, eq=False)
class _ReluStart:
    """The closed form, before any sweep.

    Attributes:
        codes: `U > 0`, float32 `(input_dim, rank)`.
        basis: `W` in the table's metric, `(rank, output_dim)`.
        margins: Smallest entry each row may have, `(input_dim, 1)`.
        lost: What the factors lose.
        dtype: Of the arithmetic.
    """

    codes: np.ndarray
    basis: np.ndarray
    margins: np.ndarray
    lost: LostEnergy
    dtype: Any


def linear_factors(
    table: Table, rank: int
) -> tuple[np.ndarray, np.ndarray, LostEnergy]:
    """Returns the truncated SVD, `U = E V`, `W = V^T`, and what it loses."""
    spectrum = spectrum_of(table, rank)
    directions = spectrum.directions[:, :rank]
    start = _encode(table, spectrum, directions, directions.T, stretch=1.0)
    return (
        *balance(start.codes, table.from_metric(start.basis)),
        start.lost,
    )


def relu_factors(
    table: Table, rank: int, sweeps: int
) -> tuple[np.ndarray, np.ndarray, LostEnergy]:
    """Returns the closed form, refined by alternating least squares.

    The sweeps cannot raise the error but by rounding, which is visible only
    where hardly any error is left: the closed form is made again then, since
    a copy of it would be as large as the codes.
    """
    make_start = _rank_one_start if rank == 1 else _simplex_start
    start = make_start(table, rank)
    basis, lost = start.basis, start.lost
    if sweeps and lost.relative > NEGLIGIBLE:
        for _ in range(sweeps):
            basis = _sweep(table, start, basis)
        lost = _lost_by(table, start, basis)
        if lost.relative > start.lost.relative:
            start = make_start(table, rank)
            basis, lost = start.basis, start.lost
    return (*balance(start.codes, table.from_metric(basis)), lost)


def _encode(
    table: Table,
    spectrum: Spectrum,
    encoder: np.ndarray,
    basis: np.ndarray,
    stretch: float | None,
    lift: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> _ReluStart:
    """Codes of all rows in one pass over the table, and what they lose.

    Args:
        table: The table.
        spectrum: Its spectrum.
        encoder: Float64 `(output_dim, rank)`: the codes are `E L` times it.
        basis: Float64 `(rank, output_dim)`, in the metric.
        stretch: `||n W||^2 / ||n||^2` for all codes `n`, where they are a
            projection of the rows; `None` where they are not.
        lift: Function of codes `(n, rank)` and their squared norms that lifts
            the codes above zero, in place, and returns margins `(n, 1)`.
    """
    dtype = spectrum.dtype
    if table.metric is not None:
        encoder = table.metric @ encoder
    encoder = encoder.astype(dtype)
    decoder = table.from_metric(basis).astype(dtype)
    # What a projection loses follows from the norms alone: a third of the
    # work, for a digit less, where a table is large.
    from_norms = (
        stretch is not None
        and dtype == np.float32
        and table.metric is None
        and table.num_blocks > 1
    )
    codes = np.empty((len(table.values), len(basis)), np.float32)
    margins = np.zeros((len(codes), 1), np.float32)
    lost = LostEnergy(table)
    for rows, block in table.blocks(dtype):
        coded = block @ encoder
        norms = squared_norms(coded)
        if lift is not None:
            margins[rows] = lift(coded, norms)
        codes[rows] = coded
        if from_norms:
            lost.add_projected(rows, block, stretch * norms)
        else:
            coded = codes[rows].astype(dtype, copy=False)
            lost.add(rows, block, coded @ decoder)
    return _ReluStart(codes, basis, margins, lost, dtype)


def _lost_by(table: Table, start: _ReluStart, basis: np.ndarray) -> LostEnergy:
    decode = table.from_metric(basis).astype(start.dtype)
    return lost_energy(
        table,
        lambda rows: start.codes[rows].astype(start.dtype, copy=False) @ decode,
        start.dtype,
    )


def _simplex_vertices(rank: int) -> np.ndarray:
    """Returns the `S` of a regular simplex, shape `(rank, rank - 1)`.

    The rows have unit length and sum to zero, and
    `S^T S = rank / (rank - 1) I`: scaled cosines of the DCT-II.
    """
    frequencies = np.arange(1, rank)
    positions = np.arange(rank)[:, np.newaxis] + 0.5
    cosines = np.cos(np.pi / rank * positions * frequencies)
    return math.sqrt(2 / (rank - 1)) * cosines


def _simplex_start(table: Table, rank: int) -> _ReluStart:
    """`U > 0`, `W`, equal to the SVD of rank - 1."""
    vertices = _simplex_vertices(rank)
    spectrum = spectrum_of(table, rank - 1)
    directions = spectrum.directions[:, : rank - 1]
    # S^T S scales the norm of a row's coordinates.
    stretch = rank / (rank - 1)
    scale = _mean_scale(table, spectrum, rank) / math.sqrt(stretch)

    def lift(codes: np.ndarray, norms: np.ndarray) -> np.ndarray:
        margins = _margins(norms, rank, scale)
        # The vertices sum to zero: a constant added to a row changes nothing.
        codes += margins - codes.min(axis=1, keepdims=True)
        return margins

    return _encode(
        table,
        spectrum,
        directions @ vertices.T / stretch,
        vertices @ directions.T,
        stretch,
        lift,
    )


def _rank_one_start(table: Table, rank: int = 1) -> _ReluStart:
    """Non-negative `U`, `W` of rank 1.

    One vertex spans no simplex, so only the rows on one side of the leading
    direction can be met: the side with more energy.
    """
    spectrum = spectrum_of(table, rank)
    directions = spectrum.directions[:, :1]
    inner = directions if table.metric is None else table.metric @ directions
    # The energy above zero minus that below.
    surplus = 0.0
    for rows, block in table.blocks(np.float64):
        points = (block @ inner)[:, 0]
        surplus += table.weights_of(rows) @ (points * np.abs(points))
    if surplus < 0:
        directions = -directions
    scale = _mean_scale(table, spectrum, rank)

    def lift(codes: np.ndarray, norms: np.ndarray) -> np.ndarray:
        margins = _margins(norms, rank, scale)
        np.maximum(codes, margins, out=codes)
        return margins

    return _encode(table, spectrum, directions, directions.T, None, lift)


def _mean_scale(table: Table, spectrum: Spectrum, rank: int) -> float:
    """The RMS entry of `rank` codes whose rows keep their norm."""
    kept = spectrum.energies[: max(1, rank - 1)].sum()
    return math.sqrt(kept / table.total_weight / rank) or 1.0


def _margins(norms: np.ndarray, rank: int, table_scale: float) -> np.ndarray:
    """The smallest entries that codes may have, from their squared norms."""
    row_scales = np.sqrt(norms / rank)
    margins = MARGIN * np.maximum(row_scales, SMALLEST_ROW_SCALE * table_scale)
    return margins[:, np.newaxis].astype(norms.dtype)


def _sweep(table: Table, start: _ReluStart, basis: np.ndarray) -> np.ndarray:
    """One sweep of alternating least squares, in one pass over the rows.

    Updates the codes in place, given `basis`, and returns the basis that is
    optimal for them: `(N^T D N) W = N^T D E`. Both in the table's metric.
    """
    dtype = start.dtype
    outer = basis if table.metric is None else basis @ table.metric.T
    outer = outer.astype(dtype)
    inner = (basis @ basis.T).astype(dtype)
    gram = np.zeros((len(basis), len(basis)))
    cross = np.zeros(basis.shape)
    for rows, block in table.blocks(dtype):
        codes = np.ascontiguousarray(start.codes[rows].T, dtype)
        margins = start.margins[rows, 0].astype(dtype, copy=False)
        _descend_coordinates(codes, outer @ block.T, inner, margins)
        start.codes[rows] = codes.T
        weighted = codes
        if table.row_weights is not None:
            weighted = table.row_weights[rows].astype(dtype) * codes
        gram += weighted @ codes.T
        cross += weighted @ block
    # Least squares, because unused coordinates make the matrix singular.
    return np.linalg.lstsq(gram, table.to_metric(cross), rcond=None)[0]


def _descend_coordinates(
    codes: np.ndarray,
    targets: np.ndarray,
    gram: np.ndarray,
    margins: np.ndarray,
) -> None:
    """Minimises `||E_i - N_i W||^2` over each column of `N >= margin` in turn.

    In place, for all rows at once. The minimum over `N_ij` is a parabola's,
    `N_ij + R_i W_j^T / ||W_j||^2`, clipped to the bound. The residual
    `R = E - N W` is never formed: `R W^T = E W^T - N (W W^T)`.

    Args:
        codes: `N^T`, `(rank, n)`: what is updated lies side by side.
        targets: `W E^T`, `(rank, n)`.
        gram: `W W^T`, `(rank, rank)`.
        margins: `(n,)`.
    """
    for j in np.flatnonzero(np.diag(gram)):
        step = (targets[j] - gram[j] @ codes) / gram[j, j]
        np.maximum(codes[j] + step, margins, out=codes[j])


def balance(
    codes: np.ndarray, basis: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 factors of the same product and equal RMS.

    Float32 codes are scaled in place.
    """
    codes_scale = _rms(codes)
    basis_scale = _rms(basis)
    scale = 1.0
    if codes_scale and basis_scale:
        scale = math.sqrt(basis_scale / codes_scale)
    codes = codes.astype(np.float32, copy=False)
    codes *= np.float32(scale)
    return codes, (basis / scale).astype(np.float32)


def _rms(factor: np.ndarray) -> float:
    energy = 0.0
    for _, part in row_blocks(factor, factor.dtype):
        with np.errstate(over="ignore", under="ignore"):
            part_energy = float(np.vdot(part, part))
        mean_square = part_energy / part.size
        if not FLOAT32_RANGE[0] < mean_square < FLOAT32_RANGE[1]:
            # Float32 cannot square what it can hold.
            part_energy = float(np.square(part, dtype=np.float64).sum())
        energy += part_energy
    return math.sqrt(energy / factor.size)
