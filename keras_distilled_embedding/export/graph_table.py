"""The layer that stands for an embedding in an exported graph."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.factorization import Factors
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import round_features
from keras_distilled_embedding.factorization import rounded_factors
from keras_distilled_embedding.factorization.activations import activate
from keras_distilled_embedding.layers.conversion import embedding_tables
from keras_distilled_embedding.layers.conversion import factors_of_table
from keras_distilled_embedding.layers.conversion import to_numpy
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.quantization import SMALLEST_ROUNDED
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import StoredFactors
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.quantization import round_to_int8
from keras_distilled_embedding.quantization import stored_factors
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import table_bytes

# Of the mean norm of rows: a row of a smaller norm is one of zeros.
_ZERO_ROW = 1e-4
# Rows whose norms are looked at for that.
_FIRST_ROWS = 1_000
_ROWS_AT_A_TIME = 16_384


class GraphTable(keras.layers.Layer):
    """An embedding as a file holds it, called like the layer it stands for.

    Every embedding of an exported model is replaced by this layer, whether it
    is factorized or not, and whether the file holds floats or integers.

    Args:
        embedding: A built `DistilledEmbedding`, `keras.layers.Embedding` or
            `keras.layers.ReversibleEmbedding`.
        quantization: Name of the storage format, or `None` for floats.

    Attributes:
        tables: The `StoredTable` of the look-up and, if it is another one,
            that of the projection.
    """

    def __init__(
        self, embedding: keras.layers.Layer, quantization: str | None
    ) -> None:
        super().__init__(name=embedding.name, dtype="float32")
        self.mask_zero = getattr(embedding, "mask_zero", False)
        self.supports_masking = True
        self.logit_soft_cap = getattr(embedding, "logit_soft_cap", None)
        # Ids are whole numbers: nothing is to be cast.
        self.autocast = False
        self.tables = _stored_tables(embedding, quantization)
        self.built = True

    @property
    def stored_bytes(self) -> int:
        """Bytes of its codes, scales, bases and offsets in a file."""
        return sum(table.stored_bytes for table in self.tables)

    @property
    def embeddings(self) -> Any:
        """The table, for layers that read it; computed in the file."""
        table = self.tables[0]
        return table.look_up(ops.arange(table.rows, dtype="int32"))

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if not reverse:
            rows = self.tables[0].look_up(inputs)
            if self.mask_zero:
                keras_internals.set_mask(rows, ops.not_equal(inputs, 0))
            return rows
        logits = self.tables[-1].project(inputs)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits

    def compute_output_spec(
        self, inputs: Any, reverse: bool = False
    ) -> keras.KerasTensor:
        table = self.tables[-1] if reverse else self.tables[0]
        shape = (
            (*inputs.shape[:-1], table.rows)
            if reverse
            else (*inputs.shape, table.width)
        )
        return keras.KerasTensor(shape, dtype="float32")

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        # Where these are ids, `call` has set the mask.
        return mask


class StoredTable(keras.layers.Layer):
    """One table of a file: `E = C B + 1 o`, or `E = C` if not factorized.

    The codes `C` are an input of the graph that is converted, `graph_codes`
    while it is traced; `LiteRTFile.store` then puts their bytes in its place.
    TensorFlow never sees them: as constants they would take 30 times their
    size in memory, count towards the 2 GB of a graph, and the converter could
    multiply a second copy of them with a factor that stands next to them.

    Args:
        stored: Its integers, `StoredFactors`; or floats in their place, and
            `None` for what there is not of basis and offset.
        kind: The storage format, or `None` for floats.
        name: Name of the embedding.
        rank: Columns of the codes, before they were filled up.
        first_row_is_zero: Whether row 0 is to be zeros, as that of padding
            often is: sums over padded sequences must not add up its rounding
            error.

    Attributes:
        format: The storage format, or `None` for floats.
        codes: Array `(input_dim, stored columns)`: floats, or integers of
            which each takes a byte.
        scales: What the integers are multiplied with.
    """

    def __init__(
        self,
        stored: StoredFactors | tuple,
        kind: Format | None,
        name: str,
        rank: int,
        first_row_is_zero: bool = False,
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.format = kind
        basis, offset = stored[2:]
        self.codes: np.ndarray = stored[0]
        self.scales: np.ndarray = stored[1]
        self.rows, self.rank = len(self.codes), rank
        self.width = rank if basis is None else basis.shape[1]
        self._use_bias = offset is not None
        self.graph_codes: Any = None
        self._first_row_is_zero = first_row_is_zero
        self.basis = self._look_up_basis = self._weight("basis", basis)
        self.offset = self._look_up_offset = self._weight("offset", offset)
        if (
            self.format is not None
            and basis is not None
            and math.prod(basis.shape) >= SMALLEST_ROUNDED
        ):
            # The file's basis is rounded, too. Most of that error is the same
            # in every row, and the offset can make up for it.
            rounded = _round_to_int8(basis)
            mean = self._mean_of_values()[np.newaxis]
            offset = offset + ops.matmul(mean, basis - rounded)[0]
            self._look_up_basis = self._weight("look_up_basis", rounded)
            self._look_up_offset = self._weight("look_up_offset", offset)
        self.built = True

    def _values(self, rows: slice) -> np.ndarray:
        """What the integers of some rows stand for."""
        scales = self.scales if len(self.scales) == 1 else self.scales[rows]
        return self.codes[rows] * scales

    def _mean_of_values(self) -> np.ndarray:
        """Of each column, with few rows as floats at a time."""
        starts = range(0, self.rows, _ROWS_AT_A_TIME)
        total = sum(
            self._values(slice(start, start + _ROWS_AT_A_TIME)).sum(axis=0)
            for start in starts
        )
        return np.asarray(total / self.rows, "float32")

    def _weight(self, name: str, value: Any) -> keras.Variable | None:
        if value is None:
            return None
        variable = self.add_weight(
            name=name, shape=value.shape, initializer="zeros", trainable=False
        )
        variable.assign(value)
        return variable

    @property
    def data(self) -> np.ndarray:
        """The codes as the file holds them."""
        return (
            self.codes if self.format is None else self.format.pack(self.codes)
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file, basis and offset counted once."""
        if self.basis is not None:
            return factor_bytes(
                self.rank, self.rows, self.width, self.format, self._use_bias
            )
        if self.format is None:
            return table_bytes(self.rows, self.width)
        return self.format.table_bytes(self.rows, self.width)

    def look_up(self, ids: Any) -> Any:
        """Rows of the table, `(..., width)`."""
        # LiteRT's look-up of integers takes one-dimensional ids.
        flat = ops.reshape(ops.cast(ids, "int32"), (-1,))
        rows = ops.take(self.graph_codes, flat, axis=0)
        if self.basis is not None:
            rows = _affine(rows, self._look_up_basis, self._look_up_offset)
        if self._first_row_is_zero:
            keep = ops.cast(ops.not_equal(flat, 0), "float32")
            rows = ops.multiply(rows, ops.expand_dims(keep, -1))
        return ops.reshape(rows, (*_sizes(ids), self.width))

    def project(self, hidden: Any) -> Any:
        """Products with all rows of the table, `(..., rows)`."""
        import tensorflow as tf

        shape = (*_sizes(hidden)[:-1], self.rows)
        hidden = ops.reshape(ops.cast(hidden, "float32"), (-1, self.width))
        states = hidden
        if self.basis is not None:
            states = ops.matmul(hidden, ops.transpose(self.basis))
        padding = self.codes.shape[1] - states.shape[1]
        if padding:
            states = ops.pad(states, [[0, 0], [0, padding]])
        # In this form the converter makes it a FULLY_CONNECTED.
        logits = tf.linalg.matmul(states, self.graph_codes, transpose_b=True)
        if self.offset is not None:
            shift = ops.matmul(hidden, ops.expand_dims(self.offset, -1))
            logits = ops.add(shift, logits)  # in this order: see the layer
        return ops.reshape(logits, shape)


