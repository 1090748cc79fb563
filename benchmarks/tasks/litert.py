"""LiteRT files of models, their translations and their speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

import keras_distilled_embedding as kde
from benchmarks.tasks.translation import Task
from examples.nmt.stepwise import write_file
from keras_distilled_embedding.export.litert import convert
from keras_distilled_embedding_runner import Runner

# TensorFlow's own way of making integers, which stores a table twice.
CONVERTER_DEFAULT = "converter default"
TIMED_SENTENCES = 100


def export(
    model: keras.Model,
    path: Path,
    quantization: str | None,
    signatures: dict[str, keras.Model] | None = None,
) -> dict:
    """Writes a file.

    Args:
        model: A built model.
        path: Path of the file.
        quantization: As of `kde.export_litert`, or `CONVERTER_DEFAULT`.
        signatures: As of `kde.export_litert`.

    Returns:
        Its bytes, and how far its outputs are from Keras's.
    """
    if quantization == CONVERTER_DEFAULT:
        parts = dict(signatures or {"serving_default": model})
        path.write_bytes(
            convert(parts, optimizations=[tf.lite.Optimize.DEFAULT])
        )
        return {"bytes": path.stat().st_size}
    report = kde.export_litert(
        model,
        path,
        quantization=quantization,
        signatures=signatures,
        verbose=False,
    )
    return _sizes(report)


def _sizes(report: kde.ExportReport) -> dict:
    fidelity = report.fidelity
    return {
        "bytes": report.bytes,
        "overhead": report.overhead,
        "table_bytes": sum(report.table_bytes.values()),
        "error": fidelity and fidelity.relative_rms_error,
    }


def export_translator(
    model: keras.Model, task: Task, path: Path, quantization: str | None
) -> dict:
    """Writes a file that translates step by step, its tokenizer included."""
    return _sizes(
        write_file(
            model,
            path,
            task.vocabulary_path,
            task.max_length,
            quantization=quantization,
            verbose=False,
        )
    )


def translate_test(path: Path, task: Task) -> list[str]:
    """Translates the sentences of the test with a file."""
    return [*map(Runner(path).generate, test_sources(task))]


def test_sources(task: Task) -> list[str]:
    """The sources, without the last words of what is too long for a model."""
    longest = task.max_length - 1  # and EOS

    def cut(sentence: str) -> str:
        while len(task.pieces.encode(sentence)) > longest:
            sentence = sentence.rpartition(" ")[0]
        return sentence

    return [*map(cut, task.texts["test"]["source"])]


def timed_translation(
    path: Path, task: Task, threads: int = 1
) -> tuple[Callable[[], object], int]:
    """A call that translates some sentences, and how many they are."""
    runner = Runner(path, num_threads=threads)
    sentences = test_sources(task)[:TIMED_SENTENCES]
    return lambda: [*map(runner.generate, sentences)], len(sentences)
