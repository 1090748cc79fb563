"""Factors in closed form: the affine optimum of a rank.

With an offset ReLU costs nothing: a constant added to a column of the codes is
taken back by the offset,

```
P Q + 1 m = (P + 1 s) Q + 1 (m - s Q),
```

and `s` can be chosen so that all codes are positive.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from keras_distilled_embedding.factorization.spectrum import FLOAT32_RANGE
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import LostEnergy
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import row_blocks
from keras_distilled_embedding.factorization.table import squared_norms
from keras_distilled_embedding.quantization import RoundedCodes

# How far above zero the smallest code of each column starts, relative to the
# root mean square (RMS) of all codes. At exactly 0, ReLU has no gradient.
MARGIN = 0.05


class Factors(NamedTuple):
    """Factors of a table, `E ~ f(U) W + 1 c`.

    Args:
        codes: `U`, float32 `(input_dim, rank)`; where they are rounded, read
            like such an array.
        basis: `W`, float32 `(rank, output_dim)`.
        offset: `c`, float32 `(output_dim,)`, or `None`.
        lost: The energy that they lose, where it is known.
        center: Where the codes are rounded, the center of the grid, float32
            `(rank,)`.
        scales: Its scales, float32 `(input_dim, 1)` or `(1, rank)`.
    """

    codes: np.ndarray | RoundedCodes
    basis: np.ndarray
    offset: np.ndarray | None
    lost: LostEnergy | None = None
    center: np.ndarray | None = None
    scales: np.ndarray | None = None


def closed_form(
    table: Table, rank: int, uses_relu: bool, use_bias: bool
) -> Factors:
    """Returns the best factors of a rank, and what they lose.

    With an offset these are the principal components of the table around its
    mean, for ReLU and for no activation alike. Without one and without an
    activation they are the truncated singular value decomposition. ReLU
    without an offset keeps it in a column of constant codes, which leaves
    `rank - 1` columns for the principal components.

    Args:
        table: The table, with the weights of its rows and columns.
        rank: Integer, at least 1.
        uses_relu: Whether the activation is ReLU, or none.
        use_bias: Whether there is an offset.
    """
    in_column = uses_relu and not use_bias
    components = rank - in_column
    spectrum = spectrum_of(table, components, centered=use_bias or uses_relu)
    codes, basis, lost = _encode(table, spectrum, components, in_column)
    free = codes[:, :components]
    scale = rms(free)
    offset = spectrum.mean
    # Of the mean, where all rows are alike: it has to survive the shift.
    unit = scale or rms(offset[np.newaxis]) or 1.0
    if uses_relu:
        shift = MARGIN * unit - free.min(axis=0, initial=np.inf)
        free += shift.astype(np.float32)
        offset = offset - shift @ basis[:components]
    if in_column:
        # A constant of the size of the other codes.
        codes[:, -1] = unit
        basis[-1] = offset / unit
    codes, basis = balance(codes, basis, scale)
    return Factors(
        codes, basis, offset.astype(np.float32) if use_bias else None, lost
    )


def _encode(
    table: Table, spectrum: Spectrum, components: int, in_column: bool
) -> tuple[np.ndarray, np.ndarray, LostEnergy]:
    """Codes around the mean in one pass, their basis, and what they lose.

    Room is left for one more column, if it is asked for.
    """
    dtype = spectrum.dtype
    directions = spectrum.directions[:, :components]
    encoder = directions
    if table.metric is not None:
        encoder = table.metric @ encoder
    encoder = encoder.astype(dtype)
    mean = spectrum.mean.astype(dtype)
    columns = components + in_column
    basis = np.zeros((columns, table.shape[1]))
    basis[:components] = table.from_metric(directions.T)
    decoder = basis[:components].astype(dtype)
    # What a projection loses follows from the norms alone. Where a table is
    # large that saves a third of the work, for a digit less.
    from_norms = (
        dtype == np.float32 and table.metric is None and table.num_blocks > 1
    )
    codes = np.empty((len(table.values), columns), np.float32)
    lost = LostEnergy(table)
    for rows, block in table.blocks(dtype):
        centered = block - mean
        coded = centered @ encoder
        codes[rows, :components] = coded
        if from_norms:
            lost.add_projected(rows, block, centered, squared_norms(coded))
        else:
            coded = codes[rows, :components].astype(dtype, copy=False)
            lost.add(rows, block, coded @ decoder + mean)
    return codes, basis, lost


def balance(
    codes: np.ndarray, basis: np.ndarray, codes_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 factors of the same product and of equal RMS.

    Of all splits of the scale it is the one that an optimizer with steps of
    one size, such as Adam, disturbs least. Float32 codes are scaled in place.

    Args:
        codes: `(input_dim, rank)`.
        basis: `(rank, output_dim)`.
        codes_scale: The RMS of the codes around their shift.
    """
    basis_scale = rms(basis)
    scale = 1.0
    if codes_scale and basis_scale:
        scale = math.sqrt(basis_scale / codes_scale)
    codes = codes.astype(np.float32, copy=False)
    codes *= np.float32(scale)
    return codes, (basis / scale).astype(np.float32)


def rms(factor: np.ndarray | RoundedCodes) -> float:
    """The root mean square of a matrix, 0 for one without entries."""
    energy = 0.0
    if not factor.size:
        return energy
    for _, part in row_blocks(factor, factor.dtype):
        with np.errstate(over="ignore", under="ignore"):
            part_energy = float(np.square(part).sum(dtype=np.float64))
        mean_square = part_energy / part.size
        if not FLOAT32_RANGE[0] < mean_square < FLOAT32_RANGE[1]:
            # Float32 cannot square what it can hold.
            part_energy = float(np.square(part, dtype=np.float64).sum())
        energy += part_energy
    return math.sqrt(energy / factor.size)
