"""A pretrained sentence encoder, only its table compressed, no training.

all-MiniLM-L6-v2: six layers of BERT, and a table that only looks up, half of
its weights. Everything but the table stays in float32.

- `int8`, `int4`, `int2`: `compress` with `rank` as wide as the table, so that
  nothing is lost but by rounding.
- `8x`, `16x`, `32x`: `compression` alone, rank and bits are planned together.
- `not calibrated`: without `calibration_data`, which in the others is a list
  of other sentences.
- `principal components`: the rival that makes static embeddings small, as in
  model2vec: as many components as fit, in 8 bits with one scale.
- `nearest`: the rival of few bits. Each number is rounded to its nearest level,
  a scale of two bytes for each row, or for each 32 numbers.

Sentences are English documentation of free software; those that are looked for
come from other documents. `recall` is how many of the ten nearest sentences of
the full model are among the ten nearest of the row, `ranks` the rank
correlation of the similarities of all, both in the mean over what is looked
for, `cosine` that of a sentence's vector with the full model's. Bytes are those
of the table, as `export_litert` stores it. `lost` is the share of the table's
energy. Seconds are the processor's, of making the table.
"""

from __future__ import annotations

import argparse
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
from benchmarks.tasks.sentence_encoder import SentenceEncoderTask
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import rank_for_compression

FULL, PLAIN = "full table", ", not calibrated"
# Options of `compress`; "rank" of the first three is the table's width.
COMPRESSED: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    f"int4{PLAIN}": {"quantization": "int4"},
    "int2": {"quantization": "int2"},
    f"int2{PLAIN}": {"quantization": "int2"},
    "8x": {"compression": 8.0},
    "16x": {"compression": 16.0},
    "32x": {"compression": 32.0},
}
COMPONENTS = {f"principal components, {size}x": size for size in (8, 16, 32)}
NEAREST: dict[str, tuple[str, int | None]] = {
    "nearest int8": ("int8", None),
    "nearest int4": ("int4", None),
    "nearest int4, blocks of 32": ("int4", 32),
    "nearest int2": ("int2", None),
    "nearest int2, blocks of 32": ("int2", 32),
}
ROWS = [FULL, *COMPRESSED, *COMPONENTS, *NEAREST]
# What one line of the picture is made of.
KINDS = {
    "full rank": ("int8", "int4", "int2"),
    f"full rank{PLAIN}": (f"int4{PLAIN}", f"int2{PLAIN}"),
    "rank and bits planned": ("8x", "16x", "32x"),
    "principal components": (*COMPONENTS,),
    "nearest": ("nearest int8", "nearest int4", "nearest int2"),
}
SIZES = (5_000, 500, 1_000)  # documents, queries, sentences to calibrate on
QUICK = (200, 20, 50)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", nargs="*", choices=ROWS, default=ROWS, metavar="ROW")


def run(options: argparse.Namespace) -> None:
    """Measures the chosen rows."""
    sizes = QUICK if options.quick else SIZES
    task = SentenceEncoderTask(options.data_dir, *sizes, options.quick)
    for name in options.rows:
        options.store.finish(name, partial(measure, name, task))


def measure(name: str, task: SentenceEncoderTask) -> dict:
    """Makes a row's table and evaluates the model with it."""
    start = time.process_time()
    model, about = make_model(name, task)
    seconds = time.process_time() - start
    table, found = (_table(m) for m in (task.model, model))
    lost = np.square(found - table).sum() / np.square(table).sum()
    return {
        "row": name,
        "documents": len(task.documents),
        "queries": len(task.queries),
        "calibrated": len(task.calibration_data),
        "shape": list(table.shape),
        "lost": float(lost),
        "made_s": round(seconds, 1),
        **about,
        **task.evaluate(model),
    }


