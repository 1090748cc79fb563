"""Factorise an embedding table: `E ~ f(U) W`.

What does not train is NumPy, in float64 and one chunk of rows at a time, so
that a memory-mapped table never has to fit in memory. What trains is Keras.
"""

import contextlib
import dataclasses
import math
import numbers
import sys
from collections.abc import Callable
from collections.abc import Iterator

import keras
import numpy as np

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
# Entries of the table held in float64 at a time (8 MiB).
CHUNK_ENTRIES = 2**20

# The learned form: Adam on minibatches of rows. An epoch is one pass over the
# rows, or this many steps where a pass is shorter.
BATCH_SIZE = 4096
STEPS_PER_EPOCH = 50
MAX_EPOCHS = 100
LEARNING_RATE = 1e-2
# An epoch must lower the best loss by this share of it. After `PATIENCE`
# epochs that do not, the learning rate is cut, `MAX_CUTS` times.
MIN_IMPROVEMENT = 2e-3
PATIENCE = 2
MAX_CUTS = 3
LEARNING_RATE_CUT = 0.3

# Live rows from which a dead one may take its codes.
MAX_DONORS = 1024

METHODS = ("exact", "learned")
TABLE_DTYPES = ("float16", "bfloat16", "float32", "float64")


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
        function = _get_activation(self.activation)
        return _activate(function, self.codes) @ self.basis

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
    function = _get_activation(activation)
    if method == "exact" and not (_is_linear(function) or _is_relu(function)):
        raise ValueError(
            'method="exact" has a closed form for activation=None, "linear" '
            'and "relu" only; pass method="learned" for any other. Received: '
            f"activation={activation!r}"
        )
    seed = _as_integer("seed", seed, minimum=0)
    table = _as_table(table)
    rank = _as_rank(rank, table.shape, function)
    weights = _as_row_weights(row_weights, len(table))
    check_finite_rows(table)

    if method == "learned":
        codes, basis = _learned_factors(
            table, weights, rank, function, seed, verbose
        )
    elif _is_linear(function):
        codes, basis = _linear_factors(table, weights, rank)
    else:
        codes, basis = _relu_factors(table, weights, rank)
    error = _relative_error(table, weights, _activate(function, codes), basis)
    factorization = Factorization(codes, basis, activation, error)
    if verbose:
        print(
            f"Factorized a table of shape {table.shape} at rank {rank}: "
            f"{factorization.compression_ratio:.2f} times smaller, "
            f"relative error {error:.4f}"
        )
    return factorization


def rank_for_compression(
    input_dim: int, output_dim: int, compression: float
) -> int:
    """Returns the largest rank that compresses a table so much.

    The factors of a table `(V, d)` have `r (V + d)` parameters, so this is
    the largest `r` with `V d / (r (V + d)) >= compression`.

    Args:
        input_dim: positive integer, the number of rows `V`.
        output_dim: positive integer, the number of columns `d`.
        compression: float above 1, parameters of the table over those of its
            factors.

    Returns:
        The rank, a positive integer.

    Raises:
        ValueError: if `compression` is not above 1, or is more than rank 1
            gives.

    Example:

    >>> rank_for_compression(30522, 384, 8.0)
    47
    """
    input_dim = _as_integer("input_dim", input_dim, minimum=1)
    output_dim = _as_integer("output_dim", output_dim, minimum=1)
    if not (isinstance(compression, numbers.Real) and compression > 1):
        raise ValueError(
            "compression must be a number greater than 1. "
            f"Received: compression={compression!r}"
        )
    largest = _compression_ratio(1, input_dim, output_dim)
    if compression > largest:
        raise ValueError(
            f"compression={compression!r} is out of reach for a table of "
            f"shape ({input_dim}, {output_dim}): rank 1 compresses it by "
            f"{largest!r}, the largest there is"
        )
    rank = int(largest / compression)
    # The division may round across an integer, in either direction.
    while _compression_ratio(rank + 1, input_dim, output_dim) >= compression:
        rank += 1
    while _compression_ratio(rank, input_dim, output_dim) < compression:
        rank -= 1
    return rank


