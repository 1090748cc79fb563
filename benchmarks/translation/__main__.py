"""The command: `prepare`, `run`, `files` and `report`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from benchmarks._threads import limit_threads
from benchmarks.translation.grid import LOSSES
from benchmarks.translation.grid import METHODS
from benchmarks.translation.grid import rows
from benchmarks.translation.rows import Results
from benchmarks.translation.rows import train_teacher
from benchmarks.translation.task import SETTINGS
from benchmarks.translation.task import Task
from benchmarks.translation.task import prepare

RESULTS = Path(__file__).parents[1] / "results" / "translation"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.translation")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("prepare", "tokenise a corpus (needs TensorFlow)"),
        ("run", "train what is missing: the teacher, then the rows"),
        ("files", "LiteRT files of the rows (needs TensorFlow), their speed"),
        ("report", "tables and pictures of what there is"),
    ):
        command = commands.add_parser(name, help=text)
        add = command.add_argument
        add("--work-dir", type=Path, default=Path("runs/translation"))
        if name == "report":
            add("--output", type=Path, default=RESULTS)
            continue
        add("--task", choices=SETTINGS, default="multi30k")
        if name == "prepare":
            add("--data-dir", help="folder of Multi30k's files")
            continue
        add("--seed", type=int, default=0)
        add("--methods", nargs="+", choices=METHODS, metavar="METHOD")
        add("--sizes", nargs="+", type=float)
        add("--losses", nargs="+", choices=LOSSES, metavar="LOSS")
        if name == "run":
            add("--threads", type=int, help="of TensorFlow; default: all")
        else:
            add("--rounds", type=int, default=3, help="of timing; 0: none")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "report":
        _report(options.work_dir, options.output)
        return 0
    folder = options.work_dir / options.task
    if options.command == "prepare":
        prepare(options.task, folder, options.data_dir)
        return 0
    chosen = [
        row
        for row in rows(options.task)
        if (options.methods is None or row.method in options.methods)
        and (options.sizes is None or row.size in options.sizes)
        and (options.losses is None or row.loss in options.losses)
    ]
    task = Task(options.task, folder, options.seed)
    results = Results(task)
    if options.command == "run":
        if options.threads:
            limit_threads(options.threads)
        train_teacher(task)
        results.translate_teacher()
        for row in chosen:
            results.finish(row)
        return 0
    from benchmarks.translation.files import Files

    files = Files(results)
    for row in chosen:
        files.finish(row)
    if options.rounds:
        files.time(chosen, options.rounds)
    return 0


def _report(work_dir: Path, output: Path) -> None:
    """Of every task and seed that has rows."""
    # Training needs neither sacreBLEU nor SentencePiece.
    from benchmarks.translation.report import Scores
    from benchmarks.translation.report import write_report

    scores = []
    for name in SETTINGS:
        for folder in sorted((work_dir / name).glob("rows_*")):
            seed = int(folder.name.removeprefix("rows_"))
            task = Task(name, folder.parent, seed)
            if task.teacher_path.exists():
                scores.append(Scores(Results(task)))
    write_report(scores, output)


if __name__ == "__main__":
    sys.exit(main())
