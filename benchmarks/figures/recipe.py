"""Which recipe brings a compressed translation model back: an ablation.

Every row fine-tunes the same 8x smaller student, made from the same trained
teacher, for the same number of steps on Multi30k, with each seed. Rows of
different teachers are compared by their distance from their own teacher.
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
from matplotlib.figure import Figure

from benchmarks.harness.plots import save
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import formatted
from benchmarks.harness.tables import markdown_table
from benchmarks.methods import METHODS
from benchmarks.tasks.translation import SETTINGS
from benchmarks.tasks.translation import Pairs
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import ready_task
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from examples.nmt.train import Recipe

TITLE = "What brings a compressed translation model back"
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
    "logits, sequence level": replace(BASE, sequence_level=True),
    "logits, task 0.5": replace(BASE, student_loss_weight=0.5),
    "logits, task 0": replace(BASE, student_loss_weight=0.0),
    "both, table 1": replace(BASE, embedding_weight=1.0),
    f"logits, {LONGER} epochs": replace(BASE, epochs=LONGER),
}
# Tried with one seed only, on the way to `BASE`.
EXPLORED = {
    "logits, rate 1e-3": replace(BASE, peak_learning_rate=1e-3),
    "logits, rate 4e-3": replace(BASE, peak_learning_rate=4e-3),
    "logits, dropout 0.1": replace(BASE, dropout=0.1),
    "logits, hidden states": replace(BASE, hidden_weight=1.0),
    "logits, temperature 2": replace(BASE, temperature=2.0),
    "logits, no smoothing": replace(BASE, smoothing=0.0),
}
# The teacher itself, trained on with the same number of steps.
_CONTROL = replace(
    BASE,
    student_loss_weight=1.0,
    peak_learning_rate=3e-4,
    dropout=SETTINGS["multi30k"].shape.dropout,
)
CONTROLS = {
    "teacher, rate 3e-04": _CONTROL,
    "teacher, rate 1e-03": replace(_CONTROL, peak_learning_rate=1e-3),
    f"teacher, {LONGER} epochs": replace(_CONTROL, epochs=LONGER),
}
ALL = {**ROWS, **CONTROLS, **EXPLORED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task-dir", type=Path, default=Path("runs/tasks"))
    add("--rows", nargs="+", choices=ALL, default=list(ALL), metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[0, 1])


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Fine-tunes and evaluates the chosen rows with each seed."""
    name = "quick" if options.quick else "multi30k"
    task = ready_task(name, options.task_dir, data_dir=options.data_dir)
    teacher = rows.finish(
        "teacher",
        lambda: {"test_bleu": _bleu(task, task.teacher(), "test")},
        wait=True,
    )
    for row in options.rows:
        for seed in options.seeds:
            if row not in EXPLORED or seed == 0:
                rows.finish(
                    f"{row} seed {seed}",
                    partial(measure, row, seed, task, teacher["test_bleu"]),
                )


def measure(row: str, seed: int, task: Task, teacher_bleu: float) -> dict:
    """Fine-tunes and evaluates one row."""
    recipe = ALL[row]
    keras.utils.set_random_seed(seed)
    if row in CONTROLS:
        student = task.teacher(recipe.dropout)
    else:
        budget = int(task.table.values.nbytes / COMPRESSION)
        student = METHODS[METHOD].student(task, budget, recipe.dropout)
    pairs = teachers_pairs(task) if recipe.sequence_level else None
    history = task.fine_tune(
        student, recipe, cached=False, seed=seed, pairs=pairs
    )
    return {
        "teacher_bleu": teacher_bleu,
        "name": row,
        "seed": seed,
        "recipe": asdict(recipe),
        "validation_nll": history.history["val_nll"],
        "validation_bleu": _bleu(task, student, "validation"),
        "test_bleu": _bleu(task, student, "test"),
    }


def teachers_pairs(task: Task) -> Pairs:
    """The training text as its teacher translates it, with 4 beams."""
    from examples.nmt.data import Batching
    from examples.nmt.data import Vocabulary
    from examples.nmt.translate import Translator
    from examples.nmt.translate import translate_to_file

    vocabulary = Vocabulary(task.vocabulary_path.read_bytes())
    shape = task.setting.shape
    translator = Translator(
        task.teacher(),
        vocabulary,
        Batching(widths=shape.widths, tokens=shape.tokens),
        num_beams=4,
        jit_compile=True,
    )
    path = task.folder / f"train_teacher_{task.seed}_beam4.txt"
    source = task.texts["train"]["source"]
    target = vocabulary.encode(translate_to_file(translator, source, path))
    return Pairs(task.pairs("train").source, [ids.numpy() for ids in target])


def _bleu(task: Task, model: keras.Model, split: str) -> float:
    text = task.decode(task.translate(model, split))
    return score(text, task.texts[split]["target"])


# The report


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rows, and those of earlier teachers."""
    del options
    done = [row for row in rows.read_all() if "recipe" in row]
    order = {
        (name, seed): (i, seed)
        for i, name in enumerate(ALL)
        for seed in {row["seed"] for row in done}
    }
    done.sort(key=lambda row: order[row["name"], row["seed"]])
    for row in done:
        row["row"] = row["name"]
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
    yield (
        f"Multi30k en-de, table 8000 x 256 compressed {COMPRESSION:g}x, "
        f"{BASE.epochs} epochs each but where the row says otherwise. Means "
        "over the seeds; the test BLEU of each seed beside it. Δ: against the "
        "teacher as it was; Δ control: against the best of the rows that "
        "train that teacher on for as many epochs. Rows of different teachers "
        "compare by their Δ."
    )
    for teacher_bleu, own in _grouped(rows, "teacher_bleu").items():
        yield f"## A teacher of test BLEU {teacher_bleu:.2f}"
        yield markdown_table([*_row_cells(own, teacher_bleu)])
    yield (
        f"sacreBLEU `{signature()}`, greedy search; validation on `val`, test "
        "on `test_2016_flickr`."
    )
    yield "## The recipes"
    yield markdown_table(
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
    _plot(rows, folder / "recipe.png")
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
        yield {
            "row": name,
            "seeds": str(len(runs)),
            "val. nats": f"{mean(r['validation_nll'][-1] for r in runs):.3f}",
            "val. BLEU": f"{mean(r['validation_bleu'] for r in runs):.2f}",
            "test BLEU": f"{means[name]:.2f}",
            "Δ": f"{means[name] - teacher_bleu:+.2f}",
            "Δ control": formatted(delta, "{:+.2f}"),
            "each": ", ".join(f"{run['test_bleu']:.2f}" for run in runs),
        }


def _plot(rows: list[dict], path: Path) -> None:
    """Draws how far every run is from its teacher, a line for each row."""
    names = list(_grouped(rows, "row"))
    figure = Figure(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="grey", linestyle="--")
    for teacher_bleu, runs in _grouped(rows, "teacher_bleu").items():
        axes.plot(
            [run["test_bleu"] - teacher_bleu for run in runs],
            [names.index(run["row"]) for run in runs],
            "o",
            alpha=0.7,
            label=f"teacher of {teacher_bleu:.2f}",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(
        xlabel="sacreBLEU, test, against the teacher",
        title=f"{COMPRESSION:g}x, one dot a seed",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
