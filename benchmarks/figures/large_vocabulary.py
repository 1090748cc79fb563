"""What a training step over a large vocabulary takes, with and without logits.

The same step twice, each in a process of its own: with all logits and Keras's
loss, and with `ChunkedCrossEntropy`. Memory is the peak while the model
trains, above what is resident once the model and the batch are there. The
losses and all gradients are compared, too. Run it again with another
`KERAS_BACKEND` for the rows of that backend.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks.harness.measure import in_new_process
from benchmarks.harness.measure import peak_mb
from benchmarks.harness.measure import reset_peak
from benchmarks.harness.measure import resident_mb
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import claim
from benchmarks.harness.tables import markdown_table

TITLE = "A training step over a large vocabulary"
PATHS = ("plain", "chunked")
SHARE, TOLERANCE = 0.25, 1e-5  # what is promised
STEPS = 3  # timed, after the one that compiles
SIZES = {
    "vocabulary": 256_000,
    "width": 1_024,
    "rank": 128,
    "tokens": 2_048,
    "chunk": 64,
}
QUICK = {"vocabulary": 500, "width": 32, "rank": 4, "tokens": 64, "chunk": 16}


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Compares both ways, compiled by XLA and, on TensorFlow, without."""
    sizes = QUICK if options.quick else SIZES
    backend = keras.backend.backend()
    for jit in (True,) if backend == "jax" else (False, True):
        name = f"{backend}, {'XLA' if jit else 'graph'}"
        rows.finish(name, partial(compare, sizes, jit))


def step(path: str, sizes: dict[str, int], jit: bool, folder: Path) -> dict:
    """Trains a few steps one way; leaves what the first has changed."""
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
    # So that the changes are the gradients, in numbers of ordinary size.
    rate = float(sizes["vocabulary"])
    model.compile(keras.optimizers.SGD(rate), loss, jit_compile=jit)
    rng = np.random.default_rng(0)
    states = rng.standard_normal(
        (sizes["tokens"], sizes["width"]), dtype="float32"
    )
    labels = rng.integers(sizes["vocabulary"], size=sizes["tokens"])
    before = model.get_weights()
    reset_peak()
    resident = resident_mb()
    value = float(model.train_on_batch(states, labels))
    peak = peak_mb() - resident
    names = [weight.path for weight in model.weights]
    changes = {
        name.replace("/", "."): new - old
        for name, old, new in zip(names, before, model.get_weights())
    }
    np.savez(folder / path, **changes)
    start = time.perf_counter()
    for _ in range(STEPS):
        model.train_on_batch(states, labels)
    seconds = (time.perf_counter() - start) / STEPS
    return {"loss": value, "peak_mb": round(peak), "seconds": round(seconds, 2)}


def compare(sizes: dict[str, int], jit: bool) -> dict:
    """Both ways, and how far they differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            path: in_new_process(step, path, sizes, jit, folder)
            for path in PATHS
        }
        plain, chunked = (np.load(folder / f"{path}.npz") for path in PATHS)
        differences = {
            key: float(
                np.linalg.norm(plain[key] - chunked[key])
                / np.linalg.norm(plain[key])
            )
            for key in plain.files
        }
    share = found["chunked"]["peak_mb"] / found["plain"]["peak_mb"]
    losses = [found[path]["loss"] for path in PATHS]
    return {
        **found,
        "share_of_memory": round(share, 3),
        "relative_difference": {
            "loss": abs(losses[0] - losses[1]) / losses[0],
            **differences,
        },
        "sizes": sizes,
    }


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rows of each backend."""
    del options
    runs = earlier.get("runs", {}) | {
        row["row"]: row for row in rows.read_all() if "sizes" in row
    }
    return {"runs": runs} if runs else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what was measured on each backend, and the claims."""
    del folder
    sizes = next(iter(results["runs"].values()))["sizes"]
    yield (
        f"A table of {sizes['vocabulary']:,} x {sizes['width']:,} at rank "
        f"{sizes['rank']}, {sizes['tokens']:,} tokens a batch, in chunks of "
        f"{sizes['chunk']}. Memory above that of the model and the batch."
    )
    yield markdown_table(
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
    yield markdown_table([*_claims(results["runs"])])


def _claims(runs: dict[str, dict]) -> Iterator[dict]:
    for name, run in runs.items():
        yield claim(
            f"{name}: share of the memory", run["share_of_memory"], "≤", SHARE
        )
        yield claim(
            f"{name}: relative difference of loss and gradients",
            max(run["relative_difference"].values()),
            "≤",
            TOLERANCE,
            "{:.1e}",
        )
