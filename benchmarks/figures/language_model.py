"""A language model: perplexity of a full table, of its factors, of baselines.

Every student is trained for as long as the control, which is the teacher
itself, trained on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras

import keras_distilled_embedding as kde
from benchmarks.harness.plots import plot_lines
from benchmarks.harness.rows import Rows
from benchmarks.harness.rows import merged
from benchmarks.harness.tables import markdown_table
from benchmarks.methods import METHODS
from benchmarks.methods.ours import PAPER
from benchmarks.methods.storage import store_as
from benchmarks.methods.storage import table_bytes
from benchmarks.methods.storage import table_layer
from benchmarks.tasks.language_model import FULL
from benchmarks.tasks.language_model import PACKAGES
from benchmarks.tasks.language_model import QUICK
from benchmarks.tasks.language_model import SHORTEST
from benchmarks.tasks.language_model import LanguageModelTask
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule

TITLE = "A language model and its table"
CONTROL = "control"
# docs/distillation.md; without smoothing, for what counts is perplexity.
RECOMMENDED = Recipe(smoothing=0.0)
TASK_ALONE = replace(RECOMMENDED, student_loss_weight=1.0)
PAPERS_LOSS = replace(
    RECOMMENDED,
    student_loss_weight=0.5,
    logits_weight=0.0,
    embedding_weight=1.0,
)


@dataclass(frozen=True)
class Kind:
    """Rows of one line of the picture.

    Args:
        method: A key of `METHODS`; `None` leaves the table.
        recipe: How they are trained, but for the length.
        sizes: How many times fewer bytes the tables take in float32. In int8,
            2x and 4x are 8x and 16x.
    """

    method: str | None
    recipe: Recipe
    sizes: tuple[float, ...] = (8.0, 16.0)


KINDS = {
    "ReLU": Kind("ours, rows weighted", RECOMMENDED, (2.0, 4.0, 8.0, 16.0)),
    "weighted SVD": Kind("weighted SVD", RECOMMENDED),
    "plain SVD": Kind("truncated SVD", RECOMMENDED),
    "paper": Kind(PAPER, PAPERS_LOSS, (8.0,)),
    "ReLU, task loss alone": Kind(
        "ours, rows weighted", TASK_ALONE, (2.0, 4.0, 8.0)
    ),
}
ROWS = {
    # At the rate of the students, and at half of it.
    f"{CONTROL}, rate {rate:.0e}": (
        Kind(None, replace(TASK_ALONE, peak_learning_rate=rate)),
        1.0,
    )
    for rate in (1e-3, 2e-3)
} | {
    f"{name} {size:g}x": (kind, size)
    for name, kind in KINDS.items()
    for size in kind.sizes
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--seed", type=int, default=0)


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Trains the teacher and the chosen rows."""
    settings = QUICK if options.quick else FULL
    task = LanguageModelTask(settings, rows.folder, options.seed)
    task.corpus  # noqa: B018 - gathered outside of what is timed
    rows.finish(
        f"teacher {options.seed}", partial(measure_teacher, task), wait=True
    )
    for name in options.rows:
        rows.finish(f"{name} {options.seed}", partial(measure, name, task))


def measure_teacher(task: LanguageModelTask) -> dict:
    """Trains and evaluates the teacher."""
    teacher, history = task.train_teacher()
    training = _training(task.settings.teacher, history)
    return {
        **_evaluated("teacher", task, teacher, training),
        "settings": asdict(task.settings),
        "text": task.corpus.about,
    }


def measure(name: str, task: LanguageModelTask) -> dict:
    """Makes, trains and evaluates a row."""
    kind, size = ROWS[name]
    recipe = replace(kind.recipe, epochs=task.settings.epochs)
    student, result = task.teacher(), {}
    if kind.method is not None:
        budget = int(task.table.values.nbytes / size)
        student = METHODS[kind.method].student(task, budget)
        result["before"] = task.evaluate(student, "test")
    keras.utils.set_random_seed(task.seed + 1)
    history = task.train(student, recipe)
    if kind.method is not None:
        kde.save_model(student, task.folder / f"{name}_{task.seed}.keras")
    result |= _training(recipe, history)
    return _evaluated(name, task, student, result)


def _training(schedule: Schedule, history: keras.callbacks.History) -> dict:
    return {
        "recipe": asdict(schedule),
        "training_nll": history.history["nll"],
        "validation_nll": history.history["val_nll"],
    }


def _evaluated(
    name: str, task: LanguageModelTask, model: keras.Model, result: dict
) -> dict:
    """Adds what a model reaches in float32 and in int8."""
    result = {
        "name": name,
        "seed": task.seed,
        **result,
        "parameters": model.count_params(),
        "stored": {},
    }
    layer = table_layer(model)
    for storage in ("float32", "int8"):
        if storage == "int8":
            store_as(layer, "int8")
        quantization = None if storage == "float32" else storage
        result["stored"][storage] = {
            "table_bytes": table_bytes(layer, quantization),
            **task.evaluate(model, "test"),
        }
    return result


