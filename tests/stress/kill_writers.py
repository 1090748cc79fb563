"""Whatever writes a file is killed at random: what is left is whole.

    python -m tests.stress.kill_writers

A process writes the same file again and again, in two versions by turns, and
is killed (SIGKILL) at a random moment; then the file is read. It must be one
version or the other. A cache of a teacher's predictions must go on where it
was and end as one that was never interrupted, a training, too.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks.harness.environment import environment
from benchmarks.harness.files import RESULTS
from benchmarks.harness.files import write_json

OUTPUT = RESULTS / "kill_writers.json"
IDS = np.arange(60, dtype="int32").reshape(3, 20)


def model_of(version: int) -> keras.Model:
    """Outputs tell the version; large enough to take a while to write."""
    ids = keras.Input((20,), dtype="int32")
    table = keras.layers.ReversibleEmbedding(20_000, 64, name="tokens")
    model = keras.Model(ids, table(table(ids), reverse=True))
    rows = np.random.default_rng(version).normal(size=(20_000, 64))
    table.embeddings.assign(rows)
    return model


def outputs_of(model: keras.Model) -> np.ndarray:
    return model.predict(IDS, verbose=0)[..., :50]


# Each writer makes what `write(path, version)` needs, and reads a path as the
# version that it holds.


class SavedModel:
    """`save_model`."""

    def __init__(self) -> None:
        self.models = [
            kde.compress(model_of(version), 4.0, verbose=0)
            for version in (0, 1)
        ]

    def write(self, path: Path, version: int) -> None:
        kde.save_model(self.models[version], path)

    def read(self, path: Path) -> np.ndarray:
        return outputs_of(kde.load_model(path))


class LiteRTFile(SavedModel):
    """`export_litert`."""

    def write(self, path: Path, version: int) -> None:
        kde.export_litert(self.models[version], path, verbose=False)

    def read(self, path: Path) -> np.ndarray:
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(str(path)).get_signature_runner()
        (name,) = runner.get_input_details()
        (outputs,) = runner(**{name: IDS}).values()
        return outputs[..., :50]


class Cache:
    """`cache_teacher`: killed once, called again."""

    def __init__(self) -> None:
        self.teacher = model_of(0)
        rng = np.random.default_rng(0)
        self.batches = [
            rng.integers(20_000, size=(3, 20)).astype("int32")
            for _ in range(40)
        ]

    def write(self, path: Path, version: int) -> None:
        del version
        kde.cache_teacher(self.teacher, self.batches, path, verbose=0)

    def read(self, path: Path) -> np.ndarray:
        self.write(path, 0)  # goes on
        files = sorted(f for f in path.rglob("*") if f.is_file())
        return np.frombuffer(b"".join(f.read_bytes() for f in files), "uint8")


class Training:
    """`Distiller.fit` with Keras's `BackupAndRestore`."""

    def write(self, path: Path, version: int) -> np.ndarray:
        del version
        keras.utils.set_random_seed(0)
        teacher = model_of(0)
        student = kde.compress(teacher, 16.0, verbose=0)
        distiller = kde.Distiller(teacher, student)
        distiller.compile("sgd", "mse")
        x = np.random.default_rng(0).integers(20_000, size=(16, 20))
        y = np.zeros((16, 20, 1), "float32")
        distiller.fit(
            x.astype("int32"),
            y,
            batch_size=4,
            epochs=6,
            shuffle=False,
            verbose=0,
            callbacks=[
                keras.callbacks.BackupAndRestore(path, double_checkpoint=True)
            ],
        )
        return student.get_layer("tokens").basis.numpy()

    def read(self, path: Path) -> np.ndarray:
        return self.write(path, 0)  # goes on


WRITERS: dict[str, Callable[[], Any]] = {
    "save_model": SavedModel,
    "export_litert": LiteRTFile,
    "cache_teacher": Cache,
    "fit": Training,
}
AGAIN = ("save_model", "export_litert")  # write over what there is


def work(name: str, path: Path, pipe: Any) -> None:
    """Writes until it is killed; tells when it begins, and how long it took."""
    writer = WRITERS[name]()
    for version in itertools.count():
        start = time.perf_counter()
        if name not in AGAIN:
            pipe.send(None)  # the first time is the one that counts
        writer.write(path, version % 2)
        pipe.send(time.perf_counter() - start)
        if name not in AGAIN:
            return


def kill(name: str, path: Path, moment: float, seconds: float) -> None:
    """Starts the writer, and kills it at a share of the time it takes."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(name, path, theirs))
    process.start()
    theirs.close()
    ours.recv()
    time.sleep(moment * seconds)
    process.kill()
    process.join()


def run(name: str, times: int, seed: int) -> dict:
    """Kills a writer so often; what was left each time."""
    writer, rng = WRITERS[name](), random.Random(f"{name} {seed}")
    found: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for version in (0, 1) if name in AGAIN else (0,):
            path = Path(folder) / f"whole_{version}"
            start = time.perf_counter()
            result = writer.write(path, version)
            seconds = time.perf_counter() - start
            if name != "fit":
                result = writer.read(path)
            expected.append(result)
        for index in range(times):
            path = Path(folder) / f"killed_{index}"
            # Two versions' time, so that both can be what is left.
            kill(name, path, rng.uniform(0, 2 if name in AGAIN else 1), seconds)
            try:
                result = writer.read(path)
            except Exception as error:
                found[f"{type(error).__name__}: {str(error)[:200]}"] += 1
                continue
            same = [
                result.shape == other.shape
                and np.allclose(result, other, rtol=1e-5, atol=1e-6)
                for other in expected
            ]
            found[f"version {same.index(True)}" if any(same) else "other"] += 1
    whole = sum(n for key, n in found.items() if key.startswith("version"))
    return {"kills": times, "whole": whole, "left": dict(found)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--writers", nargs="+", choices=WRITERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    # Imports once, in a process that has not begun to compute.
    multiprocessing.set_forkserver_preload(["keras_distilled_embedding"])
    names = options.writers or [*WRITERS]
    results: dict[str, Any] = {}
    for name in names:
        results[name] = run(name, options.kills // len(names), options.seed)
        print(name, json.dumps(results[name]), flush=True)
    results["command"] = (
        f"python -m tests.stress.kill_writers --kills {options.kills} "
        f"--seed {options.seed}"
    )
    results["environment"] = environment()
    write_json(options.output, results)
    return int(any(results[n]["whole"] < results[n]["kills"] for n in names))


if __name__ == "__main__":
    sys.exit(main())
