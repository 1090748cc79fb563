"""The command: `list`, `run FIGURE` and `report FIGURE`."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import shlex
import sys
from pathlib import Path
from types import ModuleType

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

FIGURES = {
    path.stem: path
    for path in sorted((Path(__file__).parent / "figures").glob("[a-z]*.py"))
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; see `python -m benchmarks --help`."""
    if arguments is None:
        arguments = sys.argv[1:]
    options, rest = _parser().parse_known_args(arguments)
    if options.command == "list":
        _print_list()
        return 0
    figure = importlib.import_module(f"benchmarks.figures.{options.figure}")
    options = _figure_options(figure, options, rest)
    if options.command == "run":
        _run(figure, options)
    _report(
        figure, options, shlex.join(["python", "-m", "benchmarks", *arguments])
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Figures, see `list`."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the figures")
    for command, text in (
        ("run", "measure the rows that are missing, then report"),
        ("report", "write tables and pictures of the rows that there are"),
    ):
        # A figure adds options of its own, and its help, once it is known.
        added = commands.add_parser(command, help=text, add_help=False)
        added.add_argument("figure", choices=FIGURES)
    return parser


def _figure_options(
    figure: ModuleType, options: argparse.Namespace, rest: list[str]
) -> argparse.Namespace:
    """Parses the options that all figures have and those of this one."""
    name, command = options.figure, options.command
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command} {name}",
        description=_summary(FIGURES[name]),
    )
    add = parser.add_argument
    add("--work-dir", type=Path, help=f"rows; default: runs/{name}")
    add("--output", type=Path, help=f"report; default: results/{name}")
    add("--quick", action="store_true", help="tiny sizes, to try it out")
    add("--data-dir", help="folder of Multi30k's files (else: download)")
    add("--threads", type=int, help="of TensorFlow; default: all cores")
    if hasattr(figure, "add_arguments"):
        figure.add_arguments(parser)
    parser.parse_args(rest, options)
    runs = Path("runs") / (f"{name}_quick" if options.quick else name)
    options.work_dir = options.work_dir or runs
    if options.output is None:
        from benchmarks.harness.files import RESULTS

        quick = options.work_dir / "report"
        options.output = quick if options.quick else RESULTS / name
    return options


def _run(figure: ModuleType, options: argparse.Namespace) -> None:
    from benchmarks.harness.environment import limit_threads
    from benchmarks.harness.rows import Rows

    if options.threads:
        limit_threads(options.threads)
    figure.run(Rows(options.work_dir), options)


def _report(
    figure: ModuleType, options: argparse.Namespace, command: str
) -> None:
    """Writes `results.json`, `report.md` and the pictures of a figure."""
    from benchmarks.harness.environment import environments
    from benchmarks.harness.files import RESULTS
    from benchmarks.harness.files import read_results
    from benchmarks.harness.files import write_json
    from benchmarks.harness.files import write_text
    from benchmarks.harness.rows import Rows
    from benchmarks.harness.tables import show

    name, folder = options.figure, options.output
    results = read_results(name, folder)
    if not results and options.command == "report":
        results = read_results(name, RESULTS / name)
    new = figure.collect(Rows(options.work_dir), results, options)
    if new != results or options.command == "run":
        results = {"command": command, **new}
        write_json(folder / "results.json", results)
    machines = [f"- {text}" for text in environments(results)]
    text = "\n\n".join(
        [
            f"# {figure.TITLE}",
            f"    {results.get('command', f'python -m benchmarks run {name}')}",
            *figure.report(results, folder),
            *(
                ["## Machines and versions", "\n".join(machines)]
                if machines
                else []
            ),
        ]
    )
    write_text(folder / "report.md", text + "\n")
    show(text)


def _print_list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "what it shows", box=None)
    for name, path in FIGURES.items():
        table.add_row(name, _summary(path))
    Console().print(table)


def _summary(path: Path) -> str:
    """The first line of a module's docstring, without importing it."""
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))).split("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
