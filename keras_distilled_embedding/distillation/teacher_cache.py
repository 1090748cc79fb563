"""What a teacher predicts, computed once and kept on disk.

A cache is a directory of `manifest.json` and `shard_00000.npz`, ...: the
batches of a dataset, with the teacher's most likely classes for each token.
Every file appears whole or not at all, and no file holds pickled objects.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import numbers
import operator
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)

INPUTS = "inputs"
TEACHER_OUTPUTS = "teacher_outputs"
LOG_PROBABILITIES = "log_probabilities"
CLASSES = "classes"

_FORMAT = "keras_distilled_embedding.teacher_cache"
_VERSION = 1
_MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"(manifest\.json|shard_\d+\.npz)\.tmp")
_FIELDS = ("x", "y", "sample_weight")

# A shard is written when it holds so much: little enough to lose, and to
# find a batch in quickly.
_SHARD_BATCHES = 64
_SHARD_BYTES = 64 * 2**20

# NumPy parses headers as Python, which threads must not do at the same time
# (CPython issue 106905, open in 3.11).
_reading = threading.Lock()


def split_inputs(x: Any) -> tuple[Any, list[TopPredictions] | None]:
    """Parts the inputs of a batch from the teacher's predictions.

    Args:
        x: The inputs of any batch, of a `TeacherCache` or not.

    Returns:
        The student's inputs, and the predictions for each output of the
        teacher, `None` where the batch has none.
    """
    if not isinstance(x, dict) or set(x) != {INPUTS, TEACHER_OUTPUTS}:
        return x, None
    return x[INPUTS], [
        TopPredictions(output[LOG_PROBABILITIES], output[CLASSES])
        for output in x[TEACHER_OUTPUTS]
    ]


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

    For every batch the teacher runs without dropout, and of each of its
    outputs, logits `t` of shape `(..., V)`, the `k = min(top_k, V)` largest of

    ```
    log p = log_softmax(t / temperature)
    ```

    are kept in float16, with their classes. The batches themselves are kept
    too, so that any number of students can be trained on the cache alone. A
    token takes 4 bytes for each of its `k` classes (6, if `V > 65536`).

    Called again, it keeps what is there: after an interruption it computes
    what is missing, and a complete cache does not run the teacher. The
    dataset is read through each time, to see that it is the same one; let one
    process at a time write to a directory.

    Args:
        teacher: A built `keras.Model`, whose outputs are logits. It is left
            as it is.
        dataset: A finite iterable of batches `x`, `(x, y)` or
            `(x, y, sample_weight)`, in the same order whenever it is read: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a list, ... Each of
            the three may be arrays in dictionaries, lists and tuples; shapes
            may differ between batches.
        directory: Path of the cache: empty, not there yet, or a cache made
            by a call with the same arguments.
        top_k: Positive integer.
        temperature: Positive number.
        shuffle_seed: As of `TeacherCache`.
        verbose: Whether to show a progress bar, on a terminal.

    Returns:
        The opened `TeacherCache`.

    Raises:
        TypeError: If `teacher` is not a `keras.Model`.
        ValueError: If an argument is out of range, if the dataset is empty or
            holds what cannot be stored, if the teacher's outputs are not
            logits, or if `directory` holds something else: other files, or
            the cache of another teacher, dataset, `top_k` or `temperature`.

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
    if not isinstance(teacher, keras.Model):
        raise TypeError(
            f"`teacher` must be a `keras.Model`. Received: teacher={teacher!r}"
        )
    if not teacher.built:
        raise ValueError(
            "`teacher` must be built: call it, or its `build()`, first. "
            f"Received: teacher={teacher!r}"
        )
    if (
        isinstance(top_k, bool)
        or not isinstance(top_k, numbers.Integral)
        or top_k < 1
    ):
        raise ValueError(
            f"`top_k` must be a positive integer. Received: top_k={top_k!r}"
        )
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, numbers.Real)
        or not 0 < temperature < math.inf
    ):
        raise ValueError(
            "`temperature` must be a positive number. "
            f"Received: temperature={temperature!r}"
        )
    _check_outputs(getattr(teacher, "outputs", None) or ())
    writer = _Writer(teacher, Path(directory), int(top_k), float(temperature))
    total = _num_batches(dataset)
    writer.check_num_batches(total)

    from rich.progress import Progress

    with Progress(
        transient=True, disable=not (verbose and sys.stdout.isatty())
    ) as progress:
        task = progress.add_task("Caching the teacher's outputs", total=total)
        for element in _iterate(dataset):
            writer.add(element)
            progress.advance(task)
        writer.finish()
    return TeacherCache(directory, shuffle_seed)


class TeacherCache(keras.utils.PyDataset):
    """The batches of a dataset, with the predictions of a teacher.

    Opens what `cache_teacher` wrote. Every batch has the structure of the
    dataset's, as a tuple, with `x` replaced by

    ```python
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

    Only the batch that is asked for is read, and no file stays open: any
    number of workers may read at once.

    Args:
        directory: Path of a complete cache.
        shuffle_seed: Integer of at least 0, or `None`. With a seed the order
            of the batches is drawn from it and from the epoch, so that a
            training that is resumed goes on as it would have gone. `None`
            keeps the dataset's order.
        **kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of
            `keras.utils.PyDataset`.

    Attributes:
        top_k: Integer, as asked for.
        temperature: Number, as asked for.
        num_classes: List of the vocabulary's size, for each output.
        fingerprint: String that tells the teacher by its weights.
        directory: Path.
        spec: A batch with a `keras.KerasTensor` for each array, whose shape
            has `None` where the batches differ.
        epoch: Integer that numbers the orders. A `Distiller` sets it;
            elsewhere `on_epoch_end`, which Keras calls after each epoch and
            once before the first, adds one.

    Raises:
        FileNotFoundError: If there is no cache, or one of its files is gone.
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
        if shuffle_seed is not None and (
            isinstance(shuffle_seed, bool)
            or not isinstance(shuffle_seed, numbers.Integral)
            or shuffle_seed < 0
        ):
            raise ValueError(
                "`shuffle_seed` must be an integer of at least 0 or None. "
                f"Received: shuffle_seed={shuffle_seed!r}"
            )
        self.directory = Path(directory)
        if not (self.directory / _MANIFEST).is_file():
            raise FileNotFoundError(
                "`directory` must hold a cache: make it with `cache_teacher`. "
                f"Received: directory='{directory}', without '{_MANIFEST}'"
            )
        manifest = _read_manifest(self.directory)
        if not manifest["complete"]:
            raise ValueError(
                "`directory` must hold a complete cache: call `cache_teacher` "
                "again with the same arguments, and it goes on. Received: "
                f"directory='{directory}', interrupted after "
                f"{_count(manifest)} batches"
            )
        self._shards = manifest["shards"]
        for shard in self._shards:
            path = self.directory / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(_damaged(path, "the file is missing"))
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(_damaged(path, "its size is wrong"))
        self.top_k: int = manifest["top_k"]
        self.temperature: float = manifest["temperature"]
        self.num_classes: list[int] = manifest["num_classes"]
        self.fingerprint: str = manifest["fingerprint"]
        self.shuffle_seed = shuffle_seed
        self._structure = manifest["structure"]
        sizes = [len(shard["digests"]) for shard in self._shards]
        self._starts = list(itertools.accumulate([0] + sizes))
        self.epoch = 0

    @property
    def epoch(self) -> int:
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order: Any = range(len(self))
        if self.shuffle_seed is not None:
            rng = np.random.default_rng((self.shuffle_seed, epoch))
            self._order = rng.permutation(len(self))

    @property
    def spec(self) -> tuple[Any, ...]:
        leaves = {
            key: keras.KerasTensor(
                (None, *shape[1:]), "int32" if _holds_classes(key) else dtype
            )
            for key, (shape, dtype) in _merged(
                shard["leaves"] for shard in self._shards
            ).items()
        }
        return self._assemble(leaves)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        position = int(self._order[range(len(self))[operator.index(index)]])
        number = bisect.bisect_right(self._starts, position) - 1
        row = position - self._starts[number]
        shard = self._shards[number]
        path = self.directory / shard["file"]
        try:
            with _reading, np.load(path, allow_pickle=False) as arrays:
                leaves = {
                    key: arrays[f"{row}/{key}"] for key in shard["leaves"]
                }
        except FileNotFoundError as error:
            raise FileNotFoundError(
                _damaged(path, "the file is missing")
            ) from error
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(_damaged(path, error)) from error
        for key in leaves:
            if _holds_classes(key):
                leaves[key] = leaves[key].astype("int32")
        return self._assemble(leaves)

    def _assemble(self, leaves: dict[str, Any]) -> tuple[Any, ...]:
        batch = [
            _decode(structure, name, leaves)
            for name, structure in self._structure.items()
        ]
        outputs = tuple(
            {
                name: leaves[_output_key(i, name)]
                for name in (LOG_PROBABILITIES, CLASSES)
            }
            for i in range(len(self.num_classes))
        )
        return ({INPUTS: batch[0], TEACHER_OUTPUTS: outputs}, *batch[1:])

    def as_dataset(self) -> Any:
        """The same as a `tf.data.Dataset`.

        On TensorFlow Keras takes the shapes of a `PyDataset` from two batches
        alone, and breaks off at a third of another width.
        """
        import tensorflow as tf

        spec = self.spec
        length = len(spec)
        while spec[length - 1] is None:  # tf.data knows no None
            length -= 1
        if None in keras.tree.flatten(spec[:length]):
            raise ValueError(
                "A cache of batches with a None in them cannot be read on "
                "TensorFlow: make it of batches with labels. Received: "
                f"batches of {spec}"
            )
        dataset = tf.data.Dataset.from_generator(
            lambda: (self[i][:length] for i in range(len(self))),
            output_signature=keras.tree.map_structure(
                lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype),
                spec[:length],
            ),
        )
        return dataset.apply(
            tf.data.experimental.assert_cardinality(len(self))
        ).prefetch(2)

    def on_epoch_end(self) -> None:
        self.epoch += 1

    def check(
        self, teacher: keras.Model, temperature: float | None = None
    ) -> None:
        """Refuses another teacher than the one whose outputs these are.

        Args:
            teacher: A built model, told by the values of its weights.
            temperature: Number, or `None` for any.

        Raises:
            ValueError: If teacher or temperature differ from the cache's.
        """
        _check_same(
            {"fingerprint": self.fingerprint, "temperature": self.temperature},
            {
                "fingerprint": _fingerprint(teacher),
                "temperature": temperature
                if temperature is not None
                else self.temperature,
            },
            self.directory,
        )


class _Writer:
    """Brings a cache up to date, batch by batch.

    The manifest is the truth: a shard that it does not list is not there.
    It lists the digest of every batch it has, so that a damaged shard can be
    computed again in place.
    """

    def __init__(
        self,
        teacher: keras.Model,
        directory: Path,
        top_k: int,
        temperature: float,
    ) -> None:
        self._directory = directory
        self._predictor = _Predictor(teacher, top_k, temperature)
        self._manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": _fingerprint(teacher),
            "top_k": top_k,
            "temperature": temperature,
            "num_classes": None,
            "structure": None,
            "complete": False,
            "shards": [],
        }
        names = []
        if directory.is_dir():
            names = sorted(os.listdir(directory))
        elif directory.exists():
            raise ValueError(
                "`directory` must be a directory. Received: the file "
                f"directory='{directory}'"
            )
        leftovers = [name for name in names if _TEMPORARY.fullmatch(name)]
        if _MANIFEST in names:
            manifest = _read_manifest(directory)
            if manifest["shards"]:  # otherwise nothing is lost
                _check_same(manifest, self._manifest, directory)
                self._manifest = manifest
        elif len(names) > len(leftovers):
            others = [name for name in names if name not in leftovers]
            raise ValueError(
                "`directory` must be empty or hold a cache, not other files. "
                f"Received: directory='{directory}' with {others[:5]}"
            )
        for name in leftovers:
            (directory / name).unlink()

        self._digests = []
        self._ends = {}  # The number of batches up to a damaged shard's end.
        self._missing = set()
        for number, shard in enumerate(self._manifest["shards"]):
            start = len(self._digests)
            self._digests += shard["digests"]
            if not _is_sound(directory / shard["file"], shard):
                self._missing.update(range(start, len(self._digests)))
                self._ends[len(self._digests)] = number
        self._count = 0
        self._rows: list[dict[str, np.ndarray]] = []
        self._row_digests: list[str] = []

    def check_num_batches(self, total: int | None) -> None:
        """Refuses another dataset by its size, where that is known."""
        if total == 0:
            raise self._empty()
        known = len(self._digests)
        if total is not None and (
            total < known or (total > known and self._manifest["complete"])
        ):
            raise self._other_dataset(f"a dataset of {total} batches")

    def add(self, element: Any) -> None:
        """Adds the next batch of the dataset."""
        index = self._count
        structure, arrays = _to_arrays(element, index)
        digest = _digest(structure, arrays)
        if index < len(self._digests):
            if digest != self._digests[index]:
                raise self._other_dataset(f"another batch {index}")
        elif self._manifest["complete"]:
            raise self._other_dataset("a dataset with more batches")
        if self._manifest["structure"] is None:
            self._manifest["structure"] = structure
            self._directory.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
        elif structure != self._manifest["structure"]:
            raise ValueError(
                "`dataset` must have batches of one structure. Received: "
                f"{self._manifest['structure']}, and in batch {index} "
                f"{structure}"
            )
        if index >= len(self._digests) or index in self._missing:
            self._predict(structure, arrays, index)
            self._row_digests.append(digest)
        self._count += 1
        if self._count in self._ends:
            self._write_shard(self._ends[self._count])
        elif self._count > len(self._digests) and (
            len(self._rows) >= _SHARD_BATCHES
            or sum(a.nbytes for row in self._rows for a in row.values())
            >= _SHARD_BYTES
        ):
            self._write_shard(len(self._manifest["shards"]))

    def finish(self) -> None:
        """Ends the dataset: only now is the cache complete."""
        if not self._count:
            raise self._empty()
        if self._count < len(self._digests):
            raise self._other_dataset(f"a dataset of {self._count} batches")
        if self._rows:
            self._write_shard(len(self._manifest["shards"]))
        if not self._manifest["complete"]:
            self._manifest["complete"] = True
            self._write_manifest()

    def _predict(
        self, structure: dict[str, Any], arrays: dict[str, Any], index: int
    ) -> None:
        x = _decode(structure["x"], "x", arrays)
        row = dict(arrays)
        outputs = self._predictor.predict_on_batch(x)
        num_classes = list(self._predictor.num_classes)
        for i, (log_p, classes) in enumerate(outputs):
            if np.isnan(log_p).any():
                raise ValueError(
                    "`teacher` must predict finite logits. Received: NaN or "
                    f"infinity in output {i} for batch {index}"
                )
            # A class without any chance stays a finite number in float16.
            log_p = np.maximum(log_p, np.finfo("float16").min)
            kind = "uint16" if num_classes[i] <= 2**16 else "int32"
            row[_output_key(i, LOG_PROBABILITIES)] = log_p.astype("float16")
            row[_output_key(i, CLASSES)] = classes.astype(kind)
        self._manifest["num_classes"] = num_classes
        self._rows.append(row)

    def _write_shard(self, number: int) -> None:
        shards = self._manifest["shards"]
        path = self._directory / f"shard_{number:05d}.npz"
        arrays = {
            f"{i}/{key}": array
            for i, row in enumerate(self._rows)
            for key, array in row.items()
        }
        leaves = _merged(
            {k: (a.shape, a.dtype.name) for k, a in row.items()}
            for row in self._rows
        )
        _write_atomically(path, lambda file: np.savez(file, **arrays))
        shards[number : number + 1] = [
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "digests": self._row_digests,
                "leaves": leaves,
            }
        ]
        self._write_manifest()
        self._rows, self._row_digests = [], []

    def _write_manifest(self) -> None:
        text = json.dumps(self._manifest, indent=1)
        _write_atomically(
            self._directory / _MANIFEST,
            lambda file: file.write(text.encode("utf-8")),
        )

    def _empty(self) -> ValueError:
        return ValueError(
            "`dataset` must have at least one batch. Received: an empty "
            "dataset, or an iterator that is used up"
        )

    def _other_dataset(self, received: str) -> ValueError:
        state = "complete" if self._manifest["complete"] else "interrupted"
        return ValueError(
            "`dataset` must be the one whose batches `directory` holds, in "
            "the same order (without shuffling); use another directory for "
            f"another dataset. Received: {received}, for the {state} cache of "
            f"{len(self._digests)} batches in '{self._directory}'"
        )


class _Predictor(keras.Model):
    """The teacher, and the selection of its most likely classes.

    A model of its own, so that the teacher's compiled functions are left
    alone and only the selected classes leave the device.
    """

    def __init__(
        self, teacher: keras.Model, top_k: int, temperature: float
    ) -> None:
        super().__init__(name="predictor", autocast=False)
        self.teacher = teacher
        self.top_k = top_k
        self.temperature = temperature
        self.num_classes: tuple[int, ...] = ()
        self.run_eagerly = teacher.run_eagerly
        if keras.backend.backend() == "tensorflow":
            # XLA would compile anew for each width of a batch.
            self.jit_compile = False
        self.built = True

    def call(self, inputs: Any, training: bool = False) -> Any:
        # The teacher is in inference mode by the context of this call.
        outputs = keras.tree.flatten(self.teacher(inputs))
        _check_outputs(outputs)
        self.num_classes = tuple(int(out.shape[-1]) for out in outputs)
        return [self._select(logits) for logits in outputs]

    def _select(self, logits: Any) -> tuple[Any, Any]:
        logits = ops.cast(logits, "float32") / self.temperature
        k = min(self.top_k, logits.shape[-1])
        log_p, classes = ops.top_k(ops.log_softmax(logits, axis=-1), k)
        return log_p, classes


def _check_outputs(outputs: Iterable[Any]) -> None:
    for output in outputs:
        dtype = keras.backend.standardize_dtype(output.dtype)
        if (
            not keras.backend.is_float_dtype(dtype)
            or len(output.shape) < 2
            or output.shape[-1] is None
        ):
            raise ValueError(
                "`teacher` must predict logits: float outputs of shape "
                "(..., V) over V classes. Received: an output of shape "
                f"{tuple(output.shape)} and dtype {dtype}"
            )


def _fingerprint(teacher: keras.Model) -> str:
    """Tells a model by its weights, in every process alike.

    Without their paths: Keras numbers unnamed layers within a process.
    """
    sha = hashlib.sha256()
    for variable in teacher.weights:
        value = ops.convert_to_numpy(variable)
        sha.update(f"{variable.dtype} {tuple(variable.shape)} ".encode())
        sha.update(value.tobytes())
    return sha.hexdigest()


# The dataset's batches, as arrays by name


def _num_batches(dataset: Any) -> int | None:
    """The number of batches, or `None` where that is not known before."""
    total: Any = None
    if isinstance(dataset, keras.utils.PyDataset):
        total = math.inf if dataset.num_batches is None else len(dataset)
    elif hasattr(dataset, "cardinality"):  # tf.data: -1 infinite, -2 unknown
        total = int(dataset.cardinality())
        total = {-1: math.inf, -2: None}.get(total, total)
    elif hasattr(dataset, "__len__"):
        total = len(dataset)
    elif not hasattr(dataset, "__iter__"):
        raise ValueError(
            f"`dataset` must be an iterable of batches. Received: {dataset!r}"
        )
    if total == math.inf:
        raise ValueError(
            "`dataset` must be finite: one epoch, without `repeat()`. "
            f"Received: {dataset!r}"
        )
    return total


def _iterate(dataset: Any) -> Iterator[Any]:
    if hasattr(dataset, "__iter__"):
        yield from dataset
    else:
        for i in range(len(dataset)):
            yield dataset[i]


def _to_arrays(
    element: Any, index: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the structure of a batch, and its arrays by name."""
    if isinstance(element, list):  # as Keras takes it
        element = tuple(element)
    elif not isinstance(element, tuple):
        element = (element,)
    if not 1 <= len(element) <= len(_FIELDS):
        raise ValueError(
            "`dataset` must have batches x, (x, y) or (x, y, sample_weight). "
            f"Received: batch {index} of {len(element)} parts"
        )
    arrays: dict[str, np.ndarray] = {}
    structure = {
        name: _encode(value, name, arrays, index)
        for name, value in zip(_FIELDS, element)
    }
    return structure, arrays


def _encode(
    value: Any, path: str, arrays: dict[str, np.ndarray], index: int
) -> Any:
    """Moves the arrays of a nested value to `arrays`, and leaves JSON."""
    if value is None:
        return None
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(
                "`dataset` must have strings for the keys of its "
                f"dictionaries. Received: keys {list(value)} in batch {index}"
            )
        # By number: a name may hold anything, also a slash.
        return {
            "dict": {
                key: _encode(value[key], f"{path}/{i}", arrays, index)
                for i, key in enumerate(sorted(value))
            }
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {
            kind: [
                _encode(item, f"{path}/{i}", arrays, index)
                for i, item in enumerate(value)
            ]
        }
    if not isinstance(value, np.ndarray):
        value = ops.convert_to_numpy(value)
    if value.dtype.kind not in "biufc" or value.ndim < 1:
        raise ValueError(
            "`dataset` must have batches of numbers, in arrays of a dtype "
            "that NumPy knows and with a batch axis. Received: batch "
            f"{index} with {path.split('/')[0]} of dtype {value.dtype} and "
            f"shape {value.shape}"
        )
    arrays[path] = np.array(value)  # The dataset may use its buffers again.
    return "array"


def _decode(structure: Any, path: str, arrays: dict[str, Any]) -> Any:
    """The inverse of `_encode`."""
    if structure is None:
        return None
    if structure == "array":
        return arrays[path]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {
            key: _decode(items[key], f"{path}/{i}", arrays)
            for i, key in enumerate(sorted(items))
        }
    values = [
        _decode(item, f"{path}/{i}", arrays) for i, item in enumerate(items)
    ]
    return values if kind == "list" else tuple(values)


def _digest(structure: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for path, array in arrays.items():
        sha.update(f"{path} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _output_key(i: int, name: str) -> str:
    return f"{TEACHER_OUTPUTS}/{i}/{name}"


def _holds_classes(key: str) -> bool:
    return key.startswith(TEACHER_OUTPUTS) and key.endswith(CLASSES)


def _merged(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shapes and dtypes by name, with `None` for a size that varies."""
    merged: dict[str, Any] = {}
    for row in rows:
        for key, (shape, dtype) in row.items():
            if key in merged and (
                len(merged[key][0]) != len(shape) or merged[key][1] != dtype
            ):
                raise ValueError(
                    "`dataset` must have batches of one dtype and one number "
                    f"of axes. Received: in '{key}' shape {merged[key][0]} "
                    f"of {merged[key][1]}, and shape {shape} of {dtype}"
                )
            old = merged.get(key, (shape, dtype))[0]
            sizes = [a if a == b else None for a, b in zip(old, shape)]
            merged[key] = (sizes, dtype)
    return merged


# Files


def _write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        kind = manifest["format"], manifest["version"]
        if kind == (_FORMAT, _VERSION):
            _count(manifest)
            for key in (
                "fingerprint",
                "top_k",
                "temperature",
                "num_classes",
                "structure",
                "complete",
            ):
                manifest[key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "`directory` must hold a cache of `cache_teacher`. Received: "
            f"'{path}', which is damaged or something else; delete it and "
            f"its directory to start anew ({type(error).__name__}: {error})"
        ) from error
    if kind != (_FORMAT, _VERSION):
        raise ValueError(
            f"`directory` must hold a cache of format {_FORMAT}, version "
            f"{_VERSION}. Received: '{path}' of format {kind[0]}, version "
            f"{kind[1]}; use another directory"
        )
    return manifest


def _count(manifest: dict[str, Any]) -> int:
    return sum(len(shard["digests"]) for shard in manifest["shards"])


def _is_sound(path: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is whole, by the checksums of all its arrays."""
    try:
        if path.stat().st_size != shard["bytes"]:
            return False
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _damaged(path: Path, reason: Any) -> str:
    return (
        f"A file of the teacher's cache is damaged: '{path}' ({reason}). Call "
        "`cache_teacher` again with the same arguments to restore it"
    )


def _check_same(
    cache: dict[str, Any], received: dict[str, Any], directory: Path
) -> None:
    """Refuses what a cache was not made with."""
    if cache["fingerprint"] != received["fingerprint"]:
        raise ValueError(
            "`teacher` must be the model whose outputs the cache holds, with "
            "the same weights; use another directory for another teacher. "
            f"Received: a teacher with fingerprint "
            f"{received['fingerprint'][:12]}, for the cache of "
            f"{cache['fingerprint'][:12]} in '{directory}'"
        )
    for name in ("top_k", "temperature"):
        if name in received and cache[name] != received[name]:
            raise ValueError(
                f"`{name}` must be the cache's {cache[name]}; use another "
                f"directory for another one. Received: {name}="
                f"{received[name]!r}, for the cache in '{directory}'"
            )