def make_model(
    name: str, task: SentenceEncoderTask
) -> tuple[keras.Model, dict]:
    """The model of a row; the bytes, rank and format of its table."""
    table = _table(task.model)
    if name == FULL:
        return task.model, {"bytes": table.nbytes}
    if name in NEAREST:
        rounded, number = round_to_nearest(table, *NEAREST[name])
        about = {"bytes": number, "quantization": NEAREST[name][0]}
        return _with_table(task.model, rounded), about
    if name in COMPONENTS:
        rank = rank_for_compression(*table.shape, COMPONENTS[name], "int8")
        number = factor_bytes(rank, *table.shape, "int8")
        about = {"bytes": number, "rank": rank, "quantization": "int8"}
        return _with_table(task.model, components(table, rank)), about
    options = dict(COMPRESSED[name])
    if "compression" not in options:
        options["rank"] = table.shape[1]
    if not name.endswith(PLAIN):
        options["calibration_data"] = task.calibration_data
    model = kde.compress(task.model, **options)
    layer = model.backbone.token_embedding
    number = factor_bytes(
        layer.rank, *table.shape, layer.format, layer.use_bias
    )
    return model, {
        "bytes": number,
        "rank": layer.rank,
        "quantization": layer.quantization,
    }


def components(table: np.ndarray, rank: int) -> np.ndarray:
    """A table of so many principal components, codes in 8 bits."""
    mean = table.mean(axis=0)
    basis = np.linalg.svd(table - mean, full_matrices=False)[2][:rank]
    codes = (table - mean) @ basis.T
    scale = np.abs(codes).max() / 127
    return np.rint(codes / scale) * scale @ basis + mean


def _table(model: keras.Model) -> np.ndarray:
    return ops.convert_to_numpy(model.backbone.token_embedding.embeddings)


def _with_table(model: keras.Model, table: np.ndarray) -> keras.Model:
    """A copy of the model with another table of floats."""
    backbone = model.backbone
    copy = type(model)(
        type(backbone).from_config(backbone.get_config()), model.preprocessor
    )
    copy.set_weights(model.get_weights())
    copy.backbone.token_embedding.embeddings.assign(table)
    return copy


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows in the order of `ROWS`."""
    rows = harness.merged(
        options.store.read_all(), earlier.get("rows", []), lambda r: r["row"]
    )
    rows.sort(key=lambda row: ROWS.index(row["row"]))
    return {"rows": rows} if rows else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the table and the picture."""
    rows = results["rows"]
    first = rows[0]
    rows_of_table, columns = first["shape"]
    yield (
        f"A table of {rows_of_table:,} x {columns}. {first['queries']:,} "
        f"sentences are looked for among {first['documents']:,}; calibrated on "
        f"{first['calibrated']:,} others. The package states no license of its "
        "weights."
    )
    yield harness.markdown_table([*map(_cells, rows)])
    by_name = {row["row"]: row for row in rows}
    harness.plot_lines(
        {
            kind: [
                (_ratio(by_name[name]), by_name[name]["recall"])
                for name in names
                if name in by_name
            ]
            for kind, names in KINDS.items()
        },
        folder / "recall.png",
        log_x=True,
        x_format="{x:g}",
        xlabel="times fewer bytes of the table (log scale)",
        ylabel="recall of the full model's ten nearest",
        title="A sentence encoder, no training",
    )
    yield "![Recall and bytes](recall.png)"


def _cells(row: dict) -> dict:
    form = harness.formatted
    return {
        "table": row["row"],
        "rank": form(row.get("rank"), "{}"),
        "stored": row.get("quantization") or "float32",
        "bytes": f"{row['bytes']:,}",
        "÷": f"{_ratio(row):.1f}",
        "lost": f"{row['lost']:.4f}",
        "cosine": f"{row['cosine']:.4f}",
        "recall": f"{row['recall']:.3f}",
        "ranks": f"{row['correlation']:.4f}",
        "s": f"{row['made_s']:.0f}",
    }


def _ratio(row: dict) -> float:
    return 4 * row["shape"][0] * row["shape"][1] / row["bytes"]
