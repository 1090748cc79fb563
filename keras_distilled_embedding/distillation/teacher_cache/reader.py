"""Training on predictions that a teacher has made once."""

from __future__ import annotations

import operator
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)
from keras_distilled_embedding.distillation.teacher_cache import storage

# NumPy parses headers as Python, which fails in several threads at once
# (CPython issue 106905, open in 3.11).
_reading = threading.Lock()
# What NumPy raises for files that are missing or damaged.
_READ_ERRORS = OSError, EOFError, zipfile.BadZipFile, LookupError, ValueError


def split_inputs(x: Any) -> tuple[Any, list[TopPredictions] | None]:
    """Separates the inputs of a batch from the teacher's predictions.

    There is a prediction for each output of the teacher, or `None` instead of
    them for a batch that is not from a `TeacherCache`.
    """
    keys = {storage.INPUTS, storage.TEACHER_OUTPUTS}
    if not isinstance(x, dict) or set(x) != keys:
        return x, None
    return x[storage.INPUTS], [
        TopPredictions(
            output[storage.LOG_PROBABILITIES], output[storage.CLASSES]
        )
        for output in x[storage.TEACHER_OUTPUTS]
    ]


class TeacherCache(keras.utils.PyDataset):
    """The batches of a dataset with the predictions of a teacher.

    Opens a directory that `cache_teacher` wrote. Every batch has the
    structure of the dataset's, as a tuple, with `x` replaced by

    ```
    {
        "inputs": x,
        "teacher_outputs": (  # for each output of the teacher
            {
                "log_probabilities": ...,  # (..., k) float16, descending
                "classes": ...,  # (..., k) int32
            },
        ),
    }
    ```

    Each batch is read when it is needed and no file stays open: any number of
    workers may read at once.

    Args:
        directory: Path of a complete cache.
        shuffle_seed: Integer of at least 0, or `None`. With a seed, the order
            of the batches depends on the seed and the epoch alone, so that a
            resumed training continues with the same batches. `None` keeps the
            dataset's order.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Attributes:
        top_k: Integer, as given to `cache_teacher`.
        temperature: Number, as given to `cache_teacher`.
        directory: Path of the cache.
        epoch: Integer, which selects the order. A `Distiller` sets it.
            Elsewhere `on_epoch_end`, which Keras calls after each epoch and
            once before the first, adds one.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If the cache is incomplete or damaged, or if
            `shuffle_seed` is out of range.

    Example:

    ```python
    cache = TeacherCache("teacher_cache", shuffle_seed=0)
    distiller.fit(cache, epochs=3)
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        shuffle_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.shuffle_seed = as_optional_integer(
            "shuffle_seed", shuffle_seed, minimum=0
        )
        self.directory = Path(directory)
        if not (self.directory / storage.MANIFEST).is_file():
            raise FileNotFoundError(
                "`directory` must hold a cache: make it with `cache_teacher`. "
                f"Received: directory='{directory}', without "
                f"'{storage.MANIFEST}'"
            )
        self._manifest = storage.Manifest.read(self.directory)
        num_batches = self._manifest.num_batches
        count = storage.count_batches(self.directory, num_batches)
        if num_batches is None:
            raise ValueError(
                "`directory` must hold a complete cache: call `cache_teacher` "
                "again with the same arguments, which continues it. Received: "
                f"directory='{directory}', interrupted after {count} batches"
            )
        self._num_batches = num_batches
        self.top_k = self._manifest.top_k
        self.temperature = self._manifest.temperature
        self.epoch = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = np.arange(len(self))
        if self.shuffle_seed is not None:
            rng = np.random.default_rng((self.shuffle_seed, epoch))
            self._order = rng.permutation(len(self))

    def on_epoch_end(self) -> None:
        self.epoch += 1

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        position = int(self._order[range(len(self))[operator.index(index)]])
        path = storage.batch_path(self.directory, position)
        try:
            # NumPy leaves a damaged file open that it has opened itself.
            with (
                _reading,
                open(path, "rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                count = len(self._manifest.leaves)
                leaves = [arrays[str(i)] for i in range(count)]
        except _READ_ERRORS as error:
            raise storage.damaged(path, error) from error
        return self._nest(leaves, lambda classes: classes.astype("int32"))

    def _nest(
        self, leaves: list[Any], to_int32: Callable[[Any], Any]
    ) -> tuple[Any, ...]:
        """Nests the leaves of a batch as they are documented above."""
        x, *others = storage.unflatten(self._manifest.structure, leaves)
        outputs = leaves[-2 * self._manifest.num_outputs :]
        predictions = tuple(
            {
                storage.LOG_PROBABILITIES: log_p,
                storage.CLASSES: to_int32(classes),
            }
            for log_p, classes in zip(outputs[::2], outputs[1::2])
        )
        x = {storage.INPUTS: x, storage.TEACHER_OUTPUTS: predictions}
        return (x, *others)

    def as_dataset(self) -> Any:
        """Returns the same batches as a `tf.data.Dataset`.

        On TensorFlow, Keras takes the shapes of a `PyDataset` from its first
        two batches and fails at a third one of another width.
        """
        import tensorflow as tf

        spec = self._nest(
            [
                tf.TensorSpec((None, *shape[1:]), dtype)
                for shape, dtype in self._manifest.leaves
            ],
            lambda classes: tf.TensorSpec(classes.shape, "int32"),
        )
        length = len(spec)
        while spec[length - 1] is None:  # tf.data has no None.
            length -= 1
        if None in keras.tree.flatten(spec[:length]):
            raise ValueError(
                "A cache of batches with a None in them cannot be read on "
                "TensorFlow: make it of batches with labels. Received: "
                f"batches of {spec}"
            )
        dataset = tf.data.Dataset.from_generator(
            lambda: (self[i][:length] for i in range(len(self))),
            output_signature=spec[:length],
        )
        return dataset.apply(
            tf.data.experimental.assert_cardinality(len(self))
        ).prefetch(2)

    def check(self, teacher: keras.Model) -> None:
        """Raises a `ValueError` if the cache is of another teacher."""
        fingerprint = storage.fingerprint_of(teacher)
        self._manifest.check(self.directory, teacher=fingerprint)
