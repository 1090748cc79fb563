"""The rows: how each student is made, and how it is fine-tuned.

Every student starts from the same teacher and sees the same batches as often.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks import rivals
from benchmarks.translation import tables
from benchmarks.translation.task import Task
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule
from keras_distilled_embedding.factorization import factor_bytes
from keras_distilled_embedding.layers import DistilledEmbedding

SIZES = (4.0, 8.0, 16.0, 32.0, 64.0)
KEY_SIZES = (8.0, 32.0)
OURS = "ours"
WEIGHTED = "ours, rows weighted"
CONTROL = "teacher, trained on"


@dataclass(frozen=True)
class Row:
    """One row of the grid.

    Args:
        method: A key of `METHODS`.
        size: How many times fewer bytes than the float32 table; 1 where the
            method has no choice.
        loss: A key of `LOSSES`.
    """

    method: str
    size: float = 1.0
    loss: str = "logits"

    @property
    def name(self) -> str:
        """As the report calls it, without the size."""
        if self.loss == "logits" or self.method in OWN_LOSS:
            return self.method
        return f"{self.method}, {LOSSES[self.loss][0]}"

    @property
    def slug(self) -> str:
        """For names of files."""
        text = f"{self.method} {self.loss} {self.size:g}x"
        return re.sub(r"\W+", "_", text.lower())


# What is minimised: its name, and what differs from the setting's recipe.
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


def recipe(row: Row, task: Task) -> Recipe:
    """How a row's student is trained."""
    setting = task.setting
    if row.method in (CONTROL, "int8 table", "int4 table"):
        # Nothing is missing that a large step would bring back.
        return _task_loss_alone(setting.control, setting.shape.dropout)
    if row.method == SCRATCH:
        # The teacher's budget and the students' together.
        epochs = setting.teacher.epochs + setting.student.epochs
        return _task_loss_alone(replace(setting.student, epochs=epochs), 0.0)
    return replace(setting.student, **LOSSES[row.loss][1])


def _task_loss_alone(schedule: Schedule, dropout: float) -> Recipe:
    return Recipe(
        schedule.epochs,
        schedule.peak_learning_rate,
        schedule.warmup,
        schedule.smoothing,
        student_loss_weight=1.0,
        dropout=dropout,
    )


def compressed(
    weighted: bool = False, **options: object
) -> Callable[[Task, float], keras.Model]:
    """A method of the package itself."""

    def make(task: Task, size: float) -> keras.Model:
        frequencies = task.token_frequencies if weighted else None
        return kde.compress(
            task.teacher(),
            size,
            token_frequencies=frequencies,
            verbose=0,
            **options,
        )

    return make


def closed_form_alone(task: Task, size: float) -> keras.Model:
    """Ours, before any sweep of alternating least squares."""
    layer = DistilledEmbedding.from_embedding(
        task.teacher().get_layer("token_embedding"), compression=size, sweeps=0
    )
    return task.with_table(layer)


def funnel(task: Task, size: float) -> keras.Model | None:
    """Ours with the non-linear term, narrower for smaller tables."""
    width = task.setting.shape.d_model
    hidden_dim = max(1, int(width * 8 / max(size, 8)))
    left = task.table_bytes / 4 / size - hidden_dim * (width + 1)
    if left < task.vocabulary_size + width + hidden_dim:  # not even rank 1
        return None
    return compressed(hidden_dim=hidden_dim)(task, size)


def rounded_factors(
    rounding: str,
) -> Callable[[Task, float], keras.Model | None]:
    """Ours, trained with its codes rounded, within so many bytes."""

    def make(task: Task, size: float) -> keras.Model | None:
        shape = task.vocabulary_size, task.setting.shape.d_model
        budget = int(task.table_bytes / size)
        if factor_bytes(1, *shape, rounding) > budget:
            return None
        return kde.compress(
            task.teacher(),
            max_bytes=budget,
            quantization=rounding,
            verbose=0,
        )

    return make


def rival(
    approximate: rivals.Rival, layer: type[tables.ComputedTable]
) -> Callable[[Task, float], keras.Model | None]:
    """A method that makes an approximation of the table."""

    def make(task: Task, size: float) -> keras.Model | None:
        table = teacher_table(task)
        weights = task.token_frequencies + 1.0
        made = approximate(table, weights, int(table.nbytes / size))
        if made is None:  # nothing of this kind is so small
            return None
        return task.with_table(layer(table.shape, made))

    return make


