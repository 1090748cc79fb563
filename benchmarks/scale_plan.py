"""What tables of any size would take, by arithmetic: nothing is made.

    python -m benchmarks.scale_plan

Ranks and bytes are those that `compress` and `export_litert` would choose and
write. Training memory is that of the factors with their gradients and Adam's
two moments, all in float32, on each device, the codes split over the devices
and the basis on all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks._report import write_text
from examples.nmt.evaluate import markdown_table
from keras_distilled_embedding.factorization import factor_bytes
from keras_distilled_embedding.factorization import rank_for_compression

OUTPUT = Path(__file__).parent / "results" / "scale_plan.md"
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
COMPRESSION, DEVICES = 8.0, (1, 4, 8)
TOKENS, CHUNK = 2_048, 64
# A weight, its gradient, and two moments.
COPIES = 4


def plan(rows: int, columns: int) -> list[str]:
    """The cells of one table."""
    rank = rank_for_compression(rows, columns, COMPRESSION)
    table = 4 * rows * columns
    codes, basis = 4 * rows * rank, 4 * rank * columns
    training = [COPIES * (codes / n + basis) for n in DEVICES]
    return [
        f"{rows:,} x {columns:,}",
        _size(table),
        f"{rank:,}",
        _size(factor_bytes(rank, rows, columns)),
        _size(factor_bytes(rank, rows, columns, "int8")),
        _size(COPIES * table),
        *map(_size, training),
        _size(4 * TOKENS * rows),
        _size(4 * CHUNK * rows),
    ]


def report() -> str:
    """Markdown: the table, and what its columns are."""
    headings = [
        "table",
        "float32",
        "rank",
        "factors",
        "int8",
        "train table",
        *[f"train factors, {n} device{'s' * (n > 1)}" for n in DEVICES],
        f"logits of {TOKENS:,}",
        f"of {CHUNK}",
    ]
    cells = [headings, *[plan(*table) for table in TABLES]]
    return "\n\n".join(
        [
            f"# Tables at {COMPRESSION:g}x, by arithmetic",
            "    python -m benchmarks.scale_plan",
            markdown_table(cells),
            "`factors`: float32; `int8`: as `export_litert` stores them. "
            "`train`: weights, gradients "
            f"and Adam's moments, {COPIES} times the bytes, a device; codes "
            "split over the devices, the basis on each. `logits`: float32, "
            "once; a plain step holds them several times.\n",
        ]
    )


def _size(number: float) -> str:
    if number < 1e9:
        return f"{number / 1e6:,.0f} MB"
    return f"{number / 1e9:,.2f} GB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    text = report()
    print(text)
    write_text(options.output, text)


if __name__ == "__main__":
    main()
