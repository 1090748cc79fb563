"""Training on what a teacher has predicted once."""

from __future__ import annotations

import bisect
import itertools
import operator
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)
from keras_distilled_embedding.distillation.teacher_cache import batches
from keras_distilled_embedding.distillation.teacher_cache import files

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
    if not isinstance(x, dict) or set(x) != {
        batches.INPUTS,
        batches.TEACHER_OUTPUTS,
    }:
        return x, None
    return x[batches.INPUTS], [
        TopPredictions(
            output[batches.LOG_PROBABILITIES], output[batches.CLASSES]
        )
        for output in x[batches.TEACHER_OUTPUTS]
    ]


class TeacherCache(keras.utils.PyDataset):
    """The batches of a dataset, with the predictions of a teacher.

    Opens what `cache_teacher` wrote. Every batch has the structure of the
    dataset's, as a tuple, with `x` replaced by

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
        self.shuffle_seed = as_optional_integer(
            "shuffle_seed", shuffle_seed, minimum=0
        )
        self.directory = Path(directory)
        if not (self.directory / files.MANIFEST).is_file():
            raise FileNotFoundError(
                "`directory` must hold a cache: make it with `cache_teacher`. "
                f"Received: directory='{directory}', without '{files.MANIFEST}'"
            )
        manifest = files.read_manifest(self.directory)
        if not manifest["complete"]:
            raise ValueError(
                "`directory` must hold a complete cache: call `cache_teacher` "
                "again with the same arguments, and it goes on. Received: "
                f"directory='{directory}', interrupted after "
                f"{files.num_stored(manifest)} batches"
            )
        self._shards = manifest["shards"]
        for shard in self._shards:
            path = self.directory / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(
                    files.damaged(path, "the file is missing")
                )
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(files.damaged(path, "its size is wrong"))
        self.top_k: int = manifest["top_k"]
        self.temperature: float = manifest["temperature"]
        self.num_classes: list[int] = manifest["num_classes"]
        self.fingerprint: str = manifest["fingerprint"]
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
                (None, *shape[1:]),
                "int32" if batches.holds_classes(key) else dtype,
            )
            for key, (shape, dtype) in batches.merge_leaves(
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
                files.damaged(path, "the file is missing")
            ) from error
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(files.damaged(path, error)) from error
        for key in leaves:
            if batches.holds_classes(key):
                leaves[key] = leaves[key].astype("int32")
        return self._assemble(leaves)

    def _assemble(self, leaves: dict[str, Any]) -> tuple[Any, ...]:
        batch = [
            batches.from_arrays(structure, name, leaves)
            for name, structure in self._structure.items()
        ]
        outputs = tuple(
            {
                name: leaves[batches.output_key(i, name)]
                for name in (batches.LOG_PROBABILITIES, batches.CLASSES)
            }
            for i in range(len(self.num_classes))
        )
        x = {batches.INPUTS: batch[0], batches.TEACHER_OUTPUTS: outputs}
        return (x, *batch[1:])

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
        files.check_same(
            {"fingerprint": self.fingerprint},
            {"fingerprint": files.fingerprint_of(teacher)},
            self.directory,
        )
        if temperature is not None:
            self.check_temperature(temperature)

    def check_temperature(self, temperature: float) -> None:
        """Refuses another temperature than the cache's, as `check` does."""
        files.check_same(
            {"temperature": self.temperature},
            {"temperature": temperature},
            self.directory,
        )
