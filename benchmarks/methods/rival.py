"""Rivals: what they store is arrays, and the table is computed of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks.methods.base import Approximation
from benchmarks.methods.base import Method
from benchmarks.methods.base import Table
from keras_distilled_embedding.quantization import format_of

Arrays = dict[str, np.ndarray]
Shape = tuple[int, int]
# From a table, the weights of its rows and a number of bytes to the arrays
# that are stored; `None` where nothing of the kind is so small.
Fit = Callable[[np.ndarray, np.ndarray, int], Arrays | None]
# From the arrays, those of floats as tensors, to the table of a shape.
Rebuild = Callable[[dict[str, Any], Shape], Any]


class Rival(Method):
    """A method that is two functions; making one registers it.

    What it stores and what is trained follows from its arrays: floats are
    trained, integers stay; each takes the bytes of its dtype.

    Args:
        name: Its name.
        fit: From `(table, weights, budget)` to arrays by name, or to `None`.
        rebuild: From `(arrays, shape)` to the table, with `keras.ops`.
            Integer arrays are NumPy's.
        quantization: Name of the format in which matrices of floats are
            stored, and rounded in training; by default they stay as they are.
        fixed_size: Whether there is only one size of it.
    """

    def __init__(
        self,
        name: str,
        fit: Fit,
        rebuild: Rebuild,
        quantization: str | None = None,
        fixed_size: bool = False,
    ) -> None:
        super().__init__(name, fixed_size)
        self.fit, self.rebuild = fit, rebuild
        self.quantization = quantization

    def layer(self, table: Table, budget: int) -> ArrayTable | None:
        """The fitted table as a layer."""
        arrays = self.fit(table.values, table.weights, budget)
        if arrays is None:
            return None
        return ArrayTable(
            arrays, self.rebuild, table.values.shape, self.quantization
        )

    def approximate(self, table: Table, budget: int) -> Approximation | None:
        layer = self.layer(table, budget)
        return layer and Approximation(
            ops.convert_to_numpy(layer.embeddings),
            layer.num_bytes(self.quantization),
            {name: list(a.shape) for name, a in layer.arrays.items()},
        )

    def student(
        self, task: Any, budget: int, dropout: float = 0.0
    ) -> keras.Model | None:
        layer = self.layer(task.table, budget)
        return layer and task.with_table(layer, dropout)


def round_plainly(matrix: Any, quantization: str) -> Any:
    """A matrix rounded to the nearest numbers that a format holds.

    In 8 bits with one scale, in fewer with one a row, around the mean of each
    column: no rotation, no feedback of errors.
    """
    if quantization == "int8":
        scale = ops.maximum(ops.max(ops.abs(matrix)) / 127, 1e-30)
        return ops.round(matrix / scale) * scale
    kind = format_of(quantization)
    return kind.round(matrix, *kind.grid(matrix))


def plain_bytes(shape: Shape, quantization: str) -> int:
    """Bytes of such a matrix: integers, scales, and the columns' means."""
    kind = format_of(quantization)
    means = 4 * shape[1] if kind.has_row_scales else 0
    return kind.table_bytes(*shape) + means


class ArrayTable(keras.layers.Layer):
    """An embedding, and its projection, of a table computed of arrays.

    The whole table is computed in every call. That is slower than it need be,
    and the same table: figures compare the quality of rivals, not their
    speed.

    Args:
        arrays: What is stored. Floats become variables.
        rebuild: See `Rival`.
        shape: Of the table.
        quantization: Name of a format: matrices of floats are rounded as a
            file of that kind stores them. Backward, rounding is taken for the
            identity. May be set later.
    """

    def __init__(
        self,
        arrays: Arrays,
        rebuild: Rebuild,
        shape: Shape,
        quantization: str | None = None,
    ) -> None:
        super().__init__(name="token_embedding")
        self.arrays = arrays
        self.quantization = quantization
        self.input_dim, self.output_dim = shape
        self._rebuild = rebuild
        self._variables_by_name = {
            name: self.add_weight(
                name=name,
                shape=array.shape,
                initializer=lambda shape, dtype, array=array: (
                    ops.convert_to_tensor(array, dtype)
                ),
            )
            for name, array in arrays.items()
            if np.issubdtype(array.dtype, np.floating)
        }
        self.built = True

    @property
    def embeddings(self) -> Any:
        """The table, float32 `(input_dim, output_dim)`."""
        floats = {
            name: self._stored(ops.convert_to_tensor(variable))
            for name, variable in self._variables_by_name.items()
        }
        return self._rebuild(
            {**self.arrays, **floats}, (self.input_dim, self.output_dim)
        )

    def _stored(self, values: Any) -> Any:
        if self.quantization is None or len(values.shape) != 2:
            return values
        rounded = round_plainly(values, self.quantization)
        return values + ops.stop_gradient(rounded - values)

    def num_bytes(self, quantization: str | None = None) -> int:
        """Bytes of the arrays, as floats or as a file of a format has them."""
        return sum(
            plain_bytes(array.shape, quantization)
            if quantization
            and name in self._variables_by_name
            and array.ndim == 2
            else array.nbytes
            for name, array in self.arrays.items()
        )

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return ops.matmul(inputs, ops.transpose(self.embeddings))
        return ops.take(self.embeddings, inputs, axis=0)
