"""Train a compressed model towards the model it was made from."""

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


# The losses that are given the models and the sample weights, beside the
# outputs that every loss is given.
_OWN_LOSSES = (EmbeddingDistillation, LogitsDistillation)


@keras.saving.register_keras_serializable(package=_PACKAGE)
class Distiller(keras.Model):
    """Trains a student on its task and towards its teacher.

    ```
    loss = w * task + (1 - w) * sum_i weight_i * distillation_i
    ```

    with `w = student_loss_weight`; regularization losses of the student are
    added as they are. Compile, fit, evaluate and predict as any Keras model:
    the distiller's outputs are the student's. The teacher runs only if a loss
    needs its outputs, always without dropout, and never changes. The logs
    show the task's loss and each distillation loss by name.

    Args:
        teacher: A built `keras.Model`.
        student: A built `keras.Model`, usually `compress(teacher)`. It shares
            no variable with the teacher.
        distillation_losses: A loss or a list of losses: those of this module,
            or any `keras.distillation.DistillationLoss`. Defaults to
            `[EmbeddingDistillation()]`, the paper's.
        distillation_loss_weights: A number for each loss. Defaults to ones.
        student_loss_weight: Number `w` in [0, 1].
        name: Name of the model.

    Raises:
        TypeError: If teacher, student or a loss is of another class.
        ValueError: If the weights do not fit, if teacher and student share
            variables, or if a loss finds that they do not match.

    Example:

    ```python
    teacher = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(1_000, 64, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    student = compress(teacher, compression=8.0)
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    distiller.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids = np.random.randint(1_000, size=(32, 10))
    distiller.fit(ids, np.random.randint(2, size=32))
    distiller.student  # is trained
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    - [Hinton et al., 2015](https://arxiv.org/abs/1503.02531)
    """

    def __init__(
        self,
        teacher: keras.Model,
        student: keras.Model,
        distillation_losses: DistillationLoss
        | Sequence[DistillationLoss]
        | None = None,
        distillation_loss_weights: Sequence[float] | None = None,
        student_loss_weight: float = 0.5,
        name: str = "distiller",
        **kwargs: Any,
    ) -> None:
        _check_models(teacher, student)
        losses, weights = _check_losses(
            distillation_losses, distillation_loss_weights
        )
        if (
            not isinstance(student_loss_weight, numbers.Real)
            or not 0.0 <= student_loss_weight <= 1.0
        ):
            raise ValueError(
                "`student_loss_weight` must be a number from 0 to 1. "
                f"Received: student_loss_weight={student_loss_weight!r}"
            )
        for loss in losses:
            loss.validate_model_compatibility(teacher, student)
        kwargs.setdefault("dtype", student.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.teacher = teacher
        self.student = student
        self.distillation_losses = losses
        self.distillation_loss_weights = weights
        self.student_loss_weight = float(student_loss_weight)
        # Keras tracks a layer's seed generators, not those of its losses.
        self._loss_seed_generators = [
            loss.seed_generator
            for loss in losses
            if isinstance(loss, EmbeddingDistillation)
        ]
        self._teacher_features = _FeatureExtractor(
            teacher, _layer_names(losses, "teacher_layer_name")
        )
        self._student_features = _FeatureExtractor(
            student, _layer_names(losses, "student_layer_name")
        )
        self._task_tracker = keras.metrics.Mean(name="task_loss")
        self._distillation_trackers = [
            keras.metrics.Mean(name=name) for name in _loss_names(losses)
        ]
        self.built = True

    # Only the student is trained. The teacher's own `trainable` is left
    # alone: it belongs to whoever made the teacher.

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return self.student.trainable_variables if self.trainable else []

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in trained]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self.student.trainable_weights if self.trainable else []

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        trained = {id(v) for v in self.trainable_weights}
        return [v for v in self.weights if id(v) not in trained]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._student_features(inputs, training=training)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        # Keras adds these to the task's loss; they are not to be weighted.
        penalties = sum(ops.sum(loss) for loss in self.student.losses)
        task = 0.0
        if self.student_loss_weight > 0.0 or self.loss is not None:
            task = super().compute_loss(
                x, y, y_pred, sample_weight, training=training
            )
            task = task - penalties
        self._track(self._task_tracker, task, x)
        distillation = self._distillation_loss(x, y_pred, sample_weight)
        w = self.student_loss_weight
        return w * task + (1.0 - w) * distillation + penalties

    def _distillation_loss(
        self, x: Any, y_pred: Any, sample_weight: Any
    ) -> Any:
        teacher_outputs = None
        if any(_needs_outputs(loss) for loss in self.distillation_losses):
            teacher_outputs = keras.tree.map_structure(
                ops.stop_gradient, self._teacher_features(x, training=False)
            )
        total = 0.0
        for loss, weight, tracker in zip(
            self.distillation_losses,
            self.distillation_loss_weights,
            self._distillation_trackers,
        ):
            if isinstance(loss, _OWN_LOSSES):
                value = loss.compute_loss(
                    teacher_outputs,
                    y_pred,
                    sample_weight=sample_weight,
                    teacher=self.teacher,
                    student=self.student,
                )
            else:
                value = loss.compute_loss(
                    self._teacher_features.of(loss, "teacher_layer_name"),
                    self._student_features.of(loss, "student_layer_name"),
                )
            self._track(tracker, value, x)
            total = total + weight * value
        return total

    def _track(self, metric: keras.metrics.Mean, value: Any, x: Any) -> None:
        # Weighted by the batch's size, as Keras weighs the loss it logs.
        size = ops.shape(keras.tree.flatten(x)[0])[0]
        metric.update_state(ops.stop_gradient(value), sample_weight=size)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            "teacher": serialize(self.teacher),
            "student": serialize(self.student),
            "distillation_losses": [
                serialize(loss) for loss in self.distillation_losses
            ],
            "distillation_loss_weights": list(self.distillation_loss_weights),
            "student_loss_weight": self.student_loss_weight,
            "name": self.name,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict | None = None
    ) -> Distiller:
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        for key in ("teacher", "student"):
            config[key] = deserialize(config[key], custom_objects)
        config["distillation_losses"] = [
            deserialize(loss, custom_objects)
            for loss in config["distillation_losses"]
        ]
        return cls(**config)