def _stored_tables(
    embedding: keras.layers.Layer, quantization: str | None
) -> list[StoredTable]:
    """The table of the look-up, and of an untied projection."""
    if isinstance(embedding, DistilledEmbedding):
        prefixes = [""] if embedding.tie_weights else ["", "reverse_"]
        return [_of_factors(embedding, p, quantization) for p in prefixes]
    return [
        _of_table(table, embedding.name, quantization)
        for table in embedding_tables(embedding)
    ]


def _of_factors(
    layer: DistilledEmbedding, prefix: str, quantization: str | None
) -> StoredTable:
    def read(name: str) -> np.ndarray:
        return to_numpy(layer._read(f"{prefix}{name}", "float32"))

    basis = to_numpy(layer._basis("float32", prefix))
    offset = read("offset") if layer.use_bias else None
    if quantization is None:
        # Rounded, where the layer computes with rounded codes.
        codes = to_numpy(layer._features("float32", prefix=prefix))
        stored = codes, np.ones((1, 1), "float32"), basis, offset
        return StoredTable(stored, None, layer.name, layer.rank)
    ids = np.arange(min(layer.input_dim, _FIRST_ROWS))
    first = to_numpy(layer._features("float32", ids, prefix))
    is_zero = _first_row_is_zero(_affine(first, basis, offset))
    features: Any
    center: Any
    scales: Any
    if layer.quantization == quantization:
        kind = layer.format
        assert kind is not None
        found = factors_of_table(layer, prefix)
        features = activate(layer.activation, np.asarray(found.codes))
        basis, offset = found.basis, found.offset
        center, scales = read("center"), read("scales")
    else:
        kind = format_of(quantization)
        features = to_numpy(layer._features("float32", prefix=prefix))
        zeros = np.zeros(basis.shape[1], "float32")
        found = round_features(
            Factors(features, basis, zeros if offset is None else offset),
            keras.activations.linear,
            kind,
        )
        features, basis, offset = found.codes, found.basis, found.offset
        center, scales = found.center, found.scales
    return StoredTable(
        stored_factors(features, center, scales, basis, offset, kind),
        kind,
        layer.name,
        layer.rank,
        is_zero,
    )


