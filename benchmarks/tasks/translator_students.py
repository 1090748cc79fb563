"""Copies of a translator: how they are trained, and as LiteRT files."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks.tasks.marian import Translator
from benchmarks.tasks.marian import greedy_search
from benchmarks.tasks.marian_file import TABLE
from benchmarks.tasks.pretrained import warm_cosine
from benchmarks.tasks.translator import TranslatorTask
from benchmarks.tasks.translator import batches

# Positions of a batch, half of what is evaluated together.
POSITIONS = 512
TIMED_SENTENCES = 50


def with_table(task: TranslatorTask, table: np.ndarray) -> keras.Model:
    """A copy of the model with another table of floats."""
    model = Translator(task.translator.sizes).model
    model.set_weights(task.model.get_weights())
    model.get_layer(TABLE).embeddings.assign(table)
    return model


def distill(
    model: keras.Model,
    task: TranslatorTask,
    labelled: int,
    steps: int,
    learning_rate: float,
    train: str = "tables",
) -> dict:
    """Trains a compressed copy towards the model's predictions.

    Args:
        model: The copy.
        task: Has the model and the sentences.
        labelled: How many sentences, in the model's own translation.
        steps: How many batches.
        learning_rate: The largest of Adam.
        train: `"tables"` or `"all"` weights.

    Returns:
        These numbers, and that of the tokens seen.
    """
    distiller = kde.Distiller(
        task.model,
        model,
        [kde.LogitsDistillation()],
        student_loss_weight=0.3,
        student_training=False,
        train=train,
    )
    distiller.compile(
        keras.optimizers.Adam(
            warm_cosine(learning_rate, steps),
            beta_2=0.98,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    training = [*batches(task.labelled(labelled), POSITIONS)]
    random.Random(0).shuffle(training)
    given = [*itertools.islice(itertools.cycle(training), steps)]
    distiller.fit(
        (batch for batch in given),
        steps_per_epoch=steps,
        shuffle=False,  # it is already
        verbose=2,
    )
    return {
        "steps": steps,
        "labelled": labelled,
        "learning_rate": learning_rate,
        "trained_tokens": int(sum(weights.sum() for *_, weights in given)),
    }


def in_litert(
    model: keras.Model, task: TranslatorTask, texts: list[str]
) -> dict:
    """Bytes and speed of the row's file, and whether it says the same."""
    from ai_edge_litert.interpreter import Interpreter

    sizes = task.translator.sizes
    parts = Translator(sizes, model).signatures()
    sources = [source for source, _ in task.texts[:TIMED_SENTENCES]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        file = kde.export_litert(model, path, signatures=parts, verbose=False)
        interpreter = Interpreter(str(path), num_threads=1)
        encode, decode = map(interpreter.get_signature_runner, parts)

        def search(ids: list[int]) -> list[int]:
            (found,) = greedy_search(
                lambda inputs: encode(**inputs),
                lambda inputs: decode(**inputs),
                [ids],
                sizes,
            )
            return found

        task.translate_alone(search, sources[:1])
        start = time.process_time()
        found = task.translate_alone(search, sources)
        seconds = time.process_time() - start
    return {
        "file_bytes": file.bytes,
        "ms": 1e3 * seconds / len(sources),
        "file_same": float(np.mean([a == b for a, b in zip(found, texts)])),
    }
