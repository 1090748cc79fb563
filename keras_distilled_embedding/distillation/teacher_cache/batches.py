"""Batches of any structure, as arrays by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from keras import ops

INPUTS = "inputs"
TEACHER_OUTPUTS = "teacher_outputs"
LOG_PROBABILITIES = "log_probabilities"
CLASSES = "classes"

_FIELDS = ("x", "y", "sample_weight")


def to_arrays(
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


def from_arrays(structure: Any, path: str, arrays: dict[str, Any]) -> Any:
    """The inverse of `_encode`."""
    if structure is None:
        return None
    if structure == "array":
        return arrays[path]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {
            key: from_arrays(items[key], f"{path}/{i}", arrays)
            for i, key in enumerate(sorted(items))
        }
    values = [
        from_arrays(item, f"{path}/{i}", arrays) for i, item in enumerate(items)
    ]
    return values if kind == "list" else tuple(values)


def digest_of(structure: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for path, array in arrays.items():
        sha.update(f"{path} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def output_key(i: int, name: str) -> str:
    return f"{TEACHER_OUTPUTS}/{i}/{name}"


def holds_classes(key: str) -> bool:
    return key.startswith(TEACHER_OUTPUTS) and key.endswith(CLASSES)


def merge_leaves(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
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
