"""Real pretrained language models, only their tables compressed.

SmolLM2-135M and Gemma 3 270M, each with a table that both looks up and
projects. Everything but the table stays in float32, as the packages' files
have it. Every row is `compress` as anybody calls it, and nothing else but where
`distilled` says so:

- `int8`, `int4`, `int2`: `rank` is the table's width, nothing is lost but by
  rounding.
- `8x`, `16x`, `32x`: `compression` alone, rank and bits are planned together;
  `fast`: with `min_speedup=1.0`, which takes no format that LiteRT multiplies
  slowly.
- `four times as fast`: `compression=8.0, min_speedup=4.0`, so that projecting
  takes a quarter of the table's multiplications.
- `floats 2x` and `floats 8x`: `quantization=None`, so that the rank alone
  pays.
- `not calibrated`: without `calibration_data`, which in the others is text
  that is not evaluated. The plan and the rounding then know the table alone.
- `2 pieces` and so on: calibrated on fewer, unlike all others.
- `distilled`: then `Distiller` trains codes, basis, offset and scales alone, on
  text that is not evaluated, towards the full model's predictions, which are
  computed as it goes: so many steps of two pieces, Adam, its learning rate up
  to 1e-4 and along a cosine to zero.
- `nearest int4`, `nearest int2`: the rival, no method of the package. Each
  number is rounded to its nearest level, with a scale of two bytes a row, or
  for each 32 numbers, of twelve the one that loses least. The levels are those
  of the package's int4 and int2.

Perplexity is of the next token in pieces of text, from those before it in its
piece. `same choice` is how often the likeliest token is that of the full
model, `KL` the mean Kullback-Leibler divergence from its predictions, in nats.
Bytes are those of the table, as `export_litert` stores it; the divisor is
against float32. `lost` is the share of the table's energy. Seconds are of
making the table, calibration and training included.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.methods.nearest import round_to_nearest
from benchmarks.tasks.pretrained import PROSE
from benchmarks.tasks.pretrained import SOURCES
from benchmarks.tasks.pretrained import PretrainedTask
from keras_distilled_embedding.sizes import factor_bytes

FULL = "full table"
PLAIN = ", not calibrated"
FAST = "four times as fast"
# Options of `compress`; "rank" of the first three is the table's width.
COMPRESSED: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int2": {"quantization": "int2"},
    f"int4{PLAIN}": {"quantization": "int4"},
    f"int2{PLAIN}": {"quantization": "int2"},
    "8x": {"compression": 8.0},
    "16x": {"compression": 16.0},
    "16x, fast": {"compression": 16.0, "min_speedup": 1.0},
    "32x": {"compression": 32.0},
    FAST: {"compression": 8.0, "min_speedup": 4.0},
    "floats 2x": {"compression": 2.0, "quantization": None},
    f"floats 2x{PLAIN}": {"compression": 2.0, "quantization": None},
    "floats 8x": {"compression": 8.0, "quantization": None},
    f"floats 8x{PLAIN}": {"compression": 8.0, "quantization": None},
}
PIECES = {f"int2, {number} pieces": number for number in (2, 8, 32)}
COMPRESSED |= {name: {"quantization": "int2"} for name in PIECES}
# Steps of training.
DISTILLED = {
    f"{name}, distilled {steps} steps": (name, steps)
    for name, steps in (
        ("int2", 60),
        ("int2", 240),
        ("int2", 480),
        ("32x", 480),
        (FAST, 240),
    )
}
# Their format, and how many numbers share a scale; a row by default.
BLOCKS = ", blocks of 32"
NEAREST: dict[str, tuple[str, int | None]] = {
    "nearest int4": ("int4", None),
    "nearest int2": ("int2", None),
    f"nearest int4{BLOCKS}": ("int4", 32),
    f"nearest int2{BLOCKS}": ("int2", 32),
}
MODELS = [*SOURCES, "quick"]
ROWS = [FULL, *COMPRESSED, *DISTILLED, *NEAREST]
# What one line of the picture is made of.
KINDS = {
    "bits alone": ("int8", "int4", "int2"),
    f"bits alone{PLAIN}": (f"int4{PLAIN}", f"int2{PLAIN}"),
    "rank and bits planned": ("8x", "16x", "32x"),
    "bits alone, distilled": [n for n in DISTILLED if n.startswith("int2")],
    "four times as fast": [n for n in (FAST, *DISTILLED) if n.startswith(FAST)],
    "rank alone": ("floats 2x", "floats 8x"),
    f"rank alone{PLAIN}": (f"floats 2x{PLAIN}", f"floats 8x{PLAIN}"),
    "nearest levels": ("nearest int4", "nearest int2"),
    f"nearest levels{BLOCKS}": (
        f"nearest int4{BLOCKS}",
        f"nearest int2{BLOCKS}",
    ),
}
ROWS_AT_A_TIME = 16_384
TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10, 15)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=SOURCES, default="smollm2")
    add("--rows", nargs="*", choices=ROWS, default=ROWS, metavar="ROW")
    add("--tokens", type=int, default=20_000, help="that are predicted")
    add("--calibration", type=int, default=64, help="pieces to calibrate on")
    add("--length", type=int, default=256, help="tokens of a piece")


def run(options: argparse.Namespace) -> None:
    """Measures the chosen rows of a model."""
    sizes = options.tokens, options.calibration, options.length
    if options.quick:
        options.model, sizes = "quick", (200, 2, 32)
    tokens, calibration, length = sizes
    pieces = {name: PIECES.get(name, calibration) for name in options.rows}
    task = PretrainedTask(
        options.model,
        options.task_dir / "pretrained",
        options.data_dir,
        tokens,
        max(pieces.values(), default=calibration),
        length,
        max(
            (DISTILLED[name][1] for name in options.rows if name in DISTILLED),
            default=0,
        ),
    )
    for name in options.rows:
        options.store.finish(
            f"{name} {options.model} {tokens}",
            partial(measure, name, options.model, task, pieces[name]),
        )


def measure(
    name: str, model: str, task: PretrainedTask, calibrated: int
) -> dict:
    """Makes a row's table and evaluates the model with it.

    Args:
        name: Of the row.
        model: That of the task.
        task: The task.
        calibrated: How many of its pieces to calibrate on.
    """
    start = time.perf_counter()
    layer, about = make_layer(name, task, calibrated)
    seconds = time.perf_counter() - start
    gc.collect()  # the rest of the compressed model, a cycle of references
    return {
        "row": name,
        "model": model,
        "text": task.text,
        "calibrated": calibrated,
        "length": task.pieces.shape[1],
        "shape": [task.layer.input_dim, task.layer.output_dim],
        "seconds": round(seconds, 1),
        "lost": lost_energy(task.layer, layer),
        **about,
        **task.evaluate(layer),
        "peak_mb": round(harness.peak_mb()),
    }


def make_layer(
    name: str, task: PretrainedTask, calibrated: int
) -> tuple[keras.layers.Layer, dict]:
    """The layer of a row, and its bytes, rank and format."""
    shape = task.layer.input_dim, task.layer.output_dim
    if name == FULL:
        return task.layer, {"bytes": 4 * shape[0] * shape[1]}
    if name in NEAREST:
        quantization, block = NEAREST[name]
        table = ops.convert_to_numpy(task.layer.embeddings)
        rounded, number = round_to_nearest(table, quantization, block)
        layer = keras.layers.ReversibleEmbedding(*shape)
        layer.build()
        layer.embeddings.assign(rounded)
        return layer, {"bytes": number, "quantization": quantization}
    base, steps = DISTILLED.get(name, (name, 0))
    options = dict(COMPRESSED[base])
    if "compression" not in options:
        options["rank"] = shape[1]
    if not base.endswith(PLAIN):
        options["calibration_data"] = task.calibration_data
        options["calibration_tokens"] = calibrated * task.pieces.shape[1]
    student = kde.compress(task.model, **options)
    trained = task.distill(student, steps) if steps else {}
    layer = student.backbone.token_embedding
    return layer, {
        **trained,
        "bytes": factor_bytes(layer.rank, *shape, layer.format, layer.use_bias),
        "rank": layer.rank,
        "quantization": layer.quantization,
        "row_scales": layer.row_scales,
    }


def lost_energy(full: keras.layers.Layer, layer: keras.layers.Layer) -> float:
    """The share of a table's energy that another layer's table lacks."""
    sums = np.zeros(2)
    for start in range(0, full.input_dim, ROWS_AT_A_TIME):
        ids = np.arange(start, min(start + ROWS_AT_A_TIME, full.input_dim))
        rows = ops.convert_to_numpy(full(ids))
        change = ops.convert_to_numpy(layer(ids)) - rows
        sums += np.square(change).sum(), np.square(rows).sum()
    return float(sums[0] / sums[1])


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows in the order of `ROWS`, by model and tokens."""
    done = options.store.read_all()
    rows = harness.merged(
        [row for row in done if row["row"] in ROWS],
        earlier.get("rows", []),
        lambda row: (row["model"], row["tokens"], row["row"]),
    )
    rows.sort(
        key=lambda row: (
            MODELS.index(row["model"]),
            -row["tokens"],
            ROWS.index(row["row"]),
        )
    )
    return {"rows": rows} if rows else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes a table for each model, and the picture."""
    groups: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        groups.setdefault((row["model"], row["tokens"]), []).append(row)
    for (model, tokens), rows in groups.items():
        source, first = SOURCES.get(model), rows[0]
        rows_of_table, columns = first["shape"]
        title = source.title if source else "A model of no quality"
        yield f"## {title}, {tokens:,} tokens"
        yield (
            f"A table of {rows_of_table:,} x {columns}. Pieces of "
            f"{first['length']} tokens; calibrated on "
            f"{first['calibrated']} others. "
            + (f"License: {source.license}." if source else "")
        )
        yield harness.markdown_table([*_cells(rows)])
    _plot(groups, folder / "perplexity.png")
    yield "![Perplexity and bytes](perplexity.png)"
    yield "## The text"
    yield (
        f"`{PROSE}` is technical prose in English, a paragraph a line, from "
        "the documentation of Python, PostgreSQL and Linux; `--data-dir` names "
        "its folder. Otherwise it is the text of the figure language_model. "
        "Paragraphs follow each other in the file's order, one after the other "
        "with a line break, cut into pieces; the second half is evaluated. "
        "Pieces begin with BOS where the model's file asks for it."
    )


def _plot(groups: dict[tuple, list[dict]], path: Path) -> None:
    """Perplexity against the bytes of the table, a line for each of `KINDS`."""
    lines, styles = {}, {}
    drawn = dict(zip(MODELS, ("-", ":", "--")))
    # Of the same model, the most tokens last: what is drawn.
    for (model, _), of_group in reversed(groups.items()):
        rows = {row["row"]: row for row in of_group}
        if FULL not in rows:
            continue
        full = rows[FULL]["perplexity"]
        for index, (kind, names) in enumerate(KINDS.items()):
            title = SOURCES[model].title if model in SOURCES else model
            label = f"{title.removesuffix('-Instruct')}: {kind}"
            found = [rows[name] for name in names if name in rows]
            lines[label] = [(_ratio(r), r["perplexity"] / full) for r in found]
            styles[label] = {"color": f"C{index}", "linestyle": drawn[model]}
    harness.plot_lines(
        lines,
        path,
        styles=styles,
        log_x=True,
        x_format="{x:g}",
        yscale="log",
        yticks=TICKS,
        yticklabels=[f"{tick:g}x" for tick in TICKS],
        xlabel="times fewer bytes of the table (log scale)",
        ylabel="perplexity, times that of the full table (log scale)",
        title="A pretrained model's table in fewer bytes",
    )


def _cells(rows: list[dict]) -> Iterator[dict]:
    for row in rows:
        kind = row.get("quantization") or "float32"
        if kind != "float32" and row.get("row_scales") is False:
            kind += ", a scale a column"
        yield {
            "table": row["row"],
            "rank": f"{row.get('rank', '')}",
            "stored": kind,
            "bytes": f"{row['bytes']:,}",
            "÷": f"{_ratio(row):.1f}",
            "lost": f"{row['lost']:.4f}",
            "perplexity": f"{row['perplexity']:,.2f}",
            "same choice": f"{row['agreement']:.3f}",
            "KL": f"{row['divergence']:.4f}",
            "s": f"{row['seconds']:.0f}",
        }


def _ratio(row: dict) -> float:
    return 4 * row["shape"][0] * row["shape"][1] / row["bytes"]
