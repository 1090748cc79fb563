"""Faults put into the code one at a time: do the tests notice?

    python -m tests.stress.mutation run [--limit N]
    python -m tests.stress.mutation run --survivors --backend tensorflow
    python -m tests.stress.mutation report

`run` goes on where it was; a mutant whose survival is not explained in the
report is a test that is missing, or code that is not needed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks.harness.files import RESULTS
from tests.stress.mutation.mutants import Mutant
from tests.stress.mutation.mutants import all_mutants
from tests.stress.mutation.reach import BACKENDS
from tests.stress.mutation.reach import Reach
from tests.stress.mutation.report import ALIVE
from tests.stress.mutation.report import read_reasons
from tests.stress.mutation.report import write_report
from tests.stress.mutation.trial import work

OUTPUT = RESULTS / "mutation"
SEED = 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress.mutation")
    parser.add_argument("command", choices=["run", "report"])
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/mutation"))
    add("--limit", type=int, help="of mutants; default: all")
    add("--survivors", action="store_true", help="the unexplained, again")
    add("--backend", choices=BACKENDS, default=BACKENDS[0])
    add("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    mutants = all_mutants(SEED)
    records = _records(options.folder)
    if options.command == "report":
        known = {mutant.name for mutant in mutants} & records.keys()
        unexplained = write_report(
            [records[name] for name in known], len(mutants), SEED, OUTPUT
        )
        print("\n\n".join(unexplained), f"\n{len(unexplained)} to explain")
        return 0
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    reach = Reach(options.backend, folder)
    reach.record()
    todo = mutants[: options.limit]
    if options.survivors:
        alive = {n for n, r in records.items() if r["outcome"] in ALIVE}
        alive.difference_update(*read_reasons(OUTPUT).values())
        todo = [mutant for mutant in todo if mutant.name in alive]
    else:
        todo = [mutant for mutant in todo if mutant.name not in records]
    return _try(todo, folder, reach, options.workers)


def _try(
    mutants: list[Mutant], folder: Path, reach: Reach, num_workers: int
) -> int:
    """Shares the mutants out; returns 0 if all were tried."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=work, args=(i, mutants[i::num_workers], folder, reach)
        )
        for i in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return int(any(worker.exitcode for worker in workers))


def _records(folder: Path) -> dict[str, dict]:
    """The last verdict on each mutant, by its name."""
    records = [
        json.loads(line)
        for path in folder.glob("records*.jsonl")
        for line in path.read_text().splitlines()
    ]
    records.sort(key=lambda record: record["at"])
    return {record["name"]: record for record in records}


if __name__ == "__main__":
    sys.exit(main())
