"""Computing any distillation loss, the weights of samples included."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding._utils.masked_mean import mean_over_tokens
from keras_distilled_embedding._utils.masked_mean import weights_by_output
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)


def evaluate_loss(
    loss: DistillationLoss,
    teacher_outputs: Any,
    student_outputs: Any,
    **context: Any,
) -> Any:
    """Computes any distillation loss, and gives it what it has a use for.

    `compute_loss` is called with those of `sample_weight`, `teacher` and
    `student` that its signature names or swallows. Keras's own two losses
    have a use for the weights, but no argument: they are computed here.

    Args:
        loss: A `keras.distillation.DistillationLoss`.
        teacher_outputs: Outputs of the teacher, or of one of its layers.
        student_outputs: Those of the student.
        **context: `sample_weight`, `teacher`, `student`.

    Returns:
        A scalar tensor.
    """
    if needs_teacher_outputs(loss) and not _are_cached(teacher_outputs):
        loss.validate_outputs(teacher_outputs, student_outputs)
    if type(loss) in _KERAS_LOSSES:
        return _weighted_keras_loss(
            loss, teacher_outputs, student_outputs, context["sample_weight"]
        )
    parameters = inspect.signature(loss.compute_loss).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = {p.name for p in parameters}
        context = {k: v for k, v in context.items() if k in named}
    return loss.compute_loss(teacher_outputs, student_outputs, **context)


def needs_teacher_outputs(loss: DistillationLoss) -> bool:
    """Whether the teacher has to run for `loss`."""
    return getattr(loss, "needs_teacher_outputs", True)


def _are_cached(outputs: Any) -> bool:
    return isinstance(keras.tree.flatten(outputs)[0], TopPredictions)


_KERAS_LOSSES = (
    keras.distillation.LogitsDistillation,
    keras.distillation.FeatureDistillation,
)


def _weighted_keras_loss(
    loss: DistillationLoss, teacher: Any, student: Any, sample_weight: Any
) -> Any:
    """One of Keras's losses, its mean weighted as the task's loss is."""
    temperature = getattr(loss, "temperature", 1.0)
    total = 0.0
    for function, t, s, weights in zip(
        keras.tree.flatten(loss.loss),
        keras.tree.flatten(teacher),
        keras.tree.flatten(student),
        weights_by_output(sample_weight, student),
    ):
        if function is None:
            continue
        pair = [ops.cast(x, "float32") / temperature for x in (t, s)]
        scale = 1.0
        if isinstance(loss, keras.distillation.LogitsDistillation) and (
            isinstance(function, keras.losses.KLDivergence)
        ):
            pair = [ops.softmax(x, axis=-1) for x in pair]
            scale = temperature**2
        # The `call` of a `keras.losses.Loss` is its values before their mean.
        values = getattr(function, "call", function)(*pair)
        total = total + scale * mean_over_tokens(values, weights, s)
    return total
