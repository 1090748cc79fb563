"""The table of a model, whatever a method has made of it: bytes, rounding."""

from __future__ import annotations

import keras
import numpy as np

from benchmarks.methods.rival import ArrayTable
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_table


def factor_bytes(
    rank: int,
    shape: tuple[int, int],
    quantization: str | None = None,
    use_bias: bool = True,
) -> int:
    """Bytes of factors: float32, or as a file of a format stores them.

    A file of integers also has the basis in bytes, and always an offset.
    """
    rows, columns = shape
    if quantization is None:
        return 4 * (rank * (rows + columns) + use_bias * columns)
    kind = FORMATS[quantization]
    stored = kind.stored_columns(rank)
    return kind.table_bytes(rows, rank) + stored * columns + 4 * columns


def largest_rank(
    shape: tuple[int, int],
    budget: int,
    quantization: str | None = None,
    use_bias: bool = True,
) -> int:
    """The largest rank whose factors fit into a budget; 0 where none does."""
    fitting = [
        rank
        for rank in range(1, min(shape) + 1)
        if factor_bytes(rank, shape, quantization, use_bias) <= budget
    ]
    return max(fitting, default=0)


def table_layer(model: keras.Model) -> keras.layers.Layer:
    """The one embedding of a model, wherever the model keeps it."""
    kinds = DistilledEmbedding, ArrayTable, keras.layers.Embedding
    found = {
        id(layer): layer
        for layer in model._flatten_layers()
        if isinstance(layer, kinds) and layer.name == "token_embedding"
    }
    (layer,) = found.values()
    return layer


def table_bytes(
    layer: keras.layers.Layer, quantization: str | None = None
) -> int:
    """Bytes of a model's table, float32 or as a file of a format stores it."""
    shape = layer.input_dim, layer.output_dim
    if isinstance(layer, ArrayTable):
        return layer.num_bytes(quantization)
    if isinstance(layer, DistilledEmbedding):
        return factor_bytes(layer.rank, shape, quantization, layer.use_bias)
    if quantization is None:
        return 4 * shape[0] * shape[1]
    return FORMATS[quantization].table_bytes(*shape)


def store_as(layer: keras.layers.Layer, quantization: str) -> None:
    """Rounds a trained table as a file of a format would hold it."""
    if isinstance(layer, ArrayTable | DistilledEmbedding):
        layer.quantization = quantization
    else:
        rounded = dequantize(*round_table(layer.embeddings, quantization))
        layer.embeddings.assign(rounded[:, : layer.output_dim])
    if isinstance(layer, DistilledEmbedding):
        basis = keras.ops.convert_to_numpy(layer.basis)
        scales = np.abs(basis).max(axis=1, keepdims=True) / 127
        layer.basis.assign(np.round(basis / scales) * scales)
