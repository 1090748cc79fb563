"""Weights of the losses that change while a distiller trains.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import DistillationWeightSchedule
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


def fit(distiller, schedule, *callbacks, batches=BATCHES, **options):
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
        callbacks=[*callbacks, schedule, recorder],
        **options,
    ).history
    return history, np.array(used)


# The schedules, as Keras has them and as they are


def decay(steps, start=1.0):
    return keras.optimizers.schedules.PolynomialDecay(
        start, decay_steps=steps, end_learning_rate=0.0
    )


def line(step, steps, start=1.0):
    return start * (1 - np.minimum(step, steps) / steps)


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.3, 0.7, 1.3]),
        ({"student_loss_weight": 0.6}, [0.6, 0.7, 1.3]),
        ({"student_loss_weight": 1}, [1.0, 0.7, 1.3]),
        ({"distillation_loss_weights": [0.0, 2]}, [0.3, 0.0, 2.0]),
        (
            {
                "student_loss_weight": lambda step: 0.6,
                "distillation_loss_weights": (0.5, lambda step: 2),
            },
            [0.6, 0.5, 2.0],
        ),
    ],
    ids=["none", "student", "integer", "distillation", "all"],
)
def test_constants(arguments, expected):
    distiller = make_distiller(
        distillation_loss_weights=[0.7, 1.3], student_loss_weight=0.3
    )
    history, used = fit(
        distiller, DistillationWeightSchedule(**arguments), batches=2
    )
    np.testing.assert_allclose(used, [expected] * 2)
    assert_loss_is_the_mixture(history, used)


def test_linear_decay_is_exact_at_each_step():
    distiller = make_distiller()
    schedule = DistillationWeightSchedule(rise, [decay(9, 2.0), 0.25])
    history, used = fit(distiller, schedule, epochs=3)
    steps = np.arange(3 * BATCHES)
    expected = np.stack(
        [
            [rise(step) for step in steps],
            line(steps, 9, 2.0),
            np.full(len(steps), 0.25),
        ],
        axis=1,
    )
    # The schedules of Keras compute in float32.
    np.testing.assert_allclose(used, expected, rtol=1e-6, atol=1e-7)
    # What is computed with is what is shown.
    assert_loss_is_the_mixture(history, used)
    assert len({*history["loss"]}) == 3
    # The weights in use at an epoch's end.
    last = used[BATCHES - 1 :: BATCHES].T.tolist()
    assert history["student_loss_weight"] == last[0]
    assert history["embedding_distillation_loss_weight"] == last[1]
    assert history["logits_distillation_loss_weight"] == last[2]


def test_another_training_goes_on_counting():
    distiller = make_distiller()
    schedule = DistillationWeightSchedule(rise)
    _, first = fit(distiller, schedule)
    _, second = fit(distiller, schedule)
    np.testing.assert_allclose(
        np.concatenate([first, second])[:, 0],
        [rise(step) for step in range(2 * BATCHES)],
    )


def test_validation_uses_the_last_weights():
    distiller = make_distiller(losses=LogitsDistillation())
    schedule = DistillationWeightSchedule(lambda step: step / 10)
    history, _ = fit(distiller, schedule, validation_data=make_data(1))
    w = (BATCHES - 1) / 10
    logs = {name: values[0] for name, values in history.items()}
    assert logs["val_loss"] == pytest.approx(
        w * logs["val_task_loss"]
        + (1 - w) * logs["val_logits_distillation_loss"],
        rel=1e-5,
    )


def test_several_steps_in_one_execution():
    """They share the weights of the first of them."""
    distiller = make_distiller(compile_options={"steps_per_execution": 2})
    history, used = fit(
        distiller, DistillationWeightSchedule(None, [decay(20), 1.0]), epochs=2
    )
    first_steps = np.arange(0, 2 * BATCHES, 2)
    np.testing.assert_allclose(used[:, 1], line(first_steps, 20), rtol=1e-6)
    assert_loss_is_the_mixture(history, used)


@pytest.mark.parametrize("batches", [4, 3], ids=["even", "odd"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_accumulated_gradients_count_batches(batches, scaled):
    optimizer = keras.optimizers.SGD(0.0, gradient_accumulation_steps=2)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=1.0
        )
    distiller = make_distiller(optimizer=optimizer)
    history, used = fit(
        distiller,
        DistillationWeightSchedule(rise),
        epochs=3,
        batches=batches,
    )
    steps = range(3 * batches)
    np.testing.assert_allclose(used[:, 0], [rise(step) for step in steps])
    assert_loss_is_the_mixture(history, used)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_resumed_training_goes_on_where_it_was(tmp_path):
    def train(*callbacks):
        """Of the student, all weights, and all that was used for them."""
        distiller = make_distiller(optimizer=keras.optimizers.Adam(0.01))
        history, used = fit(
            distiller,
            DistillationWeightSchedule(rise, [decay(15), 1.0]),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            *callbacks,
            epochs=4,
        )
        return history, used, distiller.student.get_weights()

    history, used, weights = train()
    with pytest.raises(KeyboardInterrupt):
        train(Interrupt())
    resumed_history, resumed_used, resumed_weights = train()
    steps = np.arange(4 * BATCHES)
    np.testing.assert_allclose(used[:, 0], [rise(step) for step in steps])
    np.testing.assert_array_equal(resumed_used, used[2 * BATCHES :])
    for name, values in resumed_history.items():
        assert values == pytest.approx(history[name][2:], rel=1e-5)
    for a, b in zip(resumed_weights, weights):
        np.testing.assert_allclose(a, b, atol=1e-6)


# Setting the weights by hand


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


def test_a_schedule_makes_no_more_traces():
    counts = []
    for schedule in (0.5, rise):
        loss = CountTraces()
        distiller = make_distiller(losses=[EmbeddingDistillation(), loss])
        fit(distiller, DistillationWeightSchedule(schedule), epochs=2)
        counts.append(loss.traces)
    assert counts[0] == counts[1]


def test_weights_may_be_set_in_the_midst_of_an_epoch():
    """By a callback of the user's, of which no schedule knows."""
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


