"""On device: bytes, speed and BLEU of a full table and of factors.

Two models: one that is little more than a table of 32,000 x 512, where the
table's own cost is seen, and a translation model, encoded and decoded token by
token. Everything runs through LiteRT on this machine's processor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import examples.nmt
import keras_distilled_embedding as kde
from benchmarks.harness.measure import time_in_turns
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import claim
from benchmarks.harness.tables import formatted
from benchmarks.harness.tables import markdown_table
from benchmarks.methods import METHODS
from benchmarks.methods.storage import table_layer
from benchmarks.tasks.litert import CONVERTER_DEFAULT
from benchmarks.tasks.litert import export
from benchmarks.tasks.litert import export_translator
from benchmarks.tasks.litert import test_sources
from benchmarks.tasks.litert import timed_translation
from benchmarks.tasks.litert import translate_test
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import ready_task
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from examples.nmt.runner import LiteRTRunner
from examples.nmt.train import Recipe
from keras_distilled_embedding.layers import DistilledEmbedding

TITLE = "On device"
# Fine-tuning of a distilled student with its codes rounded to 4 bits.
ROUNDED = Recipe(epochs=1, peak_learning_rate=1e-3)
SIZES, QUICK_SIZES = (32_000, 512), (600, 64)  # of the large table
THREADS = (1, 2)


@dataclass(frozen=True)
class Row:
    """What one row of the tables is.

    Args:
        name: As the report calls it.
        model: Which of the trained translation models it is; see `STUDENTS`.
        rank: Of the large table's factors; `None` is a full table.
        quantization: As of `export_litert`, or `CONVERTER_DEFAULT`.
        activation: `f`, of the factors.
        rounded: Whether the translation model was trained as it is stored.
    """

    name: str
    model: str
    rank: int | None
    quantization: str | None
    activation: str | None = "relu"
    rounded: bool = False


ROWS = {
    row.name: row
    for row in (
        Row("full, float32", "teacher", None, None),
        Row(
            "full, int8, converter default", "teacher", None, CONVERTER_DEFAULT
        ),
        Row("full, int8, one copy", "teacher", None, "int8"),
        Row("full, int4, one copy", "teacher", None, "int4"),
        Row("truncated SVD 8x, int8", "svd", 64, "int8", None),
        Row("ours 8x, float32", "8x", 64, None),
        Row("ours 8x, int8", "8x", 64, "int8"),
        Row("ours 8x, int4", "8x", 64, "int4", rounded=True),
        Row("ours 16x, float32", "16x", 31, None),
        Row("ours 16x, int8", "16x", 31, "int8"),
        Row("ours 16x, int4", "16x", 31, "int4", rounded=True),
    )
}
# Methods and sizes of the translation models.
STUDENTS = {
    "8x": ("ours, rows weighted", 8.0),
    "16x": ("ours, rows weighted", 16.0),
    "svd": ("weighted SVD", 8.0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task-dir", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--rounds", type=int, default=9, help="of the times")


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Writes and measures the files, then times all of them in turns."""
    name = "quick" if options.quick else "multi30k"
    sizes = QUICK_SIZES if options.quick else SIZES
    task = ready_task(name, options.task_dir, data_dir=options.data_dir)
    for name, row in ROWS.items():
        rows.finish(f"table {name}", partial(measure_table, row, sizes, rows))
        rows.finish(
            f"translation {name}", partial(measure_translation, row, task, rows)
        )
    for kind, times in (("table", time_table), ("translation", time_steps)):
        rows.finish(
            f"times {kind}",
            lambda times=times: {"times": times(rows, options.rounds, task)},
        )


# A model that is little more than its table


