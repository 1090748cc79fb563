"""Damaged and hostile files, by the thousand, for everything that reads one.

    python -m tests.stress.fuzz_files

Every case is a file that was changed at random, from its number alone: cut
short, bits flipped, blocks lost or doubled; archives whose checksums are right
but whose members are not as they were: another configuration, weights with
flipped bits, compressed bombs, paths that lead outside, pickles. A reader
may refuse a file, with an error of the kind it promises, or read it. It must
not crash, hang, run what is in the file, or take more memory than allowed.

Cases run in processes of their own, whose memory is limited.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.harness.environment import environment
from benchmarks.harness.files import RESULTS
from benchmarks.harness.files import write_json

OUTPUT = RESULTS / "fuzz_files.json"
# Beside what Keras, TensorFlow and LiteRT take themselves.
MEMORY_MB = 1_024
SECONDS = 60  # after which a case counts as hanging
SHARES = {"load_model": 0.5, "command line": 0.2, "runner": 0.3}


# What is done to files.


def cut(data: bytes, rng: random.Random) -> bytes:
    """The first part of a file."""
    return data[: rng.randrange(len(data))]


def flip(data: bytes, rng: random.Random) -> bytes:
    """A few bits of it the other way round."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def shift(data: bytes, rng: random.Random) -> bytes:
    """A block lost, doubled, or of noise."""
    start, size = rng.randrange(len(data)), rng.randrange(1, 4_096)
    block = rng.choice([b"", 2 * data[start : start + size], None])
    if block is None:
        block = rng.randbytes(size)
    return data[:start] + block + data[start + size :]


def foreign(data: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    noise = rng.randbytes(rng.randrange(5_000))
    return rng.choice([b"", noise, data[:64] + noise, _pickle(), b"PK" * 99])


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename: archive.read(i) for i in archive.infolist()}


def _archive(members: dict[str, bytes], packed: bool = False) -> bytes:
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return file.getvalue()


def another_config(data: bytes, rng: random.Random) -> bytes:
    """Another configuration, in an archive that is as it should be."""
    members = _members(data)
    name = rng.choice(["config.json", "config.json", "metadata.json"])
    config = json.loads(members[name])
    for _ in range(rng.choice([1, 1, 2, 4])):
        places = [*_places(config)]
        if places:
            holder, key = rng.choice(places)
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = rng.choice(HOSTILE)(holder[key])
    return _archive(members | {name: json.dumps(config).encode()})


def _places(value: Any) -> Any:
    """Wherever something stands, as what holds it and its key."""
    if isinstance(value, dict | list):
        keys = [*value] if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from _places(value[key])


HOSTILE: list[Callable[[Any], Any]] = [
    lambda old: None,
    lambda old: -1,
    lambda old: 0,
    lambda old: 10**12,
    lambda old: 2**80,
    lambda old: 1e308,
    lambda old: "",
    lambda old: "../../outside",
    lambda old: [old],
    lambda old: {"class_name": old, "config": old},
    lambda old: {
        "module": "os",
        "class_name": "system",
        "config": {"command": "touch canary"},
        "registered_name": None,
    },
    lambda old: {
        "module": "builtins",
        "class_name": "function",
        "config": "system",
        "registered_name": "os",
    },
    lambda old: _canary_lambda(),
    lambda old: old * 2 if isinstance(old, str | list | int) else old,
]


def other_weights(data: bytes, rng: random.Random) -> bytes:
    """Weights with flipped bits, in an archive that is as it should be."""
    members = _members(data)
    change = rng.choice([cut, flip, flip, shift])
    name = "model.weights.h5"
    return _archive(members | {name: change(members[name], rng)})


def bomb(data: bytes, rng: random.Random) -> bytes:
    """A member that is a thousand times as large as the file."""
    members = _members(data)
    name = rng.choice([*members, "assets/bomb"])
    return _archive(members | {name: bytes(200_000_000)}, packed=True)


