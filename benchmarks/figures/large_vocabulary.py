"""What a training step over a large vocabulary takes, with and without logits.

The same step twice, each in a process of its own: with all logits and Keras's
loss, and with `ChunkedCrossEntropy`, which the tests compare. Memory is the
peak while the model trains, above what is resident once the model and the
batch are there. Run it again with another `KERAS_BACKEND` for the rows of that
backend.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks import harness

PATHS = ("plain", "chunked")
SHARE = 0.25  # what is promised
STEPS = 3  # timed, after the one that compiles
SIZES = {
    "vocabulary": 256_000,
    "width": 1_024,
    "rank": 128,
    "tokens": 2_048,
    "chunk": 64,
}
QUICK = {"vocabulary": 500, "width": 32, "rank": 4, "tokens": 64, "chunk": 16}


def run(options: argparse.Namespace) -> None:
    """Compares both ways, compiled by XLA and, on TensorFlow, without."""
    sizes = QUICK if options.quick else SIZES
    backend = keras.backend.backend()
    for jit in (True,) if backend == "jax" else (False, True):
        name = f"{backend}, {'XLA' if jit else 'graph'}"
        options.store.finish(name, partial(compare, sizes, jit))


def step(path: str, sizes: dict[str, int], jit: bool) -> dict:
    """Trains a few steps one way."""
    keras.utils.set_random_seed(0)
    hidden = keras.Input((sizes["width"],))
    embedding = kde.layers.DistilledEmbedding(
        sizes["vocabulary"],
        sizes["width"],
        sizes["rank"],
        embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
    )
    dense = keras.layers.Dense(sizes["width"])
    model = keras.Model(hidden, embedding(dense(hidden), reverse=True))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if path == "chunked":
        model = kde.without_projection(model)
        loss = kde.ChunkedCrossEntropy(embedding, sizes["chunk"])
    model.compile("sgd", loss, jit_compile=jit)
    rng = np.random.default_rng(0)
    states = rng.standard_normal(
        (sizes["tokens"], sizes["width"]), dtype="float32"
    )
    labels = rng.integers(sizes["vocabulary"], size=sizes["tokens"])
    harness.reset_peak()
    resident = harness.resident_mb()
    value = float(model.train_on_batch(states, labels))
    peak = harness.peak_mb() - resident
    start = time.perf_counter()
    for _ in range(STEPS):
        model.train_on_batch(states, labels)
    seconds = (time.perf_counter() - start) / STEPS
    return {"loss": value, "peak_mb": round(peak), "seconds": round(seconds, 2)}


def compare(sizes: dict[str, int], jit: bool) -> dict:
    """Both ways, and the share of memory that chunks take."""
    found = {
        path: harness.in_new_process(step, path, sizes, jit) for path in PATHS
    }
    share = found["chunked"]["peak_mb"] / found["plain"]["peak_mb"]
    return {**found, "share_of_memory": round(share, 3), "sizes": sizes}


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows of each backend."""
    runs = earlier.get("runs", {}) | {
        row["row"]: row for row in options.store.read_all() if "sizes" in row
    }
    return {"runs": runs} if runs else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what was measured on each backend, and the claims."""
    sizes = next(iter(results["runs"].values()))["sizes"]
    yield ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    yield harness.markdown_table(
        [
            {
                "backend": name,
                "path": path,
                "peak MB": f"{run[path]['peak_mb']:,}",
                "seconds": f"{run[path]['seconds']:.2f}",
            }
            for name, run in results["runs"].items()
            for path in PATHS
        ]
    )
    yield harness.markdown_table(
        [
            harness.claim(
                f"{name}: share of the memory",
                run["share_of_memory"],
                "≤",
                SHARE,
            )
            for name, run in results["runs"].items()
        ]
    )
