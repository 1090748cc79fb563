"""LiteRT files of the students: their bytes, their translations, their speed.

For students whose table is a full one or the package's own layer. What the
rivals make of a table has no exporter here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import keras

import keras_distilled_embedding as kde
from benchmarks._report import write_text
from benchmarks.on_device import time_in_turn
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
            for storage in self._storages(row)
        }
        write_text(record, json.dumps(storages, indent=1) + "\n")

    def _exportable(self, row: Row) -> keras.Model | None:
        """The trained student; `None` where its table has no exporter."""
        if "skipped" in self.results.read(row):
            return None
        student = METHODS[row.method](self.task, row.size)
        table = table_of(student)
        known = DistilledEmbedding, keras.layers.Embedding, RoundedTable
        # The look-up and the projection of a funnel keep its codes in two
        # forms, which the exporter refuses here.
        has_funnel = getattr(table, "hidden_dim", None) is not None
        if has_funnel or not isinstance(table, known):
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
        embed_vocabulary(path, self.task.vocabulary_path)
        runner = LiteRTRunner(path)
        return {
            "bytes": path.stat().st_size,
            "table_bytes": report.table_bytes.get("token_embedding"),
            "translations": [*map(runner.translate, self._cut_sources)],
        }

    @cached_property
    def _cut_sources(self) -> list[str]:
        """Without the last words of what is too long for the model."""
        pieces, longest = self.task.pieces, self.task.max_length - 1  # and EOS

        def cut(sentence: str) -> str:
            while len(pieces.encode(sentence)) > longest:
                sentence = sentence.rpartition(" ")[0]
            return sentence

        return [*map(cut, self.task.test_text["source"])]

    def path(self, row: Row, storage: str) -> Path:
        return self.results.path(row, f".{storage}.tflite")

    def time(self, rows: list[Row], rounds: int) -> None:
        """Milliseconds a sentence, one thread, all files in turn."""
        sentences = self._cut_sources[:TIMED_SENTENCES]

        def translation(path: Path) -> Callable[[], object]:
            runner = LiteRTRunner(path)
            return lambda: [runner.translate(text) for text in sentences]

        calls = {
            path.name.removesuffix(".tflite"): translation(path)
            for row in rows
            for storage in ("float32", "int8", "int4")
            if (path := self.path(row, storage)).exists()
        }
        medians = {
            name: round(milliseconds / len(sentences), 3)
            for name, milliseconds in time_in_turn(calls, rounds, 1).items()
        }
        path = self.results.folder / "times.json"
        write_text(path, json.dumps(medians, indent=1) + "\n")

    def _storages(self, row: Row) -> list[str]:
        """The forms in which a student is worth a file."""
        table = self.results.read(row)["table"]
        if "rounding" in table:
            return [table["rounding"]]
        return ["float32", "int8"] + ["int4"] * (row.method == CONTROL)
