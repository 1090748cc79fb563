"""Factorize an embedding table: `E ~ f(U) W + 1 c`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.activations import get_activation
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.closed_form import Factors
from keras_distilled_embedding.factorization.closed_form import closed_form
from keras_distilled_embedding.factorization.learned import learned_factors
from keras_distilled_embedding.factorization.rounding import can_round
from keras_distilled_embedding.factorization.rounding import round_features
from keras_distilled_embedding.factorization.rounding import rounded_factors
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import check_finite_rows
from keras_distilled_embedding.factorization.table import lost_energy
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import format_of

METHODS = ("exact", "learned")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factorization:
    """Factors of an embedding table, `E ~ f(U) W + 1 c`.

    Attributes:
        codes: `U`, float32 array of shape `(input_dim, rank)`.
        basis: `W`, float32 array of shape `(rank, output_dim)`.
        offset: `c`, float32 array of shape `(output_dim,)`, or `None`.
        activation: `f`, as it was given to `factorize`.
        quantization: As it was given to `factorize`.
        center: With a quantization, the center of the grid to which `f(U)` is
            rounded, float32 array of shape `(rank,)`.
        scales: With a quantization, the scales of that grid, float32 array of
            shape `(input_dim, 1)`, or `(1, rank)` without `row_scales`.
        relative_error: Float, the share of the table's energy that is lost,
            `||D^1/2 (E - E~) C^1/2||_F^2 / ||D^1/2 E C^1/2||_F^2`, where `D`
            holds the row weights on its diagonal and `C` is the column
            weights. 0 where that energy is 0.
        unweighted_error: Float, the same without weights.
    """

    codes: np.ndarray
    basis: np.ndarray
    offset: np.ndarray | None
    activation: Any
    quantization: str | None = None
    center: np.ndarray | None = None
    scales: np.ndarray | None = None
    relative_error: float = math.nan
    unweighted_error: float = math.nan

    @property
    def rank(self) -> int:
        """Number of codes kept for each row."""
        return self.codes.shape[1]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all factors together."""
        factors = (self.codes, self.basis, self.offset)
        return sum(factor.size for factor in factors if factor is not None)

    def reconstruct(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Returns the table that the factors stand for.

        Args:
            rows: Slice or ids of rows; all of them by default.

        Returns:
            `f(U) W + 1 c`, float32, `(input_dim, output_dim)` or as many rows
            as are asked for. With a quantization, that of the rounded codes.
        """
        rows = slice(None) if rows is None else rows
        features = activate(get_activation(self.activation), self.codes[rows])
        if self.quantization is not None:
            assert self.scales is not None
            row_scales = self.scales.shape[0] == len(self.codes)
            features = ops.convert_to_numpy(
                format_of(self.quantization, row_scales).round(
                    features,
                    self.center,
                    self.scales[rows] if row_scales else self.scales,
                )
            )
        table = features @ self.basis
        return table if self.offset is None else table + self.offset

    def __repr__(self) -> str:
        return (
            f"<Factorization codes={self.codes.shape}, "
            f"basis={self.basis.shape}, "
            f"offset={None if self.offset is None else self.offset.shape}, "
            f"activation={self.activation!r}, "
            f"quantization={self.quantization!r}, "
            f"relative_error={self.relative_error:.4g}>"
        )


def factorize(
    table: Any,
    rank: int,
    *,
    activation: str | Callable | None = "relu",
    use_bias: bool = True,
    method: str = "exact",
    quantization: str | None = None,
    row_scales: bool = True,
    row_weights: Any = None,
    column_weights: Any = None,
    seed: int = 0,
    verbose: int = 0,
) -> Factorization:
    """Factorizes an embedding table into `rank` codes a row.

    Minimizes `||D^1/2 (E - E~) C^1/2||_F^2` for a table `E`, row weights `D`
    and column weights `C`, over the codes `U`, the basis `W` and the offset
    `c` of

    ```
    E~ = f(U) W + 1 c
    ```

    Method `"exact"` needs no training: `c` is the mean of the rows and
    `f(U) W` their principal components around it, the best there is of this
    rank, never worse than the truncated singular value decomposition. ReLU
    costs nothing: with the components `P Q`, a shift `s` of each column lifts
    all codes above zero, and the offset takes it back,

    ```
    relu(P + 1 s) Q + 1 (c - s Q) = P Q + 1 c
    ```

    Without an offset (`use_bias=False`, the published form) ReLU keeps it in
    one column of constant codes, which costs one of the components; without
    an activation the factors are the truncated singular value decomposition
    (Eckart and Young). The work is two passes over the table (three, in
    float64, where the rank reaches down to singular values below 1e-3 of the
    largest) and no more memory than the codes, a block of rows and a few
    `d^2`.

    Method `"learned"` is the first stage of Lioutas et al.: all factors start
    at random and are trained by gradient descent, with any activation. It is
    slower and a little less accurate than the exact form, and is there for
    the activations that have none. Codes of an activation that is zero below
    zero are kept above zero here too, so that every one has a gradient.

    The scale of the product is shared out so that both factors have the same
    root mean square (of the codes around their shift), where the activation
    allows it. Of all splits it is the one that an optimizer with steps of one
    size for every parameter, such as Adam, disturbs least.

    Args:
        table: Floating-point array, tensor or variable of shape
            `(input_dim, output_dim)`. A `numpy.memmap` is read in blocks.
        rank: Integer, at least 1 and at most `min(input_dim, output_dim)`,
            one more for ReLU without an offset.
        activation: `f`, any Keras activation identifier or a callable. The
            exact method takes `None`, `"linear"` and `"relu"`.
        use_bias: Boolean, whether there is an offset.
        method: `"exact"` or `"learned"`.
        quantization: `"int8"`, `"int4"`, `"int2"` or `None`. If given, the
            codes are rounded, to what a file of that kind holds: column after
            column, in coordinates that suit it, so that the rows, or their
            products with hidden states of the second moment
            `column_weights`, change least; then basis and offset are fitted
            to them.
        row_scales: Boolean, whether each row of rounded codes has a scale of
            its own, or each column. 8 bits always have the latter.
        row_weights: Array of shape `(input_dim,)` of non-negative weights,
            for example token counts (`calibrate`). Only their proportions
            matter. `None` weighs all rows alike.
        column_weights: Array `C` of shape `(output_dim, output_dim)`: the
            second moment of the hidden states that multiply the table
            (`calibrate`). What is kept are then the logits of such states,
            rather than the table's entries. `None` is the identity.
        seed: Non-negative integer, the seed of what is trained. The same
            seed gives the same factors.
        verbose: 1 shows the progress, 0 is silent.

    Returns:
        A `Factorization`.

    Raises:
        ValueError: If an argument is out of its range, or the table or the
            weights hold values that are not finite.

    Example:

    >>> table = np.random.default_rng(0).normal(size=(1000, 64))
    >>> factors = factorize(table, rank=16)
    >>> factors.codes.shape, factors.basis.shape, factors.offset.shape
    ((1000, 16), (16, 64), (64,))
    >>> factors.reconstruct().shape
    (1000, 64)

    References:

    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720), "Improving Word
      Embedding Factorization for Compression using Distilled Nonlinear Neural
      Decomposition"
    - [Frantar et al., 2023](https://arxiv.org/abs/2210.17323), "GPTQ: Accurate
      Post-Training Quantization for Generative Pre-trained Transformers"
    - [Eckart and Young, 1936](https://doi.org/10.1007/BF02288367), "The
      approximation of one matrix by another of lower rank"
    """
    weighted = Table.of(table, row_weights, column_weights)
    found = factorize_table(
        weighted,
        rank,
        activation=activation,
        use_bias=use_bias,
        method=method,
        quantization=quantization,
        row_scales=row_scales,
        seed=seed,
        verbose=verbose,
    )
    result = Factorization(
        np.asarray(found.codes),
        found.basis,
        found.offset,
        activation,
        quantization,
        found.center,
        found.scales,
    )
    lost = found.lost or lost_energy(weighted, result.reconstruct)
    result = dataclasses.replace(
        result,
        relative_error=lost.relative,
        unweighted_error=lost.relative_unweighted,
    )
    if verbose:
        print(_summary(result, weighted))
    return result


def factorize_table(
    table: Table,
    rank: int,
    *,
    activation: str | Callable | None = "relu",
    use_bias: bool = True,
    method: str = "exact",
    quantization: str | None = None,
    row_scales: bool = True,
    seed: int = 0,
    verbose: int = 0,
) -> Factors:
    """What `factorize` finds, of a table that holds its weights.

    Codes with a quantization stay integers; what is lost is not measured.
    """
    check_method(method, activation)
    check_quantization("quantization", quantization)
    function = get_activation(activation)
    seed = as_integer("seed", seed, minimum=0)
    in_column = is_relu(function) and not use_bias
    rank = _check_rank(rank, min(table.shape) + in_column, table.shape)

    form = is_relu(function), use_bias
    kind = format_of(quantization, row_scales) if quantization else None
    if kind is not None and not can_round(kind, *form):
        raise ValueError(
            f"`quantization` must not be {quantization!r} for ReLU without an "
            "offset: pass use_bias=True, or row_scales=False. Received: "
            f"quantization={quantization!r}, use_bias={use_bias}"
        )
    if method == "exact":
        if kind is None:
            return closed_form(table, rank, *form)
        return rounded_factors(table, rank, kind, *form, seed)
    check_finite_rows(table.values)
    found = learned_factors(table, rank, function, use_bias, seed, verbose)
    if kind is None:
        return found
    return round_features(
        found,
        function,
        kind,
        row_weights=table.row_weights,
        metric=table.metric,
        seed=seed,
    )


def check_method(method: Any, activation: Any) -> None:
    """Refuses an unknown method, or one that the activation has not.

    Raises:
        ValueError: If it is such a one.
    """
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {METHODS}. Received: method={method!r}"
        )
    function = get_activation(activation)
    has_closed_form = is_linear(function) or is_relu(function)
    if method == "exact" and not has_closed_form:
        raise ValueError(
            '`method="exact"` has a closed form for activation=None, "linear" '
            'and "relu" only; pass method="learned" for any other. Received: '
            f"activation={activation!r}"
        )


def _check_rank(rank: Any, largest: int, shape: tuple[int, int]) -> int:
    """Refuses ranks above the one that is already exact."""
    rank = as_integer("rank", rank)
    if rank > largest:
        raise ValueError(
            f"`rank` must be at most {largest} for a table of shape {shape}. "
            f"Received: rank={rank}"
        )
    return rank


def _summary(result: Factorization, table: Table) -> str:
    error = f"relative error {result.relative_error:.4f}"
    if table.is_weighted:
        error += f", {result.unweighted_error:.4f} without weights"
    stored = result.quantization or "floats"
    return (
        f"Factorized a table of shape {table.shape} at rank {result.rank} in "
        f"{stored}: {error}"
    )
