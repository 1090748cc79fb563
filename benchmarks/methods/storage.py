"""The table of a model, whatever a method has made of it: bytes, rounding."""

from __future__ import annotations

import keras
import numpy as np

from benchmarks.methods.rival import ArrayTable
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_table
from keras_distilled_embedding.sizes import factor_bytes

NAME = "token_embedding"


def table_layer(model: keras.Model) -> keras.layers.Layer:
    """The layer of this name, wherever the model keeps it."""
    return next(
        layer for layer in model._flatten_layers() if layer.name == NAME
    )


def table_bytes(
    layer: keras.layers.Layer, quantization: str | None = None
) -> int:
    """Bytes of a model's table, float32 or as a file of a format stores it."""
    shape = layer.input_dim, layer.output_dim
    if isinstance(layer, ArrayTable):
        return layer.num_bytes(quantization)
    if isinstance(layer, DistilledEmbedding):
        return factor_bytes(layer.rank, *shape, quantization, layer.use_bias)
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