# What is refused


@pytest.mark.parametrize(
    "arguments",
    [
        {"student_loss_weight": "linear"},
        {"student_loss_weight": [0.5]},
        {"distillation_loss_weights": ["linear", 1.0]},
        {"distillation_loss_weights": [1.0, np.ones(3)]},
    ],
)
def test_schedules_are_numbers_or_functions(arguments):
    with pytest.raises(TypeError, match="a number or a function of the step"):
        DistillationWeightSchedule(**arguments)


@pytest.mark.parametrize("weights", [0.3, rise, "linear", {"loss": 0.3}])
def test_schedules_of_distillation_losses_are_a_list(weights):
    with pytest.raises(
        TypeError, match="`distillation_loss_weights` must be a list"
    ):
        DistillationWeightSchedule(distillation_loss_weights=weights)


def test_only_distillers_have_such_weights():
    model = make_teacher()
    model.compile("sgd", "mse")
    with pytest.raises(TypeError, match="of class Sequential"):
        model.fit(
            np.zeros((2, LENGTH)),
            np.zeros((2, CLASSES)),
            verbose=0,
            callbacks=[DistillationWeightSchedule(0.5)],
        )


@pytest.mark.parametrize("number", [0, 1, 3])
def test_one_schedule_for_each_loss(number):
    schedule = DistillationWeightSchedule(None, [1.0] * number)
    with pytest.raises(
        ValueError, match=f"2 losses. Received: {number} schedules"
    ):
        fit(make_distiller(), schedule)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_a_schedule_must_stay_in_the_range_of_weights(value):
    schedule = DistillationWeightSchedule(lambda step: [0.5, value][step > 1])
    with pytest.raises(ValueError, match=f"student_loss_weight={value}"):
        fit(make_distiller(), schedule)
