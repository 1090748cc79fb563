"""The layer that stands for a table in an exported graph."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_factors
from keras_distilled_embedding.quantization import round_table
from keras_distilled_embedding.sizes import factor_bytes


class GraphTable(keras.layers.Layer):
    """An embedding as a file is to hold it, called as it was.

    `E = C B + 1 o`, with the codes `C` that are stored as integers. Look-ups
    take 1-D indices, which is what LiteRT's `EMBEDDING_LOOKUP` takes.

    Args:
        embedding: The layer that it stands for: a `DistilledEmbedding`, or a
            float `Embedding` or `ReversibleEmbedding`, whose own table is
            stored, without basis and offset.
        rounding: `"int8"` or `"int4"`.
    """

    def __init__(self, embedding: keras.layers.Layer, rounding: str) -> None:
        super().__init__(name=embedding.name, dtype="float32")
        self.quantization = rounding
        self.output_dim = embedding.output_dim
        self.mask_zero = getattr(embedding, "mask_zero", False)
        self.supports_masking = True
        self.logit_soft_cap = getattr(embedding, "logit_soft_cap", None)
        # Ids are whole: nothing is to be cast.
        self.autocast = False
        self.parts = [
            TablePart(codes, basis, rounding)
            for codes, basis in _factors(embedding)
        ]
        self.built = True

    @property
    def _reverse_part(self) -> TablePart:
        return self.parts[-1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of its integers, scales, bases and offsets in a file."""
        return sum(part.stored_bytes(self.quantization) for part in self.parts)

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            return self.parts[0].look_up(inputs)
        logits = self._reverse_part.project(inputs)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits

    def compute_output_spec(
        self, inputs: Any, reverse: bool = False
    ) -> keras.KerasTensor:
        if reverse:
            shape = (*inputs.shape[:-1], self._reverse_part.integers.shape[0])
        else:
            shape = (*inputs.shape, self.output_dim)
        return keras.KerasTensor(shape, dtype="float32")

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        if keras.backend.is_int_dtype(
            keras.backend.standardize_dtype(inputs.dtype)
        ):
            return ops.not_equal(inputs, 0) if self.mask_zero else None
        return previous_mask


class TablePart:
    """One table of integers; plain arrays, constants of the graph.

    Args:
        codes: What is stored as integers, float32 `(input_dim, k)`.
        basis: What it is multiplied with, or `None` for a dense table.
        rounding: `"int8"` or `"int4"`.
    """

    def __init__(self, codes: Any, basis: Any | None, rounding: str) -> None:
        to_numpy = ops.convert_to_numpy
        self.basis = self.offset = None
        self.width = codes.shape[1]
        if basis is None:
            integers, scales = round_table(codes, rounding)
        else:
            integers, scales, *rest = round_factors(codes, basis, rounding)
            self.basis, self.offset = map(to_numpy, rest)
            self.width = self.basis.shape[1]
        self.integers = to_numpy(integers).astype("int8")
        self.scales = to_numpy(scales)
        self.values = to_numpy(dequantize(integers, scales))

    def packed(self, rounding: str) -> np.ndarray:
        """The integers as bytes: two of four bits in one, the first lower."""
        if rounding == "int8":
            return np.frombuffer(self.integers.tobytes(), "uint8")
        pairs = self.integers.reshape(-1, 2).view("uint8") & 15
        return pairs[:, 0] | (pairs[:, 1] << 4)

    def stored_bytes(self, rounding: str) -> int:
        """Bytes in a file, the basis counted once and in 8 bits."""
        rows = len(self.integers)
        if self.basis is None:
            return FORMATS[rounding].table_bytes(rows, self.width)
        return factor_bytes(len(self.basis), rows, self.width, rounding)

    def look_up(self, ids: Any) -> Any:
        """Rows of the table, `(..., width)`."""
        flat = ops.reshape(ops.cast(ids, "int32"), (-1,))
        rows = ops.take(ops.convert_to_tensor(self.values), flat, axis=0)
        if self.basis is not None:
            rows = ops.add(ops.matmul(rows, self.basis), self.offset)
        else:
            rows = rows[:, : self.width]
        return ops.reshape(rows, (*ops.shape(ids), self.width))

    def project(self, hidden: Any) -> Any:
        """Products with all rows of the table."""
        if self.basis is None:
            padding = self.values.shape[1] - self.width
            if padding:
                before = [[0, 0]] * (len(hidden.shape) - 1)
                hidden = ops.pad(hidden, [*before, [0, padding]])
            return ops.matmul(hidden, self.values.T)
        logits = ops.matmul(ops.matmul(hidden, self.basis.T), self.values.T)
        return ops.add(logits, ops.matmul(hidden, self.offset[:, None]))


def _factors(embedding: keras.layers.Layer) -> list[tuple[Any, Any | None]]:
    """Codes and basis of the look-up, and of the projection if untied."""
    untied = not getattr(embedding, "tie_weights", True)
    if not isinstance(embedding, DistilledEmbedding):
        tables = [ops.cast(embedding.embeddings, "float32")]
        if untied:
            tables.append(
                ops.transpose(ops.cast(embedding.reverse_embeddings, "float32"))
            )
        return [(table, None) for table in tables]
    prefixes = ["", "reverse_"] if untied else [""]
    return [embedding.stored_factors(prefix) for prefix in prefixes]
