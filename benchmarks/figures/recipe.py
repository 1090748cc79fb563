"""Which recipe brings a compressed translation model back: an ablation.

Every row fine-tunes the same 8x smaller student, made from the same trained
teacher, on Multi30k, for two epochs but where the row says otherwise. Means
over the seeds; the test BLEU of each seed beside it. Δ: against the teacher as
it was; Δ control: against the best of the rows that train that teacher on for
as many epochs. Rows of different teachers compare by their Δ.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import keras

from benchmarks import harness
from benchmarks.tasks.students import CONTROL
from benchmarks.tasks.students import make_student
from benchmarks.tasks.students import measure_student
from benchmarks.tasks.translation import SETTINGS
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import ready_task
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from examples.nmt.train import Recipe

COMPRESSION = 8.0
METHOD = "ours, rows weighted"
BASE = Recipe(
    epochs=2,
    peak_learning_rate=2e-3,
    warmup=0.05,
    smoothing=0.1,
    student_loss_weight=0.3,
    logits_weight=1.0,
    embedding_weight=0.0,
    dropout=0.0,
)
LONGER = 4  # epochs: fewer than the teacher's own 9

# In the order of their worth. What differs from `BASE` is what the row tests.
ROWS = {
    "logits": BASE,
    "none": replace(BASE, student_loss_weight=1.0),
    "embedding": replace(
        BASE,
        student_loss_weight=0.5,
        logits_weight=0.0,
        embedding_weight=1.0,
    ),
    "both": replace(BASE, embedding_weight=0.1),
    "logits, task 0.1": replace(BASE, student_loss_weight=0.1),
    "logits, task 0.5": replace(BASE, student_loss_weight=0.5),
    "logits, task 0": replace(BASE, student_loss_weight=0.0),
    "both, table 1": replace(BASE, embedding_weight=1.0),
    f"logits, {LONGER} epochs": replace(BASE, epochs=LONGER),
    "logits, rate 1e-3": replace(BASE, peak_learning_rate=1e-3),
    "logits, rate 4e-3": replace(BASE, peak_learning_rate=4e-3),
}
# The teacher itself, trained on with the same number of steps.
_CONTROL = replace(
    BASE,
    student_loss_weight=1.0,
    peak_learning_rate=3e-4,
    dropout=SETTINGS["multi30k"].dropout,
)
CONTROLS = {
    "teacher, rate 3e-04": _CONTROL,
    "teacher, rate 1e-03": replace(_CONTROL, peak_learning_rate=1e-3),
    f"teacher, {LONGER} epochs": replace(_CONTROL, epochs=LONGER),
}
ALL = {**ROWS, **CONTROLS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", nargs="+", choices=ALL, default=list(ALL), metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[0, 1])


def run(options: argparse.Namespace) -> None:
    """Fine-tunes and evaluates the chosen rows with each seed."""
    name = "quick" if options.quick else "multi30k"
    task = ready_task(name, options.task_dir, data_dir=options.data_dir)
    teacher = options.store.finish(
        "teacher",
        lambda: {"test_bleu": _bleu(task, task.evaluate(task.teacher()))},
        wait=True,
    )
    for row in options.rows:
        for seed in options.seeds:
            options.store.finish(
                f"{row} seed {seed}",
                partial(measure, row, seed, task, teacher["test_bleu"]),
            )


def measure(row: str, seed: int, task: Task, teacher_bleu: float) -> dict:
    """Fine-tunes and evaluates one row."""
    recipe = ALL[row]
    keras.utils.set_random_seed(seed)
    student = make_student(
        task,
        CONTROL if row in CONTROLS else METHOD,
        COMPRESSION,
        recipe.dropout,
    )
    found = measure_student(task, student, recipe, cached=False, seed=seed)
    stored = found.pop("stored")
    return {
        **found,
        "teacher_bleu": teacher_bleu,
        "row": row,
        "seed": seed,
        "test_bleu": _bleu(task, stored["float32"]),
    }


def _bleu(task: Task, evaluated: dict) -> float:
    text = task.decode(evaluated["translations"])
    return score(text, task.texts["test"]["target"])


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rows, and those of earlier teachers."""
    done = [row for row in options.store.read_all() if "recipe" in row]
    names = list(ALL)
    done.sort(key=lambda row: (names.index(row["row"]), row["seed"]))
    teachers = {row["teacher_bleu"] for row in done}
    kept = [
        row
        for row in earlier.get("rows", [])
        if row["teacher_bleu"] not in teachers
    ]
    return {"rows": kept + done} if kept or done else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes a table for each teacher, the recipes and the picture."""
    rows = results["rows"]
    for teacher_bleu, own in _grouped(rows, "teacher_bleu").items():
        yield f"## A teacher of test BLEU {teacher_bleu:.2f}"
        yield harness.markdown_table([*_row_cells(own, teacher_bleu)])
    yield (
        f"sacreBLEU `{signature()}`, greedy search; validation on `val`, test "
        "on `test_2016_flickr`."
    )
    yield "## The recipes"
    yield harness.markdown_table(
        [
            {
                "row": row,
                **{
                    name.replace("_", " "): str(runs[0]["recipe"][name])
                    for name in asdict(BASE)
                },
            }
            for row, runs in _grouped(rows, "row").items()
        ]
    )
    names = list(_grouped(rows, "row"))
    harness.plot_lines(
        {
            f"teacher of {bleu:.2f}": [
                (run["test_bleu"] - bleu, names.index(run["row"]))
                for run in runs
            ]
            for bleu, runs in _grouped(rows, "teacher_bleu").items()
        },
        folder / "recipe.png",
        scatter=True,
        rows=names,
        xlabel="sacreBLEU, test, against the teacher",
        title=f"{COMPRESSION:g}x, one dot a seed",
    )
    yield "![Distance from the teacher](recipe.png)"


def _grouped(rows: list[dict], key: str) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _row_cells(rows: list[dict], teacher_bleu: float) -> Iterator[dict]:
    """What each row has reached."""
    mean = statistics.mean
    by_row = _grouped(rows, "row")
    means = {
        name: mean(run["test_bleu"] for run in runs)
        for name, runs in by_row.items()
    }
    for name, runs in by_row.items():
        # The teacher trained on for as long, at its best rate.
        controls = [
            means[control]
            for control in CONTROLS
            if control in means
            and CONTROLS[control].epochs == runs[0]["recipe"]["epochs"]
        ]
        delta = means[name] - max(controls) if controls else None
        # Measured only in earlier runs.
        known = [r["validation_bleu"] for r in runs if "validation_bleu" in r]
        validation = mean(known) if known else None
        yield {
            "row": name,
            "seeds": str(len(runs)),
            "val. nats": f"{mean(r['validation_nll'][-1] for r in runs):.3f}",
            "val. BLEU": harness.formatted(validation, "{:.2f}"),
            "test BLEU": f"{means[name]:.2f}",
            "Δ": f"{means[name] - teacher_bleu:+.2f}",
            "Δ control": harness.formatted(delta, "{:+.2f}"),
            "each": ", ".join(f"{run['test_bleu']:.2f}" for run in runs),
        }
