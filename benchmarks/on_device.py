"""On device: bytes, speed and BLEU of a full table and of factors.

    python -m benchmarks.on_device --data-dir DIR

Two models: one that is little more than a table of 32,000 x 512, where the
table's own cost is seen, and the translation example on Multi30k, encoded and
decoded token by token. Everything runs through LiteRT on this machine's
processor. A row is written when it is done: a run that is stopped goes on
where it was. Times are taken at the end, all rows in turn, several times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import keras_distilled_embedding as kde
from benchmarks._report import environment
from benchmarks._report import write_text
from examples.nmt.evaluate import markdown_table
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from examples.nmt.pipeline import PRESETS
from examples.nmt.pipeline import Run
from examples.nmt.runner import LiteRTRunner
from examples.nmt.stepwise import embed_vocabulary
from examples.nmt.stepwise import stepwise_signatures
from examples.nmt.train import Recipe
from examples.nmt.train import distil
from examples.nmt.translate import Translator
from keras_distilled_embedding.export.litert import convert
from keras_distilled_embedding.layers import DistilledEmbedding

RESULTS = Path(__file__).parent / "results" / "on_device"
# Fine-tuning of a distilled student with its codes rounded to 4 bits.
ROUNDED = Recipe(epochs=1, peak_learning_rate=1e-3)
VOCABULARY, WIDTH = 32_000, 512
THREADS = (1, 2)
DEFAULT = "converter default"


@dataclass(frozen=True)
class Row:
    """What one row of the tables is.

    Args:
        name: As the report calls it.
        model: Which of the trained translation models it is.
        rank: Of the large table's factors; `None` is a full table.
        quantization: As of `export_litert`, or `DEFAULT`.
        activation: `f`, of the factors.
        rounded: Whether the translation model was trained as it is stored.
    """

    name: str
    model: str
    rank: int | None
    quantization: str | None
    activation: str | None = "relu"
    rounded: bool = False

    @property
    def file(self) -> str:
        return self.name.replace(" ", "_").replace(",", "") + ".tflite"


ROWS = [
    Row("full, float32", "teacher", None, None),
    Row("full, int8, converter default", "teacher", None, DEFAULT),
    Row("full, int8, one copy", "teacher", None, "int8"),
    Row("full, int4, one copy", "teacher", None, "int4"),
    Row("truncated SVD 8x, int8", "svd", 64, "int8", None),
    Row("ours 8x, float32", "8x", 64, None),
    Row("ours 8x, int8", "8x", 64, "int8"),
    Row("ours 8x, int4", "8x", 64, "int4", rounded=True),
    Row("ours 16x, float32", "16x", 31, None),
    Row("ours 16x, int8", "16x", 31, "int8"),
    Row("ours 16x, int4", "16x", 31, "int4", rounded=True),
]


def export(
    row: Row,
    model: keras.Model,
    path: Path,
    signatures: dict[str, keras.Model] | None = None,
) -> dict:
    """Writes a row's file; its bytes, and how far it is from Keras."""
    if row.quantization == DEFAULT:
        parts = signatures or {"serving_default": model}
        path.write_bytes(
            convert(parts, optimizations=[tf.lite.Optimize.DEFAULT])
        )
        return {"bytes": path.stat().st_size}
    report = kde.export_litert(
        model,
        path,
        quantization=row.quantization,
        signatures=signatures,
        verbose=False,
    )
    fidelity = report.fidelity
    return {
        "bytes": report.bytes,
        "overhead": report.overhead,
        "tables": report.tables,
        "table_bytes": sum(report.table_bytes.values()),
        "error": fidelity and fidelity.relative_rms_error,
    }


# A model that is little more than its table


def table_model(row: Row) -> keras.Model:
    """ids -> embedding -> dense -> tied projection, random weights."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedding = _embedding(row)
    hidden = keras.layers.Dense(WIDTH, name="hidden")(embedding(ids))
    return keras.Model(ids, embedding(hidden, reverse=True))


def projection_model(row: Row) -> keras.Model:
    """The projection alone, of one position."""
    keras.utils.set_random_seed(0)
    hidden = keras.Input((1, WIDTH), name="hidden")
    return keras.Model(hidden, _embedding(row)(hidden, reverse=True))


def _embedding(row: Row) -> keras.layers.Layer:
    if row.rank is None:
        return keras.layers.ReversibleEmbedding(
            VOCABULARY, WIDTH, name="tokens"
        )
    return DistilledEmbedding(
        VOCABULARY, WIDTH, row.rank, row.activation, name="tokens"
    )


def measure_table(row: Row, folder: Path) -> dict:
    """Bytes and fidelity; the projection's file is written beside."""
    result = export(row, table_model(row), folder / row.file)
    result["embedding_ratio"] = (
        4 * VOCABULARY * WIDTH / result["table_bytes"]
        if result.get("table_bytes")
        else None
    )
    export(row, projection_model(row), folder / f"projection_{row.file}")
    return result


