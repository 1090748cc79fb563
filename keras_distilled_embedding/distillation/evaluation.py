"""Running models once, and computing every loss from what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.masked_mean import mean_over_tokens
from keras_distilled_embedding._utils.masked_mean import weights_by_output

_KERAS_LOSSES = (
    keras.distillation.LogitsDistillation,
    keras.distillation.FeatureDistillation,
)


def needs_teacher_outputs(loss: DistillationLoss) -> bool:
    """Whether the teacher has to run for `loss`."""
    return getattr(loss, "needs_teacher_outputs", True)


def evaluate_loss(
    loss: DistillationLoss,
    teacher_run: ModelRun,
    student_run: ModelRun,
    teacher_outputs: Any,
    sample_weight: Any,
) -> Any:
    """Computes a loss from the outputs of the last runs.

    `teacher_outputs` take the place of the teacher's run, unless `None`.
    """
    student_outputs = student_run.outputs[_layer_name(loss, "student")]
    if needs_teacher_outputs(loss) and teacher_outputs is None:
        teacher_outputs = keras.tree.map_structure(
            ops.stop_gradient,
            teacher_run.outputs[_layer_name(loss, "teacher")],
        )
        loss.validate_outputs(teacher_outputs, student_outputs)
    if type(loss) in _KERAS_LOSSES:
        return _weighted_keras_loss(
            loss, teacher_outputs, student_outputs, sample_weight
        )
    context = {
        "sample_weight": sample_weight,
        "teacher": teacher_run.model,
        "student": student_run.model,
    }
    parameters = inspect.signature(loss.compute_loss).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        named = {p.name for p in parameters}
        context = {k: v for k, v in context.items() if k in named}
    return loss.compute_loss(teacher_outputs, student_outputs, **context)


def _layer_name(loss: DistillationLoss, argument: str) -> str | None:
    """The layer whose outputs a loss compares; `None` is the whole model."""
    return getattr(loss, f"{argument}_layer_name", None)


class ModelRun:
    """Runs a model, of any class, and keeps the outputs of some layers.

    The name `None` stands for the model; `argument` is its name in errors.
    """

    def __init__(
        self,
        model: keras.Model,
        losses: Iterable[DistillationLoss],
        argument: str,
    ) -> None:
        self.model = model
        self.outputs: dict[str | None, Any] = {}
        self._argument = argument
        self._layers = {
            name: keras_internals.find_layer(model, name, argument)
            for name in {_layer_name(loss, argument) for loss in losses}
            if name is not None
        }

    def __call__(self, inputs: Any, training: bool | None) -> Any:
        """Returns the model's outputs."""
        calls: dict[str, list[Any]] = {name: [] for name in self._layers}

        def keep(name: str) -> Callable[..., None]:
            return lambda outputs, *_, **__: calls[name].append(outputs)

        try:
            for name, layer in self._layers.items():
                keras_internals.watch_calls(layer, keep(name))
            outputs = self.model(inputs, training=training)
        finally:
            for layer in self._layers.values():
                keras_internals.stop_watching(layer)
        self.outputs = {None: outputs}
        for name, results in calls.items():
            if len(results) != 1:
                raise ValueError(
                    "A layer whose outputs are distilled must be called once. "
                    f"Received: layer '{name}' of the {self._argument}, "
                    f"called {len(results)} times"
                )
            self.outputs[name] = results[0]
        return outputs


def _weighted_keras_loss(
    loss: DistillationLoss, teacher: Any, student: Any, sample_weight: Any
) -> Any:
    """Computes one of Keras's losses, with its mean over weighted tokens."""
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
        # The `call` of a `keras.losses.Loss` gives its values, one a token.
        values = getattr(function, "call", function)(*pair)
        total = total + scale * mean_over_tokens(values, weights, s)
    return total
