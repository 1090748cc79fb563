"""A few of the thousands of cases of the stress tests about damage."""

import json

import keras
import pytest

from tests.stress import fuzz_files
from tests.stress import kill_writers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="the files are made by TensorFlow's converter",
    ),
]


def test_damaged_files_are_refused_or_read():
    results = fuzz_files.fuzz(100)
    assert results["bad"] == []
    counts = {name: results[name]["cases"] for name in fuzz_files.SHARES}
    assert counts == {"load_model": 50, "command line": 20, "runner": 30}
    kinds = results["load_model"]["by_kind"]
    assert kinds.keys() == {c.__name__ for c in fuzz_files.ARCHIVE}
    for hostile in ("bomb", "outside"):
        assert kinds[hostile].keys() == {"refused"}


def test_a_reader_that_fails_is_found_out(monkeypatch, tmp_path):
    """The harness itself: crashes and other errors count as bad."""

    class Bad(fuzz_files.Targets):
        def __init__(self, folder):
            self.model = self.translator = b"file"

        def case(self, target, number):
            return "number", str(number).encode()

    class Pipe:
        def __init__(self):
            self.sent = []

        def send(self, message):
            self.sent.append(message)

    pipe = Pipe()
    monkeypatch.setattr(fuzz_files, "Targets", Bad)
    monkeypatch.setattr(fuzz_files.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(fuzz_files.os, "dup2", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def read(target, path):
        if path.read_bytes() == b"1":
            raise KeyError("one")
        if path.read_bytes() == b"2":
            (path.parent / "canary").touch()
        return "read"

    monkeypatch.setattr(Bad, "read", staticmethod(read))
    fuzz_files.work(str(tmp_path), "load_model", [0, 1, 2], pipe, 100)
    assert [found for *_, found in pipe.sent if found] == [
        "read",
        "KeyError: 'one'",
        "ran, or wrote outside",
    ]


def test_killed_writers_leave_whole_files(tmp_path):
    output = tmp_path / "kills.json"
    assert kill_writers.main(["--kills", "4", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    for name in kill_writers.WRITERS:
        assert results[name]["kills"] == results[name]["whole"] == 1
