"""A subclassed model, for several tests: a class is registered once."""

import keras

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
