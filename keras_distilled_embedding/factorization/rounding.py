"""Factors whose codes are rounded so that the logits change least.

Four things, none of which costs anything where the table is used:

- The columns of the codes are made alike: principal components, scaled
  half-way to one variance and turned at random. One scale then suits all codes
  of a row. The basis leads back.
- What the rounding of a column loses is handed to the columns still to come
  (error feedback), in the least-squares sense of the metric: that of the
  hidden states, where it is known.
- Basis and offset are fitted to the rounded codes by least squares.
- ReLU wants codes above zero: a constant lifts them, the offset takes it back.

References:
- [Frantar et al., 2023](https://arxiv.org/abs/2210.17323), "GPTQ: Accurate
  Post-Training Quantization for Generative Pre-trained Transformers"
- [Ashkboos et al., 2024](https://arxiv.org/abs/2404.00456), "QuaRot:
  Outlier-Free 4-Bit Inference in Rotated LLMs"
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.closed_form import MARGIN
from keras_distilled_embedding.factorization.closed_form import Factors
from keras_distilled_embedding.factorization.closed_form import closed_form
from keras_distilled_embedding.factorization.closed_form import rms
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import row_blocks
from keras_distilled_embedding.factorization.table import squared_norms
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import RoundedCodes

# Principal components are divided by their variance to this power: 0 would
# leave them, 0.5 would give all of them one variance. Of what was tried on
# MiniLM's table with a made-up metric, this lost least.
_EVENING = 0.25
# Variances below this share of the largest count as it.
_SMALLEST_VARIANCE = 1e-10
# What is added to the metric's diagonal, as a share of its mean.
_DAMPING = 1e-4
# Columns after which errors are handed on by one product of matrices, and rows
# that are rounded at a time.
_COLUMNS_AT_A_TIME, _ROWS_AT_A_TIME = 64, 8_192
# Rows that stand for a table where its scales or its loss are estimated; those
# farthest from the others are added for the scales.
_SAMPLED_ROWS, _LARGEST_ROWS = 4_096, 64
# Scales of columns that are tried, relative to what suits Gaussian numbers.
_RELATIVE_SCALES = np.geomspace(0.7, 16.0, 24)


def can_round(kind: Format, uses_relu: bool, use_bias: bool) -> bool:
    """Whether a format holds factors of a form.

    ReLU without an offset keeps it in a column of constant codes, which half
    steps of a row's own scale do not hold.
    """
    in_column = uses_relu and not use_bias
    return not (in_column and kind.has_row_scales and kind.shift)


def rounded_factors(
    table: Table,
    rank: int,
    kind: Format,
    uses_relu: bool,
    use_bias: bool,
    seed: int = 0,
) -> Factors:
    """Factors of a rank whose features are rounded; not what they lose.

    Two passes over the table, or three for scales of columns, and no more
    memory than the integers, a block of rows and a few `d^2`.

    Args:
        table: The table, with the weights of its rows and columns.
        rank: Integer, at least 1.
        kind: The storage format.
        uses_relu: Whether the activation is ReLU, or none.
        use_bias: Whether there is an offset.
        seed: Integer, the seed of the rotation.
    """
    in_column = uses_relu and not use_bias
    centered = use_bias or uses_relu
    components = rank - in_column
    if components == 0:  # the same row for all
        factors = closed_form(table, rank, uses_relu, use_bias)
        center, scales = map(ops.convert_to_numpy, kind.grid(factors.codes))
        return factors._replace(lost=None, center=center, scales=scales)
    spectrum = spectrum_of(table, components, centered)
    frame = _Frame.of(table, spectrum, components, seed)
    scales = _column_scales(table, frame, kind)
    fit = _LeastSquares(table, frame, centered)
    integers = np.empty((len(table.values), components), "int8")
    row_scales = np.ones((len(table.values) if scales is None else 0, 1), "f4")
    for rows, block in table.blocks():
        for start in range(0, len(block), _ROWS_AT_A_TIME):
            part = block[start : start + _ROWS_AT_A_TIME]
            chunk = slice(rows.start + start, rows.start + start + len(part))
            codes = frame.encode(part)
            of_part = _row_scales(codes, kind) if scales is None else scales
            integers[chunk] = feed_back(codes, of_part, frame.feedback, kind)
            if scales is None:
                row_scales[chunk] = of_part
            fit.add(chunk, part, _values(integers[chunk], of_part, kind))
    basis, offset = fit.solve()
    used = row_scales if scales is None else scales

    # As in `balance`, but by a power of two, which scales of two bytes bear.
    size = 2.0 ** round(math.log2(rms(basis) or 1.0) / 2)
    basis = basis / np.float32(size)
    used = _as_stored(used * np.float32(size), kind)
    center = np.zeros(components, "float32")
    rounded = RoundedCodes(integers, center, used, kind)
    if uses_relu:
        center = _lift(rounded)
        offset = offset - center @ basis
        rounded = RoundedCodes(integers, center, used, kind)
    if in_column:
        # The offset as a column of a constant, exactly at the grid's center.
        unit = rms(rounded) or 1.0
        basis = np.vstack([basis, offset / unit])
        if scales is not None:
            used = np.hstack([used, np.full((1, 1), 1e-30, "float32")])
        integers = np.pad(integers, [(0, 0), (0, 1)])
        center = np.append(center, np.float32(unit))
        rounded = RoundedCodes(integers, center, used, kind)
    return Factors(
        rounded,
        basis.astype("float32"),
        offset.astype("float32") if use_bias else None,
        center=center,
        scales=used,
    )


def _lift(codes: RoundedCodes) -> np.ndarray:
    """What lifts all codes of each column above zero, float32 `(rank,)`."""
    lowest = [block.min(axis=0) for _, block in row_blocks(codes)]
    smallest = np.min(lowest, axis=0)
    return (MARGIN * (rms(codes) or 1.0) - smallest).astype("float32")


def round_features(
    factors: Factors,
    function: Callable,
    kind: Format,
    *,
    row_weights: np.ndarray | None = None,
    metric: np.ndarray | None = None,
    seed: int = 0,
) -> Factors:
    """Rounds factors that are there already.

    Args:
        factors: The factors.
        function: Their activation. With ReLU or none, they are put into
            coordinates that suit rounding; others stay as they are, with the
            grid that suits them.
        kind: The storage format.
        row_weights: As of `Table`.
        metric: As of `Table`.
        seed: Integer, the seed of the rotation.
    """
    codes = np.asarray(factors.codes)
    basis, offset = factors.basis, factors.offset
    features = codes if is_linear(function) else activate(function, codes)
    uses_relu = is_relu(function)
    free = is_linear(function) or (
        uses_relu and can_round(kind, uses_relu, offset is not None)
    )
    if not free or len(codes) < len(basis) or not basis.any():
        center, scales = map(ops.convert_to_numpy, kind.grid(features))
        return factors._replace(lost=None, center=center, scales=scales)
    weighted = basis if metric is None else basis @ metric
    found = rounded_factors(
        Table.of(features, row_weights, weighted @ weighted.T),
        len(basis),
        kind,
        uses_relu,
        offset is not None,
        seed,
    )
    if offset is not None:
        assert found.offset is not None
        offset = (found.offset @ basis + offset).astype("float32")
    return found._replace(
        basis=(found.basis @ basis).astype("float32"), offset=offset
    )


def expected_error(
    table: Table,
    rank: int,
    kind: Format,
    uses_relu: bool,
    use_bias: bool,
) -> float:
    """About what `rounded_factors` loses, from a sample of the rows.

    What the rank loses is exact; what rounding adds is measured on some rows,
    before basis and offset are fitted anew.

    Args:
        table: As of `rounded_factors`.
        rank: As of `rounded_factors`.
        kind: As of `rounded_factors`.
        uses_relu: As of `rounded_factors`.
        use_bias: As of `rounded_factors`.
    """
    components = rank - (uses_relu and not use_bias)
    spectrum = spectrum_of(table, components, use_bias or uses_relu)
    if components == 0:
        return spectrum.error(0)
    frame = _Frame.of(table, spectrum, components, seed=0)
    rows = evenly_spaced(len(table.values))
    codes = frame.encode(table.values[rows].astype("float32"))
    scales = _column_scales(table, frame, kind)
    if scales is None:
        scales = _row_scales(codes, kind)
    rounded = _values(
        feed_back(codes, scales, frame.feedback, kind), scales, kind
    )
    change = squared_norms(table.to_metric((rounded - codes) @ frame.basis))
    weights = table.weights_of(rows)
    mean = weights @ change / weights.sum() if weights.any() else 0.0
    total = spectrum.total / table.total_weight
    return spectrum.error(components) + (mean / total if total else 0.0)


class _Frame(NamedTuple):
    """Coordinates in which the codes of a table are rounded.

    Args:
        mean: `m`, float32 `(output_dim,)`.
        encoder: `T`, float32 `(output_dim, rank)`: the codes are `(E - 1 m) T`,
            their mean square about 1.
        basis: float32 `(rank, output_dim)`, which leads back.
        feedback: As of `feed_back`.
    """

    mean: np.ndarray
    encoder: np.ndarray
    basis: np.ndarray
    feedback: np.ndarray

    @classmethod
    def of(
        cls, table: Table, spectrum: Spectrum, rank: int, seed: int
    ) -> _Frame:
        directions = spectrum.directions[:, :rank]
        encoder, basis = directions, table.from_metric(directions.T)
        if table.metric is not None:
            encoder = table.metric @ encoder
        # Principal components of what the rank keeps, in the plain norm: with
        # basis^T = Q R, the codes X R^T have the orthonormal basis Q^T.
        orthonormal, triangle = np.linalg.qr(basis.T)
        of_codes = spectrum.energies[:rank] / table.total_weight
        variances, turn = np.linalg.eigh(triangle * of_codes @ triangle.T)
        largest = variances.max(initial=0.0) or 1.0
        variances = np.maximum(variances, _SMALLEST_VARIANCE * largest)
        unit = variances**_EVENING
        unit *= math.sqrt(np.mean(variances / np.square(unit)))
        rotation = _rotation(rank, seed)
        encoder = encoder @ (triangle.T @ turn / unit @ rotation)
        basis = rotation.T @ (turn * unit).T @ orthonormal.T
        weighted = basis if table.metric is None else basis @ table.metric
        return cls(
            spectrum.mean.astype("float32"),
            encoder.astype("float32"),
            basis.astype("float32"),
            feedback_factor(weighted @ weighted.T),
        )

    def encode(self, block: np.ndarray) -> np.ndarray:
        """The codes of some rows."""
        return (block - self.mean) @ self.encoder


def feedback_factor(metric: np.ndarray) -> np.ndarray:
    """What the rounding error of a column asks of the columns after it.

    Args:
        metric: Symmetric positive semidefinite `(rank, rank)`, in which errors
            of a row of codes are measured.

    Returns:
        Float32 `(rank, rank)`, upper triangular with ones on the diagonal:
        the rows of `R` over their diagonal, with `metric^-1 = R^T R`.
    """
    metric = np.asarray(metric, np.float64)
    damping = _DAMPING * np.trace(metric) / len(metric) or 1.0
    inverse = np.linalg.inv(metric + damping * np.eye(len(metric)))
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return (upper / np.diag(upper)[:, np.newaxis]).astype("float32")


def feed_back(
    codes: np.ndarray, scales: np.ndarray, factor: np.ndarray, kind: Format
) -> np.ndarray:
    """Rounds codes column by column, each making up for those before it.

    Args:
        codes: Float32 `(rows, rank)`, around a center of 0.
        scales: Float32 `(rows, 1)` or `(1, rank)`.
        factor: What `feedback_factor` returned.
        kind: The storage format.

    Returns:
        int8 `(rows, rank)`.
    """
    columns = np.ascontiguousarray(codes.T)
    scales = np.broadcast_to(scales, codes.shape).T
    integers = np.empty(columns.shape, "int8")
    low, high = kind.levels
    for start in range(0, len(columns), _COLUMNS_AT_A_TIME):
        end = min(start + _COLUMNS_AT_A_TIME, len(columns))
        errors = np.empty((end - start, columns.shape[1]), "float32")
        for j in range(start, end):
            steps = columns[j] / scales[j]
            rounded = np.clip(np.rint(steps - kind.shift), low, high)
            integers[j] = rounded
            error = columns[j] - (rounded + kind.shift) * scales[j]
            errors[j - start] = error
            columns[j + 1 : end] -= np.outer(factor[j, j + 1 : end], error)
        columns[end:] -= factor[start:end, end:].T @ errors
    return integers.T


class _LeastSquares:
    """The basis and the offset that suit rounded codes best.

    Whatever the metric: with a basis free in all columns, its inverse cancels.

    Args:
        table: The table.
        frame: Where its codes come from.
        centered: Whether there is an offset.
    """

    def __init__(self, table: Table, frame: _Frame, centered: bool) -> None:
        self._table = table
        self._frame = frame
        self._centered = centered
        size = len(frame.basis) + centered
        self._gram = np.zeros((size, size))
        self._products = np.zeros((size, table.shape[1]))

    def add(self, rows: slice, block: np.ndarray, codes: np.ndarray) -> None:
        """Adds rows of the table, and their rounded codes."""
        if self._centered:
            codes = np.hstack([codes, np.ones((len(codes), 1), "float32")])
        weighted = codes
        if self._table.row_weights is not None:
            weights = self._table.weights_of(rows).astype("float32")
            weighted = weights[:, np.newaxis] * codes
        self._gram += weighted.T @ codes
        self._products += weighted.T @ (block - self._frame.mean)

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Float32 basis `(rank, output_dim)` and offset `(output_dim,)`."""
        start = np.zeros(self._products.shape)
        rank = len(self._frame.basis)
        start[:rank] = self._frame.basis
        # From the basis of the exact codes, which stays where codes are none.
        ridge = 1e-6 * np.trace(self._gram) / len(self._gram) or 1.0
        found = start + np.linalg.solve(
            self._gram + ridge * np.eye(len(self._gram)),
            self._products - self._gram @ start,
        )
        offset = self._frame.mean.astype(np.float64)
        if self._centered:
            offset = offset + found[rank]
        return found[:rank].astype("float32"), offset.astype("float32")


