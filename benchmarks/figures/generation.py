"""Text on the device: bundles for LiteRT-LM, their bytes, speed and words.

A pretrained KerasHub language model, its table compressed without training,
goes into a bundle by `export_litertlm`, and the runtime LiteRT-LM writes with
it, on this machine's processor.

- `full`: the model as it is, in float32 or 8 bits.
- `int4`, `int2`: the table in so many bits, nothing is lost but by rounding,
  everything else in 8 bits.
- `rank d/8, int8`: for speed alone. Without training its text is lost.

Prompts are continued greedily. `as Keras` is for how many of five prompts the
next 50 tokens are those of Keras, letter by letter, in float32; other bundles
round activations too, and depart at the first token that is nearly as likely as
another. KL and `same choice` are of the bundle beside the same model in Keras,
on two paragraphs. Tokens a second are of the runtime's own benchmark, medians
of five runs in which the bundles of a model take turns; `load` is the time
until the first of them can begin. Peak memory is that of a process that only
loads and writes. `export` is seconds of the processor, and the memory of a new
process before it, with TensorFlow and the model, and at its peak; `of the
floats` is what it adds, beside the full model in float32.

Of a model with the sizes of Gemma 3 270M and random weights, only bytes, memory
and speed are of interest. The rows of SmolLM2 are older: three runs, a bundle
at a time.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.tasks import pretrained
from benchmarks.tasks.bundles import MAX_LENGTH
from benchmarks.tasks.bundles import PROMPTS
from benchmarks.tasks.bundles import SPEED_NAMES
from benchmarks.tasks.bundles import speeds_of
from benchmarks.tasks.bundles import write_with

NEW_TOKENS, PREFILL, ROUNDS = 50, (8, 32), 5
SPEEDS = "speeds"
TITLES = {name: source.title for name, source in pretrained.SOURCES.items()} | {
    "gemma3-shape": "The shape of Gemma 3 270M, random weights"
}
# Options of `compress`, none for the model as it is; what the bundle stores.
ROWS: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "full, float32": (None, None),
    "full, int8": (None, "int8"),
    "int4": ({"quantization": "int4"}, "int4"),
    "int2": ({"quantization": "int2"}, "int2"),
    "rank d/8, int8": ({"quantization": "int8"}, "int8"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=["smollm2", "gemma3-shape"], default="smollm2")
    add("--rows", nargs="*", choices=ROWS, default=[*ROWS], metavar="ROW")
    add("--threads", nargs="+", type=int, default=[1, 2])


def run(options: argparse.Namespace) -> None:
    """Measures the chosen rows of a model."""
    harness.give_freed_memory_back()
    if options.quick:
        is_shape = options.model in pretrained.SHAPES
        options.model = "quick-shape" if is_shape else "quick"
    folder, bundles = (
        options.task_dir / name for name in ("pretrained", "bundles")
    )
    bundles.mkdir(parents=True, exist_ok=True)
    _, text = pretrained.paragraphs(options.data_dir)
    text = [p for p in text if 200 < len(p) < 600]
    paths = {
        name: str(bundles / f"{options.model}_{number}.litertlm")
        for number, name in enumerate(ROWS)
        if name in options.rows
    }
    for name, path in paths.items():
        options.store.finish(
            f"{name} {options.model}",
            partial(measure, name, options.model, folder, text, path),
        )
    options.store.finish(
        f"{SPEEDS} {options.model} {options.rows}",
        partial(measure_speeds, options.model, paths, options.threads),
    )


def measure(
    name: str, model: str, folder: Path, text: list[str], path: str
) -> dict:
    """Makes a row's bundle and writes with it, each in a new process.

    Args:
        name: Of the row.
        model: As of `pretrained.writer`.
        folder: For its files.
        text: Paragraphs to calibrate on, and to compare with Keras.
        path: Of the bundle.
    """
    row = harness.in_new_process(_export, name, model, folder, text, path)
    found = harness.in_new_process(write_with, path)
    expected = row.pop("keras_texts", None)
    if expected is not None:
        pairs = zip(found["texts"], expected)
        row["equal"] = sum(a.startswith(b) and b != "" for a, b in pairs)
    if model in pretrained.SHAPES:
        del found["texts"]
    return {"row": name, "model": model, **row, **found}


def measure_speeds(
    model: str, paths: dict[str, str], threads: list[int]
) -> dict:
    """How fast the runtime is with several bundles, which take turns.

    Args:
        model: Of which they are.
        paths: Of the bundles, by their rows.
        threads: Numbers of threads.
    """
    found: dict = {name: {k: {} for k in SPEED_NAMES} for name in paths}
    runs: dict = {key: [] for key in itertools.product(paths, threads)}
    for _ in range(ROUNDS):
        for name, number in runs:
            runs[name, number].append(
                harness.in_new_process(speeds_of, paths[name], number)
            )
    for (name, number), values in runs.items():
        for kind, *rounds in zip(SPEED_NAMES, *values):
            found[name][kind][str(number)] = statistics.median(rounds)
    return {"row": SPEEDS, "model": model, "found": found}


def _export(
    name: str, model: str, folder: Path, text: list[str], path: str
) -> dict:
    """Writes the bundle; what it holds and took, and what Keras writes."""
    task = pretrained.writer(model, folder)
    float_bytes = 4 * task.count_params()
    compression, quantization = ROWS[name]
    has_text = model not in pretrained.SHAPES
    if compression is not None:
        width = task.backbone.token_embedding.output_dim
        rank = width // 8 if "d/8" in name else width
        data = text[2:] if has_text else None
        task = kde.compress(
            task, rank=rank, calibration_data=data, verbose=0, **compression
        )
    harness.reset_peak()
    before = harness.resident_mb()
    start = time.process_time()
    report = kde.export_litertlm(
        task,
        path,
        max_length=MAX_LENGTH,
        prefill_lengths=PREFILL,
        quantization=quantization,
        prompts=text[:2] if has_text else None,
        verbose=False,
    )
    row = {
        "bundle_bytes": report.bytes,
        "table_bytes": sum(report.table_bytes.values()),
        "exported_s": round(time.process_time() - start, 1),
        "before_mb": round(before),
        "export_peak_mb": round(harness.peak_mb()),
        "float_bytes": float_bytes,
    }
    if has_text:
        row["divergence"] = report.fidelity.divergence
        row["agreement"] = report.fidelity.top1_agreement
        if quantization is None:
            row["keras_texts"] = generate(task)
    return row


def generate(task: keras.Model) -> list[str]:
    """What Keras writes after the prompts, in so many tokens."""
    task.compile(sampler="greedy")
    tokenizer = task.preprocessor.tokenizer
    return [
        task.generate(
            prompt,
            max_length=len(tokenizer(prompt)) + NEW_TOKENS,
            # It would take the padding of the prompt for its end.
            stop_token_ids=None,
            strip_prompt=True,
        )
        for prompt in PROMPTS
    ]


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows in the order of `ROWS`, by model."""

    def key(row: dict) -> tuple:
        return row["model"], [*ROWS].index(row["row"])

    stored = options.store.read_all()
    new = {key(row): row for row in stored if row["row"] in ROWS}
    for speeds in stored:
        for name, found in speeds.get("found", {}).items():
            new[speeds["model"], [*ROWS].index(name)] |= found
    measured = [row for row in new.values() if "decode" in row]
    rows = harness.merged(measured, earlier.get("rows", []), key)
    return {"rows": sorted(rows, key=key)} if rows else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes a table for each model, and what is written."""
    rows = results["rows"]
    for model in dict.fromkeys(row["model"] for row in rows):
        source = pretrained.SOURCES.get(model)
        yield f"## {TITLES.get(model, 'A model of no quality')}"
        if source:
            yield f"License: {source.license}."
        of_model = [row for row in rows if row["model"] == model]
        yield harness.markdown_table([*map(_cells, of_model)])
        if model in pretrained.SHAPES:
            continue
        yield f"What they write after {PROMPTS[0]!r}:"
        yield "\n".join(
            f"- {row['row']}: {row['texts'][0][:200]!r}" for row in of_model
        )


def _cells(row: dict) -> dict:
    cells = {
        "table": row["row"],
        "bundle": f"{row['bundle_bytes'] / 1e6:,.1f} MB",
        "its table": f"{row['table_bytes'] / 1e6:,.1f} MB",
    }
    if "divergence" in row:
        cells |= {
            "KL": f"{row['divergence']:.4f}",
            "same choice": f"{row['agreement']:.3f}",
            "as Keras": harness.formatted(row.get("equal"), "{} of 5"),
        }
    cells["peak MB"] = f"{row['peak_mb']:,}"
    for kind, label in (
        ("load_s", "load, s"),
        ("prefill", "prefill"),
        ("decode", "decode"),
    ):
        for threads, value in row[kind].items():
            cells[f"{label}, {threads} thr."] = f"{value:.1f}"
    cells["export, s"] = f"{row['exported_s']:.0f}"
    if "export_peak_mb" in row:
        before, peak = row["before_mb"], row["export_peak_mb"]
        share = 1e6 * (peak - before) / row["float_bytes"]
        cells["export, MB"] = f"{before:,} to {peak:,}"
        cells["of the floats"] = f"{share:.2f} x"
    return cells
