"""The non-linear funnel, `E ~ f(U) W + g(U A + b) B`."""

from __future__ import annotations

import math
from collections.abc import Callable

import keras
import numpy as np

from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.training import JIT_COMPILE
from keras_distilled_embedding.factorization.training import RowBatches
from keras_distilled_embedding.factorization.training import progress_bar

# One schedule for tables of every size. An epoch is one pass over the rows
# in so many steps: each row's codes then move as often as any other's, and
# the decoder as often for a small table as for a large one.
EPOCHS = 100
STEPS_PER_EPOCH = 60
LEARNING_RATE = 2e-2
WARMUP = 0.1
# Training stops after `PATIENCE` epochs without a loss lower by this share.
MIN_IMPROVEMENT = 1e-3
PATIENCE = 10
# Of the hidden layer's initial weights on the way out: nearly none, so that
# training starts from the linear form.
HIDDEN_BASIS_STDDEV = 0.01


def funnel_factors(
    table: Table,
    start: dict[str, np.ndarray],
    start_error: float,
    hidden_dim: int,
    function: Callable,
    hidden_function: Callable,
    seed: int,
    verbose: int,
) -> dict[str, np.ndarray]:
    """Trains all factors together by Adam, from those of the plain form.

    Args:
        table: The table.
        start: The `codes` and the `basis` of `E ~ f(U) W`.
        start_error: Their relative error.
        hidden_dim: `h`.
        function: `f`.
        hidden_function: `g`.
        seed: Of the hidden layer's initial weights and of the batches.
        verbose: 1 shows a progress bar.

    Returns:
        `codes`, `basis`, `hidden_kernel`, `hidden_bias` and `hidden_basis`,
        float32.
    """
    random = np.random.default_rng(seed)
    batch_size = math.ceil(len(table.values) / STEPS_PER_EPOCH)
    batches = RowBatches(table, batch_size, STEPS_PER_EPOCH, random)
    model = _funnel(
        table.shape,
        start["codes"].shape[1],
        hidden_dim,
        function,
        hidden_function,
        batches.batch_size,
    )
    initial = _initial_weights(start, function, hidden_dim, batches, random)
    for name, weights in initial.items():
        model.get_layer(name).set_weights(weights)
    model.compile(
        optimizer=keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                initial_learning_rate=0.0,
                decay_steps=round((1 - WARMUP) * EPOCHS * len(batches)),
                warmup_target=LEARNING_RATE,
                warmup_steps=round(WARMUP * EPOCHS * len(batches)),
            ),
            beta_2=0.99,
        ),
        loss=keras.losses.MeanSquaredError(),
        jit_compile=JIT_COMPILE,
    )
    with progress_bar(verbose, EPOCHS) as callbacks:
        model.fit(
            batches,
            epochs=EPOCHS,
            shuffle=False,  # The batches are shuffled, by their own seed.
            verbose=0,
            callbacks=[_KeepBest(start_error), *callbacks],
        )
    trained = {name: model.get_layer(name).get_weights() for name in initial}
    return {
        "codes": trained["codes"][0],
        "basis": batches.unscaled(trained["basis"][0]),
        "hidden_kernel": trained["hidden"][0],
        "hidden_bias": trained["hidden"][1],
        "hidden_basis": batches.unscaled(trained["hidden_basis"][0]),
    }


def _funnel(
    table_shape: tuple[int, int],
    rank: int,
    hidden_dim: int,
    function: Callable,
    hidden_function: Callable,
    batch_size: int,
) -> keras.Model:
    """The model `ids -> E~_ids`."""
    input_dim, output_dim = table_shape
    options = {"dtype": "float32"}  # whatever the global policy is
    layers = keras.layers
    ids = keras.Input((), batch_size=batch_size, dtype="int32")
    codes = layers.Embedding(input_dim, rank, name="codes", **options)(ids)
    features = layers.Activation(function, **options)(codes)
    linear = layers.Dense(output_dim, use_bias=False, name="basis", **options)
    hidden = layers.Dense(hidden_dim, hidden_function, name="hidden", **options)
    funnel = layers.Dense(
        output_dim, use_bias=False, name="hidden_basis", **options
    )
    total = layers.Add(**options)
    return keras.Model(ids, total([linear(features), funnel(hidden(codes))]))


def _initial_weights(
    start: dict[str, np.ndarray],
    function: Callable,
    hidden_dim: int,
    batches: RowBatches,
    random: np.random.Generator,
) -> dict[str, list[np.ndarray]]:
    """The plain form, every coordinate scaled alike, and a silent funnel."""
    codes, basis = start["codes"], batches.scaled(start["basis"])
    rank, output_dim = basis.shape
    if is_linear(function) or is_relu(function):
        scales = np.sqrt(np.square(codes).mean(axis=0)) + 1e-12
        codes, basis = codes / scales, scales[:, np.newaxis] * basis
    kernel = random.normal(size=(rank, hidden_dim)) / math.sqrt(rank)
    hidden_basis = random.normal(size=(hidden_dim, output_dim))
    return {
        "codes": [codes],
        "basis": [basis],
        "hidden": [kernel, np.zeros(hidden_dim)],
        "hidden_basis": [HIDDEN_BASIS_STDDEV * hidden_basis],
    }


class _KeepBest(keras.callbacks.Callback):
    """Goes back to the best epoch, and stops where nothing more is gained.

    Args:
        start_error: The loss before the first epoch.
    """

    def __init__(self, start_error: float) -> None:
        super().__init__()
        self._best_loss = self._goal = start_error

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._best_weights = self.model.get_weights()
        self._num_bad_epochs = 0

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        loss = logs["loss"]
        if loss < self._best_loss:
            self._best_loss = loss
            self._best_weights = self.model.get_weights()
        self._num_bad_epochs += 1
        if loss < self._goal:
            self._goal = (1 - MIN_IMPROVEMENT) * loss
            self._num_bad_epochs = 0
        if self._num_bad_epochs == PATIENCE:
            self.model.stop_training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self.model.set_weights(self._best_weights)