def _column_scales(
    table: Table, frame: _Frame, kind: Format
) -> np.ndarray | None:
    """The best scales for columns, `(1, rank)`; `None` where rows have them."""
    if kind.has_row_scales:
        return None
    largest = table.farthest_rows[:_LARGEST_ROWS]
    rows = np.union1d(evenly_spaced(len(table.values)), largest)
    codes = frame.encode(table.values[rows].astype("float32"))
    plain = kind.step * np.sqrt(np.square(codes).mean(axis=0, keepdims=True))
    plain = np.maximum(plain, 1e-30)
    low, high = kind.levels

    changes = np.empty_like(codes)  # one array for all that are tried

    def loss(relative: float) -> float:
        scales = relative * plain
        np.divide(codes, scales, out=changes)
        np.subtract(changes, kind.shift, out=changes)
        np.rint(changes, out=changes)
        np.clip(changes, low, high, out=changes)
        np.add(changes, kind.shift, out=changes)
        np.multiply(changes, scales, out=changes)
        np.subtract(changes, codes, out=changes)
        return float(np.square(changes, out=changes).sum(dtype=np.float64))

    best = min(_RELATIVE_SCALES, key=loss)
    return _as_stored(best * plain, kind)


def _row_scales(codes: np.ndarray, kind: Format) -> np.ndarray:
    squares = np.square(codes).mean(axis=1, keepdims=True)
    return _as_stored(kind.step * np.sqrt(squares), kind)


def _as_stored(scales: np.ndarray, kind: Format) -> np.ndarray:
    return ops.convert_to_numpy(kind.stored_scales(scales.astype("float32")))


def _values(
    integers: np.ndarray, scales: np.ndarray, kind: Format
) -> np.ndarray:
    """The float32 codes that integers stand for."""
    return (integers + np.float32(kind.shift)) * scales


def evenly_spaced(num_rows: int, number: int = _SAMPLED_ROWS) -> np.ndarray:
    """Ids of at most so many rows."""
    count = min(num_rows, number)
    return np.linspace(0, num_rows - 1, count).round().astype(int)


def _rotation(size: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix."""
    normal = np.random.default_rng(seed).normal(size=(size, size))
    orthogonal, triangle = np.linalg.qr(normal)
    return orthogonal * np.sign(np.diag(triangle))
