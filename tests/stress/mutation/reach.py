"""Which tests run which lines, and how long each test takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import coverage

from tests.stress.mutation.mutants import ROOT
from tests.stress.mutation.mutants import Mutant

BACKENDS = ("jax", "tensorflow")
# Tests about the two folders and what they are made of; others only use them.
TEST_FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for start in (
        "budget",
        "calibration",
        "distill",
        "factorization",
        "package",
        "quantization",
        "rounding",
        "sizes",
        "teacher_cache",
        "distillation_weights",
    )
    for path in (ROOT / "tests").glob(f"test_{start}*.py")
)
# They look at functions, and run none.
OF_SIGNATURES = "tests/test_package.py::test_defaults_are_kept"


class Reach:
    """What one run of all the tests on one backend showed.

    Args:
        backend: Keras's backend.
        folder: Where the run leaves its records.
    """

    def __init__(self, backend: str, folder: Path) -> None:
        self.backend = backend
        self._data = folder / f"coverage.{backend}"
        self._times = folder / f"times.{backend}.xml"

    def record(self) -> None:
        """Runs all tests, unless that has been done since they changed."""
        sources = [
            path
            for folder in ("keras_distilled_embedding", "tests")
            for path in (ROOT / folder).rglob("*.py")
        ]
        changed = max(path.stat().st_mtime for path in sources)
        if self._times.exists() and self._times.stat().st_mtime > changed:
            return
        part = self._times.with_suffix(".part")
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "--quiet"),
                *("-p", "no:cacheprovider", "--cov-report="),
                *("--cov=keras_distilled_embedding", "--cov-context=test"),
                f"--junitxml={part}",
                *TEST_FILES,
            ],
            cwd=ROOT,
            env=os.environ
            | {
                "KERAS_BACKEND": self.backend,
                "COVERAGE_FILE": str(self._data),
            },
            check=True,
        )
        part.rename(self._times)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of each test."""
        return {
            _test_id(case): float(case.attrib["time"])
            for case in ElementTree.parse(self._times).iter("testcase")
        }

    def tests(self, mutant: Mutant) -> list[str]:
        """Those that run a mutant's lines, the fastest first."""
        contexts = self._contexts.get(mutant.module, {})
        reached = self._of(contexts, mutant.lines)
        if self._is_run_on_import(contexts, mutant.lines):
            around = self._of(contexts, mutant.definition)
            reached |= around or self._of(contexts, contexts)
            reached |= {t for t in self.seconds if t.startswith(OF_SIGNATURES)}
        return sorted(reached, key=lambda test: (self.seconds[test], test))

    @cached_property
    def _contexts(self) -> dict[str, dict[int, list[str]]]:
        """The tests of each line, by the module's path."""
        data = coverage.CoverageData(str(self._data))
        data.read()
        return {
            str(Path(path).relative_to(ROOT)): data.contexts_by_lineno(path)
            for path in data.measured_files()
        }

    def _is_run_on_import(
        self, contexts: dict[int, list[str]], lines: range
    ) -> bool:
        """A default, a decorator, a constant."""
        return any("" in contexts.get(line, ()) for line in lines)

    def _of(
        self, contexts: dict[int, list[str]], lines: Iterable[int]
    ) -> set[str]:
        reached = set()
        for line in lines:
            for context in contexts.get(line, ()):
                test, _, phase = context.rpartition("|")
                if phase == "setup":  # a fixture's: others may share it
                    reached.update(self._of_file[test.partition("::")[0]])
                elif test:
                    reached.add(test)
        return reached & self.seconds.keys()

    @cached_property
    def _of_file(self) -> dict[str, list[str]]:
        files = defaultdict(list)
        for test in self.seconds:
            files[test.partition("::")[0]].append(test)
        return files


def _test_id(case: ElementTree.Element) -> str:
    """As pytest takes it: tests/test_x.py::TestY::test_z[param]."""
    *folders, last = case.attrib["classname"].split(".")
    classes = []
    while not last.startswith("test_"):
        classes.insert(0, last)
        last = folders.pop()
    path = "/".join([*folders, f"{last}.py"])
    return "::".join([path, *classes, case.attrib["name"]])
