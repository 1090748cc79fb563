"""Running a teacher once and keeping its predictions."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import as_positive_number
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.datasets import iterate_batches
from keras_distilled_embedding._utils.datasets import num_batches
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.distillation.logits_distillation import as_logits
from keras_distilled_embedding.distillation.teacher_cache import storage
from keras_distilled_embedding.distillation.teacher_cache.reader import (
    TeacherCache,
)

_LOCK = "writer.lock"


def cache_teacher(
    teacher: keras.Model,
    dataset: Any,
    directory: str | os.PathLike[str],
    *,
    top_k: int = 32,
    temperature: float = 1.0,
    shuffle_seed: int | None = None,
    verbose: bool | int = 1,
) -> TeacherCache:
    """Writes a teacher's predictions for a dataset to disk, once.

    For every batch the teacher runs without dropout. Of each of its outputs,
    logits `t` of shape `(..., V)`, the `k = min(top_k, V)` largest of

    ```
    log p = log_softmax(t / temperature)
    ```

    are kept in float16 together with their classes. The batches are kept too,
    so that any number of students can be trained on the cache alone. A token
    takes 4 bytes for each of its `k` classes (6 bytes if `V > 65536`).

    Call it again with the same arguments after an interruption: it continues
    after the last batch on disk. For a complete cache the teacher does not
    run. The teacher is recognized by its weights, the dataset by its first
    batch and its number of batches.

    Args:
        teacher: A built `keras.Model` whose outputs are logits. It is not
            changed.
        dataset: A finite iterable of batches `x`, `(x, y)` or
            `(x, y, sample_weight)`, in the same order whenever it is read: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a list, ... Each of
            the three may be arrays in dictionaries, lists and tuples; shapes
            may differ between batches.
        directory: Path of a directory that is empty, does not exist yet, or
            holds a cache made with the same arguments. One process at a time
            may write to it.
        top_k: Positive integer.
        temperature: Positive number.
        shuffle_seed: As of `TeacherCache`.
        verbose: Whether to show a progress bar, on a terminal.

    Returns:
        The opened `TeacherCache`.

    Raises:
        TypeError: If `teacher` is not a `keras.Model`.
        ValueError: If an argument is out of range, if the dataset is empty or
            has batches that cannot be stored, if the teacher's outputs are
            not logits, or if `directory` holds other files, a damaged cache,
            or the cache of another teacher, dataset, `top_k` or
            `temperature`.
        BlockingIOError: If another process writes to `directory`.

    Example:

    ```python
    cache = cache_teacher(teacher, train_batches, "teacher_cache")
    for compression in (4.0, 8.0, 16.0):
        student = compress(teacher, compression=compression)
        distiller = Distiller(teacher, student, [LogitsDistillation()])
        distiller.compile("adam", loss)
        distiller.fit(cache)
    ```

    References:
    - [Tan et al., 2019](https://arxiv.org/abs/1902.10461), who keep the
      top k classes of a teacher.
    """
    check_built_model("teacher", teacher)
    _check_outputs(teacher, getattr(teacher, "outputs", None) or ())
    writer = _Writer(
        teacher,
        Path(directory),
        as_integer("top_k", top_k),
        as_positive_number("temperature", temperature),
    )
    try:
        writer.open()
        total = num_batches(dataset)
        writer.check_num_batches(total)
        for element in iterate_batches(
            dataset, "Caching the teacher's outputs", verbose
        ):
            writer.add(element)
            if writer.is_complete and total is not None:
                break  # The first batch and the number of batches agree.
        else:
            writer.finish()
    finally:
        writer.lock.release(force=True)
    return TeacherCache(directory, shuffle_seed)


class _Writer:
    """Adds batches to a cache, except for those that it already holds."""

    def __init__(
        self,
        teacher: keras.Model,
        directory: Path,
        top_k: int,
        temperature: float,
    ) -> None:
        self.lock = filelock.FileLock(directory / _LOCK, timeout=0)
        self._directory = directory
        self._predictor = _Predictor(teacher, top_k, temperature)
        self._manifest = storage.Manifest(
            storage.fingerprint_of(teacher), top_k, temperature
        )
        self._num_stored = 0  # Batches of earlier calls.
        self._count = 0

    @property
    def is_complete(self) -> bool:
        return self._manifest.num_batches is not None

    def open(self) -> None:
        """Locks the directory, if it exists, and finds what it holds."""
        if not self._directory.is_dir():
            if self._directory.exists():
                raise ValueError(
                    "`directory` must be a directory. Received: the file "
                    f"directory='{self._directory}'"
                )
            return
        self._acquire_lock()
        for pattern in (f"{storage.MANIFEST}.*.tmp", "batch_*.npz.*.tmp"):
            for path in self._directory.glob(pattern):
                path.unlink()  # Its writer was killed.
        names = {path.name for path in self._directory.iterdir()} - {_LOCK}
        if names and storage.MANIFEST not in names:
            raise ValueError(
                "`directory` must be empty or hold a cache, not other files. "
                f"Received: directory='{self._directory}' with "
                f"{sorted(names)[:5]}"
            )
        if names:
            self._continue(storage.Manifest.read(self._directory))

    def _continue(self, stored: storage.Manifest) -> None:
        count = storage.count_batches(self._directory, stored.num_batches)
        if not count:
            return  # There is nothing to continue.
        stored.check(
            self._directory,
            teacher=self._manifest.teacher,
            top_k=self._manifest.top_k,
            temperature=self._manifest.temperature,
        )
        self._manifest, self._num_stored = stored, count

    def _acquire_lock(self) -> None:
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise BlockingIOError(
                f"Another process writes to '{self._directory}': wait until "
                "it has ended, or use another directory."
            ) from None

    def check_num_batches(self, total: int | None) -> None:
        """Raises an error if a dataset of this size is not the cached one."""
        if total is not None and (
            total < self._num_stored
            or (total > self._num_stored and self.is_complete)
        ):
            raise self._other_dataset(f"a dataset of {total} batches")

    def add(self, element: Any) -> None:
        """Adds the next batch of the dataset."""
        index, self._count = self._count, self._count + 1
        if 0 < index < self._num_stored:
            return
        if index and self.is_complete:
            raise self._other_dataset("a dataset with more batches")
        if isinstance(element, list):  # As Keras reads it.
            element = tuple(element)
        elif not isinstance(element, tuple):
            element = (element,)
        if not 1 <= len(element) <= 3:
            raise ValueError(
                "`dataset` must have batches x, (x, y) or (x, y, "
                f"sample_weight). Received: batch {index} of {len(element)} "
                "parts"
            )
        leaves: list[np.ndarray] = []
        structure = storage.flatten(element, leaves)
        if index == 0:
            self._check_first(storage.hash_of(leaves, structure))
        if structure != (self._manifest.structure or structure):
            raise ValueError(
                "`dataset` must have batches of one structure. Received: "
                f"{self._manifest.structure}, and in batch {index} {structure}"
            )
        if index >= self._num_stored:
            self._write(structure, leaves, index)

    def _check_first(self, first_batch: str) -> None:
        if not self._num_stored:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            self._manifest.first_batch = first_batch
        elif self._manifest.first_batch != first_batch:
            raise self._other_dataset("another first batch")

    def _write(
        self, structure: Any, leaves: list[np.ndarray], index: int
    ) -> None:
        """Writes a batch, followed by the predictions for it."""
        manifest = self._manifest
        x = storage.unflatten(structure, leaves)[0]
        outputs = self._predictor.predict_on_batch(x)
        for i, (log_p, classes) in enumerate(outputs):
            if np.isnan(log_p).any():
                raise ValueError(
                    "`teacher` must predict finite logits. Received: NaN or "
                    f"infinity in output {i} for batch {index}"
                )
            leaves += [log_p, classes]
        merged = storage.merge_leaves(manifest.leaves, leaves)
        if merged != manifest.leaves:
            manifest.structure, manifest.leaves = structure, merged
            manifest.num_outputs = len(outputs)
            manifest.write(self._directory)
        arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves)}
        write_atomically(
            storage.batch_path(self._directory, index),
            lambda file: np.savez(file, **arrays),
        )

    def finish(self) -> None:
        """Ends the dataset, which completes the cache."""
        if not self._count:
            raise ValueError(
                "`dataset` must have at least one batch. Received: an empty "
                "dataset, or an iterator that is used up"
            )
        if self._count < self._num_stored:
            raise self._other_dataset(f"a dataset of {self._count} batches")
        if not self.is_complete:
            self._manifest.num_batches = self._count
            self._manifest.write(self._directory)

    def _other_dataset(self, received: str) -> ValueError:
        state = "complete" if self.is_complete else "interrupted"
        return ValueError(
            "`dataset` must be the one whose batches `directory` holds, in "
            "the same order (without shuffling); use another directory for "
            f"another dataset. Received: {received}, for the {state} cache of "
            f"{self._num_stored} batches in '{self._directory}'"
        )


class _Predictor(keras.Model):
    """Runs the teacher and selects its most likely classes.

    It is a model of its own, so that the teacher's compiled functions stay as
    they are and only the selected classes leave the device.
    """

    def __init__(
        self, teacher: keras.Model, top_k: int, temperature: float
    ) -> None:
        super().__init__(name="predictor", autocast=False)
        self.teacher = teacher
        self.top_k = top_k
        self.temperature = temperature
        self.run_eagerly = teacher.run_eagerly
        if keras.backend.backend() == "tensorflow":
            # XLA would compile anew for each width of a batch.
            self.jit_compile = False
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        # The context of this call puts the teacher in inference mode.
        outputs = keras.tree.flatten(self.teacher(inputs))
        _check_outputs(self.teacher, outputs)
        kinds = keras_internals.last_activations(self.teacher)
        return [
            self._top_predictions(as_logits(output, kind))
            for output, kind in zip(outputs, kinds or [None] * len(outputs))
        ]

    def _top_predictions(self, logits: Any) -> tuple[Any, Any]:
        logits = logits / self.temperature
        num_classes = logits.shape[-1]
        log_p, classes = ops.top_k(
            ops.log_softmax(logits, axis=-1), min(self.top_k, num_classes)
        )
        # A class of probability zero stays a finite number in float16.
        log_p = ops.maximum(log_p, float(np.finfo("float16").min))
        kind = "uint16" if num_classes <= 2**16 else "int32"
        return ops.cast(log_p, "float16"), ops.cast(classes, kind)


def _check_outputs(teacher: keras.Model, outputs: Iterable[Any]) -> None:
    for output in outputs:
        dtype = keras.backend.standardize_dtype(output.dtype)
        if (
            not keras.backend.is_float_dtype(dtype)
            or len(output.shape) < 2
            or (output.shape[-1] or 1) < 2
        ):
            raise ValueError(
                "`teacher` must predict logits or probabilities of classes: "
                "float outputs of shape (..., V) over V > 1 classes. Received: "
                f"an output of shape {tuple(output.shape)} and dtype {dtype}"
            )
    if "sigmoid" in (keras_internals.last_activations(teacher) or ()):
        raise ValueError(
            "`teacher` must predict classes: a cache holds the likeliest. "
            "Received: an output that ends with a sigmoid"
        )
