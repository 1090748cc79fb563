"""A dense output layer over a vocabulary, through an embedding's factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class VocabularyProjection(keras.layers.Layer):
    """A `keras.layers.Dense` over a vocabulary, through factors.

    Stands in for the dense layer with which many models end, whose kernel is a
    second vocabulary table: `activation(h K + b)` with `K` of shape
    `(output_dim, input_dim)` becomes

    ```
    activation((h W^T) f(U)^T + b)
    ```

    with the factors of an embedding layer, `K ~ (f(U) W)^T`, called with
    `reverse=True`. That embedding can be the one that the model looks its
    tokens up in, which ties the two, or one of its own.

    Args:
        embedding: A `DistilledEmbedding`. One that is used elsewhere is shared.
        activation: Activation of the outputs.
        use_bias: Boolean, whether to add a bias, one number a token.
        **kwargs: Base layer arguments, such as `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: Float tensor `(..., embedding.output_dim)`.

    Returns:
        A tensor `(..., embedding.input_dim)`, in the compute dtype.

    Raises:
        TypeError: If `embedding` is not a `DistilledEmbedding`.

    Example:

    ```python
    embedding = DistilledEmbedding(input_dim=1000, output_dim=64, rank=8)
    projection = VocabularyProjection(embedding, activation="softmax")
    probabilities = projection(np.random.normal(size=(16, 64)))  # (16, 1000)
    ```
    """

    def __init__(
        self,
        embedding: DistilledEmbedding,
        activation: str | Callable | None = None,
        use_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(embedding, DistilledEmbedding):
            raise TypeError(
                "`embedding` must be a `DistilledEmbedding`. "
                f"Received: embedding={embedding!r}"
            )
        super().__init__(**kwargs)
        self.embedding = embedding
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.supports_masking = True

    def build(self, input_shape: Any = None) -> None:
        if not self.embedding.built:
            self.embedding.build()
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.embedding.input_dim,),
                initializer="zeros",
            )
        self.built = True

    def call(self, inputs: Any) -> Any:
        logits = ops.cast(
            self.embedding(inputs, reverse=True), self.compute_dtype
        )
        if self.bias is not None:
            logits = ops.add(logits, self.bias)
        return self.activation(logits)

    def compute_output_shape(self, input_shape: Any) -> tuple:
        return (*input_shape[:-1], self.embedding.input_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "embedding": keras.saving.serialize_keras_object(self.embedding),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VocabularyProjection:
        config = dict(config)
        config["embedding"] = keras.saving.deserialize_keras_object(
            config["embedding"]
        )
        return cls(**config)
