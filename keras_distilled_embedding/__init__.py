"""Embedding tables 8 to 64 times smaller, for Keras models on a phone.

`compress` replaces a model's tables by factors, `E ~ f(U) W`, `Distiller`
trains the result towards the original, `export_litert` writes it for
on-device use with one copy of each table.
"""

from keras_distilled_embedding import layers
from keras_distilled_embedding.calibration import TableStatistics
from keras_distilled_embedding.calibration import calibrate
from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.distillation import TeacherCache
from keras_distilled_embedding.distillation import cache_teacher
from keras_distilled_embedding.export import ExportReport
from keras_distilled_embedding.export import export_litert
from keras_distilled_embedding.export import export_litert_seq2seq
from keras_distilled_embedding.export import export_litertlm
from keras_distilled_embedding.factorization import Factorization
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.losses import ChunkedCrossEntropy
from keras_distilled_embedding.losses import without_projection
from keras_distilled_embedding.report import CompressionReport
from keras_distilled_embedding.report import Inspection
from keras_distilled_embedding.report import compression_report
from keras_distilled_embedding.report import inspect_model
from keras_distilled_embedding.saving import load_model
from keras_distilled_embedding.saving import save_model
from keras_distilled_embedding.version import __version__

__all__ = [
    "ChunkedCrossEntropy",
    "CompressionReport",
    "Distiller",
    "EmbeddingDistillation",
    "ExportReport",
    "Factorization",
    "Inspection",
    "LogitsDistillation",
    "TableStatistics",
    "TeacherCache",
    "__version__",
    "cache_teacher",
    "calibrate",
    "compress",
    "compression_report",
    "export_litert",
    "export_litert_seq2seq",
    "export_litertlm",
    "factorize",
    "inspect_model",
    "layers",
    "load_model",
    "save_model",
    "without_projection",
]