class _FeatureExtractor:
    """Runs a model once, and keeps the outputs of some of its layers.

    Not a layer: the models belong to the distiller.

    Args:
        model: A model; Functional or Sequential, if there are layer names.
        layer_names: Names of the layers whose outputs are wanted.
    """

    def __init__(self, model: keras.Model, layer_names: list[str]) -> None:
        self._model = model
        self._names = layer_names
        if layer_names:
            self._model = keras.Model(
                _surgery.input_structure(model),
                [
                    _surgery.output_structure(model),
                    *(model.get_layer(name).output for name in layer_names),
                ],
            )

    def __call__(self, inputs: Any, training: bool | None) -> Any:
        outputs = self._model(inputs, training=training)
        self._features = {None: outputs}
        if self._names:
            outputs, *features = outputs
            self._features = {None: outputs, **dict(zip(self._names, features))}
        return outputs

    def of(self, loss: DistillationLoss, attribute: str) -> Any:
        """What `loss` compares: the outputs, or those of a layer it names."""
        return self._features[getattr(loss, attribute, None)]


def _needs_outputs(loss: DistillationLoss) -> bool:
    return not isinstance(loss, EmbeddingDistillation)


def _layer_names(
    losses: Sequence[DistillationLoss], attribute: str
) -> list[str]:
    names = [getattr(loss, attribute, None) for loss in losses]
    return sorted({name for name in names if name is not None})


def _loss_names(losses: Sequence[DistillationLoss]) -> list[str]:
    """`EmbeddingDistillation` is `embedding_distillation_loss` in the logs."""
    names: list[str] = []
    for loss in losses:
        stem = re.sub(r"(?<!^)(?=[A-Z])", "_", type(loss).__name__).lower()
        name, count = f"{stem}_loss", 1
        while name in names:
            count += 1
            name = f"{stem}_{count}_loss"
        names.append(name)
    return names


def _check_models(teacher: keras.Model, student: keras.Model) -> None:
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, keras.Model):
            raise TypeError(
                f"`{name}` must be a `keras.Model`. Received: {name}={model!r}"
            )
        if not model.built:
            raise ValueError(
                f"`{name}` must be built: call it, or its `build()`, first. "
                f"Received: {name}={model!r}"
            )
    own = {id(variable) for variable in teacher.variables}
    shared = [v.path for v in student.variables if id(v) in own]
    if shared:
        raise ValueError(
            "`teacher` and `student` must not share variables: training the "
            "student would change the teacher. `compress` copies them. "
            f"Received: shared variables {shared[:5]}"
        )


def _check_losses(
    losses: DistillationLoss | Sequence[DistillationLoss] | None,
    weights: Sequence[float] | None,
) -> tuple[list[DistillationLoss], list[float]]:
    if losses is None:
        losses = [EmbeddingDistillation()]
    if not isinstance(losses, list | tuple):
        losses = [losses]
    for loss in losses:
        if not isinstance(loss, DistillationLoss):
            raise TypeError(
                "`distillation_losses` must be "
                "`keras.distillation.DistillationLoss` objects. "
                f"Received: {loss!r}"
            )
    if weights is None:
        weights = [1.0] * len(losses)
    if not isinstance(weights, list | tuple):
        weights = [weights]
    if len(weights) != len(losses) or not losses:
        raise ValueError(
            "`distillation_loss_weights` must hold one number for each of at "
            f"least one loss. Received: {len(losses)} losses, weights="
            f"{weights}"
        )
    if not all(isinstance(w, numbers.Real) and w >= 0 for w in weights):
        raise ValueError(
            "`distillation_loss_weights` must be numbers of at least 0. "
            f"Received: {weights}"
        )
    return list(losses), [float(w) for w in weights]
