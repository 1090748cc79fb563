"""One decoder step at a time, with a key/value cache, for LiteRT.

Exported with these signatures, a model computes every token once, where
`model.decoder` computes the whole prefix again for each. The package's
`keras_distilled_embedding_runner.py` searches with such a file on a device
without Keras; the file carries its tokenizer.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import keras
from keras import ops
from keras_nlp.layers import CachedMultiHeadAttention
from keras_nlp.layers import TransformerDecoder

import keras_distilled_embedding as kde
from keras_distilled_embedding.export.tokenizers import StoredVocabulary
from keras_distilled_embedding.export.tokenizers import append_tokenizer

from .model import decoder_layers
from .tokens import BOS_ID
from .tokens import EOS_ID
from .tokens import PAD_ID

# Added to the scores of what must not be attended to.
_EXCLUDED = -1e9


def stepwise_signatures(
    model: keras.Model, max_length: int
) -> dict[str, keras.Model]:
    """The two parts of `model` that a search for a translation calls.

    `encode` reads a sentence once. It maps `{"source": (b, s)}` ids to what
    every step needs of it: `"cross_key_i"` and `"cross_value_i"`, `(b, heads,
    s, head_dim)`, for each decoder layer `i`, and `"cross_bias"`, which
    excludes padding.

    `decode` reads a token. Its inputs are `"token"` `(b, 1)`, the `"position"`
    `(1,)` where it is, all that `encode` returns (with a batch of `b`, or of 1
    for the hypotheses of one sentence), and the caches `"self_key_i"` and
    `"self_value_i"`, `(b, heads, max_length, head_dim)`, which start as zeros.
    It returns the caches with this token in them, and the `"logits"` `(b,
    vocabulary_size)` of the next.

    Args:
        model: A model of `model.build_transformer`, compressed or not.
        max_length: Positions in the caches.

    Returns:
        Functional models by name, made of the layers of `model`, for
        `export_litert(model, path, signatures=...)`.

    Raises:
        ValueError: If the model has not that many positions.
    """
    longest = model.get_layer("target_position").sequence_length
    if not 1 <= max_length <= longest:
        raise ValueError(
            "`max_length` must be from 1 to the number of the model's "
            f"positions, {longest}. Received: max_length={max_length}"
        )
    return {"encode": _encode(model), "decode": _decode(model, max_length)}


def _encode(model: keras.Model) -> keras.Model:
    source = model.get_layer("source").output
    memory = model.get_layer("memory").output
    bias = ops.where(ops.equal(source, PAD_ID), _EXCLUDED, 0.0)
    # For all heads and all queries.
    bias = ops.expand_dims(ops.expand_dims(bias, 1), 1)
    outputs = {"cross_bias": bias}
    for i, layer in enumerate(decoder_layers(model)):
        key, value = _cross_projections(layer, i)(memory)
        outputs |= {f"cross_key_{i}": key, f"cross_value_{i}": value}
    return keras.Model({"source": source}, outputs, name="encode")


def _decode(model: keras.Model, max_length: int) -> keras.Model:
    layer = model.get_layer
    token = keras.Input((1,), dtype="int32", name="token")
    position = keras.Input(batch_shape=(1,), dtype="int32", name="position")
    bias = keras.Input((1, 1, None), name="cross_bias")
    inputs = {"token": token, "position": position, "cross_bias": bias}
    outputs = {}
    is_past = ops.less_equal(ops.arange(max_length), position)
    past_bias = ops.where(is_past, 0.0, _EXCLUDED)
    # (b, d_model) from here on: with an axis for the one position, products
    # with matrices would compute shapes at every step.
    x = layer("token_embedding")(ops.reshape(token, (-1,)))
    x = layer("embedding_scale")(x)
    x = ops.add(x, _row(layer("target_position"), position))
    for i, decoder in enumerate(decoder_layers(model)):
        own = [f"self_key_{i}", f"self_value_{i}"]
        cross = [f"cross_key_{i}", f"cross_value_{i}"]
        for names, length in ((own, max_length), (cross, None)):
            for name in names:
                shape = _cache_shape(decoder, length)
                inputs[name] = keras.Input(shape, name=name)
        x, *updated = _self_attention(decoder, i, max_length)(
            [x, position, past_bias, *(inputs[name] for name in own)]
        )
        outputs |= dict(zip(own, updated))
        x = _cross_attention(decoder, i)(
            [x, bias, *(inputs[name] for name in cross)]
        )
        x = _feed_forward(decoder, i)(x)
    x = layer("decoder_output")(x)
    outputs["logits"] = layer("token_embedding")(x, reverse=True)
    return keras.Model(inputs, outputs, name="decode")


# The blocks of a decoder layer. They are models, since the names of the layers
# inside are unique within each block only.


def _cross_projections(decoder: TransformerDecoder, i: int) -> keras.Model:
    """Of the memory `(b, s, d_model)`, the keys and values."""
    attention = decoder._cross_attention_layer
    memory = keras.Input((None, _width(decoder)))
    outputs = [
        ops.transpose(project(memory), (0, 2, 1, 3))
        for project in (attention._key_dense, attention._value_dense)
    ]
    return keras.Model(memory, outputs, name=f"cross_projections_{i}")


def _self_attention(
    decoder: TransformerDecoder, i: int, max_length: int
) -> keras.Model:
    attention = decoder._self_attention_layer
    x = keras.Input((_width(decoder),))
    position = keras.Input(batch_shape=(1,), dtype="int32")
    bias = keras.Input(batch_shape=(max_length,))
    shape = _cache_shape(decoder, max_length)
    caches = [keras.Input(shape), keras.Input(shape)]
    y = _sequence(decoder._self_attention_layer_norm(x))
    start = [0, 0, ops.reshape(position, ()), 0]
    projections = (attention._key_dense, attention._value_dense)
    updated = [
        ops.slice_update(cache, start, _by_head(project(y), decoder))
        for cache, project in zip(caches, projections)
    ]
    y = _attend(attention, y, *updated, bias)
    return keras.Model(
        [x, position, bias, *caches],
        [ops.add(x, y), *updated],
        name=f"self_attention_{i}",
    )


def _cross_attention(decoder: TransformerDecoder, i: int) -> keras.Model:
    x = keras.Input((_width(decoder),))
    bias = keras.Input((1, 1, None))
    shape = _cache_shape(decoder, None)
    keys, values = keras.Input(shape), keras.Input(shape)
    y = _sequence(decoder._cross_attention_layer_norm(x))
    y = _attend(decoder._cross_attention_layer, y, keys, values, bias)
    return keras.Model(
        [x, bias, keys, values], ops.add(x, y), name=f"cross_attention_{i}"
    )


def _feed_forward(decoder: TransformerDecoder, i: int) -> keras.Model:
    x = keras.Input((_width(decoder),))
    y = decoder._feedforward_layer_norm(x)
    y = decoder._feedforward_intermediate_dense(y)
    y = decoder._feedforward_output_dense(y)
    return keras.Model(x, ops.add(x, y), name=f"feed_forward_{i}")


def _attend(
    attention: CachedMultiHeadAttention,
    x: keras.KerasTensor,
    keys: keras.KerasTensor,
    values: keras.KerasTensor,
    bias: keras.KerasTensor,
) -> keras.KerasTensor:
    """What the one query in `x` `(b, 1, d_model)` finds, `(b, d_model)`."""
    heads, size = attention.num_heads, attention.key_dim
    query = ops.reshape(attention._query_dense(x), (-1, heads, 1, size))
    query = ops.multiply(query, 1 / math.sqrt(size))
    scores = ops.matmul(query, ops.transpose(keys, (0, 1, 3, 2)))
    weights = ops.softmax(ops.add(scores, bias))
    found = ops.reshape(ops.matmul(weights, values), (-1, 1, heads, size))
    y = attention._output_dense(found)
    return ops.reshape(y, (-1, y.shape[-1]))


def _sequence(x: keras.KerasTensor) -> keras.KerasTensor:
    """`(b, d_model)` as sequences of one, which attention takes."""
    return ops.expand_dims(x, 1)


def _by_head(
    x: keras.KerasTensor, decoder: TransformerDecoder
) -> keras.KerasTensor:
    """`(b, 1, heads, head_dim)` as `(b, heads, 1, head_dim)`."""
    return ops.reshape(x, (-1, *_cache_shape(decoder, 1)))


def _cache_shape(
    decoder: TransformerDecoder, length: int | None
) -> tuple[int, int | None, int]:
    """Of keys or values, without the batch."""
    attention = decoder._self_attention_layer
    return attention.num_heads, length, attention.key_dim


def _width(decoder: TransformerDecoder) -> int:
    return decoder._feedforward_output_dense.units


def _row(
    layer: keras.layers.Layer, position: keras.KerasTensor
) -> keras.KerasTensor:
    """The row of a table of positions, `(1, d_model)`."""
    width = layer.position_embeddings.shape[-1]
    row = layer(ops.zeros((1, 1, width)), positions=position)
    return ops.reshape(row, (1, width))


# The file


def write_file(
    model: keras.Model,
    filepath: str | os.PathLike,
    vocabulary_path: str | os.PathLike,
    max_length: int,
    quantization: str | None = None,
    verbose: bool = True,
    **sizes: int,
) -> kde.ExportReport:
    """Writes a file that translates, its tokenizer included.

    Args:
        model: A model of `model.build_transformer`, compressed or not.
        filepath: The file.
        vocabulary_path: The SentencePiece model.
        max_length: Longest sentence, in tokens.
        quantization: As of `kde.export_litert`.
        verbose: As of `kde.export_litert`.
        **sizes: `batch_size` and `sequence_length` of `kde.export_litert`,
            where they are to be fixed.

    Returns:
        An `ExportReport`.
    """
    report = kde.export_litert(
        model,
        filepath,
        quantization=quantization,
        signatures=stepwise_signatures(model, max_length),
        verbose=verbose,
        **sizes,
    )
    embed_vocabulary(filepath, vocabulary_path, model, max_length)
    return report


def embed_vocabulary(
    model_path: str | os.PathLike,
    vocabulary_path: str | os.PathLike,
    model: keras.Model,
    max_length: int,
) -> None:
    """Puts the tokenizer into a file of `stepwise_signatures`.

    Args:
        model_path: The LiteRT file; replaced by the new one once that is
            complete. A tokenizer that it has already is replaced, too.
        vocabulary_path: The SentencePiece model.
        model: The model in the file.
        max_length: As of `stepwise_signatures`.

    Raises:
        FileNotFoundError: If one of the files does not exist.
        ValueError: If the tokenizer is none, or has not as many pieces as the
            model has logits.
    """
    import sentencepiece  # which the signatures do not need

    proto = Path(vocabulary_path).read_bytes()
    sentencepiece.set_min_log_level(3)  # it prints what it raises
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise ValueError(
            "`vocabulary_path` must be a SentencePiece model. Received: "
            f"{len(proto):,} bytes of {str(vocabulary_path)!r}; SentencePiece "
            f"says: {error}"
        ) from error
    if len(pieces) != model.output.shape[-1]:
        raise ValueError(
            "`vocabulary_path` must be the tokenizer that the model was "
            f"trained with. Received: {len(pieces):,} pieces for a model of "
            f"{model.output.shape[-1]:,}"
        )
    append_tokenizer(
        model_path,
        model_path,
        StoredVocabulary(proto, is_sentencepiece=True),
        {
            "pad_id": PAD_ID,
            "bos_id": BOS_ID,
            "eos_id": EOS_ID,
            "max_length": max_length,
        },
    )