def outside(data: bytes, rng: random.Random) -> bytes:
    """A member whose name leads out of the folder."""
    name = rng.choice(
        ["../canary", "/tmp/canary", "assets/../../canary", "..\\canary"]
    )
    return _archive(_members(data) | {name: b"here"})


def pickled(data: bytes, rng: random.Random) -> bytes:
    """A member that is a pickle, and would run a command."""
    members = _members(data)
    return _archive(members | {rng.choice([*members]): _pickle()})


def other_members(data: bytes, rng: random.Random) -> bytes:
    """A member less, or one that is cut short."""
    members = _members(data)
    name = rng.choice([*members])
    if rng.random() < 0.5:
        del members[name]
    else:
        members[name] = members[name][: len(members[name]) // 2]
    return _archive(members)


class _Canary:
    def __reduce__(self) -> tuple:
        return os.system, ("touch canary",)


def _pickle() -> bytes:
    return pickle.dumps(_Canary())


def _canary_lambda() -> dict:
    """As Keras saves a function that would run a command."""
    import keras

    return keras.saving.serialize_keras_object(
        lambda x: __import__("os").system("touch canary")
    )


ANY_FILE = (cut, flip, flip, shift, foreign)
ARCHIVE = (
    *ANY_FILE,
    *(another_config,) * 4,
    *(other_weights,) * 2,
    bomb,
    outside,
    pickled,
    other_members,
)


# What reads them.


class Targets:
    """The readers, and whole files for each of them."""

    def __init__(self, folder: Path) -> None:
        self.model = (folder / "model.keras").read_bytes()
        self.translator = (folder / "model.tflite").read_bytes()

    def case(self, target: str, number: int) -> tuple[str, bytes]:
        """How a case's file was made, and the file."""
        rng = random.Random(f"{target} {number}")
        changes, data = ARCHIVE, self.model
        if target == "runner":
            changes, data = ANY_FILE, self.translator
        change = changes[number % len(changes)]
        return change.__name__, change(data, rng)

    @staticmethod
    def read(target: str, path: Path) -> str:
        """Reads a file; how it was refused, or "read"."""
        if target == "load_model":
            import keras_distilled_embedding as kde

            try:
                kde.load_model(path)
            except ValueError as error:
                return "refused" if str(error) else "refused without a word"
        elif target == "command line":
            from keras_distilled_embedding_cli import main

            errors = io.StringIO()
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(errors),
            ):
                try:
                    status = main(["inspect", str(path)])
                except SystemExit as error:
                    status = error.code
            lines = errors.getvalue().strip().splitlines()
            if status == 2 and any("error: " in line for line in lines):
                return "refused"
            return "read" if status == 0 else f"status {status}"
        else:
            from keras_distilled_embedding_runner import Runner

            try:
                Runner(path).generate("two dogs")
            except ValueError as error:
                return "refused" if str(error) else "refused without a word"
        return "read"


def make_files(folder: Path) -> None:
    """A compressed model, and a translator with its tokenizer."""
    import keras

    import keras_distilled_embedding as kde
    from examples.nmt.data import Vocabulary
    from examples.nmt.data import load_corpus
    from examples.nmt.model import build_transformer
    from examples.nmt.stepwise import embed_vocabulary
    from examples.nmt.stepwise import stepwise_signatures

    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(200, 16, name="tokens")
    hidden = keras.layers.Dense(16, activation="gelu")(embedding(ids))
    model = keras.Model(ids, embedding(hidden, reverse=True))
    model.compile("adam", "sparse_categorical_crossentropy")
    student = kde.compress(model, rank=4, verbose=0)
    kde.save_model(student, folder / "model.keras")
    vocabulary = Vocabulary.train(load_corpus("cldr").train[:600], 500)
    (folder / "pieces.spm").write_bytes(vocabulary.proto)
    translator = build_transformer(
        vocabulary.size,
        max_length=12,
        d_model=16,
        num_layers=1,
        num_heads=2,
        feed_forward_dim=24,
    )
    path = folder / "model.tflite"
    kde.export_litert(
        translator,
        path,
        signatures=stepwise_signatures(translator, 12),
        verbose=False,
    )
    embed_vocabulary(path, folder / "pieces.spm", translator, 12)


