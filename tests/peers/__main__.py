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
OWN_TESTS = ("layer_configurations.py", "kerashub_students.py")


class Results:
    """Plugin of pytest that keeps each test's error; `""` if it passed."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.errors[name] = crash.message if crash else str(report.longrepr)
        elif report.when == "call":
            self.errors.setdefault(name, "")


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    os.environ["PYTHONPATH"] = os.getcwd()
    FOLDER.mkdir(parents=True, exist_ok=True)
    listed = tomllib.loads((HERE / "differences.toml").read_text())
    differences = listed["difference"]
    replacements = [
        (d["file"], d["replace"], d["by"]) for d in differences if "file" in d
    ]
    files = adapted("keras", replacements)
    adapted("keras-hub", replacements)
    files += [HERE / name for name in OWN_TESTS]
    results = Results()
    options = ["--config-file=/dev/null", "--rootdir=.", "--quiet"]
    options += ["--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    status = pytest.main(
        [*options, *map(str, files), *arguments], plugins=[results]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)
    return report(results.errors, [d for d in differences if "test" in d])


def report(errors: dict[str, str], differences: list[dict[str, str]]) -> int:
    """Prints what differs; 1 if a test fails that should not."""
    failed = {name: error for name, error in errors.items() if error}
    unexpected = [
        name
        for name, error in failed.items()
        if not any(
            re.fullmatch(d["test"], name) and re.search(d["error"], error)
            for d in differences
        )
    ]
    gone = [
        name
        for name, error in errors.items()
        if not error and any(re.fullmatch(d["test"], name) for d in differences)
    ]
    print(
        f"\n{len(errors)} tests of the peers: {len(errors) - len(failed)} "
        f"pass, {len(failed) - len(unexpected)} differ by contract, "
        f"{len(unexpected)} fail"
    )
    for name in gone:
        print(f"passes, though it is listed as a difference: {name}")
    for name in unexpected:
        print(f"FAILS: {name}\n    {failed[name].splitlines()[0]}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