# The report


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rows, of one seed, in the order of `ROWS`."""
    del options
    done = [row for row in rows.read_all() if "stored" in row]
    if not done:
        return earlier
    teacher = next(row for row in done if row["name"] == "teacher")
    order = {name: i for i, name in enumerate(["teacher", *ROWS])}
    done.sort(key=lambda row: order[row["name"]])
    for row in done:
        row["row"] = row["name"]
    kept = earlier.get("rows", [])
    return {
        "settings": teacher["settings"],
        "text": teacher["text"],
        "rows": merged(done, kept, lambda row: (row["row"], row["seed"])),
    }


def control_of(rows: list[dict]) -> dict | None:
    """The teacher trained on, at the rate that validation prefers."""
    controls = [r for r in rows if r["row"].startswith(CONTROL)]
    return min(controls, key=lambda r: r["validation_nll"][-1], default=None)


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables and the picture."""
    rows, settings = results["rows"], results["settings"]
    control = control_of(rows)
    best = "which is missing"
    if control is not None:
        best = f"`{control['row']}`, the better of its rates in validation"
    weight = RECOMMENDED.student_loss_weight
    teacher = settings["teacher"]
    yield f"Seed {rows[0]['seed']}, one run each."
    yield (
        f"KerasHub's GPT-2, {settings['num_layers']} layers of width "
        f"{settings['hidden_dim']}, a tied table of "
        f"{settings['vocabulary']:,} x {settings['hidden_dim']}; "
        f"{rows[0]['parameters']:,} parameters in all. The teacher is trained "
        f"for {teacher['epochs']} epochs, Adam at a peak of "
        f"{teacher['peak_learning_rate']:g} and a cosine to zero; everything "
        f"else for {teacher['epochs'] // 2} more, at a peak of "
        f"{RECOMMENDED.peak_learning_rate:g} but for the controls, in batches "
        f"of {settings['batch']} x {settings['length']} tokens, without "
        "dropout."
    )
    yield markdown_table([*_row_cells(rows, control)])
    yield (
        "Perplexity is of a token of the test, predicted from those before it "
        f"in its window of {settings['length']} tokens; bits a byte, of the "
        "text, do not depend on the vocabulary. `before`: compressed and not "
        f"yet trained. `Δ`: against the control, {best}. Seconds are of "
        "compressing, training and evaluating."
    )
    yield (
        f"- `{CONTROL}`: the teacher, trained on without distillation.\n"
        "- `ReLU`: the package's factors, rows weighted by how often their "
        "tokens occur.\n"
        "- `weighted SVD`: a truncated SVD with the same weights; `plain "
        "SVD`: without weights.\n"
        f"- These three are distilled as recommended: {weight:g} task + "
        f"{1 - weight:g} `LogitsDistillation()`.\n"
        "- `ReLU, task loss alone`: without the teacher's predictions.\n"
        '- `paper`: its recipe, `method="learned"`, no weights, 0.5 task + '
        "0.5 `EmbeddingDistillation()`.\n"
        "- int8: rounded after training, as `export_litert` stores the table: "
        "codes with one scale, the basis with one for each row; nothing else "
        "is rounded."
    )
    _plot(rows, control or rows[0], folder / "quality.png")
    yield "![Perplexity and bytes](quality.png)"
    yield "## The text"
    yield (
        "Topics of Python's manual (`pydoc_data.topics`) and the docstrings of "
        f"the standard library, {' and '.join(PACKAGES)}, as installed with "
        f"the versions below: paragraphs of {SHORTEST} characters or more, "
        "ASCII only, none with a `>>>`, each once. Documents, which are topics "
        "and modules, are split by the CRC-32 of their names. The vocabulary "
        "is SentencePiece's, of the training text; every paragraph ends with "
        "EOS, which counts as a token and as one byte."
    )
    counts = ("documents", "paragraphs", "tokens", "bytes", "unknown")
    yield markdown_table(
        [
            {
                "split": split,
                **{
                    name: f"{results['text'][split][name]:,}" for name in counts
                },
                "SHA-256": f"`{results['text'][split]['sha256'][:16]}`",
            }
            for split in ("train", "validation", "test")
        ]
    )


def _row_cells(rows: list[dict], control: dict | None) -> Iterator[dict]:
    """Each model in float32 and in int8."""
    full = rows[0]["stored"]["float32"]["table_bytes"]
    for row in rows:
        for storage, stored in row["stored"].items():
            delta, trained, before = "", storage == "float32", ""
            if control is not None:
                best = control["stored"]["float32"]["perplexity"]
                delta = f"{stored['perplexity'] - best:+.2f}"
            if trained and "before" in row:
                before = f"{row['before']['perplexity']:.1f}"
            validation = math.exp(row["validation_nll"][-1])
            yield {
                "model": row["row"],
                "table": storage,
                "bytes": f"{stored['table_bytes']:,}",
                "÷": f"{full / stored['table_bytes']:.1f}",
                "before": before,
                "perplexity": f"{stored['perplexity']:.2f}",
                "Δ": delta,
                "bits a byte": f"{stored['bits_per_byte']:.4f}",
                "validation": f"{validation:.2f}" if trained else "",
                "s": f"{row['wall_s']:.0f}" if trained else "",
                "CPU s": f"{row['cpu_s']:.0f}" if trained else "",
            }


def _plot(rows: list[dict], control: dict, path: Path) -> None:
    """Perplexity against the bytes of the table."""
    kinds = {"full table": [control]}
    for row in rows:
        name, _, size = row["row"].rpartition(" ")
        if size.endswith("x"):
            kinds.setdefault(name, []).append(row)
    lines, styles = {}, {}
    for index, (kind, found) in enumerate(kinds.items()):
        for storage, line, fill in (
            ("float32", "-", "full"),
            ("int8", ":", "none"),
        ):
            label = f"{kind}, {storage}"
            lines[label] = [
                (stored["table_bytes"] / 1e6, stored["perplexity"])
                for stored in (row["stored"][storage] for row in found)
            ]
            styles[label] = {
                "color": f"C{index}",
                "linestyle": line,
                "fillstyle": fill,
            }
    plot_lines(
        lines,
        path,
        styles=styles,
        level=(control["row"], control["stored"]["float32"]["perplexity"]),
        log_x=True,
        x_format="{x:g}",
        xlabel="table, MB (log scale)",
        ylabel="perplexity of the test, a token",
        title="Perplexity against size",
    )
