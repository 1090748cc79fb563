"""Which recipe brings a compressed translation model back: an ablation.

Every row fine-tunes the same 8x smaller student, made from the same trained
teacher, for the same number of steps on Multi30k, with each seed. A row is
written when it is done: a run that is stopped goes on where it was. A run in
another work directory trains another teacher; the report keeps the rows of
earlier ones, and compares each row with its own. Several processes may share
the work, each with seeds of its own:

    python -m benchmarks.recipe --data-dir DIR --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

import keras_distilled_embedding as kde
from benchmarks._report import environment
from benchmarks._report import write_text
from benchmarks._tables import teacher_run
from benchmarks._threads import limit_threads
from examples.nmt.data import ParallelText
from examples.nmt.evaluate import markdown_table
from examples.nmt.evaluate import score
from examples.nmt.evaluate import signature
from examples.nmt.pipeline import PRESETS
from examples.nmt.train import Recipe
from examples.nmt.train import distil
from examples.nmt.translate import Translator

COMPRESSION = 8.0


@dataclass(frozen=True)
class FactorRateRecipe(Recipe):
    """A recipe with larger steps for the table's factors.

    Args:
        factor_rate: How many times larger than those of other weights.
    """

    factor_rate: float = 3.0

    def optimizer(self, steps_per_epoch: int) -> keras.optimizers.Optimizer:
        optimizer = super().optimizer(steps_per_epoch)
        update = optimizer.update_step

        def scaled_update(gradient, variable, learning_rate):
            # A TensorFlow variable, "codes:0", on that backend.
            if re.match("(codes|basis)\\b", variable.name.split("/")[-1]):
                learning_rate = self.factor_rate * learning_rate
            update(gradient, variable, learning_rate)

        optimizer.update_step = scaled_update
        return optimizer


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
    "logits, factors 3x": FactorRateRecipe(**asdict(BASE)),
    "logits, hidden states": replace(BASE, hidden_weight=1.0),
    "logits, temperature 2": replace(BASE, temperature=2.0),
    "logits, no smoothing": replace(BASE, smoothing=0.0),
    "none, sequence level": replace(
        BASE, student_loss_weight=1.0, sequence_level=True
    ),
}

# The teacher itself, trained on with the same number of steps.
_CONTROL = replace(
    BASE,
    student_loss_weight=1.0,
    peak_learning_rate=3e-4,
    dropout=PRESETS["multi30k"].dropout,
)
CONTROLS = {
    "teacher, rate 3e-04": _CONTROL,
    "teacher, rate 1e-03": replace(_CONTROL, peak_learning_rate=1e-3),
    f"teacher, {LONGER} epochs": replace(_CONTROL, epochs=LONGER),
}
ALL = {**ROWS, **CONTROLS, **EXPLORED}


class Ablation:
    """The rows of one work directory.

    Args:
        work_dir: Folder of the teacher and of a file for each row and seed.
        data_dir: Folder of Multi30k's files, see `load_corpus`.
    """

    def __init__(self, work_dir: Path, data_dir: str | None) -> None:
        self.run = teacher_run(work_dir / "teacher", data_dir)
        self.work_dir = work_dir

    def path(self, row: str, seed: int) -> Path:
        return self.work_dir / f"{re.sub(r'[ ,]+', '_', row)}__{seed}.json"

    def finish(self, row: str, recipe: Recipe, seed: int) -> None:
        """Fine-tunes, evaluates and writes one row."""
        path = self.path(row, seed)
        if path.exists():
            return
        print(f"{row}, seed {seed}", flush=True)
        self.run.train_teacher()
        keras.utils.set_random_seed(seed)
        start, cpu = time.perf_counter(), time.process_time()
        student, history = self._train(recipe, seed, row not in CONTROLS)
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
        corpus = self.run.corpus
        result = {
            "row": row,
            "seed": seed,
            "recipe": asdict(recipe),
            "validation_nll": history.history["val_nll"],
            "validation_bleu": self._bleu(student, corpus.validation),
            "test_bleu": self._bleu(student, corpus.test),
            "wall_s": round(seconds, 1),
            "cpu_s": round(cpu, 1),
        }
        write_text(path, json.dumps(result, indent=2) + "\n")

    def teacher_bleu(self) -> float:
        """Of the teacher as it was, on the test set."""
        path = self.work_dir / "teacher.json"
        if not path.exists():
            teacher = self.run.model("teacher")
            bleu = self._bleu(teacher, self.run.corpus.test)
            write_text(path, json.dumps(bleu))
        return json.loads(path.read_text())

    def _train(
        self, recipe: Recipe, seed: int, compressed: bool
    ) -> tuple[keras.Model, keras.callbacks.History]:
        run = self.run
        batches = run.settings.batching.batches
        text = run.training_text if recipe.sequence_level else run.corpus.train
        arguments = dict(
            training=batches(text, run.vocabulary, shuffle_seed=seed),
            validation=batches(run.corpus.validation, run.vocabulary),
            schedule=recipe,
            verbose=2,
        )
        student = run.teacher_with_dropout(recipe.dropout)
        if compressed:
            student = kde.compress(
                student,
                COMPRESSION,
                token_frequencies=run.vocabulary.token_frequencies(
                    run.corpus.train
                ),
                verbose=0,
            )
        keras.utils.set_random_seed(seed)
        return student, distil(run.model("teacher"), student, **arguments)

    def _bleu(
        self, model: keras.Model, text: ParallelText, num_beams: int = 1
    ) -> float:
        translator = Translator(
            model, self.run.vocabulary, self.run.settings.batching, num_beams
        )
        return score(translator.translate(text.source), text.target)

    def results(self) -> list[dict]:
        """What is there so far, in the order of the rows."""
        paths = (self.path(row, seed) for row in ALL for seed in range(100))
        return [
            {"teacher_bleu": self.teacher_bleu(), **json.loads(p.read_text())}
            for p in paths
            if p.exists()
        ]


def with_earlier(results: list[dict], folder: Path) -> list[dict]:
    """Adds the rows of the report in `folder` that are of other teachers."""
    path = folder / "results.json"
    if not path.exists():
        return results
    teachers = {result["teacher_bleu"] for result in results}
    earlier = json.loads(path.read_text())
    return [r for r in earlier if r["teacher_bleu"] not in teachers] + results


def write_report(results: list[dict], folder: Path) -> None:
    """Writes a table for each teacher, the picture and every run's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# What brings a compressed translation model back",
        f"Multi30k en-de, table 8000 x 256 compressed {COMPRESSION:g}x, "
        f"{BASE.epochs} epochs each but where the row says otherwise. Means "
        "over the seeds; the test BLEU of each seed beside it. Δ: against the "
        "teacher as it was; Δ control: against the best of the rows that "
        "train that teacher on for as many epochs. Rows of different teachers "
        "compare by their Δ.",
    ]
    for teacher_bleu, rows in _by_teacher(results).items():
        parts += [
            f"## A teacher of test BLEU {teacher_bleu:.2f}",
            markdown_table(table_cells(rows, teacher_bleu)),
        ]
    parts += [
        f"sacreBLEU `{signature()}`, greedy search; validation on `val`, test "
        "on `test_2016_flickr`.",
        "## The recipes",
        markdown_table(recipe_cells(results)),
        environment(),
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    plot(results, folder / "recipe.png")


def _by_teacher(results: list[dict]) -> dict[float, list[dict]]:
    return _grouped(results, "teacher_bleu")


def _by_row(results: list[dict]) -> dict[str, list[dict]]:
    return _grouped(results, "row")


def _grouped(results: list[dict], key: str) -> dict:
    groups: dict = {}
    for result in results:
        groups.setdefault(result[key], []).append(result)
    return groups


def table_cells(results: list[dict], teacher_bleu: float) -> list[list[str]]:
    """Headings, then what each row reached."""
    mean = statistics.mean
    rows = _by_row(results)
    means = {
        row: mean(run["test_bleu"] for run in runs)
        for row, runs in rows.items()
    }

    def control(epochs: int) -> float | None:
        """The teacher trained on for as long: the best there is."""
        found = [
            means[row]
            for row in CONTROLS
            if row in means and CONTROLS[row].epochs == epochs
        ]
        return max(found, default=None)

    cells = [
        [
            "row",
            "seeds",
            "val. nats",
            "val. BLEU",
            "test BLEU",
            "Δ",
            "Δ control",
            "each",
        ]
    ]
    for row, runs in rows.items():
        best = control(runs[0]["recipe"]["epochs"])
        cells.append(
            [
                row,
                str(len(runs)),
                f"{mean(run['validation_nll'][-1] for run in runs):.3f}",
                f"{mean(run['validation_bleu'] for run in runs):.2f}",
                f"{means[row]:.2f}",
                f"{means[row] - teacher_bleu:+.2f}",
                "" if best is None else f"{means[row] - best:+.2f}",
                ", ".join(f"{run['test_bleu']:.2f}" for run in runs),
            ]
        )
    return cells


def recipe_cells(results: list[dict]) -> list[list[str]]:
    """Headings, then the settings of each row."""
    names = list(asdict(BASE))
    cells = [["row", *(name.replace("_", " ") for name in names)]]
    for row, runs in _by_row(results).items():
        recipe = runs[0]["recipe"]
        cells.append([row, *(str(recipe[name]) for name in names)])
    return cells


def plot(results: list[dict], path: Path) -> None:
    """Draws how far every run is from its teacher, a line for each row."""
    from matplotlib.figure import Figure

    names = list(_by_row(results))
    figure = Figure(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="grey", linestyle="--")
    for teacher_bleu, runs in _by_teacher(results).items():
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
        title="8x, one dot a seed",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe")
    add = parser.add_argument
    add("--data-dir", help="folder of Multi30k's .gz files (else: download)")
    add("--work-dir", type=Path, default=Path("runs/recipe"))
    add("--rows", nargs="+", choices=ALL, default=list(ALL), metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add(
        "--output",
        type=Path,
        default=Path("benchmarks/results/recipe"),
        help="folder of the report",
    )
    add("--threads", type=int, help="of TensorFlow; default: all cores")
    options = parser.parse_args(arguments)
    if options.threads:
        limit_threads(options.threads)
    ablation = Ablation(options.work_dir, options.data_dir)
    for row in options.rows:
        for seed in options.seeds:
            if row in EXPLORED and seed > 0:
                continue
            ablation.finish(row, ALL[row], seed)
    results = with_earlier(ablation.results(), options.output)
    write_report(results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
