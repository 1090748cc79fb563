"""Running a teacher once, and keeping what it predicts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import as_positive_number
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.datasets import iterate_batches
from keras_distilled_embedding._utils.datasets import num_batches
from keras_distilled_embedding._utils.files import FolderLock
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.distillation.teacher_cache import batches
from keras_distilled_embedding.distillation.teacher_cache import files
from keras_distilled_embedding.distillation.teacher_cache.reader import (
    TeacherCache,
)

# A shard is written when it holds so much: little enough to lose, and to
# find a batch in quickly.
_SHARD_BATCHES = 64
_SHARD_BYTES = 64 * 2**20


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
    dataset is read through each time, to see that it is the same one. One
    process at a time writes to a directory.

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
    top_k = as_integer("top_k", top_k)
    temperature = as_positive_number("temperature", temperature)
    _check_outputs(getattr(teacher, "outputs", None) or ())
    with FolderLock(Path(directory)) as lock:
        writer = _Writer(teacher, Path(directory), lock, top_k, temperature)
        writer.check_num_batches(num_batches(dataset))
        for element in iterate_batches(
            dataset, "Caching the teacher's outputs", verbose
        ):
            writer.add(element)
        writer.finish()
    return TeacherCache(directory, shuffle_seed)


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
        lock: FolderLock,
        top_k: int,
        temperature: float,
    ) -> None:
        self._directory = directory
        self._lock = lock
        self._predictor = _Predictor(teacher, top_k, temperature)
        self._manifest = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "fingerprint": files.fingerprint_of(teacher),
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
        leftovers = [name for name in names if files.is_leftover(name)]
        if files.MANIFEST in names:
            manifest = files.read_manifest(directory)
            if manifest["shards"]:  # otherwise nothing is lost
                files.check_same(manifest, self._manifest, directory)
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
            if not files.is_sound(directory / shard["file"], shard):
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
        structure, arrays = batches.to_arrays(element, index)
        digest = batches.digest_of(structure, arrays)
        if index < len(self._digests):
            if digest != self._digests[index]:
                raise self._other_dataset(f"another batch {index}")
        elif self._manifest["complete"]:
            raise self._other_dataset("a dataset with more batches")
        if self._manifest["structure"] is None:
            self._manifest["structure"] = structure
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
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
        x = batches.from_arrays(structure["x"], "x", arrays)
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
            row[batches.output_key(i, batches.LOG_PROBABILITIES)] = (
                log_p.astype("float16")
            )
            row[batches.output_key(i, batches.CLASSES)] = classes.astype(kind)
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
        leaves = batches.merge_leaves(
            {k: (a.shape, a.dtype.name) for k, a in row.items()}
            for row in self._rows
        )
        write_atomically(path, lambda file: np.savez(file, **arrays))
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
        write_atomically(
            self._directory / files.MANIFEST,
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
