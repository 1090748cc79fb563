"""What a training step over a large vocabulary takes, with logits and without.

    python -m benchmarks.large_vocabulary

The same step twice, each in a process of its own: with all logits and Keras's
loss, and with `ChunkedCrossEntropy`. Memory is the peak while the model
trains, above what is resident once the model and the batch are there. The
losses and all gradients are compared, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks._memory import peak_mb
from benchmarks._memory import reset_peak
from benchmarks._memory import resident_mb
from benchmarks._report import environment
from benchmarks._report import write_text

OUTPUT = Path(__file__).parent / "results" / "large_vocabulary.json"
PATHS = ("plain", "chunked")
SHARE, TOLERANCE = 0.25, 1e-5  # what is promised
# Timed, after the one that compiles.
STEPS = 3


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
        found = {}
        for path in PATHS:
            options = [f"--{key}={value}" for key, value in sizes.items()]
            command = [sys.executable, "-m", "benchmarks.large_vocabulary"]
            command += [*options, "--path", path, "--folder", name]
            command += ["--jit"] if jit else []
            child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[path] = json.loads(child.stdout.splitlines()[-1])
        plain, chunked = (np.load(folder / f"{p}.npz") for p in PATHS)
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
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {
        "vocabulary": 256_000,
        "width": 1_024,
        "rank": 128,
        "tokens": 2_048,
        "chunk": 64,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    # Of the processes that this one starts.
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--jit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = {
        name: getattr(options, name)
        for name in ("vocabulary", "width", "rank", "tokens", "chunk")
    }
    if options.path:
        result = step(options.path, sizes, options.jit, options.folder)
        print(json.dumps(result))
        return
    backend = keras.backend.backend()
    record = {"runs": {}}
    if options.output.exists():
        record = json.loads(options.output.read_text("utf-8"))
    for jit in (True,) if backend == "jax" else (False, True):
        run = compare(sizes, jit)
        worst = max(run["relative_difference"].values())
        run |= {
            "sizes": sizes,
            "holds": {
                f"at most {SHARE:.0%} of the memory": (
                    run["share_of_memory"] <= SHARE
                ),
                f"loss and gradients to {TOLERANCE:g}": worst <= TOLERANCE,
            },
            "command": "python -m benchmarks.large_vocabulary",
            "environment": environment(),
        }
        name = f"{backend}, {'XLA' if jit else 'graph'}"
        record["runs"][name] = run
        print(name, json.dumps(run, indent=1), flush=True)
    write_text(options.output, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