def table_model(row: Row, sizes: tuple[int, int]) -> keras.Model:
    """ids -> embedding -> dense -> tied projection, random weights."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedding = _embedding(row, sizes)
    hidden = keras.layers.Dense(sizes[1], name="hidden")(embedding(ids))
    return keras.Model(ids, embedding(hidden, reverse=True))


def projection_model(row: Row, sizes: tuple[int, int]) -> keras.Model:
    """The projection alone, of one position."""
    keras.utils.set_random_seed(0)
    hidden = keras.Input((1, sizes[1]), name="hidden")
    return keras.Model(hidden, _embedding(row, sizes)(hidden, reverse=True))


def _embedding(row: Row, sizes: tuple[int, int]) -> keras.layers.Layer:
    if row.rank is None:
        return keras.layers.ReversibleEmbedding(*sizes, name="tokens")
    return DistilledEmbedding(
        *sizes, row.rank, activation=row.activation, name="tokens"
    )


def measure_table(row: Row, sizes: tuple[int, int], rows: Rows) -> dict:
    """Bytes and fidelity; the projection's file is written beside."""
    path = rows.path(f"table {row.name}", ".tflite")
    result = export(table_model(row, sizes), path, row.quantization)
    table_bytes = result.get("table_bytes")
    result["embedding_ratio"] = (
        4 * sizes[0] * sizes[1] / table_bytes if table_bytes else None
    )
    path = rows.path(f"projection {row.name}", ".tflite")
    export(projection_model(row, sizes), path, row.quantization)
    return {**result, "sizes": list(sizes)}


def invoker(path: Path, threads: int, shape: list[int]) -> Callable:
    """A function that runs a file once, on what it was given before.

    Args:
        path: The file, of one input.
        threads: How many it uses.
        shape: Of the input, its own last dimension left out.
    """
    interpreter = Interpreter(str(path), num_threads=threads)
    (tensor,) = interpreter.get_input_details()
    if tensor["dtype"] == np.float32:
        shape = [*shape, int(tensor["shape"][-1])]
    interpreter.resize_tensor_input(tensor["index"], shape)
    interpreter.allocate_tensors()
    values = np.random.default_rng(0).integers(100, size=shape)
    interpreter.set_tensor(tensor["index"], values.astype(tensor["dtype"]))
    return interpreter.invoke


def time_table(rows: Rows, rounds: int, task: Task) -> dict:
    """Of each row: the projection, and the model at lengths 1 and 16."""
    del task
    calls = {}
    for name in ROWS:
        for threads in THREADS:
            for what, kind, length in (
                ("projection", "projection", 1),
                ("model T=1", "table", 1),
                ("model T=16", "table", 16),
            ):
                path = rows.path(f"{kind} {name}", ".tflite")
                calls[name, f"{what}, {threads} threads"] = invoker(
                    path, threads, [1, length]
                )
    return _medians(calls, rounds, 10)


def _medians(calls: dict, rounds: int, repeats: int) -> dict[str, dict]:
    """Median milliseconds by row and by what is timed."""
    medians: dict[str, dict] = {}
    for (name, what), times in time_in_turns(calls, rounds, repeats).items():
        median = statistics.median(times["wall_ms"])
        medians.setdefault(name, {})[what] = median
    return medians


# The translation model


def trained_model(row: Row, task: Task, rows: Rows) -> keras.Model:
    """The translation model of a row; trains what is missing."""
    if row.model == "teacher":
        return task.teacher()
    path = rows.path(f"student {row.model}", ".keras")
    if not path.exists():
        method, size = STUDENTS[row.model]
        budget = int(task.table.values.nbytes / size)
        keras.utils.set_random_seed(0)
        student = METHODS[method].student(task, budget)
        task.fine_tune(student, task.setting.student, cached=False)
        kde.save_model(student, path)
    if not row.rounded:
        return kde.load_model(path)
    rounded = rows.path(f"student {row.model} {row.quantization}", ".keras")
    if not rounded.exists():
        student = kde.load_model(path)
        table_layer(student).quantization = row.quantization
        task.fine_tune(student, ROUNDED, cached=False, seed=7)
        kde.save_model(student, rounded)
    return kde.load_model(rounded)


