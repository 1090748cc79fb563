"""The command: `list`, `run FIGURE` and `report FIGURE`."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
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
    """Runs one command; see README.md."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the figures")
    for command, text in (
        ("run", "measure the rows that are missing, then report"),
        ("report", "write tables and pictures of the rows that there are"),
    ):
        # The help of a figure is known once the figure is.
        added = commands.add_parser(command, help=text, add_help=False)
        added.add_argument("figure", choices=FIGURES)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "list":
        _print_list()
        return 0
    figure = importlib.import_module(f"benchmarks.figures.{options.figure}")
    _add_figure_options(figure, options, rest)
    if options.command == "run":
        figure.run(options)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    _report(figure, options, command)
    return 0


def _add_figure_options(
    figure: ModuleType, options: argparse.Namespace, rest: list[str]
) -> None:
    """Parses the options that all figures have and those of this one."""
    from benchmarks import harness

    name = options.figure
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {options.command} {name}",
        description=_summary(FIGURES[name]),
    )
    add = parser.add_argument
    add("--work-dir", type=Path, help=f"rows; default: runs/{name}")
    add("--task-dir", type=Path, help="tasks, teachers; default: runs/tasks")
    add("--output", type=Path, help=f"report; default: results/{name}")
    add("--quick", action="store_true", help="tiny sizes, to try it out")
    add("--data-dir", help="folder of a text's files, such as Multi30k's")
    if hasattr(figure, "add_arguments"):
        figure.add_arguments(parser)
    parser.parse_args(rest, options)
    folder = options.work_dir or Path("runs") / name
    options.task_dir = options.task_dir or folder.parent / "tasks"
    if options.quick:
        folder /= "quick"
    options.store = harness.Rows(folder)
    if options.output is None:
        results = harness.RESULTS / name
        options.output = folder / "report" if options.quick else results


def _report(
    figure: ModuleType, options: argparse.Namespace, command: str
) -> None:
    """Writes `results.json`, `report.md` and the pictures of a figure."""
    from benchmarks import harness

    name, folder = options.figure, options.output
    earlier = harness.read_results(name, folder)
    if not earlier and options.command == "report":
        earlier = harness.read_results(name, harness.RESULTS / name)
    results = dict(figure.collect(options, earlier))
    if not results:
        raise SystemExit(f"No rows yet: python -m benchmarks run {name}")
    if options.command == "run":
        results["command"] = command
        harness.write_json(folder / "results.json", results)
    command = results.pop("command", "")
    if not command.startswith("python -m benchmarks run"):
        command = f"python -m benchmarks run {name}"  # of earlier results
    title, _, introduction = inspect.getdoc(figure).partition("\n\n")
    parts = [f"# {title.rstrip('.')}", f"    {command}", introduction]
    parts += figure.report(results, folder)
    machines = harness.environments(results)
    if machines:
        parts += ["## Machines and versions", "- " + "\n- ".join(machines)]
    text = "\n\n".join(parts) + "\n"
    harness.write_text(folder / "report.md", text)
    print(text)


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