def validate_rank(rank: int, input_dim: int, output_dim: int) -> None:
    """Checks that factors of this rank are smaller than the table.

    Args:
        rank: positive integer `r` with `r (V + d) < V d`.
        input_dim: positive integer, the number of rows `V`.
        output_dim: positive integer, the number of columns `d`.

    Raises:
        ValueError: if the rank is not a positive integer, or is so large that
            the factors have at least as many parameters as the table.

    Example:

    >>> validate_rank(47, 30522, 384)
    """
    input_dim = _as_integer("input_dim", input_dim, minimum=1)
    output_dim = _as_integer("output_dim", output_dim, minimum=1)
    rank = _as_integer("rank", rank, minimum=1)
    if _compression_ratio(rank, input_dim, output_dim) > 1:
        return
    largest = math.ceil(input_dim * output_dim / (input_dim + output_dim)) - 1
    raise ValueError(
        f"rank={rank} makes a table of shape ({input_dim}, {output_dim}) no "
        f"smaller: {rank * (input_dim + output_dim)} parameters instead of "
        f"{input_dim * output_dim}. "
        + (
            f"Pass a rank of at most {largest}"
            if largest
            else "No rank does: leave this table as it is"
        )
    )


def _compression_ratio(rank: int, input_dim: int, output_dim: int) -> float:
    return input_dim * output_dim / (rank * (input_dim + output_dim))


# Arguments.


def _as_integer(name: str, value, minimum: int) -> int:
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"{name} must be an integer of at least {minimum}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def _as_rank(rank, table_shape: tuple[int, int], function: Callable) -> int:
    """Refuses ranks above the one that can already be exact."""
    rank = _as_integer("rank", rank, minimum=1)
    largest = min(table_shape) + (not _is_linear(function))
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest} for a table of shape "
            f"{table_shape} and this activation. Received: rank={rank}"
        )
    return rank


def _as_table(table) -> np.ndarray:
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


def _as_row_weights(row_weights, num_rows: int) -> np.ndarray:
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
            for rows, block in _row_blocks(table, dtype=np.float32)
        ]
    )
    if bad_rows.size:
        first = ", ".join(map(str, bad_rows[:5]))
        raise ValueError(
            "table must be finite in float32. Received: a table with NaN, "
            f"infinite or too large values in {bad_rows.size} of its "
            f"{len(table)} rows, the first of them {first}"
        )


# Activations.


def _get_activation(activation) -> Callable:
    try:
        return keras.activations.get(activation)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "activation must be None, the name of a Keras activation or a "
            f"callable. Received: activation={activation!r}"
        ) from error


def _is_linear(function: Callable) -> bool:
    return function is keras.activations.linear


def _is_relu(function: Callable) -> bool:
    return function in (keras.activations.relu, keras.ops.relu)


def _is_zero_below(function: Callable) -> bool:
    """Whether negative codes have no effect, and so no gradient."""
    return not _activate(function, np.float32([[-4.0, -1.0, -0.1]])).any()


