"""Factors learned by gradient descent, from a random start."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np

from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.activations import is_zero_below
from keras_distilled_embedding.factorization.closed_form import MARGIN
from keras_distilled_embedding.factorization.closed_form import balance
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.training import JIT_COMPILE
from keras_distilled_embedding.factorization.training import RowBatches
from keras_distilled_embedding.factorization.training import progress_bar

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


def learned_factors(
    table: Table,
    rank: int,
    function: Callable,
    seed: int,
    verbose: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors trained by gradient descent from a random start."""
    random = np.random.default_rng(seed)
    batches = RowBatches(table, BATCH_SIZE, STEPS_PER_EPOCH, random)

    def revive(codes: np.ndarray, basis: np.ndarray) -> np.ndarray:
        return _revive_dead_rows(
            table.values, codes, batches.unscaled(basis), function, random
        )

    model = _factorized_embedding(
        table.shape, rank, function, batches.batch_size, random
    )
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.MeanSquaredError(),
        jit_compile=JIT_COMPILE,
    )
    with progress_bar(verbose, MAX_EPOCHS) as callbacks:
        model.fit(
            batches,
            epochs=MAX_EPOCHS,
            shuffle=False,  # The batches are shuffled, by their own seed.
            verbose=0,
            callbacks=[_ReduceOnPlateau(revive), *callbacks],
        )
    codes, basis = model.get_weights()
    if is_linear(function) or is_relu(function):
        return balance(codes, batches.unscaled(basis))
    return codes, batches.unscaled(basis)


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
    bound = _LowerBound(MARGIN) if is_zero_below(function) else None
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
    activations = activate(function, codes)
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
