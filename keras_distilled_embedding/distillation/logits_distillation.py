"""The divergence of the student's predictions from its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.arguments import as_positive_number
from keras_distilled_embedding._utils.masked_mean import mean_over_tokens
from keras_distilled_embedding._utils.masked_mean import weights_by_output

# Over classes, and of units that are predicted each by itself.
OUTPUT_KINDS = ("logits", "softmax", "binary_logits", "sigmoid")
_BINARY = OUTPUT_KINDS[2:]
_SMALLEST_PROBABILITY = 1e-30


@dataclass(frozen=True)
class TopPredictions:
    """A teacher's most likely classes, as `cache_teacher` stores them."""

    log_probabilities: Any  # floats `(..., k)`, at the loss's temperature
    classes: Any  # integers `(..., k)`


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class LogitsDistillation(DistillationLoss):
    """Kullback-Leibler divergence of the student's predictions.

    For each token, with the teacher's logits `t`, the student's `s` and the
    temperature `T`,

    ```
    T^2 sum_v p_v (log p_v - log q_v),   p = softmax(t / T), q = softmax(s / T)
    ```

    The factor `T^2` keeps the scale of the gradient (Hinton et al.). The mean
    over tokens is weighted by their sample weights and leaves masked tokens
    out; the losses of several outputs are added. The targets are the teacher's
    predictions alone: label smoothing of the task's loss does not change them.

    An output that ends with a softmax is taken for the probabilities that it
    holds. One that ends with a sigmoid, or has a single unit, predicts each
    unit by itself: its loss is the sum of the divergences of these binary
    predictions. This is read off the last layers of the models; `outputs`
    says it where they do not tell, and can leave outputs out.

    With `top_k`, or from a `TeacherCache`, the sum runs over the teacher's `k`
    most likely classes and one more class that stands for all others. It is
    never more than the full divergence, and equal to it for `k = V`.

    Args:
        temperature: Positive number `T`.
        top_k: Positive integer or `None`. How many of the teacher's most
            likely classes are distinguished. `None` uses all classes, or all
            that a cache holds.
        outputs: What the outputs of the models are, for each of them in
            Keras's order: `"logits"` or `"softmax"` over classes,
            `"binary_logits"` or `"sigmoid"` of units that are predicted each
            by itself, or `None` to leave the output out, such as a feature or
            a regression. Or one of these for all. By default it is read off
            the last layers of the models.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    distiller = Distiller(teacher, student, [LogitsDistillation(2.0)])
    ```

    References:
    - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531)
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        outputs: str | Sequence[str | None] | None = None,
    ) -> None:
        self.temperature = as_positive_number("temperature", temperature)
        self.top_k = as_optional_integer("top_k", top_k)
        given = [outputs] if isinstance(outputs, str) else outputs or []
        if not set(given) <= {*OUTPUT_KINDS, None}:
            raise ValueError(
                f"`outputs` must be of {OUTPUT_KINDS}, or None to leave an "
                f"output out. Received: outputs={outputs!r}"
            )
        self.outputs = outputs if isinstance(outputs, str | None) else [*given]

    def validate_model_compatibility(
        self, teacher: keras.Model, student: keras.Model
    ) -> None:
        """Raises a `ValueError` if the predictions cannot be compared."""
        sizes = []
        for model in (teacher, student):
            outputs = getattr(model, "outputs", None)
            if not outputs:
                return
            sizes.append([output.shape[-1] for output in outputs])
        if sizes[0] != sizes[1]:
            raise ValueError(
                "`teacher` and `student` must predict over the same "
                f"vocabulary. Received: outputs of size {sizes[0]} from the "
                f"teacher, {sizes[1]} from the student"
            )
        kinds = [self._kinds(model, sizes[0]) for model in (teacher, student)]
        for index, (of_teacher, of_student) in enumerate(zip(*kinds)):
            if (of_teacher in _BINARY) != (of_student in _BINARY):
                raise ValueError(
                    "`teacher` and `student` must both predict classes, or "
                    "both units each by itself. Received: output "
                    f"{index} is {of_teacher!r} of the teacher, "
                    f"{of_student!r} of the student"
                )

    def _kinds(
        self, model: keras.Model | None, sizes: Sequence[int]
    ) -> list[str | None]:
        """What each output of a model, of these last dimensions, is."""
        if isinstance(self.outputs, str):
            return [self.outputs] * len(sizes)
        if self.outputs is not None:
            if len(self.outputs) != len(sizes):
                raise ValueError(
                    "`outputs` must name each of the outputs of the models, "
                    f"{len(sizes)}. Received: outputs={self.outputs}"
                )
            return list(self.outputs)
        activations = model and keras_internals.last_activations(model)
        kinds: list[str | None] = []
        for index, size in enumerate(sizes):
            activation = activations[index] if activations else "linear"
            if activation in ("softmax", "sigmoid"):
                kinds.append(activation)
                continue
            if len(sizes) > 1 and activations:
                raise ValueError(
                    "`outputs` must say what each of several outputs is, "
                    "where not all end with a softmax or a sigmoid, such as "
                    'outputs=["logits", None]; None leaves one out. '
                    f"Received: outputs=None, activations {activations}"
                )
            kinds.append("binary_logits" if size == 1 else "logits")
        return kinds

    def check_cache(self, top_k: int, temperature: float) -> None:
        """Raises a `ValueError` if a `TeacherCache` does not fit this loss."""
        if self.temperature != temperature:
            raise ValueError(
                "`temperature` of a `LogitsDistillation` must be the cache's "
                f"{temperature}. Received: temperature={self.temperature}"
            )
        if self.top_k is not None and self.top_k > top_k:
            raise ValueError(
                "`top_k` of a `LogitsDistillation` must be at most the cache's "
                f"{top_k}. Received: top_k={self.top_k}"
            )

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        sample_weight: Any = None,
        teacher: keras.Model | None = None,
        student: keras.Model | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the divergence, averaged over the weighted tokens."""
        predictions = keras.tree.flatten(student_outputs)
        sizes = [prediction.shape[-1] for prediction in predictions]
        losses = [
            mean_over_tokens(
                self._token_losses(target, of_teacher, prediction, of_student),
                weights,
                prediction,
            )
            for target, of_teacher, prediction, of_student, weights in zip(
                keras.tree.flatten(teacher_outputs),
                self._kinds(teacher, sizes),
                predictions,
                self._kinds(student, sizes),
                weights_by_output(sample_weight, student_outputs),
            )
            if of_teacher is not None
        ]
        return sum(losses[1:], losses[0]) if losses else ops.zeros(())

    def _token_losses(
        self, target: Any, of_teacher: Any, prediction: Any, of_student: Any
    ) -> Any:
        student = as_logits(prediction, of_student) / self.temperature
        if isinstance(target, TopPredictions):
            top = TopPredictions(
                target.log_probabilities[..., : self.top_k],
                target.classes[..., : self.top_k],
            )
            divergences = _divergences_of_top(top, student)
        else:
            teacher = as_logits(target, of_teacher) / self.temperature
            if of_teacher in _BINARY:
                divergences = _binary_divergences(teacher, student)
            elif self.top_k is None:
                divergences = _divergences(teacher, student)
            else:
                top = _top_predictions(teacher, self.top_k)
                divergences = _divergences_of_top(top, student)
        return self.temperature**2 * divergences

    def get_config(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "outputs": self.outputs,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LogitsDistillation:
        return cls(**config)


def as_logits(outputs: Any, kind: str | None) -> Any:
    """Outputs of a model, of one of `OUTPUT_KINDS`, as float32 logits."""
    outputs = ops.cast(outputs, "float32")
    if kind == "softmax":
        return _log(outputs)
    if kind == "sigmoid":
        return _log(outputs) - _log(1.0 - outputs)
    return outputs


def _log(probabilities: Any) -> Any:
    return ops.log(ops.maximum(probabilities, _SMALLEST_PROBABILITY))


def _binary_divergences(teacher_logits: Any, student_logits: Any) -> Any:
    """Of predictions of units each by itself, summed over the units."""
    t, s = teacher_logits, student_logits
    yes, no = ops.log_sigmoid, lambda x: ops.log_sigmoid(-x)
    p = ops.sigmoid(t)
    return ops.sum(p * (yes(t) - yes(s)) + (1.0 - p) * (no(t) - no(s)), axis=-1)


def _divergences(teacher_logits: Any, student_logits: Any) -> Any:
    """Kullback-Leibler divergence of each token's prediction.

    In fewer passes over the vocabulary than two log-softmaxes take.
    """
    t, s = (
        x - ops.stop_gradient(ops.max(x, axis=-1, keepdims=True))
        for x in (teacher_logits, student_logits)
    )
    odds = ops.exp(t)
    normalizer = ops.sum(odds, axis=-1)
    return (
        ops.sum(odds * (t - s), axis=-1) / normalizer
        - ops.log(normalizer)
        + ops.log(ops.sum(ops.exp(s), axis=-1))
    )


def _divergences_of_top(teacher: TopPredictions, student_logits: Any) -> Any:
    """The same over a few classes and one class for all others."""
    # A log probability may be minus infinity in float16.
    log_p = ops.maximum(ops.cast(teacher.log_probabilities, "float32"), -1e4)
    classes = ops.cast(teacher.classes, "int32")
    normalizer = ops.logsumexp(student_logits, axis=-1, keepdims=True)
    log_q = ops.take_along_axis(student_logits, classes, axis=-1) - normalizer
    p = ops.exp(log_p)
    divergences = ops.sum(p * (log_p - log_q), axis=-1)
    if classes.shape[-1] == student_logits.shape[-1]:
        return divergences
    # Not 1 - sum(q), which float32 rounds to zero for a confident student.
    others = _without(student_logits, classes)
    log_others_q = ops.logsumexp(others, axis=-1) - normalizer[..., 0]
    others_p = ops.maximum(1.0 - ops.sum(p, axis=-1), keras.config.epsilon())
    return divergences + others_p * (ops.log(others_p) - log_others_q)


def _without(logits: Any, classes: Any) -> Any:
    """Returns the logits, with those of `classes` replaced by -1e30."""
    vocabulary, k = logits.shape[-1], classes.shape[-1]
    flat = ops.reshape(logits, (-1, vocabulary))
    classes = ops.reshape(classes, (-1, k))
    rows = ops.arange(ops.shape(flat)[0], dtype="int32")[:, None]
    rows = ops.broadcast_to(rows, ops.shape(classes))
    indices = ops.reshape(ops.stack([rows, classes], axis=-1), (-1, 2))
    low = ops.full((ops.shape(indices)[0],), -1e30, dtype=logits.dtype)
    flat = ops.scatter_update(flat, indices, low)
    return ops.reshape(flat, ops.shape(logits))


def _top_predictions(logits: Any, top_k: int) -> TopPredictions:
    values, classes = ops.top_k(logits, min(top_k, logits.shape[-1]))
    normalizer = ops.logsumexp(logits, axis=-1, keepdims=True)
    return TopPredictions(values - normalizer, classes)
