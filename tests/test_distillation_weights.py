"""Weights of the losses that change while a distiller trains.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation

VOCABULARY, WIDTH, RANK, CLASSES = 23, 8, 3, 5
BATCH, LENGTH, BATCHES = 4, 6, 4


def make_teacher():
    model = keras.Sequential(
        [
            keras.Input((LENGTH,), dtype="int32"),
            keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens"),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(CLASSES, name="classes"),
        ]
    )
    rng = np.random.default_rng(1)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.7))
    return model


class CountTraces(LogitsDistillation):
    """Counts its computations in Python: one a trace, where compiled."""

    traces = 0

    def compute_loss(self, *args, **kwargs):
        self.traces += 1
        return super().compute_loss(*args, **kwargs)


def make_distiller(losses=None, optimizer=None, compile_options=(), **options):
    teacher = make_teacher()
    distiller = Distiller(
        teacher,
        compress(teacher, rank=RANK, verbose=0),
        losses or [EmbeddingDistillation(), LogitsDistillation()],
        **options,
    )
    distiller.compile(
        optimizer or keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **dict(compile_options),
    )
    return distiller


def make_data(batches=BATCHES):
    """Batches all alike: where nothing is learnt, each has one loss."""
    rng = np.random.default_rng(3)
    ids = rng.integers(VOCABULARY, size=(BATCH, LENGTH)).astype("int32")
    labels = rng.integers(CLASSES, size=BATCH).astype("int32")
    return np.tile(ids, (batches, 1)), np.tile(labels, batches)


def fit(distiller, *callbacks, batches=BATCHES, **options):
    """Trains in a fixed order; gives the history and each batch's weights."""
    used = []

    def record(batch, logs=None):
        used.append(
            [
                distiller.student_loss_weight,
                *distiller.distillation_loss_weights,
            ]
        )

    recorder = keras.callbacks.LambdaCallback(on_train_batch_end=record)
    history = distiller.fit(
        *make_data(batches),
        batch_size=BATCH,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, recorder],
        **options,
    ).history
    return history, np.array(used)


def rise(step):
    return min(1.0, 0.1 + 0.05 * step)


def mixture(logs, used):
    """The logged loss by its parts, which stay the same; a mean of steps."""
    w, *weights = np.asarray(used).T
    parts = (
        logs["embedding_distillation_loss"],
        logs["logits_distillation_loss"],
    )
    distillation = sum(a * b for a, b in zip(weights, parts))
    return np.mean(w * logs["task_loss"] + (1 - w) * distillation)


def assert_loss_is_the_mixture(history, used):
    epochs = len(history["loss"])
    for epoch, each in enumerate(np.split(used, epochs)):
        logs = {name: values[epoch] for name, values in history.items()}
        assert logs["loss"] == pytest.approx(mixture(logs, each), rel=1e-5)


def test_weights_may_be_set_without_another_trace():
    loss = CountTraces()
    distiller = make_distiller(losses=[EmbeddingDistillation(), loss])
    data = make_data(1)

    def step():
        distiller.reset_metrics()
        return distiller.train_on_batch(*data, return_dict=True)

    logs = step()
    assert logs["loss"] == pytest.approx(
        mixture(logs | renamed(logs), [[0.5, 1.0, 1.0]]), rel=1e-5
    )
    traces = loss.traces
    distiller.student_loss_weight = 0.2
    logs = step()
    assert logs["loss"] == pytest.approx(
        mixture(logs | renamed(logs), [[0.2, 1.0, 1.0]]), rel=1e-5
    )
    distiller.distillation_loss_weights = [0.25, 3]
    logs = step()
    assert logs["loss"] == pytest.approx(
        mixture(logs | renamed(logs), [[0.2, 0.25, 3.0]]), rel=1e-5
    )
    assert loss.traces == traces
    assert distiller.student_loss_weight == 0.2
    assert distiller.distillation_loss_weights == [0.25, 3.0]


def renamed(logs):
    return {"logits_distillation_loss": logs["count_traces_loss"]}


def test_weights_may_be_set_in_the_midst_of_an_epoch():
    """By a callback, which is followed at each step."""
    distiller = make_distiller()

    def set_weights(batch, logs=None):
        distiller.student_loss_weight = rise(batch)
        distiller.distillation_loss_weights = [1.0, batch]

    setter = keras.callbacks.LambdaCallback(on_train_batch_begin=set_weights)
    history, used = fit(distiller, setter)
    assert used[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert_loss_is_the_mixture(history, used)
    # And what is computed with afterwards is what the properties say.
    logs = distiller.evaluate(*make_data(1), verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(mixture(logs, used[-1:]), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("student_loss_weight", 1.5, "student_loss_weight=1.5"),
        ("student_loss_weight", -0.5, "student_loss_weight=-0.5"),
        ("student_loss_weight", float("nan"), "student_loss_weight=nan"),
        ("student_loss_weight", "1", "student_loss_weight='1'"),
        ("distillation_loss_weights", [1.0], r"2 losses, weights=\[1.0\]"),
        ("distillation_loss_weights", [1.0, -1.0], r"\[1.0, -1.0\]"),
        ("distillation_loss_weights", [1.0, "1"], r"\[1.0, '1'\]"),
    ],
)
def test_bad_weights_change_nothing(name, value, message):
    distiller = make_distiller(student_loss_weight=0.4)
    with pytest.raises(ValueError, match=message):
        setattr(distiller, name, value)
    assert distiller.student_loss_weight == 0.4
    assert distiller.distillation_loss_weights == [1.0, 1.0]
    np.testing.assert_allclose(
        ops.convert_to_numpy(distiller._weights_in_use), [0.4, 1.0, 1.0]
    )


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_task_without_a_loss_gets_no_weight(weight):
    teacher = make_teacher()
    student = compress(teacher, rank=RANK, verbose=0)
    distiller = Distiller(teacher, student, student_loss_weight=0.0)
    distiller.compile("sgd")
    distiller.student_loss_weight = 0.0
    with pytest.raises(ValueError, match=f"student_loss_weight={weight}"):
        distiller.student_loss_weight = weight
    assert distiller.student_loss_weight == 0.0
