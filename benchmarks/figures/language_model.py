"""A language model and its table: perplexity of the table, of its factors.

KerasHub's GPT-2 with a tied table, trained by Adam with a cosine to zero,
without dropout; one run each. Every student is trained for as long as the
control, which is the teacher itself, trained on without distillation; Δ is
against the control.

- `ReLU`: the package's factors, rows weighted by how often their tokens occur.
- `weighted SVD`: a truncated SVD with the same weights; `plain SVD`: without.
- These three are distilled as docs/distillation.md recommends, without label
  smoothing: 0.3 task + 0.7 `LogitsDistillation()`.
- `ReLU, task loss alone`: without the teacher's predictions.
- `paper`: its recipe, `method="learned"`, no weights, 0.5 task + 0.5
  `EmbeddingDistillation()`.
- int8: rounded after training, as `export_litert` stores the table: codes with
  one scale, the basis with one for each row; nothing else is rounded.

Perplexity is of a token of the test, predicted from those before it in its
window; bits a byte, of the text, do not depend on the vocabulary. `before`:
compressed and not yet trained. Seconds are of compressing, training and
evaluating.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.methods.ours import PAPER
from benchmarks.tasks.language_model import FULL
from benchmarks.tasks.language_model import PACKAGES
from benchmarks.tasks.language_model import QUICK
from benchmarks.tasks.language_model import SHORTEST
from benchmarks.tasks.language_model import LanguageModelTask
from benchmarks.tasks.students import CONTROL
from benchmarks.tasks.students import LOSSES
from benchmarks.tasks.students import evaluate_stored
from benchmarks.tasks.students import make_student
from benchmarks.tasks.students import measure_student

# Methods, losses and how many times fewer bytes in float32, by what the rows
# of one line of the picture are called. In int8, 2x and 4x are 8x and 16x.
KINDS = {
    "ReLU": ("ours, rows weighted", "logits", (2.0, 4.0, 8.0, 16.0)),
    "weighted SVD": ("weighted SVD", "logits", (8.0, 16.0)),
    "plain SVD": ("truncated SVD", "logits", (8.0, 16.0)),
    "paper": (PAPER, "embedding", (8.0,)),
    "ReLU, task loss alone": ("ours, rows weighted", "none", (2.0, 4.0, 8.0)),
}
ROWS = {
    # At the rate of the students, and at half of it.
    f"control, rate {rate:.0e}": (
        CONTROL,
        1.0,
        {"student_loss_weight": 1.0, "peak_learning_rate": rate},
    )
    for rate in (1e-3, 2e-3)
} | {
    f"{name} {size:g}x": (method, size, LOSSES[loss][1])
    for name, (method, loss, sizes) in KINDS.items()
    for size in sizes
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--seed", type=int, default=0)


def run(options: argparse.Namespace) -> None:
    """Trains the teacher and the chosen rows."""
    setting = QUICK if options.quick else FULL
    name = "language_model_quick" if options.quick else "language_model"
    task = LanguageModelTask(setting, options.task_dir / name, options.seed)
    task.corpus  # noqa: B018 - gathered outside of what is timed
    options.store.finish(
        f"teacher {options.seed}", partial(measure_teacher, task), wait=True
    )
    for name in options.rows:
        options.store.finish(
            f"{name} {options.seed}", partial(measure, name, task)
        )


def measure_teacher(task: LanguageModelTask) -> dict:
    """Trains and evaluates the teacher."""
    teacher, history = task.train_teacher()
    return {
        "row": "teacher",
        "seed": task.seed,
        "settings": asdict(task.setting),
        "text": task.corpus.about,
        "validation_nll": history.history["val_nll"],
        "parameters": teacher.count_params(),
        "stored": evaluate_stored(task, teacher),
    }


def measure(name: str, task: LanguageModelTask) -> dict:
    """Makes, trains and evaluates a row."""
    method, size, changes = ROWS[name]
    student = make_student(task, method, size)
    recipe = replace(task.setting.student, **changes)
    return {"row": name, **measure_student(task, student, recipe)}


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows in the order of `ROWS`."""
    order = ["teacher", *ROWS]
    done = [row for row in options.store.read_all() if "stored" in row]
    if not done:
        return earlier
    done.sort(key=lambda row: order.index(row["row"]))
    return {
        "settings": done[0].pop("settings"),
        "text": done[0].pop("text"),
        "rows": harness.merged(
            done,
            earlier.get("rows", []),
            lambda row: (row["row"], row["seed"]),
        ),
    }


def control_of(rows: list[dict]) -> dict | None:
    """The teacher trained on, at the rate that validation prefers."""
    controls = [r for r in rows if r["row"].startswith("control")]
    return min(controls, key=lambda r: r["validation_nll"][-1], default=None)


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables and the picture."""
    rows, settings = results["rows"], results["settings"]
    control = control_of(rows)
    best = "which is missing"
    if control is not None:
        best = f"`{control['row']}`, the better of its rates in validation"
    yield f"{rows[0]['parameters']:,} parameters in all. Settings:"
    yield f"```json\n{json.dumps(settings, indent=1)}\n```"
    yield harness.markdown_table([*_row_cells(rows, control)])
    yield f"The control is {best}."
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
    yield harness.markdown_table(
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
            elif trained and "before_nll" in row:
                before = f"{math.exp(row['before_nll']):.1f}"
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
    harness.plot_lines(
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
