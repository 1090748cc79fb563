"""What the factors that are trained have in common."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator

import keras
import numpy as np

from keras_distilled_embedding._utils.progress import make_progress
from keras_distilled_embedding.factorization.table import Table

# On torch compiling takes minutes, the steps themselves seconds.
JIT_COMPILE = False if keras.backend.backend() == "torch" else "auto"


class RowBatches(keras.utils.PyDataset):
    """Batches of one shape: row ids, rows divided by `scale`, row weights.

    The rows are those of `E L`. `scale` is their weighted RMS and the weights
    have a mean of 1, so that the mean squared error is the relative error
    whatever the table, and one learning rate serves them all.

    Args:
        table: The table.
        batch_size: Rows in a batch, at most.
        min_steps: Batches in an epoch, at least: where there are fewer rows,
            an epoch passes over them several times.
        random: Of the order, a new one every epoch.
    """

    def __init__(
        self,
        table: Table,
        batch_size: int,
        min_steps: int,
        random: np.random.Generator,
    ) -> None:
        super().__init__()
        self.scale = table.rms() or 1.0
        self.num_rows = len(table.values)
        self.batch_size = min(batch_size, self.num_rows)
        self._min_steps = min_steps
        self._table = table
        self._mean_weight = table.total_weight / self.num_rows
        self._random = random
        self.on_epoch_end()

    def __len__(self) -> int:
        return max(math.ceil(self.num_rows / self.batch_size), self._min_steps)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        start = index * self.batch_size
        ids = self._order[start : start + self.batch_size]
        # A memory map is read faster in the order of its rows.
        ids = np.sort(ids)
        rows = self._table.values[ids].astype(np.float32)
        rows = self._table.to_metric(rows) / np.float32(self.scale)
        weights = self._table.weights_of(ids) / self._mean_weight
        return ids, rows, weights.astype(np.float32)

    def on_epoch_end(self) -> None:
        # Whole passes over the rows, so that a full last batch can borrow.
        num_ids = len(self) * self.batch_size
        passes = math.ceil(num_ids / self.num_rows)
        orders = [
            self._random.permutation(self.num_rows) for _ in range(passes)
        ]
        self._order = np.concatenate(orders)[:num_ids].astype(np.int32)

    def scaled(self, basis: np.ndarray) -> np.ndarray:
        """The basis of these rows, from that of the table's."""
        return self._table.to_metric(basis) / self.scale

    def unscaled(self, basis: np.ndarray) -> np.ndarray:
        """The basis of the table's rows, from that of these rows."""
        return self._table.from_metric(self.scale * basis).astype(np.float32)


@contextlib.contextmanager
def progress_bar(
    verbose: int, total: int
) -> Iterator[list[keras.callbacks.Callback]]:
    """Yields the callbacks that draw a bar: none away from a terminal."""
    progress = None
    if verbose and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            progress = make_progress(verbose)
    if progress is None:
        yield []
        return
    with progress:
        task = progress.add_task("Learning", total=total)

        def update(epoch: int, logs: dict[str, float]) -> None:
            progress.update(
                task,
                completed=epoch + 1,
                description=f"Learning, relative error {logs['loss']:.4f}",
                refresh=True,
            )

        yield [keras.callbacks.LambdaCallback(on_epoch_end=update)]
