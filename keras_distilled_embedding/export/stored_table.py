"""The layer that stands for a table in an exported graph."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.rounding import round_codes


class StoredTable(keras.layers.Layer):
    """An embedding as a file is to hold it, called as it was.

    `E = C B + 1 o`, with the codes `C` that are stored as integers. Look-ups
    take 1-D indices, which is what LiteRT's `EMBEDDING_LOOKUP` takes.

    Args:
        embedding: The layer that it stands for: a `DistilledEmbedding`, or a
            float `Embedding` or `ReversibleEmbedding`, whose own table `C`
            then is, its columns scaled.
        rounding: `"int8"` or `"int4"`.
    """

    def __init__(self, embedding: keras.layers.Layer, rounding: str) -> None:
        super().__init__(name=embedding.name, dtype="float32")
        self.rounding = rounding
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
        return sum(part.stored_bytes(self.rounding) for part in self.parts)

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
    """One table of integers; plain arrays, constants of the graph."""

    def __init__(self, codes: Any, basis: Any | None, rounding: str) -> None:
        self.is_diagonal = basis is None
        if basis is None:
            basis = ops.eye(codes.shape[1], dtype="float32")
        rounded = round_codes(codes, basis, rounding)
        to_numpy = ops.convert_to_numpy
        self.integers = to_numpy(rounded.integers).astype("int8")
        self.scales = to_numpy(rounded.scales)
        self.values = to_numpy(rounded.values())
        self.basis = to_numpy(rounded.basis)
        self.offset = to_numpy(rounded.offset)
        # Of a dense table in int8 the basis is a scale for each column; in
        # int4 it is the identity, padded to whole blocks.
        self.columns = np.diagonal(self.basis).copy()

    def packed(self, rounding: str) -> np.ndarray:
        """The integers as bytes: two of four bits in one, the first lower."""
        if rounding == "int8":
            return np.frombuffer(self.integers.tobytes(), "uint8")
        pairs = self.integers.reshape(-1, 2).view("uint8") & 15
        return pairs[:, 0] | (pairs[:, 1] << 4)

    def stored_bytes(self, rounding: str) -> int:
        """Bytes in a file, the basis counted once and in 8 bits."""
        total = len(self.packed(rounding)) + 4 * len(self.offset)
        total += 4 * len(self.columns) if self.is_diagonal else self.basis.size
        scales = 4 if rounding == "int8" else 2 * self.scales.size
        return total + scales

    def look_up(self, ids: Any) -> Any:
        flat = ops.reshape(ops.cast(ids, "int32"), (-1,))
        rows = ops.take(ops.convert_to_tensor(self.values), flat, axis=0)
        width = self.basis.shape[1]
        if self.is_diagonal:
            rows = ops.multiply(rows[:, :width], self.columns)
        else:
            rows = ops.matmul(rows, self.basis)
        rows = ops.add(rows, self.offset)
        shape = ops.shape(ids)
        return ops.reshape(rows, (*shape, width))

    def project(self, hidden: Any) -> Any:
        if self.is_diagonal:
            states = ops.multiply(hidden, self.columns)
            padding = self.values.shape[1] - states.shape[-1]
            if padding:
                states = ops.pad(
                    states, [[0, 0]] * (len(states.shape) - 1) + [[0, padding]]
                )
        else:
            states = ops.matmul(hidden, self.basis.T)
        logits = ops.matmul(states, self.values.T)
        shift = ops.matmul(hidden, self.offset[:, None])
        return ops.add(logits, shift)


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
