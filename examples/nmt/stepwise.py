"""One decoder step at a time, with a key/value cache, for LiteRT.

A file of these signatures computes each token once, where one of
`model.encoder` and `model.decoder` computes a whole prefix for every token.
`runner.py` searches with it, on a device without Keras.
"""

from __future__ import annotations

import math

import keras
from keras import ops
from keras_nlp.layers import CachedMultiHeadAttention
from keras_nlp.layers import TransformerDecoder

from .data import PAD_ID
from .model import decoder_layers

# Added to the scores of what must not be attended to.
_EXCLUDED = -1e9


def stepwise_signatures(
    model: keras.Model, max_length: int
) -> dict[str, keras.Model]:
    """The two halves of `model` between which a search goes back and forth.

    `encode` reads a sentence once: `{"source": (b, s)}` ids to what every
    step needs of it, `"cross_key_i"` and `"cross_value_i"` for the decoder
    layer `i` and `"cross_bias"`, which excludes padding.

    `decode` reads one token: `"token"` `(b, 1)`, its `"position"` `(1,)`, all
    that `encode` returns, with a batch of `b` or, for the hypotheses of one
    sentence, of 1, and the caches `"self_key_i"` and `"self_value_i"`, whose
    length is `max_length` at every step. It returns `"logits"`
    `(b, vocabulary_size)` of the next token, and the caches with this
    token in them.

    Args:
        model: A model of `model.build_transformer`, compressed or not.
        max_length: Positions of the caches, at most the model's longest.

    Returns:
        Functional models by name, made of the layers of `model`, for
        `export_litert(model, path, signatures=...)`.
    """
    longest = model.get_layer("target_position").sequence_length
    if not 1 <= max_length <= longest:
        raise ValueError(
            "`max_length` must be a number of the model's positions, 1 to "
            f"{longest}. Received: max_length={max_length}"
        )
    return {"encode": _encode(model), "decode": _decode(model, max_length)}


def _encode(model: keras.Model) -> keras.Model:
    source = model.get_layer("source").output
    memory = model.get_layer("memory").output
    is_padding = ops.equal(source, PAD_ID)
    bias = ops.where(is_padding, _EXCLUDED, 0.0)
    # Over heads and queries.
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
    positions = ops.arange(max_length)
    past = ops.where(ops.less_equal(positions, position), 0.0, _EXCLUDED)
    # Without the axis of the one position, on which matrix products of Keras
    # would compute shapes at every step.
    ids = ops.reshape(token, (-1,))
    x = layer("embedding_scale")(layer("token_embedding")(ids))
    x = ops.add(x, _row(layer("target_position"), position))
    for i, decoder in enumerate(decoder_layers(model)):
        own = [f"self_key_{i}", f"self_value_{i}"]
        cross = [f"cross_key_{i}", f"cross_value_{i}"]
        for names, length in ((own, max_length), (cross, None)):
            for name, shape in zip(names, _cache_shapes(decoder, length)):
                inputs[name] = keras.Input(shape, name=name)
        own_caches = [inputs[name] for name in own]
        x, *updated = _self_attention(decoder, i, max_length)(
            [x, position, past, *own_caches]
        )
        outputs |= dict(zip(own, updated))
        x = _cross_attention(decoder, i)(
            [x, bias, *(inputs[name] for name in cross)]
        )
        x = _feed_forward(decoder, i)(x)
    x = layer("decoder_output")(x)
    outputs["logits"] = layer("token_embedding")(x, reverse=True)
    return keras.Model(inputs, outputs, name="decode")


# The blocks of a decoder layer: models, since the names of the layers inside
# are unique in each of them only.


def _cross_projections(decoder: TransformerDecoder, i: int) -> keras.Model:
    """The memory `(b, s, d_model)` to what cross-attention reads of it."""
    attention = decoder._cross_attention_layer
    memory = keras.Input((None, _width(decoder)))
    # Of (b, s, heads, head_dim).
    key = ops.transpose(attention._key_dense(memory), (0, 2, 1, 3))
    value = ops.transpose(attention._value_dense(memory), (0, 2, 3, 1))
    return keras.Model(memory, [key, value], name=f"cross_projections_{i}")


def _self_attention(
    decoder: TransformerDecoder, i: int, max_length: int
) -> keras.Model:
    attention = decoder._self_attention_layer
    heads, size = _heads(decoder)
    x = keras.Input((_width(decoder),))
    position = keras.Input(batch_shape=(1,), dtype="int32")
    past = keras.Input(batch_shape=(max_length,))
    keys, values = map(keras.Input, _cache_shapes(decoder, max_length))
    y = _sequence(decoder._self_attention_layer_norm(x))
    key = ops.reshape(attention._key_dense(y), (-1, heads, 1, size))
    value = ops.reshape(attention._value_dense(y), (-1, heads, size, 1))
    at = ops.reshape(position, ())
    new_keys = ops.slice_update(keys, [0, 0, at, 0], key)
    new_values = ops.slice_update(values, [0, 0, 0, at], value)
    y = _attend(attention, y, new_keys, new_values, past)
    return keras.Model(
        [x, position, past, keys, values],
        [ops.add(x, y), new_keys, new_values],
        name=f"self_attention_{i}",
    )


def _cross_attention(decoder: TransformerDecoder, i: int) -> keras.Model:
    x = keras.Input((_width(decoder),))
    bias = keras.Input((1, 1, None))
    keys, values = map(keras.Input, _cache_shapes(decoder, None))
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
    """What one query `(b, 1, d_model)` attends to.

    Keys are `(b, heads, n, head_dim)` and values `(b, heads, head_dim, n)`:
    both are multiplied along their last axis, as LiteRT wants them.
    """
    heads, size = attention._num_heads, attention._key_dim
    query = ops.reshape(attention._query_dense(x), (-1, heads, 1, size))
    query = ops.multiply(query, 1 / math.sqrt(size))
    scores = ops.matmul(query, ops.transpose(keys, (0, 1, 3, 2)))
    weights = ops.softmax(ops.add(scores, bias))
    context = ops.matmul(weights, ops.transpose(values, (0, 1, 3, 2)))
    context = ops.reshape(context, (-1, 1, heads, size))
    y = attention._output_dense(context)
    return ops.reshape(y, (-1, y.shape[-1]))


def _sequence(x: keras.KerasTensor) -> keras.KerasTensor:
    """`(b, d_model)` to sequences of one."""
    return ops.expand_dims(x, 1)


def _heads(decoder: TransformerDecoder) -> tuple[int, int]:
    """How many attention heads there are, and how wide each is."""
    attention = decoder._self_attention_layer
    return attention._num_heads, attention._key_dim


def _width(decoder: TransformerDecoder) -> int:
    return decoder._feedforward_output_dense.units


def _cache_shapes(
    decoder: TransformerDecoder, length: int | None
) -> tuple[tuple, tuple]:
    """Of the keys and of the values, without the batch."""
    heads, size = _heads(decoder)
    return (heads, length, size), (heads, size, length)


def _row(
    layer: keras.layers.Layer, position: keras.KerasTensor
) -> keras.KerasTensor:
    """The row of a table of positions, `(1, d_model)`."""
    width = layer.position_embeddings.shape[-1]
    row = layer(ops.zeros((1, 1, width)), positions=position)
    return ops.reshape(row, (1, width))
