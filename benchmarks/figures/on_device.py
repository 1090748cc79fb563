"""On device: bytes, speed and BLEU of a full table and of factors.

Two models through LiteRT on this machine's processor. One is little more than
its table: a look-up, a dense layer and the tied projection, with random
weights, so that its error is of rounding alone, against Keras. The other one
translates Multi30k (`test_2016_flickr`), encoded once, decoded token by token
with a key/value cache by `keras_distilled_embedding_runner.py`, greedily; one
teacher, its students distilled by the recipe of the figure `translation`.

"File / weights" is the file's bytes over those of the weights, each counted
once: an entry of a table in 4, 1 or half a byte, of another matrix in 4 or 1,
any other number in 4. A truncated SVD of the same rank is the same file but
for its numbers. Times are medians of rounds in which all rows take turns, in
milliseconds, a sentence's of the first 100; peak memory is of a process that
translates 20. Ratios are medians over the rounds, each against int8 of the
same rank in the same round. The row with scales of columns is rounded in Keras
already, and its error is of the rest alone.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter

import keras_distilled_embedding_runner
from benchmarks import harness
from benchmarks.figures.translation import TEACHER
from benchmarks.figures.translation import Row as Student
from benchmarks.figures.translation import measure
from benchmarks.methods.ours import OURS
from benchmarks.tasks import litert
from benchmarks.tasks.students import make_student
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import ready_task
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from keras_distilled_embedding.layers import DistilledEmbedding

MODELS = ("table", "translation")
SIZES, QUICK_SIZES = (32_000, 512), (600, 64)  # of the large table


@dataclass(frozen=True)
class Row:
    """What one row of the tables is.

    Args:
        method: Of the translation model, as of the figure `translation`, or
            `TEACHER`; `None` where the row is of the large table alone.
        size: How many times fewer bytes its table takes, as it is trained.
        quantization: As of `litert.export`.
        rank: Of the large table's factors; `None` is a full table.
        activation: `f`, of these factors.
        row_scales: Whether each row of codes in few bits has its own scale.
    """

    method: str | None
    size: float
    quantization: str | None
    rank: int | None = None
    activation: str | None = "relu"
    row_scales: bool = True


ROWS = {
    "full, float32": Row(TEACHER, 1.0, None),
    "full, int8, converter default": Row(
        TEACHER, 1.0, litert.CONVERTER_DEFAULT
    ),
    "full, int8, one copy": Row(TEACHER, 1.0, "int8"),
    "full, int4, one copy": Row(TEACHER, 1.0, "int4"),
    "full, int2, one copy": Row(TEACHER, 1.0, "int2"),
    "truncated SVD 8x, int8": Row("truncated SVD", 8.0, "int8", 64, None),
    "ours 8x, float32": Row(OURS, 8.0, None, 64),
    "ours 8x, int8": Row(OURS, 8.0, "int8", 64),
    # As many bytes as rank 32 takes in four bits.
    "ours 8x, int4": Row("ours, int4", 53.0, "int4", 64),
    # As many bytes as int8, at twice the rank.
    "ours 8x, int2": Row("ours, int2", 32.0, "int2", 64),
    "ours 16x, float32": Row(OURS, 16.0, None, 31),
    "ours 16x, int8": Row(OURS, 16.0, "int8", 31),
    "rank 256, int8": Row(None, 1.0, "int8", 256),
    "rank 256, int4": Row(None, 1.0, "int4", 256),
    "rank 256, int2": Row(None, 1.0, "int2", 256),
    "rank 256, int2, scales of columns": Row(
        None, 1.0, "int2", 256, row_scales=False
    ),
}


def rows_of(model: str) -> dict[str, Row]:
    """The rows of one of the two models."""
    return {
        name: row
        for name, row in ROWS.items()
        if model == "table" or row.method
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--rounds", type=int, default=9, help="of the times")
    add("--threads", nargs="+", type=int, default=[1, 2], help="of LiteRT")
    text = "with other work beside: cpu, of one thread"
    add("--clock", choices=("wall", "cpu"), default="wall", help=text)


def run(options: argparse.Namespace) -> None:
    """Writes and measures the files, then times all of them in turns."""
    store = options.store
    if "table" in options.models:
        sizes = QUICK_SIZES if options.quick else SIZES
        for name, row in ROWS.items():
            if options.quick and row.rank:
                row = replace(row, rank=min(row.rank, sizes[1] // 2))
            store.finish(
                f"table {name}", partial(measure_table, name, row, sizes, store)
            )
        store.finish("times table", lambda: time_table(store, options))
    if "translation" not in options.models:
        return
    task = ready_task(
        "quick" if options.quick else "multi30k",
        options.task_dir,
        data_dir=options.data_dir,
    )
    for name, row in rows_of("translation").items():
        if options.quick:  # of a small table less can be saved
            row = replace(row, size=min(row.size, 4.0))
        student = Student(row.method, row.size)
        if row.method != TEACHER:
            store.finish(
                student.key(task), partial(measure, student, task, store)
            )
        store.finish(
            f"translation {name}",
            partial(measure_translation, name, row, task, store),
        )
    store.finish(
        "times translation", lambda: time_translation(store, options, task)
    )


# A model that is little more than its table


def table_model(
    row: Row, sizes: tuple[int, int], projection: bool = False
) -> keras.Model:
    """ids -> embedding -> dense -> tied projection, random weights.

    Args:
        row: The row.
        sizes: Of the table.
        projection: Whether it is the projection alone, of one position.
    """
    keras.utils.set_random_seed(0)
    embedding = _embedding(row, sizes)
    if projection:
        hidden = inputs = keras.Input((1, sizes[1]), name="hidden")
    else:
        inputs = keras.Input((None,), dtype="int32", name="ids")
        hidden = keras.layers.Dense(sizes[1])(embedding(inputs))
    return keras.Model(inputs, embedding(hidden, reverse=True))


def _embedding(row: Row, sizes: tuple[int, int]) -> keras.layers.Layer:
    if row.rank is None:
        return keras.layers.ReversibleEmbedding(*sizes, name="tokens")
    return DistilledEmbedding(
        *sizes,
        row.rank,
        activation=row.activation,
        # Otherwise the file's own way of rounding floats.
        quantization=None if row.row_scales else row.quantization,
        row_scales=row.row_scales,
        name="tokens",
    )


def measure_table(
    name: str, row: Row, sizes: tuple[int, int], store: harness.Rows
) -> dict:
    """Bytes and fidelity; the projection's file is written beside."""
    path = store.path(f"table {name}", ".tflite")
    result = litert.export(table_model(row, sizes), path, row.quantization)
    table_bytes = result.get("table_bytes")
    result["embedding_ratio"] = (
        4 * sizes[0] * sizes[1] / table_bytes if table_bytes else None
    )
    path = store.path(f"projection {name}", ".tflite")
    litert.export(table_model(row, sizes, True), path, row.quantization)
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


