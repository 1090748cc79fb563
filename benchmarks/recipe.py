"""Which recipe brings a compressed translation model back: an ablation.

Every row fine-tunes the same 8x smaller student, made from the same trained
teacher, for the same number of steps on Multi30k, with each seed. A row is
written when it is done: a run that is stopped goes on where it was. Several
processes may share the work, each with seeds of its own:

    python -m benchmarks.recipe --data-dir DIR --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import tensorflow as tf

import keras_distilled_embedding as kde
from examples.nmt.data import ParallelText
from examples.nmt.evaluate import score
from examples.nmt.pipeline import PRESETS
from examples.nmt.pipeline import Run
from examples.nmt.train import Recipe
from examples.nmt.train import distil
from examples.nmt.translate import Translator

COMPRESSION = 8.0
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
FULL = 7  # epochs: fewer than the teacher's own 9

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
}

# Tried with one seed only, on the way to `BASE`.
EXPLORED = {
    "logits, rate 1e-3": replace(BASE, peak_learning_rate=1e-3),
    "logits, rate 4e-3": replace(BASE, peak_learning_rate=4e-3),
    "logits, dropout 0.1": replace(BASE, dropout=0.1),
    "logits, factors 3x": replace(BASE, factor_rate=3.0),
    "logits, hidden states": replace(BASE, hidden_weight=1.0),
    "logits, temperature 2": replace(BASE, temperature=2.0),
    "logits, no smoothing": replace(BASE, smoothing=0.0),
    "none, sequence level": replace(
        BASE, student_loss_weight=1.0, sequence_level=True
    ),
}

# The teacher itself, trained on with the same number of steps.
CONTROLS = {
    f"teacher, rate {rate:.0e}": replace(
        BASE,
        student_loss_weight=1.0,
        peak_learning_rate=rate,
        dropout=PRESETS["multi30k"].dropout,
    )
    for rate in (3e-4, 1e-3)
}
ALL = {**ROWS, **CONTROLS, **EXPLORED}


class Ablation:
    """The rows of one work directory.

    Args:
        work_dir: Folder of the teacher and of a file for each row and seed.
        data_dir: Folder of Multi30k's files, see `load_corpus`.
    """

    def __init__(self, work_dir: Path, data_dir: str | None) -> None:
        settings = replace(
            PRESETS["multi30k"], student=replace(BASE, sequence_level=True)
        )
        self.run = Run(settings, work_dir / "teacher", data_dir)
        self.work_dir = work_dir

    def path(self, row: str, seed: int) -> Path:
        return self.work_dir / f"{row.replace(' ', '_')}__{seed}.json"

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
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(part, path)

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe")
    add = parser.add_argument
    add("--data-dir", help="folder of Multi30k's .gz files (else: download)")
    add("--work-dir", type=Path, default=Path("runs/recipe"))
    add("--rows", nargs="+", choices=ALL, default=list(ALL), metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--threads", type=int, help="of TensorFlow; default: all cores")
    options = parser.parse_args(arguments)
    if options.threads:
        tf.config.threading.set_intra_op_parallelism_threads(options.threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    ablation = Ablation(options.work_dir, options.data_dir)
    for row in options.rows:
        for seed in options.seeds[: 1 if row in EXPLORED else None]:
            ablation.finish(row, ALL[row], seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
