"""How long `compress` takes on a large model, and how much memory.

A KerasHub language model of 250 million random weights, most of them in its
table, as in small models with large vocabularies. Memory is the process's
resident peak while the model is compressed, above what it was before the
model was made.
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
from keras_distilled_embedding.keras_internals import without_initial_values
from keras_distilled_embedding.quantization import QUANTIZATIONS

SECONDS, MEMORY = 60, 2.5  # what is promised
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
    add("--compression", type=float, default=8.0)
    choices = ["auto", "none", *QUANTIZATIONS]
    add("--quantization", choices=choices, default="auto")


def run(options: argparse.Namespace) -> None:
    """Compresses the model once, in a process of its own."""
    sizes = QUICK if options.quick else SIZES
    size, quantization = options.compression, options.quantization
    options.store.finish(
        f"{size:g}x, {quantization}",
        lambda: harness.in_new_process(measure, sizes, size, quantization),
    )


def make_model(sizes: dict[str, int]) -> keras.Model:
    """A model of random weights.

    TensorFlow keeps the memory of random initial values, three times that of
    the weights, and would hide in it what `compress` needs: the values come
    from NumPy, weight by weight.
    """
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
    sizes: dict[str, int], compression: float, quantization: str
) -> dict:
    """Compresses a model; its seconds, and the megabytes at the peak."""
    before = harness.resident_mb()
    model = make_model(sizes)
    model_mb = 4 * model.count_params() / 1e6
    harness.reset_peak()
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
        "peak_mb": round(peak),
        "peak_over_model": round(peak / model_mb, 3),
    }


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the last row."""
    return ([earlier] + options.store.read_all())[-1]


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what was measured, and the claims."""
    names = ("model_parameters", "student_parameters", "model_mb", "peak_mb")
    cells = {name.replace("_", " "): f"{results[name]:,}" for name in names}
    size = f"{results['compression']:g}x"
    yield harness.markdown_table([{"compression": size, **cells}])
    over = results["peak_over_model"]
    yield harness.markdown_table(
        [
            harness.claim("seconds", results["seconds"], "≤", SECONDS),
            harness.claim("peak / the model's memory", over, "≤", MEMORY),
        ]
    )
