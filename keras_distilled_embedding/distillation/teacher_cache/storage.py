"""The files of a cache: `manifest.json` and `batch_000000.npz`, ...

The file of a batch holds arrays only, no pickled objects. How they are nested
is in the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding._utils.files import write_atomically

# The keys of a cached batch.
INPUTS = "inputs"
TEACHER_OUTPUTS = "teacher_outputs"
LOG_PROBABILITIES = "log_probabilities"
CLASSES = "classes"

MANIFEST = "manifest.json"
_VERSION = 2


@dataclasses.dataclass
class Manifest:
    """What `manifest.json` holds."""

    teacher: str  # Identifies the model by a hash of its weights.
    top_k: int
    temperature: float
    first_batch: str = ""  # Hash of the dataset's first batch.
    structure: Any = None  # How the arrays of the dataset are nested.
    num_outputs: int = 0  # Of the teacher.
    # Shape and dtype of each array in the file of a batch, with `None` for a
    # size that differs between batches: the arrays of the dataset, then log
    # probabilities and classes for each output of the teacher.
    leaves: list[Any] = dataclasses.field(default_factory=list)
    num_batches: int | None = None  # `None` while the cache is incomplete.
    version: int = _VERSION

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        path = directory / MANIFEST
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
            directory / MANIFEST, lambda file: file.write(text.encode("utf-8"))
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


def batch_path(directory: Path, index: int) -> Path:
    return directory / f"batch_{index:06d}.npz"


def count_batches(directory: Path, expected: int | None) -> int:
    """Counts the batches on disk, and raises an error if one is missing."""
    count = max(len([*directory.glob("batch_*.npz")]), expected or 0)
    for index in range(count):
        path = batch_path(directory, index)
        if not path.is_file():
            raise damaged(path, "the file is missing")
    return count


def damaged(path: Path, reason: Any) -> ValueError:
    return ValueError(
        f"The teacher's cache is damaged: '{path}' ({reason}). Delete the "
        f"directory '{path.parent}' and call `cache_teacher` again"
    )


def hash_of(arrays: Iterable[Any], structure: Any = None) -> str:
    """Returns a hash of arrays, the same in every process."""
    sha = hashlib.sha256(json.dumps(structure).encode())
    for array in arrays:
        array = ops.convert_to_numpy(array)
        sha.update(f"{array.dtype.name} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:32]


def fingerprint_of(teacher: keras.Model) -> str:
    """Identifies a model by its weights, whatever their names are."""
    return f"the model with weights {hash_of(teacher.weights)}"


def flatten(value: Any, leaves: list[np.ndarray]) -> Any:
    """Appends the arrays of a nested value to a list; returns its structure.

    The structure is JSON, in which an integer stands for the array of that
    index.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(
                "`dataset` must have strings for the keys of its "
                f"dictionaries. Received: a batch with keys {list(value)}"
            )
        return {"dict": {k: flatten(value[k], leaves) for k in sorted(value)}}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(item, leaves) for item in value]}
    if not isinstance(value, np.ndarray):
        value = ops.convert_to_numpy(value)
    if value.dtype.kind not in "biufc" or value.ndim < 1:
        raise ValueError(
            "`dataset` must have batches of numbers, in arrays of a dtype "
            "that NumPy knows and with a batch axis. Received: an array of "
            f"dtype {value.dtype} and shape {value.shape}"
        )
    leaves.append(value)
    return len(leaves) - 1


def unflatten(structure: Any, leaves: list[Any]) -> Any:
    """Nests a list of leaves as `flatten` found them."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return leaves[structure]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: unflatten(item, leaves) for key, item in items.items()}
    values = [unflatten(item, leaves) for item in items]
    return values if kind == "list" else tuple(values)


def merge_leaves(merged: list[Any], leaves: list[np.ndarray]) -> list[Any]:
    """Returns the shapes and dtypes `merged` of batches, with one more."""
    received = [[list(leaf.shape), leaf.dtype.name] for leaf in leaves]
    result = []
    for old, new in zip(merged or received, received):
        if len(old[0]) != len(new[0]) or old[1] != new[1]:
            raise ValueError(
                "`dataset` must have batches of one dtype and one number of "
                f"axes. Received: an array of shape and dtype {old}, and in "
                f"another batch {new}"
            )
        sizes = [a if a == b else None for a, b in zip(old[0], new[0])]
        result.append([sizes, new[1]])
    return result
