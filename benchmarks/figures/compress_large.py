"""How long `compress` takes on a large model, and how much memory.

A KerasHub language model of 250 million random weights, most of them in its
table, as in small models with large vocabularies; or Gemma 3 270M itself, from
its package. Nothing is calibrated. Memory is the process's resident peak while
the model is compressed, above what it was before the model was made.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import keras_hub
import numpy as np

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.tasks.pretrained import GGUF
from benchmarks.tasks.pretrained import SOURCES
from benchmarks.tasks.pretrained import build
from keras_distilled_embedding.keras_internals import without_initial_values
from keras_distilled_embedding.quantization import QUANTIZATIONS

# What is promised.
SECONDS, MEMORY = {"random": 60, "gemma3": 120}, 2.5
TITLES = {
    "random": "250 million random weights",
    "gemma3": SOURCES["gemma3"].title,
}
SIZES = {
    "vocabulary_size": 250_000,
    "num_layers": 8,
    "num_heads": 12,
    "hidden_dim": 768,
    "intermediate_dim": 3072,
    "max_sequence_length": 1024,
}
QUICK = {**SIZES, "vocabulary_size": 2_000, "num_layers": 1, "hidden_dim": 96}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=SECONDS, default="random")
    add("--compression", type=float, default=8.0)
    choices = ["auto", "none", *QUANTIZATIONS]
    add("--quantization", choices=choices, default="auto")


def run(options: argparse.Namespace) -> None:
    """Compresses the model once, in a process of its own."""
    harness.give_freed_memory_back()
    what = options.model, options.quick, options.task_dir / "pretrained"
    size, quantization = options.compression, options.quantization
    options.store.finish(
        f"{options.model}, {size:g}x, {quantization}",
        lambda: {
            "model": options.model,
            **harness.in_new_process(measure, what, size, quantization),
        },
    )


def make_model(name: str, quick: bool, folder: Path) -> keras.Model:
    """The model, whose weights are all the memory that it takes.

    TensorFlow keeps the memory of random initial values, three times that of
    the weights, and would hide in it what `compress` needs.
    """
    if name == "random":
        return random_model(QUICK if quick else SIZES)
    folder.mkdir(parents=True, exist_ok=True)
    with without_initial_values():
        return build(GGUF(SOURCES[name].path(folder)))


def random_model(sizes: dict[str, int]) -> keras.Model:
    """A model of random weights, which come from NumPy, weight by weight."""
    rng = np.random.default_rng(0)
    with without_initial_values():
        backbone = keras_hub.models.GPT2Backbone(**sizes)
        model = keras_hub.models.GPT2CausalLM(
            backbone=backbone, preprocessor=None
        )
    for weight in model.weights:
        values = rng.standard_normal(weight.shape, dtype="float32")
        weight.assign(0.02 * values)
    return model


def measure(
    what: tuple[str, bool, Path], compression: float, quantization: str
) -> dict:
    """Compresses a model; its seconds, and the megabytes at the peak."""
    before = harness.resident_mb()
    model = make_model(*what)
    model_mb = 4 * model.count_params() / 1e6
    harness.reset_peak()
    loaded = harness.resident_mb() - before
    start = time.perf_counter()
    student = kde.compress(
        model,
        compression,
        quantization=None if quantization == "none" else quantization,
        verbose=0,
    )
    seconds = time.perf_counter() - start
    peak = harness.peak_mb() - before
    return {
        "model_parameters": model.count_params(),
        "student_parameters": student.count_params(),
        "compression": compression,
        "quantization": quantization,
        "seconds": round(seconds, 1),
        "model_mb": round(model_mb),
        "loaded_mb": round(loaded),
        "peak_mb": round(peak),
        "peak_over_model": round(peak / model_mb, 3),
    }


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the last row of each model."""
    rows = earlier.get("rows", [earlier] if earlier else [])
    last = {
        row.get("model", "random"): row
        for row in [*rows, *options.store.read_all()]
    }
    return {"rows": [last[name] for name in SECONDS if name in last]}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what was measured, and the claims."""
    names = (
        "model_parameters",
        "student_parameters",
        "model_mb",
        "loaded_mb",
        "peak_mb",
    )
    for row in results["rows"]:
        name = row.get("model", "random")
        cells = {
            key.replace("_", " "): harness.formatted(row.get(key), "{:,}")
            for key in names
        }
        kind = row.get("quantization", "auto")
        yield f"## {TITLES[name]}"
        yield harness.markdown_table(
            [{"compression": f"{row['compression']:g}x, {kind}", **cells}]
        )
        over = row["peak_over_model"]
        yield harness.markdown_table(
            [
                harness.claim("seconds", row["seconds"], "≤", SECONDS[name]),
                harness.claim("peak / the model's memory", over, "≤", MEMORY),
            ]
        )
