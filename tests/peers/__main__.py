"""Runs the peers' own tests and compares with what is expected to differ.

    python -m tests.peers [-k EXPRESSION]

`differences.toml` lists what this package does otherwise by contract. A
difference is a text of a test that is replaced by what the contract says, or a
test that fails with a known error. Any other failure is one of this package.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

from tests.peers.adapt import FOLDER
from tests.peers.adapt import adapted

HERE = Path(__file__).parent
MOST_DIFFERENCES = 22
OWN_TESTS = ("layer_configurations.py", "kerashub_students.py")


class Results:
    """Plugin of pytest that keeps each test's error; `""` if it passed.

    It seeds each test, as Keras's own do not.
    """

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def pytest_runtest_setup(self) -> None:
        import keras

        keras.utils.set_random_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.errors[name] = crash.message if crash else str(report.longrepr)
        elif report.when == "call":
            self.errors.setdefault(name, "")


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    differences = tomllib.loads((HERE / "differences.toml").read_text())
    differences = differences["difference"]
    if len(differences) > MOST_DIFFERENCES:
        print(f"{len(differences)} differences, above {MOST_DIFFERENCES}")
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    replacements = [
        (d["file"], d["replace"], d["by"]) for d in differences if "file" in d
    ]
    files = adapted("keras", replacements)
    adapted("keras-hub", replacements)
    files += [HERE / name for name in OWN_TESTS]
    results = Results()
    # Not this package's settings: there, warnings are errors.
    options = ["--config-file=/dev/null", "--rootdir=.", "--quiet"]
    options += ["--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    status = pytest.main(
        [*options, *map(str, files), *arguments], plugins=[results]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    return compare(results.errors, [d for d in differences if "test" in d])


def compare(errors: dict[str, str], differences: list[dict[str, str]]) -> int:
    """Prints what differs; 1 if a test fails that should not.

    Args:
        errors: By test; empty for those that passed.
        differences: The tests that are expected to fail, with their errors.
    """
    unexpected, expected, gone = [], [], []
    for name, error in errors.items():
        listed = [d for d in differences if re.fullmatch(d["test"], name)]
        if error and any(re.search(d["error"], error) for d in listed):
            expected.append(name)
        elif error:
            unexpected.append(name)
        elif listed:
            gone.append(name)
    print(
        f"\n{len(errors)} tests of the peers: {len(expected)} differ by "
        f"contract, {len(unexpected)} fail, the others pass"
    )
    for name in gone:
        print(f"PASSES, though it is listed as a difference: {name}")
    for name in unexpected:
        print(f"FAILS: {name}\n    {errors[name].splitlines()[0]}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