def time_table(store: harness.Rows, options: argparse.Namespace) -> dict:
    """Of each row: the projection, and the model at lengths 1 and 16.

    `"ratios"` are those of the projection in few bits to int8 of its rank.
    """
    calls = {}
    kinds = (
        ("projection", "projection", 1),
        ("model T=1", "table", 1),
        ("model T=16", "table", 16),
    )
    for name, (what, kind, length), n in product(ROWS, kinds, options.threads):
        path = store.path(f"{kind} {name}", ".tflite")
        calls[name, f"{what}, {n} threads"] = invoker(path, n, [1, length])
    found = harness.time_in_turns(calls, options.rounds, 10)
    ratios: dict[str, dict] = {}
    for (name, row), n in product(ROWS.items(), options.threads):
        if row.quantization not in ("int4", "int2"):
            continue
        what = f"projection, {n} threads"
        ours, int8 = (
            found[key, what][f"{options.clock}_ms"]
            for key in (name, _in_int8(row))
        )
        ratios.setdefault(name, {})[what] = statistics.median(
            a / b for a, b in zip(ours, int8, strict=True)
        )
    return {
        "times": _medians(found, options.clock),
        "ratios": ratios,
        "clock": options.clock,
    }


def _in_int8(row: Row) -> str:
    """The name of the row of the same rank in int8."""
    return next(
        name
        for name, other in ROWS.items()
        if (other.rank, other.quantization) == (row.rank, "int8")
        and other.activation == row.activation
    )


def _medians(times: dict, clock: str) -> dict[str, dict]:
    """Median milliseconds by row and by what is timed."""
    medians: dict[str, dict] = {}
    for (name, what), found in times.items():
        median = statistics.median(found[f"{clock}_ms"])
        medians.setdefault(name, {})[what] = median
    return medians


# The translation model


def measure_translation(
    name: str, row: Row, task: Task, store: harness.Rows
) -> dict:
    """Bytes, BLEU and peak memory of a row's file."""
    key = Student(row.method, row.size).key(task)
    if row.method == TEACHER:
        model = task.teacher()
    else:
        model = make_student(task, row.method, row.size)
        model.load_weights(store.path(key, ".weights.h5"))
    path = store.path(f"translation {name}", ".tflite")
    result = litert.export_translator(model, task, path, row.quantization)
    translations = litert.translate_test(path, task)
    result["bleu"] = score(translations, task.texts["test"]["target"])
    if row.quantization is None:
        expected = task.decode(task.evaluate(model)["translations"])
        result["same_as_keras"] = statistics.mean(
            a == b for a, b in zip(translations, expected, strict=True)
        )
    result["peak_mb"] = _peak_mb(path, litert.test_sources(task)[:20])
    return result


def time_translation(
    store: harness.Rows, options: argparse.Namespace, task: Task
) -> dict:
    """Milliseconds a sentence."""
    calls, number = {}, 1
    for name, threads in product(rows_of("translation"), options.threads):
        path = store.path(f"translation {name}", ".tflite")
        call, number = litert.timed_translation(path, task, threads)
        calls[name, f"sentence, {threads} threads"] = call
    found = harness.time_in_turns(calls, options.rounds, 1)
    medians = _medians(found, options.clock)
    return {
        "times": {
            name: {what: ms / number for what, ms in found.items()}
            for name, found in medians.items()
        },
        "clock": options.clock,
    }


