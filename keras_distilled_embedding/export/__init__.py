"""Keras models as LiteRT files that hold each table once."""

from keras_distilled_embedding.export.litert import export_litert
from keras_distilled_embedding.export.litertlm import export_litertlm
from keras_distilled_embedding.export.report import ExportReport

__all__ = ["ExportReport", "export_litert", "export_litertlm"]
