"""Computing a teacher's predictions once and keeping them on disk.

A directory holds `manifest.json` and, for each batch, a file of arrays without
pickled objects, `batch_000000.npz`, ... How they are nested is in the manifest.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pprint
import threading
import zipfile
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock
import keras
import numpy as np
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.arguments import as_positive_number
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.datasets import iterate_batches
from keras_distilled_embedding._utils.datasets import num_batches
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)
from keras_distilled_embedding.distillation.logits_distillation import as_logits

_MANIFEST = "manifest.json"
_LOCK = "writer.lock"
_VERSION = 3
# The keys of a cached batch.
_INPUTS = "inputs"
_TEACHER_OUTPUTS = "teacher_outputs"
_LOG_PROBABILITIES = "log_probabilities"
_CLASSES = "classes"
# NumPy parses headers as Python, which fails in several threads at once
# (CPython issue 106905, open in 3.11).
_reading = threading.Lock()
# What NumPy raises for files that are missing or damaged.
_READ_ERRORS = OSError, EOFError, zipfile.BadZipFile, LookupError, ValueError


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
        if not (self.directory / _MANIFEST).is_file():
            raise FileNotFoundError(
                "`directory` must hold a cache: make it with `cache_teacher`. "
                f"Received: directory='{directory}', without '{_MANIFEST}'"
            )
        self._manifest = _Manifest.read(self.directory)
        count = _count_batches(self.directory, self._manifest)
        if self._manifest.num_batches is None:
            raise ValueError(
                "`directory` must hold a complete cache: call `cache_teacher` "
                "again with the same arguments, which continues it. Received: "
                f"directory='{directory}', interrupted after {count} batches"
            )
        self._num_batches = count
        self.top_k = self._manifest.top_k
        self.temperature = self._manifest.temperature
        self.epoch = 0

    def on_epoch_end(self) -> None:
        self.epoch += 1

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        position = range(len(self))[operator.index(index)]
        if self.shuffle_seed is not None:
            rng = np.random.default_rng((self.shuffle_seed, self.epoch))
            position = int(rng.permutation(len(self))[position])
        path = _batch_path(self.directory, position)
        try:
            # NumPy leaves a damaged file open that it has opened itself.
            with (
                _reading,
                open(path, "rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                batch = self._manifest.nest(lambda i: arrays[str(i)])
        except _READ_ERRORS as error:
            raise _damaged(path, error) from error
        for output in batch[0][_TEACHER_OUTPUTS]:
            output[_CLASSES] = output[_CLASSES].astype("int32")
        return batch

    def as_dataset(self) -> Any:
        """Returns the same batches as a `tf.data.Dataset`.

        On TensorFlow, Keras takes the shapes of a `PyDataset` from its first
        two batches and fails at a third one of another width.
        """
        import tensorflow as tf

        leaves = self._manifest.leaves
        spec = self._manifest.nest(
            lambda i: tf.TensorSpec((None, *leaves[i][0][1:]), leaves[i][1])
        )
        for output in spec[0][_TEACHER_OUTPUTS]:
            output[_CLASSES] = tf.TensorSpec(output[_CLASSES].shape, "int32")
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
        self._manifest.check(self.directory, teacher=_fingerprint_of(teacher))


def split_inputs(x: Any) -> tuple[Any, list[TopPredictions] | None]:
    """Separates the inputs of a batch from the teacher's predictions.

    These are `None` for a batch that is not from a `TeacherCache`.
    """
    if not isinstance(x, dict) or set(x) != {_INPUTS, _TEACHER_OUTPUTS}:
        return x, None
    return x[_INPUTS], [
        TopPredictions(output[_LOG_PROBABILITIES], output[_CLASSES])
        for output in x[_TEACHER_OUTPUTS]
    ]


@dataclasses.dataclass
class _Manifest:
    """What `manifest.json` holds."""

    teacher: str  # Identifies the model by a hash of its weights.
    top_k: int
    temperature: float
    first_batch: str = ""  # Hash of the dataset's first batch.
    # A batch as it is read, with the index of each array in its place.
    structure: str = ""
    # Shape and dtype of each array, with `None` for a size that differs
    # between batches.
    leaves: list[Any] = dataclasses.field(default_factory=list)
    num_batches: int | None = None  # `None` while the cache is incomplete.
    version: int = _VERSION

    @classmethod
    def read(cls, directory: Path) -> _Manifest:
        path = directory / _MANIFEST
        try:
            entries = json.loads(path.read_text("utf-8"))
            manifest = cls(**entries)
            if entries != {**vars(manifest), "version": _VERSION}:
                raise ValueError("entries are missing or of another version")
        except (ValueError, TypeError) as error:
            raise ValueError(
                "`directory` must hold a cache that this version of "
                f"`cache_teacher` wrote. Received: '{path}', which is damaged "
                "or something else; delete the directory or use another one "
                f"({type(error).__name__}: {error})"
            ) from error
        return manifest

    def write(self, directory: Path) -> None:
        text = json.dumps(vars(self), indent=1)
        write_atomically(
            directory / _MANIFEST, lambda file: file.write(text.encode("utf-8"))
        )

    def check(self, directory: Path, **received: Any) -> None:
        """Raises an error if the cache was made with other arguments."""
        for name, value in received.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"`{name}` must be the one of the cache in '{directory}', "
                    f"{getattr(self, name)}; use another directory for another "
                    f"one. Received: {name}={value}"
                )

    def nest(self, leaf_of: Callable[[int], Any]) -> Any:
        """Returns a batch with other values in the place of the indices."""
        return keras.tree.map_structure(
            lambda i: None if i is None else leaf_of(i),
            ast.literal_eval(self.structure),
        )

    def include(self, structure: str, leaves: list[np.ndarray]) -> bool:
        """Adds a batch; returns whether the manifest had to change."""
        if structure != (self.structure or structure):
            raise ValueError(
                "`dataset` must have batches of one structure. Received: "
                f"{self.structure}, and in another batch {structure}"
            )
        received = [[list(leaf.shape), leaf.dtype.name] for leaf in leaves]
        merged = []
        for old, new in zip(self.leaves or received, received):
            if len(old[0]) != len(new[0]) or old[1] != new[1]:
                raise ValueError(
                    "`dataset` must have batches of one dtype and one number "
                    f"of axes. Received: an array of shape and dtype {old}, "
                    f"and in another batch {new}"
                )
            sizes = [a if a == b else None for a, b in zip(old[0], new[0])]
            merged.append([sizes, new[1]])
        is_new = merged != self.leaves
        self.structure, self.leaves = structure, merged
        return is_new


def _batch_path(directory: Path, index: int) -> Path:
    return directory / f"batch_{index:06d}.npz"


def _count_batches(directory: Path, manifest: _Manifest) -> int:
    """Counts the batches on disk, and raises an error if one is missing."""
    found = len([*directory.glob("batch_*.npz")])
    count = max(found, manifest.num_batches or 0)
    for index in range(count):
        path = _batch_path(directory, index)
        if not path.is_file():
            raise _damaged(path, "the file is missing")
    return count


def _damaged(path: Path, reason: Any) -> ValueError:
    return ValueError(
        f"The teacher's cache is damaged: '{path}' ({reason}). Delete the "
        f"directory '{path.parent}' and call `cache_teacher` again"
    )


def _hash_of(arrays: Iterable[Any], structure: str = "") -> str:
    """Returns a hash of arrays, the same in every process."""
    sha = hashlib.sha256(structure.encode())
    for array in map(ops.convert_to_numpy, arrays):
        sha.update(f"{array.dtype.name} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:32]


def _fingerprint_of(teacher: keras.Model) -> str:
    """Identifies a model by its weights, whatever their names are."""
    return f"the model with weights {_hash_of(teacher.weights)}"


def _as_array(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = ops.convert_to_numpy(value)
    if array.dtype.kind not in "biufc" or array.ndim < 1:
        raise ValueError(
            "`dataset` must have batches of numbers, in arrays of a dtype "
            "that NumPy knows and with a batch axis. Received: an array of "
            f"dtype {array.dtype} and shape {array.shape}"
        )
    return array


def _flatten(batch: Any) -> tuple[str, list[np.ndarray]]:
    """Returns a batch as text, with indices for its arrays, and the arrays."""
    indices = itertools.count()
    numbered = keras.tree.map_structure(
        lambda leaf: None if leaf is None else next(indices), batch
    )
    # Of plain dictionaries, with their keys in order, lists and tuples.
    plain = keras.saving.serialize_keras_object(numbered)
    structure = pprint.saferepr(plain)
    try:
        ast.literal_eval(structure)
    except (ValueError, SyntaxError):
        raise ValueError(
            "`dataset` must have strings for the keys of its dictionaries. "
            f"Received: a batch of {structure}"
        ) from None
    leaves = keras.tree.flatten(batch)
    return structure, [leaf for leaf in leaves if leaf is not None]


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
        self._manifest = _Manifest(_fingerprint_of(teacher), top_k, temperature)
        self._num_stored = 0  # Batches of earlier calls.
        self._count = 0

    @property
    def is_complete(self) -> bool:
        return self._manifest.num_batches is not None

    def open(self) -> None:
        """Locks the directory, if it exists, and finds what it holds."""
        if not self._directory.exists():
            return
        if not self._directory.is_dir():
            raise ValueError(
                "`directory` must be a directory. Received: the file "
                f"directory='{self._directory}'"
            )
        self._acquire_lock()
        for pattern in (f"{_MANIFEST}.*.tmp", "batch_*.npz.*.tmp"):
            for path in self._directory.glob(pattern):
                path.unlink()  # Its writer was killed.
        names = {path.name for path in self._directory.iterdir()} - {_LOCK}
        if not names:
            return
        if _MANIFEST not in names:
            raise ValueError(
                "`directory` must be empty or hold a cache, not other files. "
                f"Received: directory='{self._directory}' with "
                f"{sorted(names)[:5]}"
            )
        stored = _Manifest.read(self._directory)
        count = _count_batches(self._directory, stored)
        if count:  # Or else there is nothing to continue.
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

    def add(self, batch: Any) -> None:
        """Adds the next batch of the dataset."""
        index, self._count = self._count, self._count + 1
        if 0 < index < self._num_stored:
            return
        if index and self.is_complete:
            raise self._other_dataset("a dataset with more batches")
        # A list is a tuple, as Keras reads it.
        batch = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        if not 1 <= len(batch) <= 3:
            raise ValueError(
                "`dataset` must have batches x, (x, y) or (x, y, "
                f"sample_weight). Received: batch {index} of {len(batch)} parts"
            )
        batch = keras.tree.map_structure(_as_array, batch)
        if index == 0:
            self._check_first(batch)
        if index >= self._num_stored:
            self._write(batch, index)

    def _check_first(self, batch: Any) -> None:
        structure, leaves = _flatten(batch)
        first_batch = _hash_of(leaves, structure)
        if not self._num_stored:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            self._manifest.first_batch = first_batch
        elif self._manifest.first_batch != first_batch:
            raise self._other_dataset("another first batch")

    def _write(self, batch: tuple[Any, ...], index: int) -> None:
        """Writes a batch with the predictions for it."""
        x, *others = batch
        outputs = self._predictor.predict_on_batch(x)
        for i, output in enumerate(outputs):
            if np.isnan(output[_LOG_PROBABILITIES]).any():
                raise ValueError(
                    "`teacher` must predict finite logits. Received: NaN or "
                    f"infinity in output {i} for batch {index}"
                )
        x = {_INPUTS: x, _TEACHER_OUTPUTS: tuple(outputs)}
        structure, leaves = _flatten((x, *others))
        if self._manifest.include(structure, leaves):
            self._manifest.write(self._directory)
        arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves)}
        write_atomically(
            _batch_path(self._directory, index),
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

    As a model of its own it leaves the teacher's compiled functions alone.
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

    def _top_predictions(self, logits: Any) -> dict[str, Any]:
        logits = logits / self.temperature
        num_classes = logits.shape[-1]
        log_p, classes = ops.top_k(
            ops.log_softmax(logits, axis=-1), min(self.top_k, num_classes)
        )
        # A class of probability zero stays a finite number in float16.
        log_p = ops.maximum(log_p, float(np.finfo("float16").min))
        kind = "uint16" if num_classes <= 2**16 else "int32"
        return {
            _LOG_PROBABILITIES: ops.cast(log_p, "float16"),
            _CLASSES: ops.cast(classes, kind),
        }


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
