"""Distillation weights that change while a model trains."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.distillation.distiller import Distiller

Schedule = float | Callable[[int], Any]


class DistillationWeightSchedule(keras.callbacks.Callback):
    """Changes the weights of a `Distiller`'s losses as it trains.

    A schedule is a number, which stays the same, or a function of the step:
    one of `keras.optimizers.schedules` or any other function. Steps are
    counted as the optimizer counts them, so that a resumed training continues
    with the same weights. The weights in use are added to the epoch's logs.

    Args:
        student_loss_weight: Schedule of the task's weight, or `None` to leave
            it as it is.
        distillation_loss_weights: List of a schedule for each distillation
            loss, or `None` to leave the weights as they are.

    Raises:
        TypeError: If a schedule is neither a number nor a function, or if
            `distillation_loss_weights` is not a list.

    Example:

    ```python
    # The weight of the teacher's predictions falls linearly to zero.
    linear_decay = keras.optimizers.schedules.PolynomialDecay(
        1.0, decay_steps=10_000, end_learning_rate=0.0
    )
    distiller.fit(
        inputs,
        labels,
        callbacks=[
            DistillationWeightSchedule(distillation_loss_weights=[linear_decay])
        ],
    )
    ```
    """

    def __init__(
        self,
        student_loss_weight: Schedule | None = None,
        distillation_loss_weights: Sequence[Schedule] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(distillation_loss_weights, list | tuple | None):
            raise TypeError(
                "`distillation_loss_weights` must be a list of one schedule "
                "for each distillation loss, such as [0.3]. Received: "
                f"distillation_loss_weights={distillation_loss_weights!r}"
            )
        schedules = [student_loss_weight, *(distillation_loss_weights or [])]
        for schedule in schedules:
            is_number = isinstance(schedule, numbers.Real | None)
            if not is_number and not callable(schedule):
                raise TypeError(
                    "The schedule of a weight must be a number or a function "
                    "of the step, such as a "
                    "`keras.optimizers.schedules.PolynomialDecay`. "
                    f"Received: {schedule!r}"
                )
        self._student_schedule = student_loss_weight
        self._distillation_schedules = distillation_loss_weights

    def set_model(self, model: keras.Model) -> None:
        """Sets the model that `fit` trains, which must be a `Distiller`."""
        super().set_model(model)
        if not isinstance(model, Distiller):
            raise TypeError(
                "`DistillationWeightSchedule` must be a callback of a "
                f"`Distiller`. Received: model '{model.name}' of class "
                f"{type(model).__name__}"
            )
        schedules = self._distillation_schedules
        losses = model.distillation_losses
        if schedules is not None and len(schedules) != len(losses):
            raise ValueError(
                "`distillation_loss_weights` must hold one schedule for each "
                f"of the distiller's {len(losses)} losses. "
                f"Received: {len(schedules)} schedules"
            )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._first_step = keras_internals.count_steps(self.model.optimizer)

    def on_train_batch_begin(
        self, batch: int, logs: dict | None = None
    ) -> None:
        step = self._first_step + batch
        model = self.model
        weights = [model.student_loss_weight, *model.distillation_loss_weights]
        schedules = [
            self._student_schedule,
            *(self._distillation_schedules or [None] * (len(weights) - 1)),
        ]
        scheduled = [
            weight if schedule is None else _value(schedule, step)
            for schedule, weight in zip(schedules, weights)
        ]
        if scheduled != weights:
            model.student_loss_weight = scheduled[0]
            model.distillation_loss_weights = scheduled[1:]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            logs["student_loss_weight"] = self.model.student_loss_weight
            names = self.model.distillation_loss_names
            weights = self.model.distillation_loss_weights
            for name, weight in zip(names, weights):
                logs[f"{name}_weight"] = weight


def _value(schedule: Schedule, step: int) -> float:
    if callable(schedule):
        return float(ops.convert_to_numpy(schedule(step)))
    return float(schedule)
