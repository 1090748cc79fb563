"""Training the teacher, and distilling it into the compressed student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import keras
from keras import ops

if TYPE_CHECKING:
    import tensorflow as tf

    Batches = tf.data.Dataset | keras.utils.PyDataset


@keras.saving.register_keras_serializable(package="examples.nmt")
class LabelSmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of integer labels, from logits, with label smoothing.

    The target gives `1 - smoothing` to the label and spreads `smoothing`
    evenly over the vocabulary; no one-hot target is ever built. Reduced to
    the mean over tokens of non-zero weight.

    Args:
        smoothing: Probability spread over the vocabulary, in [0, 1).
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        reduction: str = "mean_with_sample_weight",
        name: str = "label_smoothed_crossentropy",
        **kwargs,
    ) -> None:
        super().__init__(name=name, reduction=reduction, **kwargs)
        self.smoothing = smoothing

    def call(self, y_true, y_pred):
        log_normalizer = ops.logsumexp(y_pred, axis=-1)
        label = ops.take_along_axis(
            y_pred, ops.cast(y_true, "int32")[..., None], axis=-1
        )[..., 0]
        expected = (1.0 - self.smoothing) * label
        expected += self.smoothing * ops.mean(y_pred, axis=-1)
        return log_normalizer - expected

    def get_config(self) -> dict:
        return {**super().get_config(), "smoothing": self.smoothing}


@dataclass(frozen=True)
class Schedule:
    """Length and step sizes of one training run.

    The learning rate rises linearly to its peak, then falls to zero along a
    cosine.

    Args:
        epochs: Passes over the training text.
        peak_learning_rate: Largest step size of Adam.
        warmup: Share of the steps that the rise takes.
        smoothing: Label smoothing of the cross-entropy.
    """

    epochs: int = 9
    peak_learning_rate: float = 1.2e-3
    warmup: float = 0.1
    smoothing: float = 0.1

    def optimizer(self, steps_per_epoch: int) -> keras.optimizers.Optimizer:
        steps = self.epochs * steps_per_epoch
        warmup_steps = max(1, round(self.warmup * steps))
        return keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                initial_learning_rate=0.0,
                decay_steps=max(1, steps - warmup_steps),
                warmup_target=self.peak_learning_rate,
                warmup_steps=warmup_steps,
            ),
            beta_2=0.98,
            epsilon=1e-9,
        )


@dataclass(frozen=True)
class Recipe(Schedule):
    """How a student is distilled; beside the schedule, the losses' weights.

    The defaults are what brought a compressed translation model back best
    (`python -m benchmarks run recipe`).

    Args:
        student_loss_weight: Share of the task's loss, in [0, 1]; the rest is
            the distillation's.
        logits_weight: Weight of the divergence from the teacher's predictions.
        embedding_weight: Weight of the squared distance between the tables.
        hidden_weight: Weight of the squared distance between the decoders'
            last hidden states.
        temperature: Of the predictions compared.
        dropout: Share of units dropped in the student.
    """

    epochs: int = 4
    peak_learning_rate: float = 2e-3
    warmup: float = 0.05
    student_loss_weight: float = 0.3
    logits_weight: float = 1.0
    embedding_weight: float = 0.0
    hidden_weight: float = 0.0
    temperature: float = 1.0
    dropout: float = 0.0


def fit(
    model: keras.Model,
    training: Batches,
    validation: Batches,
    schedule: Schedule,
    backup_dir: Path | None = None,
    jit_compile: bool = True,
    callbacks: list[keras.callbacks.Callback] | None = None,
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains `model`, a translator or a distiller of one.

    Args:
        model: What to train; its compile settings are replaced.
        training: Batches of `(inputs, labels, sample_weight)`.
        validation: The same, evaluated after every epoch.
        schedule: Length and step sizes.
        backup_dir: Where each epoch's state is kept until the run is
            complete, so that an interrupted run resumes.
        jit_compile: Whether XLA compiles the step: about twice as fast once
            compiled, seconds of compilation for each batch shape.
        callbacks: Further Keras callbacks.
        verbose: As in `keras.Model.fit`.

    Returns:
        The `History` of the epochs run by this call.
    """
    steps_per_epoch = len(training)
    if steps_per_epoch == 0:
        raise ValueError(
            "`training` has no complete batch: give it more sentence pairs, "
            "or batches of fewer tokens."
        )
    model.compile(
        schedule.optimizer(steps_per_epoch),
        loss=LabelSmoothedCrossentropy(schedule.smoothing),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="nll"
            )
        ],
        jit_compile=jit_compile,
    )
    callbacks = list(callbacks or [])
    if backup_dir is not None:
        # The one before, too, should a kill cut the last one short.
        callbacks.append(
            keras.callbacks.BackupAndRestore(
                str(backup_dir), double_checkpoint=True
            )
        )
    return model.fit(
        training,
        validation_data=validation,
        epochs=schedule.epochs,
        shuffle=False,  # the dataset does
        callbacks=callbacks,
        verbose=verbose,
    )


def distill(
    teacher: keras.Model,
    student: keras.Model,
    training: Batches,
    validation: Batches,
    schedule: Recipe,
    quantization: str | None = None,
    **options,
) -> keras.callbacks.History:
    """Trains `student` on the task and towards `teacher`, as `fit` does.

    Args:
        teacher: The trained model.
        student: Its compressed copy.
        training: As in `fit`.
        validation: As in `fit`.
        schedule: The recipe. A loss of weight zero is not computed.
        quantization: `"int8"`, `"int4"` or `"int2"`: how the student's codes
            are rounded from now on. By default as they are.
        **options: Those of `fit`.
    """
    import keras_distilled_embedding as kde

    losses = {
        kde.LogitsDistillation(schedule.temperature): schedule.logits_weight,
        kde.EmbeddingDistillation(): schedule.embedding_weight,
        keras.distillation.FeatureDistillation(
            "mse", "decoder_output", "decoder_output"
        ): schedule.hidden_weight,
    }
    losses = {loss: weight for loss, weight in losses.items() if weight > 0}
    if quantization is not None:
        student.get_layer("token_embedding").quantize(quantization)
    model = student
    if losses and schedule.student_loss_weight < 1.0:
        model = kde.Distiller(
            teacher,
            student,
            list(losses),
            distillation_loss_weights=list(losses.values()),
            student_loss_weight=schedule.student_loss_weight,
        )
    return fit(model, training, validation, schedule, **options)