def _of_table(
    table: np.ndarray, name: str, quantization: str | None
) -> StoredTable:
    """A table that is not factorized.

    In 4 and 2 bits it is, at full rank: that costs a basis, and rounds to
    integers in coordinates of which few bits hold much more.
    """
    one = np.ones((1, 1), "float32")
    rows, width = table.shape
    if quantization is None:
        return StoredTable((table, one, None, None), None, name, width)
    kind = format_of(quantization)
    if kind.bits == 8 or factor_bytes(width, rows, width, kind) >= table.size:
        stored = *round_to_int8(table), None, None
        return StoredTable(stored, format_of("int8"), name, width)
    found = rounded_factors(Table.of(table), width, kind, False, True)
    center: Any = found.center
    scales: Any = found.scales
    return StoredTable(
        stored_factors(
            found.codes, center, scales, found.basis, found.offset, kind
        ),
        kind,
        name,
        width,
        _first_row_is_zero(table[:_FIRST_ROWS]),
    )


def _sizes(tensor: Any) -> tuple[Any, ...]:
    """Its sizes, of which one that is not known need not be computed."""
    sizes = tuple(tensor.shape)
    if sizes.count(None) > 1:
        return ops.shape(tensor)
    return tuple(-1 if size is None else size for size in sizes)


def _affine(codes: Any, basis: Any, offset: Any) -> Any:
    rows = codes @ basis
    return rows if offset is None else rows + offset


def _first_row_is_zero(rows: np.ndarray) -> bool:
    """Whether row 0 is as good as zero, among the first rows of a table."""
    norms = np.linalg.norm(rows, axis=1)
    return bool(norms[0] < _ZERO_ROW * norms.mean())


def _round_to_int8(basis: Any) -> Any:
    """Rounds each column to multiples of a 127th of its largest number.

    As ai-edge-quantizer rounds it.
    """
    scales = ops.divide(ops.max(ops.abs(basis), axis=0), 127.0)
    scales = ops.where(ops.greater(scales, 0.0), scales, 1.0)
    return ops.multiply(ops.round(ops.divide(basis, scales)), scales)
