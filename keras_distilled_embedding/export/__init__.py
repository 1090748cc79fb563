"""Keras models as LiteRT files that hold each table once."""

from keras_distilled_embedding.export.litert import export_litert
from keras_distilled_embedding.export.litertlm import export_litertlm
from keras_distilled_embedding.export.report import ExportReport
from keras_distilled_embedding.export.seq2seq import export_litert_seq2seq

__all__ = [
    "ExportReport",
    "export_litert",
    "export_litert_seq2seq",
    "export_litertlm",
]
