"""Computing a teacher's predictions once and keeping them on disk."""

from keras_distilled_embedding.distillation.teacher_cache.reader import (
    TeacherCache,
)
from keras_distilled_embedding.distillation.teacher_cache.reader import (
    split_inputs,
)
from keras_distilled_embedding.distillation.teacher_cache.writer import (
    cache_teacher,
)

__all__ = [
    "TeacherCache",
    "cache_teacher",
    "split_inputs",
]
