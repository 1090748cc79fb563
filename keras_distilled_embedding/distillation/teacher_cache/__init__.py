"""What a teacher predicts, computed once and kept on disk."""

from keras_distilled_embedding.distillation.teacher_cache.batches import CLASSES
from keras_distilled_embedding.distillation.teacher_cache.batches import INPUTS
from keras_distilled_embedding.distillation.teacher_cache.batches import (
    LOG_PROBABILITIES,
)
from keras_distilled_embedding.distillation.teacher_cache.batches import (
    TEACHER_OUTPUTS,
)
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
    "CLASSES",
    "INPUTS",
    "LOG_PROBABILITIES",
    "TEACHER_OUTPUTS",
    "TeacherCache",
    "cache_teacher",
    "split_inputs",
]
