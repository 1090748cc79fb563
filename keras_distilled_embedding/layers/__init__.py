"""Keras layers of the package."""

from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)

__all__ = ["DistilledEmbedding"]
