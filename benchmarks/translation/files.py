"""LiteRT files of the students: their bytes, their translations, their speed.

For students whose table is a full one or the package's own layer. What the
rivals make of a table has no exporter here.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import cached_property
from pathlib import Path

import keras
import numpy as np
import sentencepiece

import keras_distilled_embedding as kde
from benchmarks._report import write_text
from benchmarks.translation.grid import CONTROL
from benchmarks.translation.grid import METHODS
from benchmarks.translation.grid import Row
from benchmarks.translation.rows import Results
from benchmarks.translation.rows import table_of
from benchmarks.translation.tables import RoundedTable
from examples.nmt.runner import LiteRTRunner
from examples.nmt.stepwise import embed_vocabulary
from examples.nmt.stepwise import stepwise_signatures
from keras_distilled_embedding.layers import DistilledEmbedding

TIMED_SENTENCES = 100


class Files:
    """The files of one task and seed, beside their rows.

    Args:
        results: The rows.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.task = results.task
        self._sources = json.loads(
            (self.task.folder / "test.json").read_text("utf-8")
        )["source"]

    def finish(self, row: Row) -> None:
        """Exports a row in each form there is, and translates the test."""
        record = self.results.path(row, ".files.json")
        if record.exists() or not self.results.done(row):
            return
        student = self._exportable(row)
        if student is None:
            return
        print(f"files of {row.name}, {row.size:g}x", flush=True)
        storages = {
            storage: self._export(row, student, storage)
            for storage in _storages(student, row)
        }
        write_text(record, json.dumps(storages, indent=1) + "\n")

    def _exportable(self, row: Row) -> keras.Model | None:
        """The trained student; `None` where its table has no exporter."""
        if "skipped" in self.results.read(row):
            return None
        student = METHODS[row.method](self.task, row.size)
        table = table_of(student)
        known = DistilledEmbedding, keras.layers.Embedding, RoundedTable
        if not isinstance(table, known):
            return None
        student.load_weights(self.results.path(row, ".weights.h5"))
        if not isinstance(table, RoundedTable):
            return student
        # As a layer of Keras, which the exporter rounds in the same way.
        dense = keras.layers.ReversibleEmbedding(
            table.input_dim, table.output_dim, name="token_embedding"
        )
        dense.build()
        dense.set_weights(table.get_weights())
        return self.task.with_table(dense, student)

    def _export(self, row: Row, student: keras.Model, storage: str) -> dict:
        path = self.path(row, storage)
        report = kde.export_litert(
            student,
            path,
            quantization=storage,
            signatures=stepwise_signatures(student, self.task.max_length),
            verbose=False,
        )
        embed_vocabulary(path, self.task.folder / "vocabulary.spm")
        runner = LiteRTRunner(path)
        return {
            "bytes": path.stat().st_size,
            "table_bytes": report.table_bytes.get("token_embedding"),
            "translations": [*map(runner.translate, self._cut_sources)],
        }

    @cached_property
    def _ids(self) -> list[np.ndarray]:
        return self.task.pairs("test").source

    @cached_property
    def _cut_sources(self) -> list[str]:
        """Without the last words of what is too long for the model."""
        pieces = sentencepiece.SentencePieceProcessor(
            model_proto=(self.task.folder / "vocabulary.spm").read_bytes()
        )
        longest = self.task.max_length - 1  # and its end

        def cut(sentence: str) -> str:
            while len(pieces.encode(sentence)) > longest:
                sentence = sentence.rpartition(" ")[0]
            return sentence

        return [*map(cut, self._sources)]

    def path(self, row: Row, storage: str) -> Path:
        return self.results.path(row, f".{storage}.tflite")

    def time(self, rows: list[Row], rounds: int) -> None:
        """Milliseconds a sentence, one thread, all files in turn."""
        runners = {
            path.name.removesuffix(".tflite"): LiteRTRunner(path)
            for row in rows
            for storage in ("float32", "int8", "int4")
            if (path := self.path(row, storage)).exists()
        }
        sentences = [
            sentence
            for sentence, ids in zip(self._sources, self._ids)
            if len(ids) <= self.task.max_length
        ][:TIMED_SENTENCES]
        samples: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                start = time.perf_counter()
                for sentence in sentences:
                    runner.translate(sentence)
                seconds = time.perf_counter() - start
                samples[name].append(1e3 * seconds / len(sentences))
        medians = {
            name: round(statistics.median(values), 3)
            for name, values in samples.items()
        }
        path = self.results.folder / "times.json"
        write_text(path, json.dumps(medians, indent=1) + "\n")


def _storages(student: keras.Model, row: Row) -> list[str]:
    """The forms in which a student is worth a file."""
    table = table_of(student)
    if row.method in ("int8 table", "int4 table"):
        return [row.method.removesuffix(" table")]
    if row.method == CONTROL:
        return ["float32", "int8", "int4"]
    if getattr(table, "rounding", None) is not None:
        return [table.rounding]
    if getattr(table, "hidden_dim", None) is not None:
        return ["float32"]  # the funnel's codes have no rounded form
    return ["float32", "int8"]