def rounded_table(rounding: str) -> Callable[[Task, float], keras.Model]:
    """The full table in small integers."""

    def make(task: Task, size: float) -> keras.Model:
        del size
        layer = tables.RoundedTable(teacher_table(task), rounding)
        return task.with_table(layer, dropout=task.setting.shape.dropout)

    return make


def smaller_model(task: Task, size: float) -> keras.Model | None:
    """A Transformer so much narrower, with new weights."""
    shape = task.setting.shape
    width = int(shape.d_model / size)
    if width < 4:
        return None
    return task.build(
        seed=task.seed + 1,
        d_model=width,
        num_heads=max(1, min(shape.num_heads, width // 8)),
        feed_forward_dim=max(8, int(shape.feed_forward_dim / size)),
    )


def teacher_again(task: Task, size: float) -> keras.Model:
    """The teacher itself, with the dropout it was trained with."""
    del size
    return task.teacher(task.setting.shape.dropout)


def teacher_table(task: Task) -> np.ndarray:
    layer = task.teacher().get_layer("token_embedding")
    return keras.ops.convert_to_numpy(layer.embeddings)


SCRATCH = "smaller model, from scratch"
FUNNEL = "ours, funnel"
PAPER = "the paper's recipe"
METHODS: dict[str, Callable[[Task, float], keras.Model | None]] = {
    CONTROL: teacher_again,
    OURS: compressed(),
    WEIGHTED: compressed(weighted=True),
    "ours, no sweeps": closed_form_alone,
    FUNNEL: funnel,
    "ours, int4": rounded_factors("int4"),
    # Ours without its activation, nothing else.
    "truncated SVD": compressed(activation=None),
    "weighted SVD": compressed(weighted=True, activation=None),
    "GroupReduce": rival(rivals.group_reduce, tables.GroupedTable),
    "Tensor-Train": rival(rivals.tensor_train, tables.TensorTrainTable),
    "product quantisation": rival(
        rivals.product_quantization, tables.ProductQuantizedTable
    ),
    "nested ranks": rival(tables.nested_ranks, tables.NestedTable),
    PAPER: compressed(method="learned"),
    "smaller model, logits": smaller_model,
    SCRATCH: smaller_model,
    "int8 table": rounded_table("int8"),
    "int4 table": rounded_table("int4"),
}
# Their loss is part of what they are, not an ablation.
OWN_LOSS = {PAPER, SCRATCH, CONTROL, "int8 table", "int4 table"}


def rows(task: str) -> list[Row]:
    """The grid of a task, in the order of its worth."""
    eight, thirty_two = KEY_SIZES
    key = [
        Row(CONTROL),
        Row(OURS, eight),
        Row("truncated SVD", eight),
        Row(WEIGHTED, eight),
        Row("weighted SVD", eight),
        Row("GroupReduce", eight),
        Row(OURS, 4.0),
        Row(OURS, 2.0),
        Row(OURS, 16.0),
        Row("Tensor-Train", eight),
        Row("product quantisation", eight),
        Row(OURS, thirty_two),
        Row("GroupReduce", thirty_two),
        Row("smaller model, logits", eight),
        Row("nested ranks", eight),
        Row(PAPER, eight, "embedding"),
        Row("ours, int4", thirty_two),
        Row("truncated SVD", thirty_two),
        Row("ours, int4", 16.0),
        Row("int4 table"),
        Row("GroupReduce", 4.0),
        Row("truncated SVD", 4.0),
        Row(FUNNEL, eight),
        Row(OURS, eight, "none"),
        Row(OURS, eight, "embedding"),
        Row(OURS, eight, "both"),
        Row("Tensor-Train", thirty_two),
        Row("nested ranks", thirty_two),
        Row(PAPER, thirty_two, "embedding"),
        Row("smaller model, logits", thirty_two),
        Row(SCRATCH, eight),
        Row("int8 table"),
        Row("ours, no sweeps", eight),
        Row("ours, int4", eight),
        Row("truncated SVD", 2.0),
        Row("weighted SVD", 2.0),
        Row(WEIGHTED, 2.0),
        Row(WEIGHTED, 4.0),
        Row(WEIGHTED, 16.0),
        Row(WEIGHTED, thirty_two),
        Row(OURS, 64.0),
        Row("ours, int4", 64.0),
        Row(SCRATCH, thirty_two),
        Row(FUNNEL, thirty_two),
    ]
    if task == "multi30k":
        return key
    everything = [
        Row(method, size, "embedding" if method == PAPER else "logits")
        for size in SIZES
        for method in METHODS
        if method not in (CONTROL, "int8 table", "int4 table")
    ]
    return list(dict.fromkeys([*key, *everything]))