def measure_translation(row: Row, task: Task, rows: Rows) -> dict:
    """Bytes, BLEU and peak memory of a row's file."""
    model = trained_model(row, task, rows)
    path = rows.path(f"translation {row.name}", ".tflite")
    result = export_translator(model, task, path, row.quantization)
    result["bytes_over_parameters"] = result["bytes"] / (
        model.count_params() * (1 if row.quantization else 4)
    )
    translations = translate_test(path, task)
    result["bleu"] = score(translations, task.texts["test"]["target"])
    if row.quantization is None:
        expected = task.decode(task.translate(model, "test"))
        result["same_as_keras"] = statistics.mean(
            a == b for a, b in zip(translations, expected, strict=True)
        )
    result["peak_mb"] = _peak_mb(path, test_sources(task)[:20])
    return result


def time_steps(rows: Rows, rounds: int, task: Task) -> dict:
    """Milliseconds a sentence, and a step of the decoder."""
    sentences, steps, number = {}, {}, 1
    for name in ROWS:
        path = rows.path(f"translation {name}", ".tflite")
        for threads in THREADS:
            call, number = timed_translation(path, task, threads)
            sentences[name, f"sentence, {threads} threads"] = call
            steps[name, f"step, {threads} threads"] = _step(
                LiteRTRunner(path, num_threads=threads)
            )
    times = _medians(steps, rounds, 100)
    for name, found in _medians(sentences, rounds, 1).items():
        times[name] |= {what: ms / number for what, ms in found.items()}
    return times


def _step(runner: LiteRTRunner) -> Callable[[], object]:
    """One step of the decoder, with a source of twelve tokens."""
    cross = runner._encode(source=np.full((1, 12), 5, "int32"))
    caches = runner._empty_caches(1)
    token, position = np.full((1, 1), 5, "int32"), np.full(1, 3, "int32")
    return lambda: runner._decode(
        token=token, position=position, **cross, **caches
    )


def _peak_mb(path: Path, lines: list[str]) -> float:
    """Resident peak of a process that translates a few sentences."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from runner import LiteRTRunner\n"
        "runner = LiteRTRunner(sys.argv[1])\n"
        "for line in sys.stdin: runner.translate(line.strip())\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    folder = Path(examples.nmt.__file__).parent
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code, path, folder],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout.split()[-1]) * 1_024 / 1e6


# The report


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rows and the times of both models."""
    del options
    results = {}
    for kind in ("table", "translation"):
        found = {name: rows.read(f"{kind} {name}") for name in ROWS}
        found = {name: row for name, row in found.items() if row}
        times = rows.read(f"times {kind}")
        if found and times:
            results[kind] = {"rows": found, "times": times["times"]}
    return results or earlier


def claims(table: dict, translation: dict) -> list[dict]:
    """What is promised, what was measured, and whether it holds."""
    ours = [name for name in ROWS if name.startswith("ours 8x")]
    floating, int8, int4 = ours
    svd = "truncated SVD 8x, int8"
    full = [name for name in ROWS if name.startswith("full")]
    files = {name: translation["rows"][name]["overhead"] for name in ours}
    bleu = {name: translation["rows"][name]["bleu"] for name in ours}
    rows = table["rows"]
    sentence = {
        name: times["sentence, 1 threads"]
        for name, times in translation["times"].items()
    }

    def overhead(name: str) -> float:
        return _over_entries(ROWS[name], rows[name])

    def speedup(slow: str, fast: str) -> float:
        slow, fast = table["times"][slow], table["times"][fast]
        return slow["projection, 1 threads"] / fast["projection, 1 threads"]

    same = translation["rows"][floating]["same_as_keras"]
    return [
        claim(text, value, sign, bar, "{:.3f}")
        for text, value, sign, bar in (
            (
                "file / weights, table model, float32",
                overhead(floating),
                "≤",
                1.02,
            ),
            ("file / weights, table model, int8", overhead(int8), "≤", 1.04),
            ("file / weights, table model, int4", overhead(int4), "≤", 1.15),
            (
                "file / weights, translation, float32",
                files[floating],
                "≤",
                1.03,
            ),
            ("file / weights, translation, int8", files[int8], "≤", 1.08),
            (
                "table / ours, 8x and int8",
                rows[int8]["embedding_ratio"],
                "≥",
                30,
            ),
            (
                "table / ours, 8x and int4",
                rows[int4]["embedding_ratio"],
                "≥",
                50,
            ),
            (
                "projection: int8 against full float32",
                speedup("full, float32", int8),
                "≥",
                40,
            ),
            (
                "projection: int8 against full int8, one copy",
                speedup("full, int8, one copy", int8),
                "≥",
                6,
            ),
            (
                "projection: float32 against full float32",
                speedup("full, float32", floating),
                "≥",
                20,
            ),
            ("BLEU lost by int8", bleu[floating] - bleu[int8], "≤", 0.3),
            ("BLEU lost by int4", bleu[floating] - bleu[int4], "≤", 1.0),
            (
                "sentence: ours int8 / the fastest full table",
                sentence[int8] / min(sentence[name] for name in full),
                "<",
                1.0,
            ),
            (
                "sentence: ours int8 / SVD of the same rank, int8",
                sentence[int8] / sentence[svd],
                "<",
                1.0,
            ),
            ("sentences translated as by Keras, float32", same, "≥", 0.99),
        )
    ]