# The run.


def work(
    folder: str, target: str, numbers: list[int], pipe: Any, memory_mb: int
) -> None:
    """A process that reads the files of some cases, one after the other."""
    warnings.simplefilter("ignore")
    targets = Targets(Path(folder))
    home = Path(tempfile.mkdtemp(dir=folder))
    os.chdir(home)
    # What a whole file takes is there before memory is limited.
    whole = home / "whole"
    whole.write_bytes(
        targets.translator if target == "runner" else targets.model
    )
    assert targets.read(target, whole) == "read"
    # What is printed below Python is of no interest.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    used = int(Path("/proc/self/statm").read_text().split()[0])
    limit = used * os.sysconf("SC_PAGE_SIZE") + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    path = home / "case"
    for number in numbers:
        kind, data = targets.case(target, number)
        path.write_bytes(data)
        pipe.send((number, kind, None))
        try:
            found = targets.read(target, path)
        except BaseException as error:
            found = f"{type(error).__name__}: {str(error)[:200]}"
        canaries = [p for p in Path(folder).rglob("canary")]
        if canaries or Path("/tmp/canary").exists():
            found = "ran, or wrote outside"
            for canary in canaries:
                canary.unlink()
        pipe.send((number, kind, found))


def run(target: str, numbers: list[int], folder: Path) -> list[tuple]:
    """Number, kind and finding of each case."""
    context = multiprocessing.get_context("spawn")
    found, left = [], list(numbers)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(str(folder), target, left, theirs, MEMORY_MB)
        )
        process.start()
        theirs.close()
        current = None
        try:
            while ours.poll(SECONDS if current else 10 * SECONDS):
                number, kind, result = ours.recv()
                current = (number, kind)
                if result is not None:
                    found.append((number, kind, result))
                    current = None
                    left.remove(number)
            if current:
                found.append((*current, "hangs"))
        except EOFError:  # the process has ended
            process.join()
            if current:
                found.append((*current, f"crash {process.exitcode}"))
            elif left:
                raise RuntimeError("the whole file cannot be read") from None
        process.kill()
        process.join()
        if current:
            left.remove(current[0])
    return found


def fuzz(cases: int, first: int = 0) -> dict:
    """Runs so many cases; what came of them, by target and by kind."""
    results: dict[str, Any] = {"bad": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process that ends: TensorFlow need not stay for the rest.
        maker = multiprocessing.get_context("spawn").Process(
            target=make_files, args=(folder,)
        )
        maker.start()
        maker.join()
        for target, share in SHARES.items():
            numbers = [*range(first, first + round(cases * share))]
            start = time.perf_counter()
            counts: dict[str, collections.Counter] = {}
            for number, kind, found in run(target, numbers, folder):
                well = found in ("read", "refused")
                counts.setdefault(kind, collections.Counter())[
                    found if well else "bad"
                ] += 1
                if not well:
                    results["bad"].append([target, number, kind, found])
                    print(target, number, kind, found, flush=True)
            results[target] = {
                "cases": len(numbers),
                "seconds": round(time.perf_counter() - start, 1),
                "by_kind": {k: dict(c) for k, c in sorted(counts.items())},
            }
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    results = fuzz(options.cases, options.first)
    results |= {
        "memory_mb": MEMORY_MB,
        "command": f"python -m tests.stress.fuzz_files --cases {options.cases} "
        f"--first {options.first}",
        "environment": environment(),
    }
    write_json(options.output, results)
    print(json.dumps(results, indent=1))
    return 1 if results["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