def _activate(function: Callable, codes: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(function(keras.ops.array(codes)))


# The table, in chunks of rows.


def _row_blocks(
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


def _project(table: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Returns `E V`, float64, for `directions` `V` `(output_dim, k)`."""
    return np.concatenate(
        [block @ directions for _, block in _row_blocks(table)]
    )


def _relative_error(
    table: np.ndarray,
    weights: np.ndarray,
    activations: np.ndarray,
    basis: np.ndarray,
) -> float:
    """Returns `||D^1/2 (E - f(U) W)||_F^2 / ||D^1/2 E||_F^2`."""
    basis = basis.astype(np.float64)
    lost = energy = 0.0
    for rows, block in _row_blocks(table):
        residual = block - activations[rows].astype(np.float64) @ basis
        lost += weights[rows] @ np.square(residual).sum(axis=1)
        energy += weights[rows] @ np.square(block).sum(axis=1)
    return float(lost / energy) if energy > 0 else 0.0


def _weighted_rms(table: np.ndarray, weights: np.ndarray) -> float:
    """Returns the root mean square entry, rows weighted."""
    energy = sum(
        weights[rows] @ np.square(block).mean(axis=1)
        for rows, block in _row_blocks(table)
    )
    return math.sqrt(energy / weights.sum())


# The exact forms.


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
    for rows, block in _row_blocks(table):
        scaled = np.sqrt(weights[rows])[:, np.newaxis] * block
        gram += scaled.T @ scaled
    return np.linalg.eigh(gram)[1][:, : -rank - 1 : -1]


def _linear_factors(
    table: np.ndarray, weights: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the truncated SVD: `U = E V`, `W = V^T`."""
    directions = _right_singular_vectors(table, weights, rank)
    return _balance(_project(table, directions), directions.T)


def _relu_factors(
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
    candidates = [_balance(codes, basis)]
    for _ in range(SWEEPS):
        basis = _sweep(table, weights, codes, basis, margin)
    candidates.append(_balance(codes, basis))
    return min(
        candidates,
        key=lambda factors: _relative_error(table, weights, *factors),
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
    points = _project(table, directions)
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
    codes = _project(table, directions)
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
    for rows, block in _row_blocks(table):
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


def _balance(
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


# The learned form.


def _learned_factors(
    table: np.ndarray,
    weights: np.ndarray,
    rank: int,
    function: Callable,
    seed: int,
    verbose: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors trained by gradient descent from a random start."""
    random = np.random.default_rng(seed)
    batches = _RowBatches(table, weights, random)

    def revive(codes, basis):
        basis = batches.scale * basis
        return _revive_dead_rows(table, codes, basis, function, random)

    model = _factorized_embedding(
        table.shape, rank, function, batches.batch_size, random
    )
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.MeanSquaredError(),
    )
    with _progress_bar(verbose) as callbacks:
        model.fit(
            batches,
            epochs=MAX_EPOCHS,
            shuffle=False,  # The batches are shuffled, by their own seed.
            verbose=0,
            callbacks=[_ReduceOnPlateau(revive), *callbacks],
        )
    codes, basis = model.get_weights()
    if _is_linear(function) or _is_relu(function):
        return _balance(codes, batches.scale * basis)
    return codes, (batches.scale * basis).astype(np.float32)


class _LowerBound(keras.constraints.Constraint):
    """Keeps weights at or above a value."""

    def __init__(self, value: float):
        self.value = value

    def __call__(self, weights):
        return keras.ops.maximum(weights, self.value)


def _factorized_embedding(
    table_shape: tuple[int, int],
    rank: int,
    function: Callable,
    batch_size: int,
    random: np.random.Generator,
) -> keras.Model:
    """Returns the model `ids -> f(U_ids) W`; its weights are `[U, W]`.

    The random start gives rows of about unit RMS, the scale of the targets. A
    code that ReLU cuts off has no gradient, and no other row shares it, so it
    would stay lost: half of them from the start. A bound keeps them alive.
    """
    input_dim, output_dim = table_shape
    codes_seed, basis_seed = random.integers(2**31, size=2).tolist()
    bound = _LowerBound(MARGIN) if _is_zero_below(function) else None
    return keras.Sequential(
        [
            keras.Input((), batch_size=batch_size, dtype="int32"),
            keras.layers.Embedding(
                input_dim,
                rank,
                embeddings_initializer=keras.initializers.RandomNormal(
                    stddev=1.0, seed=codes_seed
                ),
                embeddings_constraint=bound,
                dtype="float32",
            ),
            keras.layers.Activation(function, dtype="float32"),
            keras.layers.Dense(
                output_dim,
                use_bias=False,
                kernel_initializer=keras.initializers.RandomNormal(
                    stddev=math.sqrt(2 / rank), seed=basis_seed
                ),
                dtype="float32",
            ),
        ]
    )


class _RowBatches(keras.utils.PyDataset):
    """Batches of one shape: row ids, rows divided by `scale`, row weights.

    `scale` is the weighted RMS of the table and the weights have a mean of 1,
    so that the mean squared error is the relative error whatever the table,
    and one learning rate serves them all.
    """

    def __init__(
        self,
        table: np.ndarray,
        weights: np.ndarray,
        random: np.random.Generator,
    ):
        super().__init__()
        self.batch_size = min(BATCH_SIZE, len(table))
        self.scale = _weighted_rms(table, weights) or 1.0
        self._table = table
        self._weights = (weights / weights.mean()).astype(np.float32)
        self._random = random
        self.on_epoch_end()

    def __len__(self) -> int:
        steps = math.ceil(len(self._table) / self.batch_size)
        return max(steps, STEPS_PER_EPOCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        start = index * self.batch_size
        ids = self._order[start : start + self.batch_size]
        rows = self._table[ids].astype(np.float32) / np.float32(self.scale)
        return ids, rows, self._weights[ids]

    def on_epoch_end(self) -> None:
        # Whole passes over the rows, so that a full last batch can borrow.
        num_ids = len(self) * self.batch_size
        passes = math.ceil(num_ids / len(self._table))
        num_rows = len(self._table)
        orders = [self._random.permutation(num_rows) for _ in range(passes)]
        self._order = np.concatenate(orders)[:num_ids].astype(np.int32)


class _ReduceOnPlateau(keras.callbacks.Callback):
    """Cuts the learning rate on a plateau, and stops after the last cut.

    Each time, and at the end, the model goes back to its best weights and its
    dead rows are revived. Keras's own callbacks compare losses by an absolute
    difference; tables leave anything between 1e-6 and 0.9 of their energy.

    Args:
        revive: function of the codes and the basis that returns live codes.
    """

    def __init__(self, revive: Callable):
        super().__init__()
        self._revive = revive

    def on_train_begin(self, logs=None):
        self._best_loss = math.inf
        self._best_weights = self.model.get_weights()
        self._num_bad_epochs = 0
        self._num_cuts = 0

    def on_epoch_end(self, epoch, logs=None):
        loss = logs["loss"]
        improved = loss < (1 - MIN_IMPROVEMENT) * self._best_loss
        self._num_bad_epochs = 0 if improved else self._num_bad_epochs + 1
        if loss < self._best_loss:
            self._best_loss = loss
            self._best_weights = self.model.get_weights()
        if self._num_bad_epochs < PATIENCE:
            return
        if self._num_cuts == MAX_CUTS:
            self.model.stop_training = True
            return
        self._num_bad_epochs = 0
        self._num_cuts += 1
        self._restore()
        self.model.optimizer.learning_rate = (
            LEARNING_RATE * LEARNING_RATE_CUT**self._num_cuts
        )

    def on_train_end(self, logs=None):
        self._restore()

    def _restore(self):
        codes, basis = self._best_weights
        self.model.set_weights([self._revive(codes, basis), basis])


@contextlib.contextmanager
def _progress_bar(verbose: int) -> Iterator[list[keras.callbacks.Callback]]:
    """Yields the callbacks that draw a bar: none away from a terminal."""
    progress = None
    if verbose and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.progress import Progress

            progress = Progress(transient=True)
    if progress is None:
        yield []
        return
    with progress:
        task = progress.add_task("Learning", total=MAX_EPOCHS)

        def update(epoch, logs):
            progress.update(
                task,
                completed=epoch + 1,
                description=f"Learning, relative error {logs['loss']:.4f}",
            )

        yield [keras.callbacks.LambdaCallback(on_epoch_end=update)]


def _revive_dead_rows(
    table: np.ndarray,
    codes: np.ndarray,
    basis: np.ndarray,
    function: Callable,
    random: np.random.Generator,
) -> np.ndarray:
    """Returns codes without rows of `f(U_i) = 0`, unless there are no others.

    Such a row may get no gradient, from this loss or any later one, and its
    token would stay lost. It takes the codes of a live row instead, which are
    live whatever `f` is: the row that fits best among a sample.
    """
    activations = _activate(function, codes)
    is_live = activations.any(axis=1)
    if is_live.all() or not is_live.any():
        return codes
    donors = random.permutation(np.flatnonzero(is_live))[:MAX_DONORS]
    donated = activations[donors] @ basis
    rows = np.asarray(table[~is_live], dtype=np.float32)
    # ||e - x||^2 without the ||e||^2 that all candidates share.
    distances = np.square(donated).sum(axis=1) - 2 * rows @ donated.T
    codes = codes.copy()
    codes[~is_live] = codes[donors[distances.argmin(axis=1)]]
    return codes
