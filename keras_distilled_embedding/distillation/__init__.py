"""Train a compressed model towards the model it was made from."""

from keras_distilled_embedding.distillation.distiller import Distiller
from keras_distilled_embedding.distillation.losses import EmbeddingDistillation
from keras_distilled_embedding.distillation.losses import LogitsDistillation
from keras_distilled_embedding.distillation.losses import paired_embeddings

__all__ = [
    "Distiller",
    "EmbeddingDistillation",
    "LogitsDistillation",
    "paired_embeddings",
]
