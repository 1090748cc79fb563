"""Train a compressed model towards the model it was made from."""

from keras_distilled_embedding.distillation.distiller import Distiller
from keras_distilled_embedding.distillation.embedding_distillation import (
    EmbeddingDistillation,
)
from keras_distilled_embedding.distillation.logits_distillation import (
    LogitsDistillation,
)
from keras_distilled_embedding.distillation.teacher_cache import TeacherCache
from keras_distilled_embedding.distillation.teacher_cache import cache_teacher

__all__ = [
    "Distiller",
    "EmbeddingDistillation",
    "LogitsDistillation",
    "TeacherCache",
    "cache_teacher",
]
