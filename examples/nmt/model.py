"""The translation model: a small Transformer with one shared table."""

from __future__ import annotations

import keras
from keras_nlp.layers import PositionEmbedding
from keras_nlp.layers import TransformerDecoder
from keras_nlp.layers import TransformerEncoder

from .tokens import PAD_ID


def build_transformer(
    vocabulary_size: int,
    max_length: int,
    d_model: int = 256,
    num_layers: int = 2,
    num_heads: int = 8,
    feed_forward_dim: int = 512,
    dropout: float = 0.2,
    seed: int = 0,
    embedding: keras.layers.Layer | None = None,
) -> keras.Model:
    """Builds an encoder-decoder Transformer (pre-layer-normalized).

    One table, the layer `"token_embedding"`, embeds the source and the
    target and, transposed, projects to the logits. The layers' names are what
    `stepwise` finds them by.

    Args:
        vocabulary_size: Rows of the table.
        max_length: Longest sequence, in tokens.
        d_model: Columns of the table, width of the Transformer.
        num_layers: Encoder layers; as many decoder layers.
        num_heads: Attention heads a layer.
        feed_forward_dim: Hidden units of the feed-forward blocks.
        dropout: Share of units dropped in training.
        seed: Seed of the initial weights.
        embedding: The table, called as a `keras.layers.ReversibleEmbedding`
            is and named `"token_embedding"`; by default a new one.

    Returns:
        A Functional model of `{"source": (b, s), "target": (b, t)}` int32 ids
        to logits `(b, t, vocabulary_size)`.
    """
    keras.utils.set_random_seed(seed)
    source = keras.Input((None,), dtype="int32", name="source")
    target = keras.Input((None,), dtype="int32", name="target")
    embedding = embedding or keras.layers.ReversibleEmbedding(
        vocabulary_size,
        d_model,
        # Rows of unit norm in expectation: logits start of order one.
        embeddings_initializer=keras.initializers.RandomNormal(
            stddev=d_model**-0.5
        ),
        name="token_embedding",
    )
    # Brings the look-up back to the scale of the residual stream.
    scale = keras.layers.Rescaling(d_model**0.5, name="embedding_scale")

    def embed(ids: keras.KerasTensor, side: str) -> keras.KerasTensor:
        x = scale(embedding(ids))
        positions = PositionEmbedding(max_length, name=f"{side}_position")
        x = keras.layers.Add(name=f"{side}_sum")([x, positions(x)])
        return keras.layers.Dropout(dropout, name=f"{side}_dropout")(x)

    block = dict(
        intermediate_dim=feed_forward_dim,
        num_heads=num_heads,
        dropout=dropout,
        normalize_first=True,
    )
    padding = keras.ops.not_equal(source, PAD_ID)
    x = embed(source, "source")
    for i in range(num_layers):
        x = TransformerEncoder(**block, name=f"encoder_{i}")(
            x, padding_mask=padding
        )
    memory = keras.layers.LayerNormalization(name="memory")(x)
    x = embed(target, "target")
    for i in range(num_layers):
        x = TransformerDecoder(**block, name=f"decoder_{i}")(
            x, memory, encoder_padding_mask=padding
        )
    x = keras.layers.LayerNormalization(name="decoder_output")(x)
    logits = embedding(x, reverse=True)
    return keras.Model(
        {"source": source, "target": target}, logits, name="transformer"
    )


def decoder_layers(model: keras.Model) -> list[TransformerDecoder]:
    """The decoder layers of `model`, from the input up."""
    return [
        layer for layer in model.layers if isinstance(layer, TransformerDecoder)
    ]