def invoker(path: Path, threads: int, shape: tuple, dtype: str) -> Callable:
    """A function that runs a file once, on what it was given before."""
    interpreter = Interpreter(str(path), num_threads=threads)
    (tensor,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(tensor["index"], shape)
    interpreter.allocate_tensors()
    values = np.random.default_rng(0).integers(100, size=shape).astype(dtype)
    interpreter.set_tensor(tensor["index"], values)
    return interpreter.invoke


def time_in_turn(calls: dict, rounds: int, repeats: int) -> dict:
    """Median milliseconds of each call: all in turn, many times."""
    samples = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for key, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = time.perf_counter() - start
            samples[key].append(1e3 * seconds / repeats)
    return {key: statistics.median(values) for key, values in samples.items()}


def time_table(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Of each row: the projection, and the model at lengths 1 and 16."""
    calls = {}
    for row in ROWS:
        for threads in THREADS:
            path = folder / f"projection_{row.file}"
            calls[row.name, f"projection, {threads} threads"] = invoker(
                path, threads, (1, 1, WIDTH), "float32"
            )
            for length in (1, 16):
                calls[row.name, f"model T={length}, {threads} threads"] = (
                    invoker(folder / row.file, threads, (1, length), "int32")
                )
    times: dict[str, dict[str, float]] = {}
    for (name, what), ms in time_in_turn(calls, rounds, 10).items():
        times.setdefault(name, {})[what] = ms
    return times


# The translation example


class Translations:
    """The trained models, and what they make of the test set.

    Args:
        work_dir: Folder of the models, each a run of the example.
        data_dir: Folder of Multi30k's files.
    """

    def __init__(self, work_dir: Path, data_dir: str | None) -> None:
        self.work_dir = work_dir
        self.runs = {
            name: Run(
                replace(PRESETS["multi30k"], **options),
                work_dir / name,
                data_dir,
            )
            for name, options in (
                ("8x", {}),
                ("16x", {"compression": 16.0}),
                ("svd", {"activation": None}),
            )
        }
        self.test = self.runs["8x"].corpus.test

    @property
    def max_length(self) -> int:
        return PRESETS["multi30k"].batching.max_length

    @property
    def vocabulary(self) -> Path:
        return self.work_dir / "8x" / "vocabulary.spm"

    def model(self, row: Row) -> keras.Model:
        """The trained model of a row; trains what is missing."""
        first = self.runs["8x"]
        first.train_teacher()
        if row.model == "teacher":
            return first.model("teacher")
        run = self.runs[row.model]
        for name in ("teacher.keras", "vocabulary.spm", "teacher_history.csv"):
            if not (run.work_dir / name).exists():
                shutil.copy(first.work_dir / name, run.work_dir / name)
        run.compress()
        run.distil()
        if not row.rounded:
            return run.model("student")
        path = run.work_dir / f"student_{row.quantization}.keras"
        if not path.exists():
            self._train_rounded(run, row.quantization, path)
        return kde.load_model(path)

    def _train_rounded(self, run: Run, rounding: str, path: Path) -> None:
        keras.utils.set_random_seed(0)
        batches = run.settings.batching.batches
        student = run.model("student")
        distil(
            run.teacher_with_dropout(0.0),
            student,
            training=batches(run.corpus.train, run.vocabulary, shuffle_seed=7),
            validation=batches(run.corpus.validation, run.vocabulary),
            schedule=ROUNDED,
            quantization=rounding,
            verbose=2,
        )
        kde.save_model(student, path)

    def measure(self, row: Row, folder: Path) -> dict:
        model = self.model(row)
        path = folder / f"translate_{row.file}"
        signatures = stepwise_signatures(model, self.max_length)
        result = export(row, model, path, signatures)
        result["bytes_over_parameters"] = result["bytes"] / (
            model.count_params() * (1 if row.quantization else 4)
        )
        embed_vocabulary(path, self.vocabulary)
        runner = LiteRTRunner(path)
        translations = [runner.translate(line) for line in self.test.source]
        result["bleu"] = score(translations, list(self.test.target))
        if row.quantization is None:
            result["same_as_keras"] = self.same_as_keras(model, translations)
        result["peak_mb"] = _peak_mb(path, list(self.test.source)[:20])
        return result

    def same_as_keras(
        self, model: keras.Model, translations: list[str]
    ) -> float:
        """Share of the sentences that Keras translates to the same text."""
        run = self.runs["8x"]
        keras_translator = Translator(
            model, run.vocabulary, run.settings.batching
        )
        expected = keras_translator.translate(list(self.test.source))
        return statistics.mean(
            a == b for a, b in zip(translations, expected, strict=True)
        )

    def time(self, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
        """Milliseconds a sentence, and a step of the decoder."""
        lines = list(self.test.source)[:100]
        calls, steps = {}, {}
        for row in ROWS:
            for threads in THREADS:
                runner = LiteRTRunner(
                    folder / f"translate_{row.file}", num_threads=threads
                )
                key = row.name, f"sentence, {threads} threads"
                calls[key] = lambda runner=runner: [
                    runner.translate(line) for line in lines
                ]
                key = row.name, f"step, {threads} threads"
                steps[key] = _step(runner)
        times: dict[str, dict[str, float]] = {}
        for (name, what), ms in time_in_turn(calls, rounds, 1).items():
            times.setdefault(name, {})[what] = ms / len(lines)
        for (name, what), ms in time_in_turn(steps, rounds, 100).items():
            times[name][what] = ms
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
    folder = Path(__file__).parents[1] / "examples" / "nmt"
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code, path, folder],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(shown.stdout.split()[-1]) * 1_024 / 1e6


# The report


def claims(table: dict, translation: dict) -> list[list[str]]:
    """What is promised, what was measured, and whether it holds."""
    projection = "projection, 1 threads"

    def speedup(slow: str, fast: str) -> float:
        times = table["times"]
        return times[slow][projection] / times[fast][projection]

    def bleu(name: str) -> float:
        return translation["rows"][name]["bleu"]

    ours = [row.name for row in ROWS if row.name.startswith("ours 8x")]
    rivals = [row.name for row in ROWS if not row.name.startswith("ours")]
    sentence = {
        name: times["sentence, 1 threads"]
        for name, times in translation["times"].items()
    }
    floating, int8, int4 = ours
    overheads = dict(zip(ours, map(_over_entries, ours, [table] * 3)))
    files = {name: translation["rows"][name]["overhead"] for name in ours}
    rows = table["rows"]
    checks = [
        (
            "file / weights, table model, float32",
            overheads[floating],
            "<=",
            1.02,
        ),
        ("file / weights, table model, int8", overheads[int8], "<=", 1.04),
        ("file / weights, table model, int4", overheads[int4], "<=", 1.15),
        ("file / weights, translation, float32", files[floating], "<=", 1.03),
        ("file / weights, translation, int8", files[int8], "<=", 1.08),
        ("table / ours, 8x and int8", rows[int8]["embedding_ratio"], ">=", 30),
        ("table / ours, 8x and int4", rows[int4]["embedding_ratio"], ">=", 50),
        (
            "projection: int8 against full float32",
            speedup("full, float32", int8),
            ">=",
            40,
        ),
        (
            "projection: int8 against full int8, one copy",
            speedup("full, int8, one copy", int8),
            ">=",
            6,
        ),
        (
            "projection: float32 against full float32",
            speedup("full, float32", floating),
            ">=",
            20,
        ),
        ("BLEU lost by int8", bleu(floating) - bleu(int8), "<=", 0.3),
        ("BLEU lost by int4", bleu(floating) - bleu(int4), "<=", 1.0),
        (
            "sentence: ours int8 / the fastest full table",
            sentence[int8] / min(sentence[name] for name in rivals[:4]),
            "<",
            1.0,
        ),
        (
            "sentence: ours int8 / SVD of the same rank, int8",
            sentence[int8] / sentence[rivals[4]],
            "<",
            1.0,
        ),
        (
            "sentences translated as by Keras, float32",
            translation["rows"][floating]["same_as_keras"],
            ">=",
            0.99,
        ),
    ]
    compare = {
        "<=": lambda a, b: a <= b,
        ">=": lambda a, b: a >= b,
        "<": lambda a, b: a < b,
    }
    return [["promised", "bound", "measured", "holds"]] + [
        [
            what,
            f"{sign} {bound}",
            f"{value:.3f}",
            "yes" if compare[sign](value, bound) else "NO",
        ]
        for what, value, sign, bound in checks
    ]


def _over_entries(name: str, table: dict) -> float:
    """Bytes of the table model's file over its entries alone, no scales."""
    row = next(row for row in ROWS if row.name == name)
    bits = {None: 32, "int8": 8, "int4": 4}[row.quantization]
    matrices = WIDTH * (row.rank + WIDTH) * min(32, max(bits, 8)) / 8
    entries = VOCABULARY * row.rank * bits / 8 + matrices + 4 * WIDTH
    return table["rows"][name]["bytes"] / entries


def table_cells(results: dict) -> list[list[str]]:
    what = [
        f"{kind}, {n} threads"
        for kind in ("projection", "model T=1", "model T=16")
        for n in THREADS
    ]
    rows = [
        [
            "",
            "file bytes",
            "/ weights",
            "table bytes",
            "error of logits",
            *(f"ms, {name}" for name in what),
        ]
    ]
    for row in ROWS:
        values, times = results["rows"][row.name], results["times"][row.name]
        rows.append(
            [
                row.name,
                *_size_cells(values),
                *(f"{times[name]:.3f}" for name in what),
            ]
        )
    return rows


def translation_cells(results: dict) -> list[list[str]]:
    what = [
        f"{kind}, {n} threads" for kind in ("step", "sentence") for n in THREADS
    ]
    rows = [
        [
            "",
            "file bytes",
            "/ weights",
            "table bytes",
            "BLEU",
            "peak MB",
            *(f"ms, {name}" for name in what),
        ]
    ]
    for row in ROWS:
        values, times = results["rows"][row.name], results["times"][row.name]
        size = _size_cells(values)[:3]
        rows.append(
            [
                row.name,
                *size,
                f"{values['bleu']:.2f}",
                f"{values['peak_mb']:.0f}",
                *(f"{times[name]:.2f}" for name in what),
            ]
        )
    return rows


def _size_cells(values: dict) -> list[str]:
    def shown(key: str, form: str) -> str:
        value = values.get(key)
        return "" if value is None else format(value, form)

    return [
        f"{values['bytes']:,}",
        shown("overhead", ".3f"),
        shown("table_bytes", ",") if values.get("table_bytes") else "",
        shown("error", ".2%"),
    ]


def write_report(table: dict, translation: dict, folder: Path) -> None:
    text = f"""# On device

`python -m benchmarks.on_device --data-dir DIR`, {environment()}.
LiteRT on this machine's processor; times are medians of rounds in which all
rows take turns, in milliseconds.

## What is promised

{markdown_table(claims(table, translation))}

"File / weights" is the file's bytes over those of the weights, each counted
once: an entry of a table in 4, 1 or half a byte, of another matrix in 4 or 1,
any other number in 4; of the table model without the scales of its blocks.
Were every weight of the translation model one byte, biases too, its int8 file
would be {translation["rows"]["ours 8x, int8"]["bytes_over_parameters"]:.3f}
times as large. A truncated SVD of the same rank is the same file but for its
numbers: neither can be faster.

## A table of {VOCABULARY:,} x {WIDTH}, a dense layer, the tied projection

Random weights: the error is of rounding alone, against Keras.

{markdown_table(table_cells(table))}

## Translation, Multi30k, test_2016_flickr

Encoded once, decoded token by token with a key/value cache by
`examples/nmt/runner.py`, greedily; one teacher, its students distilled by the
example's recipe, those of int4 for one more epoch with their codes rounded.
BLEU of 1,000 sentences ({signature()}); times of the first 100; peak memory
of a process that translates 20.

{markdown_table(translation_cells(translation))}
"""
    write_text(folder / "report.md", text)
    write_text(
        folder / "results.json",
        json.dumps({"table": table, "translation": translation}, indent=2),
    )


class Rows:
    """Results by name, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, kind: str, row: Row, measure: Callable[[], dict]) -> dict:
        path = self.folder / f"{kind}_{row.file}.json"
        if not path.exists():
            print(f"{kind}: {row.name}", flush=True)
            write_text(path, json.dumps(measure()))
        return json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="folder of Multi30k's .gz files")
    parser.add_argument("--work-dir", type=Path, default="runs/on_device")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    rows = Rows(options.work_dir / "files")
    translations = Translations(options.work_dir, options.data_dir)
    table = {
        "rows": {
            row.name: rows.get(
                "table", row, lambda row=row: measure_table(row, rows.folder)
            )
            for row in ROWS
        },
    }
    translation = {
        "rows": {
            row.name: rows.get(
                "translation",
                row,
                lambda row=row: translations.measure(row, rows.folder),
            )
            for row in ROWS
        },
    }
    table["times"] = time_table(rows.folder, options.rounds)
    translation["times"] = translations.time(rows.folder, options.rounds)
    write_report(table, translation, options.output)
    print((options.output / "report.md").read_text())


if __name__ == "__main__":
    main()
