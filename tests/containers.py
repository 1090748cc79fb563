"""Models for several tests. A class is registered with Keras only once."""

import keras
import pytest

VOCABULARY, WIDTH = 61, 16


def embedding(name="tokens"):
    return keras.layers.ReversibleEmbedding(VOCABULARY, WIDTH, name=name)


@keras.saving.register_keras_serializable(package="tests")
class Containers(keras.Model):
    """Keeps layers in each way that Keras tracks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = embedding()
        self.in_list = [self.tokens, embedding("in_list")]
        self.in_dict = {"a": embedding("in_dict"), "b": [self.tokens]}
        self.in_tuple = (embedding("in_tuple"), {"c": (self.tokens,)})

    def call(self, ids):
        used = [
            self.in_list[0],
            self.in_list[1],
            self.in_dict["a"],
            self.in_dict["b"][0],
            self.in_tuple[0],
            self.in_tuple[1]["c"][0],
        ]
        x = sum((i + 1) * layer(ids) for i, layer in enumerate(used))
        return self.tokens(x, reverse=True)


def gpt2_backbone(vocabulary_size=VOCABULARY, length=8):
    """A small backbone of KerasHub."""
    return pytest.importorskip("keras_hub").models.GPT2Backbone(
        vocabulary_size=vocabulary_size,
        num_layers=1,
        num_heads=2,
        hidden_dim=WIDTH,
        intermediate_dim=24,
        max_sequence_length=length,
    )