def _peak_mb(path: Path, lines: list[str]) -> float:
    """Resident peak of a process that translates a few sentences."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from keras_distilled_embedding_runner import Runner\n"
        "runner = Runner(sys.argv[1])\n"
        "for line in sys.stdin: runner.generate(line.strip())\n"
        "status = open('/proc/self/status').read()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    folder = Path(keras_distilled_embedding_runner.__file__).parent
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code, path, folder],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout.split()[-1]) * 1_024 / 1e6


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows and the times of both models."""
    read = options.store.read
    results = {kind: earlier[kind] for kind in MODELS if kind in earlier}
    for kind in MODELS:
        found = {name: read(f"{kind} {name}") for name in rows_of(kind)}
        times = read(f"times {kind}")
        if all(found.values()) and times:
            results[kind] = {
                "rows": found,
                "times": times["times"],
                "ratios": times.get("ratios", {}),
                "clock": times["clock"],
            }
    return results


BARS = {
    "file / weights, table model, float32": ("≤", 1.02),
    "file / weights, table model, int8": ("≤", 1.04),
    "file / weights, table model, int4": ("≤", 1.15),
    "file / weights, translation, float32": ("≤", 1.03),
    "file / weights, translation, int8": ("≤", 1.08),
    "table / ours, 8x and int8": ("≥", 30),
    "table / ours, 8x and int4": ("≥", 50),
    "projection: int8 against full float32": ("≥", 40),
    "projection: int8 against full int8, one copy": ("≥", 6),
    "projection: float32 against full float32": ("≥", 20),
    "BLEU lost by int8": ("≤", 0.3),
    "BLEU lost by int4": ("≤", 1.0),
    "sentence: ours int8 / the fastest full table": ("<", 1.0),
    "sentence: ours int8 / SVD of the same rank, int8": ("<", 1.0),
    "sentences translated as by Keras, float32": ("≥", 0.99),
}


def claims(table: dict, translation: dict) -> list[dict]:
    """What is promised, what was measured, and whether it holds."""
    rows, files = table["rows"], translation["rows"]
    floating, int8, int4 = (
        f"ours 8x, {form}" for form in ("float32", "int8", "int4")
    )
    sentence = {
        name: times["sentence, 1 threads"]
        for name, times in translation["times"].items()
    }
    full = min(ms for name, ms in sentence.items() if name.startswith("full"))

    def speedup(slow: str, fast: str) -> float:
        slow, fast = table["times"][slow], table["times"][fast]
        return slow["projection, 1 threads"] / fast["projection, 1 threads"]

    measured = (
        *(rows[name]["overhead"] for name in (floating, int8, int4)),
        files[floating]["overhead"],
        files[int8]["overhead"],
        rows[int8]["embedding_ratio"],
        rows[int4]["embedding_ratio"],
        speedup("full, float32", int8),
        speedup("full, int8, one copy", int8),
        speedup("full, float32", floating),
        files[floating]["bleu"] - files[int8]["bleu"],
        files[floating]["bleu"] - files[int4]["bleu"],
        sentence[int8] / full,
        sentence[int8] / sentence["truncated SVD 8x, int8"],
        files[floating]["same_as_keras"],
    )
    return [
        harness.claim(text, value, *bar, "{:.3f}")
        for (text, bar), value in zip(BARS.items(), measured, strict=True)
    ]


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the claims and a table for each model."""
    if len(results) == 2:
        yield "## What is promised"
        yield harness.markdown_table(claims(**results))
    for kind, found in results.items():
        if kind == "translation":
            yield f"## Translation, BLEU {signature()}"
        else:
            rows = next(iter(found["rows"].values()))
            height, width = rows.get("sizes", SIZES)
            yield f"## A table of {height:,} x {width}"
        yield harness.markdown_table(
            [_cells(name, found, kind) for name in found["rows"]]
        )
        if found.get("ratios"):
            yield "The projection in few bits, against int8 of the same rank:"
            yield harness.markdown_table(
                [
                    {"": name}
                    | {what: f"{ratio:.2f}" for what, ratio in ratios.items()}
                    for name, ratios in found["ratios"].items()
                ]
            )


def _cells(name: str, results: dict, kind: str) -> dict:
    row, times = results["rows"][name], results["times"][name]
    table_bytes = row.get("table_bytes") or None
    cells = {
        "": name,
        "file bytes": f"{row['bytes']:,}",
        "/ weights": harness.formatted(row.get("overhead"), "{:.3f}"),
        "table bytes": harness.formatted(table_bytes, "{:,}"),
    }
    if kind == "table":
        cells["error of logits"] = harness.formatted(row.get("error"), "{:.2%}")
    else:
        cells["BLEU"] = f"{row['bleu']:.2f}"
        cells["peak MB"] = f"{row['peak_mb']:.0f}"
    unit = "CPU ms" if results.get("clock") == "cpu" else "ms"
    return cells | {
        f"{unit}, {what}": f"{ms:.3f}" for what, ms in times.items()
    }
