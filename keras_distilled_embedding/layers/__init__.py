"""Keras layers of the package."""

from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.layers.vocabulary_projection import (
    VocabularyProjection,
)

__all__ = ["DistilledEmbedding", "VocabularyProjection"]
