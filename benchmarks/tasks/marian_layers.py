"""The layers of Marian's translators that Keras has not."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

# The most positions of a sequence whose length a graph does not know.
LONGEST = 256


@keras.saving.register_keras_serializable(package="benchmarks.marian")
class SinePositions(keras.layers.Layer):
    """Scales embeddings, and adds sines and cosines of where they are.

    Called with `(b, t, width)` and the first position, of shape `(1,)`.
    """

    def call(self, x: Any, start: Any) -> Any:
        width = x.shape[-1]
        waves = np.exp(np.linspace(0.0, -math.log(10_000), width // 2))
        positions = ops.cast(ops.arange(ops.shape(x)[1]) + start, "float32")
        angles = positions[:, None] * ops.convert_to_tensor(waves, "float32")
        added = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
        return x * math.sqrt(width) + added

    def compute_output_shape(self, x_shape: Any, start_shape: Any) -> Any:
        return x_shape


@keras.saving.register_keras_serializable(package="benchmarks.marian")
class DotAttention(keras.layers.Layer):
    """Attention between projections `(b, t, width)` and `(b, s, width)`.

    Args:
        heads: Number of heads.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads

    def call(self, query: Any, keys: Any, values: Any, bias: Any) -> Any:
        width = query.shape[-1]
        query, keys, values = map(self._split, (query, keys, values))
        scores = ops.matmul(query, ops.transpose(keys, (0, 1, 3, 2)))
        scores = scores / math.sqrt(width // self.heads) + bias
        found = ops.matmul(ops.softmax(scores), values)
        found = ops.transpose(found, (0, 2, 1, 3))
        return ops.reshape(found, (*ops.shape(found)[:2], width))

    def _split(self, x: Any) -> Any:
        size = x.shape[-1] // self.heads
        x = ops.reshape(x, (*ops.shape(x)[:2], self.heads, size))
        return ops.transpose(x, (0, 2, 1, 3))

    def compute_output_shape(
        self, query_shape: Any, *other_shapes: Any, **kwargs: Any
    ) -> Any:
        return query_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable(package="benchmarks.marian")
class SSRU(keras.layers.Layer):
    """The recurrence `c_t = f_t c_(t-1) + (1 - f_t) x_t`.

    All positions in as many passes as their number has bits, each of which
    joins spans of twice the length; one position in none. Called with `x` and
    `f`, both `(b, t, width)`, and the state before, `(b, width)`.
    """

    def call(self, x: Any, kept: Any, state: Any) -> Any:
        # Of the span that ends at t: c_t = kept_t c_before + added_t
        added, span = (1.0 - kept) * x, 1
        while span < (x.shape[1] or LONGEST):
            added = added + kept * _delayed(added, span, 0.0)
            kept = kept * _delayed(kept, span, 1.0)
            span *= 2
        return added + kept * state[:, None]

    def compute_output_shape(
        self, x_shape: Any, *others: Any, **kw: Any
    ) -> Any:
        return x_shape


def _delayed(x: Any, steps: int, before: float) -> Any:
    padding = [[0, 0], [steps, 0], [0, 0]]
    return ops.pad(x, padding, constant_values=before)[:, :-steps]


@keras.saving.register_keras_serializable(package="benchmarks.marian")
class OutputBias(keras.layers.Layer):
    """Adds a number to the logit of each token."""

    def build(self, input_shape: Any) -> None:
        self.bias = self.add_weight(
            shape=(input_shape[-1],), initializer="zeros", name="bias"
        )

    def call(self, logits: Any) -> Any:
        return logits + self.bias
