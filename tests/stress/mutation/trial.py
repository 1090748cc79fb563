"""Runs the tests of one mutant, in a copy of the project."""

from __future__ import annotations

import bisect
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.progress import track

from tests.stress.mutation.mutants import ROOT
from tests.stress.mutation.mutants import Mutant
from tests.stress.mutation.reach import Reach

FIRST = 10.0  # seconds of tests to begin with: most mutants do not outlive them
BROKEN = 70  # the exit status where the tests could not be run
PATIENCE = 4.0  # a mutant may be so many times as slow as the original
OPTIONS = (
    *("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"),
    # One that was killed may have left half a compiled program.
    *("-W", "ignore:Error reading persistent compilation cache"),
)


class Workplace:
    """A copy of the project, in which one mutant at a time is tried.

    Args:
        folder: Where the copy is made.
        reach: What the tests reach.
    """

    def __init__(self, folder: Path, reach: Reach) -> None:
        self.folder = folder
        self._reach = reach
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, folder, ignore=_not_of_the_project)
        # Most of what mutants compile, others have compiled before.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        # Imported once, before the forks. Not Keras, which takes its backend
        # then, nor TensorFlow, beside which JAX finds nothing compiled.
        import jax  # noqa: F401

    def check(self) -> None:
        """Raises `RuntimeError` where tests fail without a fault."""
        seconds = self._reach.seconds
        tests = sorted(seconds, key=seconds.get)[::5]
        if self._run(tests, 600) != "survived":
            raise RuntimeError(f"Failed tests: {self.folder}/output.txt")

    def verdict(self, mutant: Mutant) -> dict:
        """Tries a mutant until a test fails: few tests first, then all.

        Returns:
            `outcome`, one of `"killed"`, `"hung"`, `"survived"` and
            `"unreached"` (no test runs the place), and, but for the last,
            the number of `tests` that it was tried on.
        """
        path = self.folder / mutant.module
        original = path.read_text()
        tried, outcome = 0, "unreached"
        try:
            _write_source(path, mutant.code)
            for tests, seconds in self._stages(mutant):
                tried += len(tests)
                outcome = self._run(tests, 20 + PATIENCE * seconds)
                if outcome != "survived":
                    break
        finally:
            _write_source(path, original)
        return {"outcome": outcome, "tests": tried}

    def _stages(self, mutant: Mutant) -> Iterator[tuple[list[str], float]]:
        """Tests and their seconds."""
        tests = self._reach.tests(mutant)
        seconds = [self._reach.seconds[test] for test in tests]
        first = bisect.bisect(list(itertools.accumulate(seconds)), FIRST)
        for stage in (slice(first), slice(first, None)):
            if tests[stage]:
                yield tests[stage], sum(seconds[stage])

    def _run(self, tests: list[str], limit: float) -> str:
        process = multiprocessing.get_context("fork").Process(
            target=_test, args=(self.folder, self._reach.backend, tests)
        )
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return "hung"
        if process.exitcode == pytest.ExitCode.OK:
            return "survived"
        if process.exitcode == BROKEN:
            raise RuntimeError(f"No tests run: see {self.folder}/output.txt")
        return "killed"


def work(index: int, mutants: list[Mutant], folder: Path, reach: Reach) -> None:
    """One of several processes, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    workplace = Workplace(folder / f"copy{index}", reach)
    workplace.check()
    with open(folder / f"records{index}.jsonl", "a") as file:
        for mutant in track(mutants, f"worker {index}", disable=index > 0):
            start = time.monotonic()
            record = {
                "name": mutant.name,
                "operator": mutant.operator,
                "backend": reach.backend,
                **workplace.verdict(mutant),
                "seconds": round(time.monotonic() - start, 1),
                "at": time.time(),
            }
            print(json.dumps(record), file=file, flush=True)


def _not_of_the_project(folder: str, names: list[str]) -> set[str]:
    """What `shutil.copytree` leaves out."""
    others = {"runs", "__pycache__"} & set(names)
    return others | {name for name in names if name.startswith(".")}


def _write_source(path: Path, source: str) -> None:
    """Writes a module, and sees to it that it is compiled anew."""
    path.write_text(source)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        compiled.unlink()


def _test(folder: Path, backend: str, tests: list[str]) -> None:
    """In a process of its own: the tests, up to the first that fails."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ["PYTHONPATH"] = str(folder)  # of the processes that tests start
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "keras_distilled_embedding"):
            del sys.modules[name]
    with open(folder / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    status = BROKEN
    try:
        status = pytest.main([*OPTIONS, *tests])
    finally:
        sys.stdout.flush()
        os._exit(status)  # threads of a mutant's may not end
