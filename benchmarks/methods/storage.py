"""The table of a model, whatever a method has made of it: bytes, rounding."""

from __future__ import annotations

import keras
import numpy as np

from benchmarks.methods.rival import ArrayTable
from benchmarks.methods.rival import plain_bytes
from benchmarks.methods.rival import round_plainly
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import format_of
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
        kind: Format | None = None
        if quantization is not None:
            kind = format_of(quantization, layer.row_scales)
        return factor_bytes(layer.rank, *shape, kind, layer.use_bias)
    if quantization is None:
        return 4 * shape[0] * shape[1]
    return plain_bytes(shape, quantization)


def store_as(layer: keras.layers.Layer, quantization: str) -> None:
    """Rounds a trained table as a file of a format would hold it."""
    if isinstance(layer, ArrayTable):
        layer.quantization = quantization
    elif isinstance(layer, DistilledEmbedding):
        layer.quantize(quantization)
        # As a file has it, with the rotation multiplied in.
        rotation, basis = map(np.array, (layer.rotation, layer.basis))
        basis = rotation @ basis
        scales = np.abs(basis).max(axis=0) / 127
        layer.basis.assign(np.round(basis / scales) * scales)
        layer.rotation.assign(np.eye(layer.rank))
    else:
        layer.embeddings.assign(round_plainly(layer.embeddings, quantization))
