"""Factors learned by gradient descent: the first stage of the paper."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from collections.abc import Iterator

import keras
import numpy as np

from keras_distilled_embedding._utils.progress import make_progress
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.activations import is_zero_below
from keras_distilled_embedding.factorization.closed_form import MARGIN
from keras_distilled_embedding.factorization.closed_form import Factors
from keras_distilled_embedding.factorization.closed_form import balance
from keras_distilled_embedding.factorization.closed_form import rms
from keras_distilled_embedding.factorization.table import Table

# Adam on minibatches of rows, its rate falling to zero along a cosine. An
# epoch is one pass over the rows, or this many steps where a pass is shorter.
BATCH_SIZE = 4096
STEPS_PER_EPOCH = 50
EPOCHS = 60
LEARNING_RATE = 1e-2
# On torch compiling takes minutes, the steps themselves seconds.
JIT_COMPILE = False if keras.backend.backend() == "torch" else "auto"


def learned_factors(
    table: Table,
    rank: int,
    function: Callable,
    use_bias: bool,
    seed: int,
    verbose: int,
) -> Factors:
    """Returns codes, basis and offset trained from a random start.

    Args:
        table: The table, with the weights of its rows and columns.
        rank: Integer, at least 1.
        function: The activation `f`.
        use_bias: Whether there is an offset.
        seed: Integer, of the start and of the order of the rows.
        verbose: Whether to show a progress bar, on a terminal.
    """
    random = np.random.default_rng(seed)
    batches = _RowBatches(table, random)
    model = _factorized_embedding(
        table.shape, rank, function, use_bias, batches.batch_size, random
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        LEARNING_RATE, decay_steps=EPOCHS * len(batches)
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.MeanSquaredError(),
        jit_compile=JIT_COMPILE,
    )
    with _progress_bar(verbose) as callbacks:
        model.fit(
            batches,
            epochs=EPOCHS,
            shuffle=False,  # The batches are shuffled, by their own seed.
            verbose=0,
            callbacks=callbacks,
        )
    codes, basis, *offset = model.get_weights()
    basis = batches.unscaled(basis)
    if is_linear(function) or is_relu(function):  # `f(a U) = a f(U)`, `a > 0`
        codes, basis = balance(codes, basis, rms(codes))
    return Factors(
        codes, basis, batches.unscaled(offset[0]) if use_bias else None
    )


class _RowBatches(keras.utils.PyDataset):
    """Batches of one shape: row ids, rows divided by their RMS, row weights.

    The rows are those of `E L`. The weights have a mean of 1, so that the
    mean squared error is the relative error whatever the table, and one
    learning rate serves them all.

    Args:
        table: The table.
        random: Of the order, a new one every epoch.
    """

    def __init__(self, table: Table, random: np.random.Generator) -> None:
        super().__init__()
        self._scale = table.rms() or 1.0
        self._table = table
        self._num_rows = len(table.values)
        self._mean_weight = table.total_weight / self._num_rows
        self._random = random
        self.batch_size = min(BATCH_SIZE, self._num_rows)
        self.on_epoch_end()

    def __len__(self) -> int:
        return max(math.ceil(self._num_rows / self.batch_size), STEPS_PER_EPOCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        start = index * self.batch_size
        # A memory map is read faster in the order of its rows.
        ids = np.sort(self._order[start : start + self.batch_size])
        rows = self._table.values[ids].astype(np.float32)
        rows = self._table.to_metric(rows / np.float32(self._scale))
        weights = self._table.weights_of(ids) / self._mean_weight
        return ids, rows.astype(np.float32), weights.astype(np.float32)

    def on_epoch_end(self) -> None:
        # Whole passes over the rows, so that a full last batch can borrow.
        num_ids = len(self) * self.batch_size
        passes = math.ceil(num_ids / self._num_rows)
        orders = [
            self._random.permutation(self._num_rows) for _ in range(passes)
        ]
        self._order = np.concatenate(orders)[:num_ids].astype(np.int32)

    def unscaled(self, basis: np.ndarray) -> np.ndarray:
        """The basis of the table's rows, from that of these rows."""
        return self._table.from_metric(self._scale * basis).astype(np.float32)


class _LowerBound(keras.constraints.Constraint):
    """Keeps weights at or above a value."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, weights: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.maximum(weights, self.value)


def _factorized_embedding(
    table_shape: tuple[int, int],
    rank: int,
    function: Callable,
    use_bias: bool,
    batch_size: int,
    random: np.random.Generator,
) -> keras.Model:
    """Returns the model `ids -> f(U_ids) W + c` with weights `[U, W, c]`.

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
                use_bias=use_bias,
                kernel_initializer=keras.initializers.RandomNormal(
                    stddev=math.sqrt(2 / rank), seed=basis_seed
                ),
                dtype="float32",
            ),
        ]
    )


@contextlib.contextmanager
def _progress_bar(verbose: int) -> Iterator[list[keras.callbacks.Callback]]:
    """Yields the callbacks that draw a bar: none away from a terminal."""
    if not (verbose and sys.stdout.isatty()):
        yield []
        return
    with make_progress(verbose) as progress:
        task = progress.add_task("Learning", total=EPOCHS)

        def update(epoch: int, logs: dict[str, float]) -> None:
            progress.update(
                task,
                completed=epoch + 1,
                description=f"Learning, relative error {logs['loss']:.4f}",
                refresh=True,
            )

        yield [keras.callbacks.LambdaCallback(on_epoch_end=update)]
