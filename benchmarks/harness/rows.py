"""Rows on disk: one file a row, written when the row is done."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from collections.abc import Hashable
from pathlib import Path

import filelock

from benchmarks.harness.environment import environment
from benchmarks.harness.files import write_json


class Rows:
    """The rows of one folder, which several processes may share.

    A row that is done is not measured again, so that a run that was stopped
    continues where it was. A row that another process is measuring is left to
    that process.

    Args:
        folder: Made with the first row.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str, suffix: str = ".json") -> Path:
        """The file that belongs to a row."""
        return self.folder / (re.sub(r"\W+", "_", name) + suffix)

    def read(self, name: str) -> dict | None:
        """Returns a row, or `None` where it is not done."""
        path = self.path(name)
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def read_all(self, prefix: str = "") -> list[dict]:
        """Returns the rows that are done, by the time they were."""
        found = [
            json.loads(path.read_text("utf-8"))
            for path in sorted(
                self.folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns
            )
        ]
        return [row for row in found if row["row"].startswith(prefix)]

    def finish(
        self, name: str, measure: Callable[[], dict], wait: bool = False
    ) -> dict | None:
        """Measures a row unless it is done.

        Args:
            name: Name of the row.
            measure: Returns what to keep of it, as JSON can hold it.
            wait: Whether to wait for another process that measures the row.

        Returns:
            The row: what `measure` returned, with the row's name, its
            environment and its seconds. `None` where another process is
            measuring it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path(name, ".lock"))
        try:
            with lock.acquire(blocking=wait):
                return self.read(name) or self._measure(name, measure)
        except filelock.Timeout:
            return None

    def _measure(self, name: str, measure: Callable[[], dict]) -> dict:
        print(name, flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        row = {
            "row": name,
            **measure(),
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "environment": environment(),
        }
        write_json(self.path(name), row)
        return row


def merged(
    new: list[dict], earlier: list[dict], key: Callable[[dict], Hashable]
) -> list[dict]:
    """Returns new rows, and those earlier ones that none of them replaces."""
    known = {key(row) for row in new}
    return new + [row for row in earlier if key(row) not in known]
