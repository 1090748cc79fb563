"""Train a compressed model towards the model it was made from."""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.distillation import DistillationLoss

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding.distillation.embedding_distillation import (
    EmbeddingDistillation,
)
from keras_distilled_embedding.distillation.evaluation import ModelRun
from keras_distilled_embedding.distillation.evaluation import evaluate_loss
from keras_distilled_embedding.distillation.evaluation import (
    needs_teacher_outputs,
)
from keras_distilled_embedding.distillation.teacher_cache import TeacherCache
from keras_distilled_embedding.distillation.teacher_cache import split_inputs
from keras_distilled_embedding.layers import DistilledEmbedding


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class Distiller(keras.Model):
    """Trains a student on its task and towards its teacher.

    ```
    loss = w * task + (1 - w) * sum_i weight_i * distillation_i
    ```

    with `w = student_loss_weight`. Regularization losses of the student are
    added as they are. Compile, fit, evaluate and predict as with any Keras
    model; the distiller's outputs are the student's. The teacher runs only if
    a loss needs its outputs, always without dropout, and is never changed.
    The logs show the task's loss and each distillation loss by name.

    A student whose layers have a `quantization` is trained with its codes
    rounded as a file stores them.

    Args:
        teacher: A built `keras.Model`.
        student: A built `keras.Model`, usually `compress(teacher)`. It shares
            no variable with the teacher.
        distillation_losses: A loss or a list of losses: those of this package
            or any `keras.distillation.DistillationLoss`. Defaults to
            `[EmbeddingDistillation()]`, as in the paper.
        distillation_loss_weights: A number or a list of numbers, one for each
            loss. Defaults to ones.
        student_loss_weight: Number `w` in [0, 1].
        name: Name of the model.
        student_training: Whether the student is trained in training mode.
            `False` switches its dropout off and leaves the statistics of its
            normalization layers as they are. Try it for a student that learns
            its teacher's predictions, see docs/distillation.md.
        train: `"all"` trainable weights of the student, or `"tables"`: those
            of its `layers.DistilledEmbedding` alone. The others get neither
            gradients nor optimizer states, which saves time and memory.

    Raises:
        TypeError: If `teacher`, `student` or a loss is of another class.
        ValueError: If the weights do not fit the losses, if teacher and
            student share variables, if a loss does not accept the models, or
            if `train` is neither, or has nothing to train.

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
        distillation_loss_weights: Sequence[float] | float | None = None,
        student_loss_weight: float = 0.5,
        name: str = "distiller",
        student_training: bool = True,
        train: str = "all",
        **kwargs: Any,
    ) -> None:
        _check_models(teacher, student)
        _check_train(train, student)
        losses, weights = _check_losses(
            distillation_losses, distillation_loss_weights
        )
        _check_student_loss_weight(student_loss_weight)
        for loss in losses:
            # Keras's own check refuses subclassed models and nested layers.
            if type(loss) is not keras.distillation.FeatureDistillation:
                loss.validate_model_compatibility(teacher, student)
        teacher_run = ModelRun(teacher, losses, "teacher")
        student_run = ModelRun(student, losses, "student")
        kwargs.setdefault("dtype", student.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.teacher = teacher
        self.student = student
        self.distillation_losses = losses
        self.student_training = bool(student_training)
        self.train = train
        self._teacher_run, self._student_run = teacher_run, student_run
        # A variable, so that the weights may change between compiled steps.
        # The properties return the same numbers before they are rounded.
        self._weights_in_use = self.add_weight(
            shape=(1 + len(weights),),
            initializer="zeros",
            trainable=False,
            dtype="float32",
            autocast=False,
            name="loss_weights",
        )
        self._set_weights_in_use([student_loss_weight, *weights])
        # Keras tracks the seed generators of a layer, not those of a loss.
        self._loss_seed_generators = [
            loss.seed_generator
            for loss in losses
            if hasattr(loss, "seed_generator")
        ]
        self._task_tracker = keras.metrics.Mean(name="task_loss")
        self._distillation_trackers = [
            keras.metrics.Mean(name=name)
            for name in self.distillation_loss_names
        ]
        self.built = True

    @property
    def distillation_loss_names(self) -> list[str]:
        """The names in the logs, as `embedding_distillation_loss`."""
        names: list[str] = []
        for loss in self.distillation_losses:
            stem = re.sub(r"(?<!^)(?=[A-Z])", "_", type(loss).__name__).lower()
            name, count = f"{stem}_loss", 1
            while name in names:
                count += 1
                name = f"{stem}_{count}_loss"
            names.append(name)
        return names

    @property
    def student_loss_weight(self) -> float:
        """The weight of the task's loss. It may be set between steps."""
        return self._weight_values[0]

    @student_loss_weight.setter
    def student_loss_weight(self, weight: float) -> None:
        _check_student_loss_weight(weight)
        if weight > 0.0 and self.compiled and self.loss is None:
            raise ValueError(
                "`student_loss_weight` must be 0, because `compile()` was "
                "called without a `loss`. Received: "
                f"student_loss_weight={weight!r}"
            )
        self._set_weights_in_use([weight, *self._weight_values[1:]])

    @property
    def distillation_loss_weights(self) -> list[float]:
        """The weights of the distillation losses. May be set between steps."""
        return self._weight_values[1:]

    @distillation_loss_weights.setter
    def distillation_loss_weights(self, weights: Sequence[float]) -> None:
        _, weights = _check_losses(self.distillation_losses, weights)
        self._set_weights_in_use([self.student_loss_weight, *weights])

    def _set_weights_in_use(self, values: list[float]) -> None:
        keras_internals.make_variables_current(self)
        self._weight_values = [float(value) for value in values]
        self._weights_in_use.assign(self._weight_values)

    # Only the student is trained. No layer's `trainable` is changed.

    def _trained(self, variables: list[keras.Variable]) -> list[keras.Variable]:
        """Those that are trained among the student's trainable ones."""
        if not self.trainable:
            return []
        if self.train == "all":
            return variables
        tables = {
            id(v) for layer in _tables_of(self.student) for v in layer.variables
        }
        return [v for v in variables if id(v) in tables]

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        return self._trained(self.student.trainable_variables)

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in trained]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        return self._trained(self.student.trainable_weights)

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        trained = {id(v) for v in self.trainable_weights}
        return [v for v in self.weights if id(v) not in trained]

    def fit(
        self,
        x: Any = None,
        *args: Any,
        validation_data: Any = None,
        callbacks: Any = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the student, as `keras.Model.fit`.

        `x` and `validation_data` may be a `TeacherCache`, from which the
        student learns without its teacher being run. A cache of another
        teacher, or with less than a loss needs, raises a `ValueError`.
        """
        if isinstance(x, TeacherCache):
            if not isinstance(callbacks, keras.callbacks.CallbackList):
                callbacks = [
                    # A resumed training begins with a later epoch.
                    keras.callbacks.LambdaCallback(
                        on_epoch_begin=lambda epoch, _: setattr(
                            x, "epoch", epoch
                        )
                    ),
                    *keras.tree.flatten(callbacks or []),
                ]
            kwargs["shuffle"] = False  # The cache has its own order.
        return super().fit(
            self._readable(x),
            *args,
            validation_data=self._readable(validation_data),
            callbacks=callbacks,
            **kwargs,
        )

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`; `x` may be a `TeacherCache`."""
        return super().evaluate(self._readable(x), *args, **kwargs)

    def _readable(self, data: Any) -> Any:
        """Checks a cache and returns what Keras reads; leaves other data."""
        if not isinstance(data, TeacherCache):
            return data
        data.check(self.teacher)
        for loss in filter(needs_teacher_outputs, self.distillation_losses):
            if not hasattr(loss, "check_cache"):
                raise ValueError(
                    "A `TeacherCache` holds the teacher's predictions, for "
                    "`LogitsDistillation`; train with the batches themselves "
                    f"for other losses. Received: {type(loss).__name__}"
                )
            loss.check_cache(data.top_k, data.temperature)
        if keras.backend.backend() == "tensorflow":
            return data.as_dataset()
        return data

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        inputs, _ = split_inputs(inputs)
        return self._student_run(
            inputs, training=training and self.student_training
        )

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        # Keras adds these to the task's loss. They are not weighted.
        penalties = sum(ops.sum(loss) for loss in self.losses)
        task = 0.0
        if self.loss is None and self.student_loss_weight > 0.0:
            # Keras does not check it on JAX, nor with regularization.
            raise ValueError(
                "Provide a `loss` of the task in `compile()`, or set "
                "`student_loss_weight` to 0. Received: loss=None, "
                f"student_loss_weight={self.student_loss_weight}"
            )
        if self.loss is not None:
            task = super().compute_loss(
                x, y, y_pred, sample_weight, training=training
            )
            task = task - penalties
        self._track(self._task_tracker, task, x)
        inputs, cached = split_inputs(x)
        losses = self.distillation_losses
        if cached is None and any(map(needs_teacher_outputs, losses)):
            self._teacher_run(inputs, training=False)
        distillation = 0.0
        for index, loss in enumerate(losses):
            value = evaluate_loss(
                loss,
                self._teacher_run,
                self._student_run,
                cached,
                sample_weight,
            )
            self._track(self._distillation_trackers[index], value, x)
            distillation += self._weights_in_use[1 + index] * value
        w = self._weights_in_use[0]
        return w * task + (1.0 - w) * distillation + penalties

    def _track(self, metric: keras.metrics.Mean, value: Any, x: Any) -> None:
        # Weighted by the size of the batch, like the loss in Keras's logs.
        size = ops.shape(keras.tree.flatten(x)[0])[0]
        metric.update_state(ops.stop_gradient(value), sample_weight=size)

    # Keras does not save the states of random generators. They are saved here,
    # so that a training which is resumed continues with the same draws.

    def save_own_variables(self, store: dict[str, Any]) -> None:
        store["loss_weights"] = np.asarray(self._weight_values, "float64")
        for index, state in enumerate(self._random_states()):
            store[f"random_state_{index}"] = ops.convert_to_numpy(state)

    def load_own_variables(self, store: dict[str, Any]) -> None:
        self._set_weights_in_use(np.asarray(store["loss_weights"]).tolist())
        for index, state in enumerate(self._random_states()):
            state.assign(store[f"random_state_{index}"])

    def _random_states(self) -> list[keras.Variable]:
        own = [self._weights_in_use, *self.teacher.variables]
        known = {id(v) for v in (*own, *self.student.weights)}
        return [v for v in self.variables if id(v) not in known]

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
            "student_training": self.student_training,
            "train": self.train,
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


def _check_models(teacher: keras.Model, student: keras.Model) -> None:
    for name, model in (("teacher", teacher), ("student", student)):
        check_built_model(name, model)
    own = {id(variable) for variable in teacher.variables}
    shared = [v.path for v in student.variables if id(v) in own]
    if shared:
        raise ValueError(
            "`teacher` and `student` must not share variables: training the "
            "student would change the teacher. `compress` copies them. "
            f"Received: shared variables {shared[:5]}"
        )
    keras_internals.refuse_reads(student, teacher.variables)


def _tables_of(student: keras.Model) -> list[DistilledEmbedding]:
    return [
        layer
        for layer in keras_internals.iterate_layers(student)
        if isinstance(layer, DistilledEmbedding)
    ]


def _check_train(train: str, student: keras.Model) -> None:
    if train not in ("all", "tables"):
        raise ValueError(
            f"`train` must be 'all' or 'tables'. Received: train={train!r}"
        )
    if train == "tables" and not _tables_of(student):
        raise ValueError(
            "With `train='tables'`, `student` must have a "
            "`layers.DistilledEmbedding`, as `compress` makes them. "
            f"Received: student '{student.name}' without one"
        )


def _check_student_loss_weight(weight: Any) -> None:
    is_number = isinstance(weight, numbers.Real)
    if not is_number or not 0.0 <= float(weight) <= 1.0:
        raise ValueError(
            "`student_loss_weight` must be a number from 0 to 1. "
            f"Received: student_loss_weight={weight!r}"
        )


def _check_losses(
    losses: DistillationLoss | Sequence[DistillationLoss] | None,
    weights: Sequence[float] | float | None,
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
    values: list[Any] = [1.0] * len(losses)
    if isinstance(weights, list | tuple):
        values = list(weights)
    elif weights is not None:
        values = [weights]
    if len(values) != len(losses) or not losses:
        raise ValueError(
            "`distillation_loss_weights` must hold one number for each of at "
            f"least one loss. Received: {len(losses)} losses, weights={values}"
        )
    if not all(isinstance(w, numbers.Real) and float(w) >= 0 for w in values):
        raise ValueError(
            "`distillation_loss_weights` must be numbers of at least 0. "
            f"Received: {values}"
        )
    return list(losses), [float(w) for w in values]
