"""How a student is made and trained: the same for every task and method."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras

from benchmarks.methods import METHODS
from benchmarks.methods.storage import store_as
from benchmarks.methods.storage import table_bytes
from benchmarks.methods.storage import table_layer
from examples.nmt.train import Recipe

CONTROL = "teacher, trained on"
# What is minimized: its name, and what differs from a task's recipe.
LOSSES: dict[str, tuple[str, dict]] = {
    "logits": ("logits distillation", {}),
    "none": ("task loss alone", {"student_loss_weight": 1.0}),
    "embedding": (
        "embedding distillation",
        {
            "student_loss_weight": 0.5,
            "logits_weight": 0.0,
            "embedding_weight": 1.0,
        },
    ),
    "both": ("logits and embedding distillation", {"embedding_weight": 0.1}),
}


def make_student(
    task: Any, method: str, size: float, dropout: float = 0.0
) -> keras.Model | None:
    """Returns a student before its training.

    Args:
        task: A translation or a language model's task.
        method: A key of `METHODS`, or `CONTROL`.
        size: How many times fewer bytes than the float32 table.
        dropout: Of the student.

    Returns:
        The student; `None` where there is nothing so small.
    """
    if method == CONTROL:
        return task.teacher(dropout)
    budget = int(task.table.values.nbytes / size)
    return METHODS[method].student(task, budget, dropout)


def measure_student(
    task: Any,
    student: keras.Model | None,
    recipe: Recipe,
    weights: Path | None = None,
    **options: Any,
) -> dict:
    """Trains a student and evaluates it in every form that it is stored in.

    Args:
        task: The task.
        student: The student, which is trained in place.
        recipe: How it is trained.
        weights: File for the trained weights.
        **options: Further options of the task's `fine_tune`.

    Returns:
        `"recipe"`, `"before_nll"`, `"validation_nll"` by epoch, `"rank"`, and
        of each form in `"stored"` its bytes and what `task.evaluate` returns;
        or why there is nothing.
    """
    result = {"seed": task.seed, "recipe": asdict(recipe)}
    if student is None:
        return result | {"skipped": "nothing of this kind is so small"}
    result["before_nll"] = task.nll(student)
    history = task.fine_tune(student, recipe, **options)
    if weights is not None:
        student.save_weights(weights)
    layer = table_layer(student)
    return result | {
        "validation_nll": history.history["val_nll"],
        "rank": getattr(layer, "rank", None),
        "parameters": student.count_params(),
        "stored": evaluate_stored(task, student),
    }


def evaluate_stored(task: Any, model: keras.Model) -> dict[str, dict]:
    """Evaluates a trained model in every form that its table is stored in.

    That is the one that it was trained in, or floats and then, where it takes
    fewer bytes, int8, in which the model is left.
    """
    layer = table_layer(model)

    def measure(form: str | None) -> dict:
        return {
            "table_bytes": table_bytes(layer, form),
            **task.evaluate(model),
        }

    quantization = getattr(layer, "quantization", None)
    if quantization:
        return {quantization: measure(quantization)}
    stored = {"float32": measure(None)}
    if table_bytes(layer, "int8") < table_bytes(layer):
        store_as(layer, "int8")
        stored["int8"] = measure("int8")
    return stored


def nats_a_token(
    model: keras.Model, batches: Any, jit_compile: bool = False
) -> float:
    """Mean cross-entropy of the labels of some batches."""
    metric = keras.metrics.SparseCategoricalCrossentropy(
        from_logits=True, name="nll"
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[metric],
        jit_compile=jit_compile,
    )
    return model.evaluate(batches, verbose=0, return_dict=True)["nll"]
