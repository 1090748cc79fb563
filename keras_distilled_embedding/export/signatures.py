"""A model as one signature of a file: its inputs and outputs by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals

# What TensorFlow does not take in the name of an input.
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\\/>-]")


class Signature:
    """Calls a model with a dictionary of inputs, and returns one of outputs.

    `batch_size` and `sequence_length` take the place of unknown sizes.
    """

    def __init__(
        self,
        model: keras.Model,
        batch_size: int | None = None,
        sequence_length: int | None = None,
    ) -> None:
        self.model = model
        self._structure = keras_internals.input_structure(model)
        tensors = keras.tree.flatten(self._structure)
        self._is_flat = _is_flat_dictionary(self._structure)
        if self._is_flat:
            labels = sorted(self._structure)  # Keras's order
        else:
            labels = [tensor.name for tensor in tensors]
        self._names = {label: _name(label) for label in labels}
        if len(set(self._names.values())) < len(tensors):
            raise ValueError(
                "`model` must have inputs of different names, up to "
                f"characters such as spaces. Received: inputs named {labels}"
            )
        self.inputs = {
            self._names[label]: keras.KerasTensor(
                [
                    (sequence_length if axis else batch_size)
                    if size is None
                    else size
                    for axis, size in enumerate(tensor.shape)
                ],
                tensor.dtype,
            )
            for label, tensor in zip(labels, tensors)
        }

    def call(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Calls the model with tensors or arrays by name."""
        values = keras.tree.pack_sequence_as(
            self._structure, [inputs[name] for name in self.inputs]
        )
        outputs = self.model(values, training=False)
        if isinstance(outputs, dict):
            return outputs
        return {
            f"output_{i}": output
            for i, output in enumerate(keras.tree.flatten(outputs))
        }

    def by_name(self, batch: Any) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch by the names of the file's inputs."""
        nested = isinstance(self._structure, Mapping) and not self._is_flat
        if isinstance(batch, Mapping) and not (
            nested and set(batch) == set(self._structure)
        ):
            arrays = {
                self._names.get(str(key), str(key)): value
                for key, value in batch.items()
            }
        else:
            flat = keras.tree.flatten(batch)
            arrays = {f"input {i}": value for i, value in enumerate(flat)}
            if len(flat) == len(self.inputs):
                arrays = dict(zip(self.inputs, flat))
        if set(arrays) != set(self.inputs):
            raise ValueError(
                "A batch must have the inputs of the model, named "
                f"{list(self._names)}. Received: a batch with {list(arrays)}"
            )
        return {name: np.asarray(value) for name, value in arrays.items()}


def _is_flat_dictionary(structure: Any) -> bool:
    return isinstance(structure, Mapping) and not any(
        isinstance(value, Mapping | list | tuple)
        for value in structure.values()
    )


def _name(label: str) -> str:
    name = _NOT_IN_NAMES.sub("_", label)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"input{name}"
