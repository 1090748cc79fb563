"""Factorise an embedding table: `E ~ f(U) W`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.activations import get_activation
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.closed_form import linear_factors
from keras_distilled_embedding.factorization.closed_form import relu_factors
from keras_distilled_embedding.factorization.funnel import funnel_factors
from keras_distilled_embedding.factorization.learned import learned_factors
from keras_distilled_embedding.factorization.ranks import as_rank
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import check_finite_rows
from keras_distilled_embedding.factorization.table import lost_energy

METHODS = ("exact", "learned")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factorization:
    """Factors of an embedding table, `E ~ f(U) W + g(U A + b) B`.

    Attributes:
        codes: `U`, float32 array of shape `(input_dim, rank)`.
        basis: `W`, float32 array of shape `(rank, output_dim)`.
        activation: `f`, as it was given to `factorize()`.
        relative_error: Float, the share of the table's energy that is lost,
            `||D^1/2 (E - E~) C^1/2||_F^2 / ||D^1/2 E C^1/2||_F^2`, where `D`
            holds the row weights on its diagonal and `C` is the column
            weights. 0 where that energy is 0.
        unweighted_error: Float, the same without weights; `None` where it was
            not measured.
        hidden_kernel: `A`, float32 array `(rank, hidden_dim)`, or `None`.
        hidden_bias: `b`, float32 array `(hidden_dim,)`, or `None`.
        hidden_basis: `B`, float32 array `(hidden_dim, output_dim)`, or `None`.
        hidden_activation: `g`, as it was given to `factorize()`.
    """

    codes: np.ndarray
    basis: np.ndarray
    activation: Any
    relative_error: float
    hidden_kernel: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    hidden_basis: np.ndarray | None = None
    hidden_activation: Any = "gelu"
    unweighted_error: float | None = None

    @property
    def rank(self) -> int:
        """Number of coefficients kept for each row."""
        return self.codes.shape[1]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all factors together."""
        factors = (
            self.codes,
            self.basis,
            self.hidden_kernel,
            self.hidden_bias,
            self.hidden_basis,
        )
        return sum(factor.size for factor in factors if factor is not None)

    @property
    def compression_ratio(self) -> float:
        """Parameters of the table over the parameters of its factors."""
        return len(self.codes) * self.basis.shape[1] / self.num_parameters

    def reconstruct(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """Returns the table that the factors stand for.

        Args:
            rows: Slice or ids of rows; all of them by default.

        Returns:
            `f(U) W + g(U A + b) B`, float32, `(input_dim, output_dim)` or as
            many rows as are asked for.
        """
        codes = self.codes if rows is None else self.codes[rows]
        table = activate(get_activation(self.activation), codes) @ self.basis
        if self.hidden_basis is not None:
            hidden = activate(
                get_activation(self.hidden_activation),
                codes @ self.hidden_kernel + self.hidden_bias,
            )
            table += hidden @ self.hidden_basis
        return table

    def __repr__(self) -> str:
        shapes = f"codes={self.codes.shape}, basis={self.basis.shape}, "
        if self.hidden_kernel is not None:
            shapes += f"hidden_kernel={self.hidden_kernel.shape}, "
        return (
            f"<Factorization {shapes}activation={self.activation!r}, "
            f"relative_error={self.relative_error:.4g}, "
            f"compression_ratio={self.compression_ratio:.4g}>"
        )


def factorize(
    table: Any,
    rank: int,
    *,
    activation: str | Callable | None = "relu",
    hidden_dim: int | None = None,
    method: str = "exact",
    row_weights: Any = None,
    seed: int = 0,
    verbose: int = 0,
    hidden_activation: str | Callable | None = "gelu",
    column_weights: Any = None,
    sweeps: int = 5,
) -> Factorization:
    """Factorises an embedding table into `rank` coefficients a row.

    Minimises `||D^1/2 (E - E~) C^1/2||_F^2` for a table `E`, row weights `D`
    and column weights `C`, over the codes `U` and the basis `W` of

    ```
    E~ = f(U) W
    ```

    Method `"exact"` needs no training. Without an activation it is the
    truncated singular value decomposition, the best there is of this rank
    (Eckart and Young). With ReLU it starts from the decomposition of rank
    `rank - 1`, `E ~ P Q`: the `rank` unit vertices `S` of a regular simplex
    sum to zero and span that space, so

    ```
    C = (k / rank) P S^T,   k = rank - 1      C S = P
    U_i = C_i - min(C_i) + margin             relu(U) (S Q) = P Q
    ```

    and alternating least squares lower the error from there, keeping every
    coefficient above the margin, so that ReLU passes a gradient through all of
    them. Its error lies between those of the decompositions of rank
    `rank - 1` and `rank`. With `rank=1` there is no simplex and the form is
    the non-negative one of rank 1, which can be much worse. The decomposition
    takes two passes over the table (three, in float64, where the rank reaches
    down to singular values below 1e-3 of the largest), every sweep one more,
    and no more memory than the codes, a block of rows and a few `d^2`.

    Method `"learned"` is the first stage of Lioutas et al.: `U` and `W` start
    at random and are trained by gradient descent, with any activation. It is
    slower and a little less accurate than the exact form, and is there for
    the activations that have none. Codes of an activation that is zero below
    zero are kept above a margin here too, and rows with `f(U_i) = 0` are
    revived. A row of weight 0 keeps a random code.

    With `hidden_dim` a non-linear funnel is added,

    ```
    E~ = f(U) W + g(U A + b) B
    ```

    Its rank is up to `rank + hidden_dim` for only `(rank + d + 1) hidden_dim`
    more parameters, so it can do what no plain form can: beat the singular
    value decomposition of equal size. All its factors are trained together
    from those of the plain form, with a schedule that fits itself to the
    table, in minutes. It is meant for tables that get little or no
    fine-tuning, such as word vectors, retrieval and input-only embeddings.

    The scale of the product is shared out so that both factors have the same
    root mean square. Of all splits it is the one that an optimiser with steps
    of one size for every parameter, such as Adam, disturbs least. Only where
    `f` is neither linear nor ReLU, so that the codes cannot be rescaled, or
    with `hidden_dim`, do they keep the scale at which they were trained.

    Args:
        table: Floating-point array, tensor or variable of shape
            `(input_dim, output_dim)`. A `numpy.memmap` is read in blocks.
        rank: Integer, at least 1 and at most `min(input_dim, output_dim)`,
            one more with an activation.
        activation: `f`, any Keras activation identifier or a callable. The
            exact method takes `None`, `"linear"` and `"relu"`.
        hidden_dim: `None`, or the width `h` of the funnel.
        method: `"exact"` or `"learned"`: how the plain form is made.
        row_weights: Array of shape `(input_dim,)` of non-negative weights,
            for example token counts (`count_tokens`). Only their proportions
            matter. `None` weighs all rows alike.
        seed: Non-negative integer, the seed of what is trained. The same
            seed gives the same factors.
        verbose: 1 shows the progress, 0 is silent.
        hidden_activation: `g`, any Keras activation identifier or a callable.
        column_weights: Array `C` of shape `(output_dim, output_dim)`: the
            second moment of the hidden states that multiply the table
            (`second_moment`). What is kept are then the logits of such
            states, rather than the table's entries. `None` is the identity.
        sweeps: Integer, of alternating least squares over the exact ReLU
            form. Their gain fades quickly: five give most of what twenty do.

    Returns:
        A `Factorization`.

    Raises:
        ValueError: If an argument is out of its range, or the table or the
            weights hold values that are not finite.

    Example:

    >>> table = np.random.default_rng(0).normal(size=(1000, 64))
    >>> factors = factorize(table, rank=16)
    >>> factors.codes.shape, factors.basis.shape
    ((1000, 16), (16, 64))
    >>> factors.reconstruct().shape
    (1000, 64)

    References:

    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720), "Improving Word
      Embedding Factorization for Compression using Distilled Nonlinear Neural
      Decomposition"
    - [Eckart and Young, 1936](https://doi.org/10.1007/BF02288367), "The
      approximation of one matrix by another of lower rank"
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {METHODS}. Received: method={method!r}"
        )
    function = get_activation(activation)
    hidden_function = get_activation(hidden_activation, "hidden_activation")
    if method == "exact" and not (is_linear(function) or is_relu(function)):
        raise ValueError(
            'method="exact" has a closed form for activation=None, "linear" '
            'and "relu" only; pass method="learned" for any other. Received: '
            f"activation={activation!r}"
        )
    hidden_dim = as_integer("hidden_dim", hidden_dim, or_none=True)
    seed = as_integer("seed", seed, minimum=0)
    sweeps = as_integer("sweeps", sweeps, minimum=0)
    table = Table.of(table, row_weights, column_weights)
    rank = as_rank(rank, table.shape, function)

    if method == "learned":
        check_finite_rows(table.values)
        codes, basis = learned_factors(table, rank, function, seed, verbose)
        lost = None
    elif is_linear(function):
        codes, basis, lost = linear_factors(table, rank)
    else:
        codes, basis, lost = relu_factors(table, rank, sweeps)
    result = Factorization(codes, basis, activation, math.nan)
    lost = lost or lost_energy(table, result.reconstruct)
    if hidden_dim is not None:
        arrays = funnel_factors(
            table,
            {"codes": codes, "basis": basis},
            lost.relative,
            hidden_dim,
            function,
            hidden_function,
            seed,
            verbose,
        )
        result = dataclasses.replace(
            result, hidden_activation=hidden_activation, **arrays
        )
        lost = lost_energy(table, result.reconstruct)
    result = dataclasses.replace(
        result,
        relative_error=lost.relative,
        unweighted_error=lost.relative_unweighted,
    )
    if verbose:
        print(_summary(result, table))
    return result


def _summary(result: Factorization, table: Table) -> str:
    error = f"relative error {result.relative_error:.4f}"
    if table.is_weighted:
        error += f", {result.unweighted_error:.4f} without weights"
    return (
        f"Factorized a table of shape {table.shape} at rank {result.rank}: "
        f"{result.compression_ratio:.2f} times smaller, {error}"
    )
