"""Factors in closed form, and alternating least squares."""

import math

import numpy as np

from keras_distilled_embedding.factorization.table import project
from keras_distilled_embedding.factorization.table import relative_error
from keras_distilled_embedding.factorization.table import row_blocks

# Smallest entry of an exact ReLU code, relative to the RMS of its row. ReLU
# has no gradient at 0, so every coefficient starts this far above it: enough
# to survive the first steps of an optimiser. On real tables, even a margin of
# 0.2 costs less than 1e-4 of the error.
MARGIN = 0.05
# A row of zeros has no scale of its own: rows count as no smaller than this
# share of the table's RMS.
SMALLEST_ROW_SCALE = 0.1
# Alternating least squares sweeps over the exact ReLU form. Their gain fades
# quickly: five give most of what twenty do.
SWEEPS = 5


def _right_singular_vectors(
    table: np.ndarray, weights: np.ndarray, rank: int
) -> np.ndarray:
    """Returns the leading `rank` of `D^1/2 E`, shape `(output_dim, rank)`.

    They are eigenvectors of the Gram matrix `E^T D E`, which one pass over the
    rows gives. Squaring costs half of the digits: float64 keeps singular
    values down to 1e-7 of the largest, float32 would keep 1e-3 of it.
    """
    num_rows, num_columns = table.shape
    if num_rows < num_columns:
        # The whole table is smaller than its Gram matrix.
        scaled = np.sqrt(weights)[:, np.newaxis] * table.astype(np.float64)
        return np.linalg.svd(scaled, full_matrices=False)[2][:rank].T
    gram = np.zeros((num_columns, num_columns))
    for rows, block in row_blocks(table):
        scaled = np.sqrt(weights[rows])[:, np.newaxis] * block
        gram += scaled.T @ scaled
    return np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]


def linear_factors(
    table: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the truncated SVD: `U = E V`, `W = V^T`."""
    directions = _right_singular_vectors(table, weights, rank)
    return balance(project(table, directions), directions.T)


def relu_factors(
    table: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the better of the closed form and its refinement.

    The sweeps cannot raise the error but by rounding, which is visible only
    where hardly any error is left.
    """
    if rank == 1:
        codes, basis, margin = _rank_one_start(table, weights)
    else:
        codes, basis, margin = _simplex_start(table, weights, rank)
    candidates = [balance(codes, basis)]
    for _ in range(SWEEPS):
        basis = _sweep(table, weights, codes, basis, margin)
    candidates.append(balance(codes, basis))
    return min(
        candidates,
        key=lambda factors: relative_error(table, weights, *factors),
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


def _simplex_start(
    table: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `U > 0`, `W`, equal to the SVD of rank - 1, and the margin."""
    vertices = _simplex_vertices(rank)
    directions = _right_singular_vectors(table, weights, rank - 1)
    points = project(table, directions)
    codes = (rank - 1) / rank * points @ vertices.T
    margin = _margin(codes)
    # The vertices sum to zero: a constant added to a row changes nothing.
    codes += margin - codes.min(axis=1, keepdims=True)
    return codes, vertices @ directions.T, margin


def _rank_one_start(
    table: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns non-negative `U`, `W` of rank 1, and the margin.

    One vertex spans no simplex, so only the rows on one side of the leading
    direction can be met: the side with more energy.
    """
    directions = _right_singular_vectors(table, weights, 1)
    codes = project(table, directions)
    if weights @ np.square(codes * (codes > 0)) < 0.5 * weights @ codes**2:
        codes, directions = -codes, -directions
    margin = _margin(codes)
    return np.maximum(codes, margin), directions.T, margin


def _margin(codes: np.ndarray) -> np.ndarray:
    """Returns the smallest entry a row may have, shape `(input_dim, 1)`."""
    row_scales = np.sqrt(np.square(codes).mean(axis=1, keepdims=True))
    table_scale = math.sqrt(np.square(row_scales).mean()) or 1.0
    return MARGIN * np.maximum(row_scales, SMALLEST_ROW_SCALE * table_scale)


def _sweep(
    table: np.ndarray,
    weights: np.ndarray,
    codes: np.ndarray,
    basis: np.ndarray,
    margin: np.ndarray,
) -> np.ndarray:
    """One sweep of alternating least squares, in one pass over the rows.

    Updates `codes` in place, given `basis`, and returns the basis that is
    optimal for them: `(N^T D N) W = N^T D E`.
    """
    gram = np.zeros((len(basis), len(basis)))
    cross = np.zeros(basis.shape)
    for rows, block in row_blocks(table):
        _descend_coordinates(codes[rows], block, basis, margin[rows])
        weighted = weights[rows, np.newaxis] * codes[rows]
        gram += weighted.T @ codes[rows]
        cross += weighted.T @ block
    # Least squares, because unused coordinates make the matrix singular.
    return np.linalg.lstsq(gram, cross, rcond=None)[0]


def _descend_coordinates(
    codes: np.ndarray, block: np.ndarray, basis: np.ndarray, margin: np.ndarray
) -> None:
    """Minimises `||E_i - N_i W||^2` over each column of `N >= margin` in turn.

    In place, for all rows at once. The minimum over `N_ij` is a parabola's,
    `N_ij + R_i W_j^T / ||W_j||^2`, clipped to the bound. The residual
    `R = E - N W` is never formed: `R W^T = E W^T - N (W W^T)`.
    """
    targets = block @ basis.T
    gram = basis @ basis.T
    for j in np.flatnonzero(np.diag(gram)):
        step = (targets[:, j] - codes @ gram[j]) / gram[j, j]
        np.maximum(codes[:, j] + step, margin[:, 0], out=codes[:, j])


def balance(
    codes: np.ndarray, basis: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 factors of the same product and equal RMS."""
    codes_scale = math.sqrt(np.square(codes).mean())
    basis_scale = math.sqrt(np.square(basis).mean())
    scale = 1.0
    if codes_scale and basis_scale:
        scale = math.sqrt(basis_scale / codes_scale)
    return (
        (codes * scale).astype(np.float32),
        (basis / scale).astype(np.float32),
    )
