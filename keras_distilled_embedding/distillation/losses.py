"""What a student is compared with its teacher by."""

from __future__ import annotations

import collections
import numbers
import re
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding import _surgery
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)

_PACKAGE = "keras_distilled_embedding"


@keras.saving.register_keras_serializable(package=_PACKAGE)
class EmbeddingDistillation(DistillationLoss):
    """Squared distance between the teacher's tables and the student's.

    For every `layers.DistilledEmbedding` of the student, and the embedding of
    the same name in the teacher (the first, second, ... of that name, where
    nested models each have one), the mean over the rows of the table

    ```
    1/V sum_i ||E_i - E~_i||^2        E (V, d): the teacher's, fixed
    ```

    and the sum of these over the layers; an untied layer counts both of its
    tables. The teacher itself is not run for this loss.

    Args:
        num_rows: Integer or `None`. How many rows, drawn anew at every step,
            stand for all of them: the mean over them is an unbiased estimate.
            `None` uses all rows, which costs about `rank / output_dim` of
            what projecting a batch of `V` tokens costs.
        seed: Integer, seed of the draws.

    Example:

    ```python
    distiller = Distiller(teacher, student, [EmbeddingDistillation()])
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720), equation of
      the second stage.
    """

    def __init__(self, num_rows: int | None = None, seed: int = 0) -> None:
        if num_rows is not None and (
            isinstance(num_rows, bool)
            or not isinstance(num_rows, numbers.Integral)
            or num_rows < 1
        ):
            raise ValueError(
                "`num_rows` must be a positive integer or None. "
                f"Received: num_rows={num_rows!r}"
            )
        self.num_rows = num_rows
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def validate_model_compatibility(
        self, teacher: keras.Model, student: keras.Model
    ) -> None:
        """Refuses models whose tables cannot be paired.

        Raises:
            ValueError: If the student has no `DistilledEmbedding`, or the
                teacher no float embedding of that name and shape.
        """
        for _ in paired_embeddings(teacher, student):
            pass

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        teacher: keras.Model,
        student: keras.Model,
        **kwargs: Any,
    ) -> Any:
        """Computes the loss from the models' tables; outputs are not used."""
        losses = []
        for old, new in paired_embeddings(teacher, student):
            losses.append(self._distance(old.embeddings, new))
            if not new.tie_weights:
                kernel = ops.transpose(_reverse_kernel(old))
                losses.append(self._distance(kernel, new, reverse=True))
        return sum(losses[1:], losses[0])

    def _distance(
        self, table: Any, layer: DistilledEmbedding, reverse: bool = False
    ) -> Any:
        ids = None
        if self.num_rows is not None:
            ids = keras.random.randint(
                (self.num_rows,), 0, layer.input_dim, seed=self.seed_generator
            )
            table = ops.take(table, ids, axis=0)
        rows = layer.reconstruct(ids, reverse=reverse)
        difference = ops.subtract(
            ops.stop_gradient(ops.cast(table, "float32")),
            ops.cast(rows, "float32"),
        )
        return ops.mean(ops.sum(ops.square(difference), axis=-1))

    def get_config(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "seed": self.seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EmbeddingDistillation:
        return cls(**config)


def paired_embeddings(
    teacher: keras.Model, student: keras.Model
) -> Iterator[tuple[keras.layers.Layer, DistilledEmbedding]]:
    """Yields each factorised table of the student after the teacher's own.

    Args:
        teacher: A model with embedding layers.
        student: A model in which some of them are `DistilledEmbedding`s of
            the same name, as `compress` leaves them.

    Raises:
        ValueError: As `EmbeddingDistillation.validate_model_compatibility`.
    """
    tables = dict(_named_embeddings(teacher))
    found = False
    for key, layer in _named_embeddings(student):
        if not isinstance(layer, DistilledEmbedding):
            continue
        found = True
        if key not in tables:
            raise ValueError(
                f"`teacher` has no embedding named '{layer.name}' for the "
                f"student's layer of that name. Received: teacher with "
                f"embeddings {[table.name for table in tables.values()]}"
            )
        table = tables[key]
        if isinstance(table, keras.layers.Embedding) and (
            table.quantization_mode is not None
        ):
            raise ValueError(
                "`teacher` must hold float tables: those of a quantized layer "
                "mean nothing without their scales. Received: layer "
                f"'{table.name}' with quantization_mode="
                f"{table.quantization_mode!r}"
            )
        shape = (table.input_dim, table.output_dim)
        if shape != (layer.input_dim, layer.output_dim):
            raise ValueError(
                f"`teacher` and `student` must have tables of one shape for "
                f"the layer '{layer.name}'. Received: {shape} in the teacher, "
                f"{(layer.input_dim, layer.output_dim)} in the student"
            )
        yield table, layer
    if not found:
        raise ValueError(
            "`student` has no `DistilledEmbedding` layer to distil a table "
            "into: make it with `compress(teacher)`. Received: student "
            f"'{student.name}'"
        )


def _named_embeddings(
    model: keras.Model,
) -> Iterator[tuple[tuple[str, int], keras.layers.Layer]]:
    """Yields embedding layers after their name and its count so far."""
    counts: collections.Counter[str] = collections.Counter()
    for layer in _surgery.iterate_layers(model):
        if isinstance(layer, keras.layers.Embedding | DistilledEmbedding):
            yield (layer.name, counts[layer.name]), layer
            counts[layer.name] += 1


def _reverse_kernel(layer: keras.layers.Layer) -> Any:
    """The projection's kernel `(d, V)` of a tied or untied layer."""
    if getattr(layer, "tie_weights", True):
        return ops.transpose(layer.embeddings)
    return layer.reverse_embeddings


@keras.saving.register_keras_serializable(package=_PACKAGE)
class LogitsDistillation(DistillationLoss):
    """Kullback-Leibler divergence of the student's predictions.

    For each token, with the teacher's logits `t`, the student's `s` and the
    temperature `T`,

    ```
    T^2 sum_v p_v (log p_v - log q_v),   p = softmax(t / T), q = softmax(s / T)
    ```

    The factor `T^2` keeps the gradient's scale (Hinton et al.). Tokens are
    averaged by their sample weight, and masked ones left out; with several
    outputs the losses add up.

    Args:
        temperature: Positive number `T`.

    Example:

    ```python
    distiller = Distiller(teacher, student, [LogitsDistillation(2.0)])
    ```

    References:
    - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531)
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not isinstance(temperature, numbers.Real) or not temperature > 0:
            raise ValueError(
                "`temperature` must be a positive number. "
                f"Received: temperature={temperature!r}"
            )
        self.temperature = temperature
        self._divergence = _Divergence(temperature)

    def validate_model_compatibility(
        self, teacher: keras.Model, student: keras.Model
    ) -> None:
        """Refuses models with symbolic outputs of different vocabularies.

        Raises:
            ValueError: If the last dimensions of the outputs differ.
        """
        outputs = [
            getattr(model, "outputs", None) for model in (teacher, student)
        ]
        if not all(outputs):
            return
        sizes = [[out.shape[-1] for out in outs] for outs in outputs]
        if sizes[0] != sizes[1]:
            raise ValueError(
                "`teacher` and `student` must predict over the same "
                f"vocabulary. Received: outputs of size {sizes[0]} from the "
                f"teacher, {sizes[1]} from the student"
            )

    def compute_loss(
        self,
        teacher_outputs: Any,
        student_outputs: Any,
        *,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the divergence, averaged over the weighted tokens."""
        teacher_logits = keras.tree.flatten(teacher_outputs)
        student_logits = keras.tree.flatten(student_outputs)
        if isinstance(sample_weight, dict):  # by the outputs' names
            sample_weight = keras.tree.flatten(
                {name: sample_weight.get(name) for name in student_outputs}
            )
        elif not isinstance(sample_weight, list | tuple):
            sample_weight = [sample_weight] * len(student_logits)
        losses = [
            self._divergence(t, s, sample_weight=_token_weights(w, s))
            for t, s, w in zip(teacher_logits, student_logits, sample_weight)
        ]
        return sum(losses[1:], losses[0])

    def get_config(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LogitsDistillation:
        return cls(**config)


class _Divergence(keras.losses.Loss):
    """The formula of `LogitsDistillation`; Keras masks, weighs, averages."""

    def __init__(self, temperature: float) -> None:
        super().__init__("divergence", reduction="mean_with_sample_weight")
        self.temperature = temperature

    def call(self, teacher_logits: Any, student_logits: Any) -> Any:
        temperature = ops.cast(self.temperature, student_logits.dtype)
        log_p = ops.log_softmax(teacher_logits / temperature, axis=-1)
        log_q = ops.log_softmax(student_logits / temperature, axis=-1)
        divergence = ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
        return temperature**2 * divergence


def _token_weights(weights: Any, logits: Any) -> Any:
    """A weight for each token, where a whole sequence was given one.

    A loss that averages by the weights it is given would sum over the tokens.
    """
    if weights is None or len(weights.shape) >= len(logits.shape):
        return weights
    while len(weights.shape) < len(logits.shape) - 1:
        weights = ops.expand_dims(weights, -1)
    ones = ops.ones_like(logits[..., 0], dtype="float32")
    return ops.cast(weights, "float32") * ones
