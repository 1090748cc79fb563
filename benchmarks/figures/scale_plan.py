"""What tables of any size would take at 8x, by arithmetic: nothing is made.

`factors`: float32; `int8`: as `export_litert` stores them. `train`: weights,
gradients and Adam's two moments, four times the bytes, on each device, the
codes split over the devices, the basis on all of them. `logits`: float32,
once; a plain step holds them several times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import largest_rank

COMPRESSION, DEVICES = 8, (1, 4, 8)
# From a vocabulary of one language to what no one has yet.
TABLES = (
    (32_000, 2_048),
    (128_000, 2_048),
    (128_000, 4_096),
    (256_000, 1_024),
    (256_000, 2_304),
    (256_000, 4_096),
    (1_000_000, 4_096),
)
TOKENS, CHUNK = 2_048, 64
# A weight, its gradient, and two moments.
COPIES = 4


def run(options: argparse.Namespace) -> None:
    """Nothing is measured."""


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the bytes and ranks of each table."""
    return {"tables": [plan(*table) for table in TABLES]}


def plan(rows: int, columns: int) -> dict:
    """What one table takes, in bytes."""
    shape, table = (rows, columns), 4 * rows * columns
    rank = largest_rank(*shape, table // COMPRESSION)
    codes = 4 * rows * rank
    factors = factor_bytes(rank, *shape)
    return {
        "shape": list(shape),
        "float32": table,
        "rank": rank,
        "factors": factors,
        "int8": factor_bytes(rank, *shape, "int8"),
        "train table": COPIES * table,
        **{
            f"train factors, {n} device{'s' * (n > 1)}": (
                COPIES * (codes // n + factors - codes)
            )
            for n in DEVICES
        },
        f"logits of {TOKENS:,}": 4 * TOKENS * rows,
        f"of {CHUNK}": 4 * CHUNK * rows,
    }


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the table, and what its columns are."""
    yield harness.markdown_table([*map(_cells, results["tables"])])


def _cells(row: dict) -> dict:
    rows, columns = row["shape"]
    cells = {"table": f"{rows:,} x {columns:,}"}
    for name, value in row.items():
        if name != "shape":
            cells[name] = f"{value:,}" if name == "rank" else _size(value)
    return cells


def _size(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:,.0f} MB"
    return f"{number / 1e9:,.2f} GB"