def _over_entries(row: Row, found: dict) -> float:
    """Bytes of the table model's file over its entries alone, no scales."""
    vocabulary, width = found.get("sizes", SIZES)
    bits = {None: 32, "int8": 8, "int4": 4}[row.quantization]
    matrices = width * (row.rank + width) * min(32, max(bits, 8)) / 8
    entries = vocabulary * row.rank * bits / 8 + matrices + 4 * width
    return found["bytes"] / entries


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the claims and a table for each model."""
    del folder
    table, translation = results.get("table"), results.get("translation")
    yield (
        "LiteRT on this machine's processor; times are medians of rounds in "
        "which all rows take turns, in milliseconds."
    )
    if table and translation:
        int8 = translation["rows"]["ours 8x, int8"]["bytes_over_parameters"]
        yield "## What is promised"
        yield markdown_table(claims(table, translation))
        yield (
            '"File / weights" is the file\'s bytes over those of the weights, '
            "each counted once: an entry of a table in 4, 1 or half a byte, "
            "of another matrix in 4 or 1, any other number in 4; of the table "
            "model without the scales of its blocks. Were every weight of the "
            "translation model one byte, biases too, its int8 file would be "
            f"{int8:.3f} times as large. A truncated SVD of the same rank is "
            "the same file but for its numbers: neither can be faster."
        )
    if table:
        sizes = next(iter(table["rows"].values())).get("sizes", SIZES)
        yield (
            f"## A table of {sizes[0]:,} x {sizes[1]}, a dense layer, the "
            "tied projection"
        )
        yield "Random weights: the error is of rounding alone, against Keras."
        yield markdown_table(
            [_cells(name, table, "table") for name in table["rows"]]
        )
    if translation:
        yield "## Translation, Multi30k, test_2016_flickr"
        yield (
            "Encoded once, decoded token by token with a key/value cache by "
            "`examples/nmt/runner.py`, greedily; one teacher, its students "
            "distilled by the example's recipe, those of int4 for one more "
            "epoch with their codes rounded. BLEU of the test "
            f"({signature()}); times of the first 100 sentences; peak memory "
            "of a process that translates 20."
        )
        yield markdown_table(
            [
                _cells(name, translation, "translation")
                for name in translation["rows"]
            ]
        )


def _cells(name: str, results: dict, kind: str) -> dict:
    row, times = results["rows"][name], results["times"][name]
    table_bytes = row.get("table_bytes") or None
    cells = {
        "": name,
        "file bytes": f"{row['bytes']:,}",
        "/ weights": formatted(row.get("overhead"), "{:.3f}"),
        "table bytes": formatted(table_bytes, "{:,}"),
    }
    if kind == "table":
        cells["error of logits"] = formatted(row.get("error"), "{:.2%}")
        order, form = ("projection", "model T=1", "model T=16"), "{:.3f}"
    else:
        cells["BLEU"] = f"{row['bleu']:.2f}"
        cells["peak MB"] = f"{row['peak_mb']:.0f}"
        order, form = ("step", "sentence"), "{:.2f}"
    return cells | {
        f"ms, {what}, {n} threads": form.format(times[f"{what}, {n} threads"])
        for what in order
        for n in THREADS
    }
