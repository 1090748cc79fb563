"""Factorise an embedding table: `E ~ f(U) W`."""

import dataclasses

import numpy as np

from keras_distilled_embedding._arguments import as_integer
from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.activations import get_activation
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.arguments import as_rank
from keras_distilled_embedding.factorization.exact import linear_factors
from keras_distilled_embedding.factorization.exact import relu_factors
from keras_distilled_embedding.factorization.learned import learned_factors
from keras_distilled_embedding.factorization.table import as_row_weights
from keras_distilled_embedding.factorization.table import as_table
from keras_distilled_embedding.factorization.table import check_finite_rows
from keras_distilled_embedding.factorization.table import relative_error

METHODS = ("exact", "learned")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factorization:
    """Factors of an embedding table, `E ~ f(U) W`.

    Attributes:
        codes: `U`, float32 array of shape `(input_dim, rank)`.
        basis: `W`, float32 array of shape `(rank, output_dim)`.
        activation: `f`, as it was given to `factorize()`.
        relative_error: float, the share of the table's energy that is lost,
            `||D^1/2 (E - f(U) W)||_F^2 / ||D^1/2 E||_F^2`, where `D` holds
            the row weights on its diagonal. 0 where that energy is 0.
        hidden_kernel: `None`, reserved for the non-linear funnel.
        hidden_bias: `None`, reserved for the non-linear funnel.
        hidden_basis: `None`, reserved for the non-linear funnel.
    """

    codes: np.ndarray
    basis: np.ndarray
    activation: object
    relative_error: float
    hidden_kernel: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    hidden_basis: np.ndarray | None = None

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

    def reconstruct(self) -> np.ndarray:
        """Returns `f(U) W`, float32, shape `(input_dim, output_dim)`."""
        function = get_activation(self.activation)
        return activate(function, self.codes) @ self.basis

    def __repr__(self) -> str:
        return (
            f"<Factorization codes={self.codes.shape}, "
            f"basis={self.basis.shape}, activation={self.activation!r}, "
            f"relative_error={self.relative_error:.4g}, "
            f"compression_ratio={self.compression_ratio:.4g}>"
        )


def factorize(
    table,
    rank: int,
    *,
    activation="relu",
    hidden_dim: int | None = None,
    method: str = "exact",
    row_weights=None,
    seed: int = 0,
    verbose: int = 0,
) -> Factorization:
    """Factorises an embedding table into `rank` coefficients a row.

    Minimises `sum_i w_i ||E_i - f(U_i) W||^2` over the codes `U` and the basis
    `W`, for a table `E` and row weights `w`.

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
    the non-negative one of rank 1, which can be much worse.

    Method `"learned"` is the first stage of Lioutas et al.: `U` and `W` start
    at random and are trained by gradient descent, with any activation. It is
    slower and a little less accurate than the exact form, and is there for
    the activations that have none. Codes of an activation that is zero below
    zero are kept above a margin here too, and rows with `f(U_i) = 0` are
    revived. A row of weight 0 keeps a random code.

    The scale of the product is shared out so that both factors have the same
    root mean square. Of all splits it is the one that an optimiser with steps
    of one size for every parameter, such as Adam, disturbs least. Only where
    `f` is neither linear nor ReLU, so that the codes cannot be rescaled, do
    they keep the scale at which they were trained.

    Args:
        table: floating-point array, tensor or variable of shape
            `(input_dim, output_dim)`. A `numpy.memmap` is read in chunks.
        rank: integer, at least 1 and at most `min(input_dim, output_dim)`,
            one more with an activation.
        activation: `f`, any Keras activation identifier or a callable. The
            exact method takes `None`, `"linear"` and `"relu"`.
        hidden_dim: `None`. Width of the non-linear funnel, which is not
            supported yet.
        method: `"exact"` or `"learned"`.
        row_weights: array of shape `(input_dim,)` of non-negative weights,
            for example token counts. Only their proportions matter. `None`
            weighs all rows alike.
        seed: non-negative integer, the seed of the learned method. The same
            seed gives the same factors.
        verbose: 1 shows the progress, 0 is silent.

    Returns:
        A `Factorization`.

    Raises:
        ValueError: if an argument is out of its range, or the table or the
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
    if hidden_dim is not None:
        raise ValueError(
            "hidden_dim is not supported by factorize() yet; pass "
            f"hidden_dim=None. Received: hidden_dim={hidden_dim!r}"
        )
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {METHODS}. Received: method={method!r}"
        )
    function = get_activation(activation)
    if method == "exact" and not (is_linear(function) or is_relu(function)):
        raise ValueError(
            'method="exact" has a closed form for activation=None, "linear" '
            'and "relu" only; pass method="learned" for any other. Received: '
            f"activation={activation!r}"
        )
    seed = as_integer("seed", seed, minimum=0)
    table = as_table(table)
    rank = as_rank(rank, table.shape, function)
    weights = as_row_weights(row_weights, len(table))
    check_finite_rows(table)

    if method == "learned":
        codes, basis = learned_factors(
            table, weights, rank, function, seed, verbose
        )
    elif is_linear(function):
        codes, basis = linear_factors(table, weights, rank)
    else:
        codes, basis = relu_factors(table, weights, rank)
    error = relative_error(table, weights, activate(function, codes), basis)
    factorization = Factorization(codes, basis, activation, error)
    if verbose:
        print(
            f"Factorized a table of shape {table.shape} at rank {rank}: "
            f"{factorization.compression_ratio:.2f} times smaller, "
            f"relative error {error:.4f}"
        )
    return factorization
