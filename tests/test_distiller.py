"""`Distiller` as a Keras model: training, saving, and what it refuses.

What a step computes is in test_distiller_losses.py. Nothing here belongs to
one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from tests.distillation_models import BATCH
from tests.distillation_models import CLOSE
from tests.distillation_models import RANK
from tests.distillation_models import CountCalls
from tests.distillation_models import changed
from tests.distillation_models import cross_entropies
from tests.distillation_models import divergences
from tests.distillation_models import evaluate
from tests.distillation_models import float64
from tests.distillation_models import make_classifiers
from tests.distillation_models import make_data
from tests.distillation_models import make_distiller
from tests.distillation_models import make_factors
from tests.distillation_models import make_pair
from tests.distillation_models import make_table
from tests.distillation_models import randomize
from tests.distillation_models import snapshot
from tests.distillation_models import task_loss
from tests.distillation_models import without_gradient

FACTORS = {"tokens/codes", "tokens/basis", "tokens/offset"}

RUNS_EAGERLY = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX traces every step"
)


def both_losses():
    return [EmbeddingDistillation(), LogitsDistillation()]


# Training


def test_teacher_stays_and_student_is_trained():
    teacher, student = make_pair(dropout=0.5)
    teacher.get_layer("hidden").trainable = False
    trainable = [(layer.name, layer.trainable) for layer in teacher.layers]
    ids, targets, _ = make_data()
    distiller = make_distiller(
        (teacher, student), both_losses(), optimizer=keras.optimizers.Adam()
    )
    before, student_before = snapshot(teacher), snapshot(student)
    loss = evaluate(distiller, ids, targets)["loss"]
    distiller.fit(ids, targets, epochs=5, verbose=0)
    # Its dropout's random state included.
    assert not changed(teacher, before)
    assert trainable == [(x.name, x.trainable) for x in teacher.layers]
    assert FACTORS | {"hidden/kernel"} <= changed(student, student_before)
    assert evaluate(distiller, ids, targets)["loss"] < loss
    for kind in ("variables", "weights"):
        own = {id(v) for v in getattr(student, f"trainable_{kind}")}
        trained = [id(v) for v in getattr(distiller, f"trainable_{kind}")]
        rest = [id(v) for v in getattr(distiller, f"non_trainable_{kind}")]
        every = [id(v) for v in getattr(distiller, kind)]
        assert set(trained) == own
        assert sorted(trained + rest) == sorted(every)
    names = {v.path for v in distiller.optimizer.variables}
    assert len(names) == 2 + 2 * len(own)  # Adam: two for each


def test_layers_frozen_in_the_student_stay():
    teacher, student = make_pair()
    student.get_layer("hidden").trainable = False
    distiller = make_distiller((teacher, student), optimizer="sgd")
    before = snapshot(student)
    distiller.fit(*make_data()[:2], verbose=0)
    assert changed(student, before) == FACTORS


def test_only_the_tables_are_trained(tmp_path):
    """Without a layer's `trainable` being changed, also after loading."""
    teacher, student = make_pair()
    distiller = make_distiller(
        (teacher, student),
        both_losses(),
        optimizer=keras.optimizers.Adam(0.01),
        train="tables",
    )
    ids, targets, _ = make_data()
    for _ in range(2):
        before = snapshot(distiller.student)
        distiller.fit(ids, targets, verbose=0)
        assert changed(distiller.student, before) == FACTORS
        assert len(distiller.trainable_variables) == 3
        assert len(distiller.trainable_weights) == 3
        # Two for each table's variable, the step and the rate.
        assert len(distiller.optimizer.variables) == 8
        every = [*distiller.trainable_weights, *distiller.non_trainable_weights]
        assert {id(v) for v in every} == {id(v) for v in distiller.weights}
        distiller.save(tmp_path / "distiller.keras")
        distiller = keras.saving.load_model(
            tmp_path / "distiller.keras", {"CountCalls": CountCalls}
        )
    assert all(layer.trainable for layer in student.layers)
    with pytest.raises(ValueError, match="`student` must have a .* without"):
        # Of a model that is not compressed.
        Distiller(student, teacher, LogitsDistillation(), train="tables")


@without_gradient
def test_only_distillation_needs_no_task():
    models = make_pair()
    ids = make_data()[0]
    distiller = make_distiller(
        models, student_loss_weight=0.0, loss=None, optimizer="sgd"
    )
    before = snapshot(models[1])
    history = distiller.fit(ids, epochs=2, verbose=0).history
    np.testing.assert_allclose(
        history["embedding_distillation_loss"], history["loss"], rtol=1e-6
    )
    assert history["loss"][1] < history["loss"][0]
    assert changed(models[1], before) == FACTORS
    distiller = make_distiller(models, student_loss_weight=0.5, loss=None)
    with pytest.raises(ValueError, match="Provide a `loss`"):
        distiller.fit(ids, verbose=0)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_students_stay_rounded_and_learn(quantization):
    models = make_pair(quantization=quantization)
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models, both_losses(), optimizer=keras.optimizers.Adam(0.01)
    )
    before = snapshot(models[1])
    history = distiller.fit(ids, targets, epochs=10, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert changed(models[1], before) >= FACTORS
    assert models[1].get_layer("tokens").quantization == quantization


class RecordOutputs(keras.losses.Loss):
    last = None

    def call(self, y_true, y_pred):
        RecordOutputs.last = (float64(y_true), float64(y_pred))
        return ops.mean(ops.square(y_true - y_pred), axis=-1)


@RUNS_EAGERLY
@pytest.mark.parametrize(
    ("training", "student_training"),
    [(False, True), (True, True), (True, False)],
)
def test_dropout_is_the_students_alone(training, student_training):
    teacher, student = make_pair(dropout=0.9)
    ids, targets, _ = make_data()
    distiller = make_distiller(
        (teacher, student),
        keras.distillation.FeatureDistillation(loss=RecordOutputs()),
        student_training=student_training,
        run_eagerly=True,
    )
    assert distiller.get_config()["student_training"] == student_training
    if training:
        distiller.train_on_batch(ids, targets)
    else:
        distiller.test_on_batch(ids, targets)
    teacher_outputs, student_outputs = RecordOutputs.last
    np.testing.assert_allclose(teacher_outputs, teacher(ids), atol=1e-5)
    same = np.allclose(student_outputs, student(ids), atol=1e-5)
    assert same != (training and student_training)


@RUNS_EAGERLY
@pytest.mark.parametrize(
    ("make_losses", "teacher_calls"),
    [
        (lambda: EmbeddingDistillation(), 0),
        (lambda: LogitsDistillation(), 1),
        (both_losses, 1),
        (
            lambda: [
                LogitsDistillation(),
                keras.distillation.LogitsDistillation(),
                keras.distillation.FeatureDistillation(
                    teacher_layer_name="hidden", student_layer_name="hidden"
                ),
            ],
            1,
        ),
    ],
    ids=["embedding", "logits", "both", "keras"],
)
def test_models_run_once_a_step_at_most(make_losses, teacher_calls):
    models = make_pair()
    distiller = make_distiller(models, make_losses(), run_eagerly=True)
    counters = [model.get_layer("counter") for model in models]
    for step in (distiller.train_on_batch, distiller.test_on_batch):
        for counter in counters:
            counter.calls = 0
        step(*make_data()[:2])
        assert [c.calls for c in counters] == [teacher_calls, 1]


def test_fit_with_callbacks_metrics_and_validation_data(tmp_path):
    models = make_pair()
    distiller = Distiller(*models, both_losses())
    distiller.compile(
        "adam",
        task_loss(),
        metrics=["accuracy"],
        weighted_metrics=["sparse_categorical_crossentropy"],
    )
    path = tmp_path / "best.weights.h5"
    best = keras.callbacks.ModelCheckpoint(
        path, save_best_only=True, save_weights_only=True
    )
    stop = keras.callbacks.EarlyStopping(
        "val_loss", patience=0, min_delta=1e9, restore_best_weights=True
    )
    ids, targets, _ = make_data()
    validation_data = ids[::-1, ::-1], targets
    history = distiller.fit(
        ids,
        targets,
        validation_data=validation_data,
        epochs=9,
        verbose=0,
        callbacks=[best, stop],
    ).history
    names = {
        "loss",
        "task_loss",
        "embedding_distillation_loss",
        "logits_distillation_loss",
        "accuracy",
        "sparse_categorical_crossentropy",
    }
    assert set(history) == names | {f"val_{name}" for name in names}
    assert len(history["loss"]) == 2  # stopped
    logs = evaluate(distiller, *validation_data)
    assert logs["loss"] == pytest.approx(history["val_loss"][0], rel=1e-5)
    randomize(models[1], seed=9)
    assert evaluate(distiller, *validation_data)["loss"] != logs["loss"]
    distiller.load_weights(path)
    logs = evaluate(distiller, *validation_data)
    assert logs["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer_options", "options"),
    [
        ({}, {"jit_compile": True}),
        ({}, {"steps_per_execution": 2}),
        ({"gradient_accumulation_steps": 2}, {}),
    ],
    ids=["jit", "steps", "accumulation"],
)
def test_ways_to_compile(optimizer_options, options):
    teacher, student = make_pair(dropout=0.1)
    distiller = Distiller(teacher, student, both_losses())
    optimizer = keras.optimizers.Adam(0.01, **optimizer_options)
    distiller.compile(optimizer, task_loss(), **options)
    before, student_before = snapshot(teacher), snapshot(student)
    history = distiller.fit(
        *make_data()[:2], batch_size=BATCH // 2, epochs=4, verbose=0
    ).history
    assert history["loss"][-1] < history["loss"][0]
    assert not changed(teacher, before)
    assert changed(student, student_before)


def make_model_of_dictionaries(embedding, seed):
    ids = keras.Input((None,), dtype="int32", name="ids")
    other = keras.Input((1,), name="other")
    x = keras.layers.GlobalAveragePooling1D()(embedding(ids)) + other
    outputs = {
        "zeta": keras.layers.Dense(3, name="zeta")(x),
        "alpha": keras.layers.Dense(5, name="alpha")(x),
    }
    model = keras.Model({"ids": ids, "other": other}, outputs)
    return randomize(model, seed)


def test_dictionaries_of_inputs_and_outputs():
    models = [
        make_model_of_dictionaries(embedding, seed)
        for seed, embedding in enumerate((make_table(), make_factors()), 1)
    ]
    losses = {"zeta": task_loss(), "alpha": task_loss()}
    distillation = LogitsDistillation(outputs="logits")
    distiller = make_distiller(models, distillation, loss=losses)
    inputs = {
        "ids": make_data()[0],
        "other": np.ones((BATCH, 1), "float32"),
    }
    labels = {name: np.arange(BATCH) % 3 for name in losses}
    teacher_logits, logits = (model(inputs) for model in models)
    task = sum(
        cross_entropies(labels[name], logits[name]).mean() for name in losses
    )
    divergence = sum(
        divergences(teacher_logits[name], logits[name]).mean()
        for name in losses
    )
    logs = evaluate(distiller, inputs, labels)
    assert logs["task_loss"] == pytest.approx(task, **CLOSE)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )
    distiller.fit(inputs, labels, verbose=0)
    assert set(distiller.predict(inputs, verbose=0)) == {"alpha", "zeta"}


def test_outputs_are_the_students():
    teacher, student = make_pair()
    ids = make_data()[0]
    distiller = Distiller(teacher, student)
    np.testing.assert_array_equal(distiller(ids), student(ids))
    np.testing.assert_allclose(
        distiller.predict(ids, verbose=0), student(ids), atol=1e-5
    )


# Saving; that a training continues is in test_distiller_resume.py


@pytest.mark.parametrize(
    "make_losses",
    [
        lambda: None,
        lambda: [
            EmbeddingDistillation(seed=5),
            LogitsDistillation(3.0),
            keras.distillation.LogitsDistillation(),
        ],
    ],
    ids=["default", "several"],
)
def test_saving(make_losses, tmp_path):
    distiller = make_distiller(
        make_pair(quantization="int8"),
        make_losses(),
        student_loss_weight=0.3,
        name="d",
        optimizer="adam",
    )
    ids, targets, _ = make_data()
    distiller.fit(ids, targets, verbose=0)
    expected = evaluate(distiller, ids, targets)
    path = tmp_path / "distiller.keras"
    distiller.save(path)
    restored = keras.saving.load_model(
        path, custom_objects={"CountCalls": CountCalls}
    )
    assert restored.name == "d"
    assert restored.student.get_layer("tokens").quantization == "int8"
    assert evaluate(restored, ids, targets) == pytest.approx(expected, rel=1e-5)
    # Training continues as it would have.
    for model in (distiller, restored):
        model.fit(ids, targets, verbose=0)
    for a, b in zip(distiller.weights, restored.weights, strict=True):
        np.testing.assert_allclose(
            float64(a), float64(b), atol=1e-5, err_msg=a.path
        )


# What is refused, before any work


def make_unbuilt():
    return keras.Sequential([keras.layers.Dense(2)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda t, s: (None, s),
            TypeError,
            "`teacher` must be a `keras.Model`. Received: teacher=None",
        ),
        (lambda t, s: (t, "s"), TypeError, "`student` must be .*student='s'"),
        (lambda t, s: (make_unbuilt(), s), ValueError, "`teacher` must be bu"),
        (lambda t, s: (t, make_unbuilt()), ValueError, "`student` must be bu"),
        (lambda t, s: (t, t), ValueError, "share variables.*tokens/embedd"),
    ],
)
def test_bad_models(make, error, message):
    with pytest.raises(error, match=message):
        Distiller(*make(*make_classifiers()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"distillation_losses": "kl"}, TypeError, "Received: 'kl'"),
        ({"distillation_losses": [None]}, TypeError, "Received: None"),
        (
            {"distillation_losses": keras.losses.KLDivergence()},
            TypeError,
            "DistillationLoss",
        ),
        ({"distillation_losses": []}, ValueError, "at least one loss"),
        (
            {"distillation_loss_weights": [1.0, 2.0]},
            ValueError,
            r"1 losses, weights=\[1.0, 2.0\]",
        ),
        ({"distillation_loss_weights": [-1.0]}, ValueError, r"\[-1.0\]"),
        ({"distillation_loss_weights": ["1"]}, ValueError, r"\['1'\]"),
        (
            {"distillation_loss_weights": [float("nan")]},
            ValueError,
            r"\[nan\]",
        ),
        ({"student_loss_weight": -0.1}, ValueError, "weight=-0.1"),
        ({"student_loss_weight": 1.1}, ValueError, "weight=1.1"),
        ({"student_loss_weight": "half"}, ValueError, "weight='half'"),
        ({"student_loss_weight": None}, ValueError, "weight=None"),
        ({"train": "table"}, ValueError, "'tables'. Received: train='table'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Distiller(*make_classifiers(), **options)


def test_a_compressed_model_is_a_student():
    teacher, _ = make_pair()
    student = compress(teacher, rank=RANK, verbose=0)
    distiller = make_distiller(
        (teacher, student),
        both_losses(),
        student_loss_weight=0.0,
        loss=None,
        optimizer=keras.optimizers.Adam(0.01),
    )
    ids = make_data()[0]
    before = evaluate(distiller, ids)
    distiller.fit(ids, epochs=10, verbose=0)
    after = evaluate(distiller, ids)
    assert after["loss"] < before["loss"]
    assert after["task_loss"] == 0.0


def test_a_student_that_still_uses_the_teachers_table():
    """Through a function that refers to it, where no layer shares it."""

    def tied(table):
        ids = keras.Input((5,), dtype="int32")
        embedding = keras.layers.Embedding(20, 8, name="tokens")
        states = keras.layers.Dense(8)(embedding(ids))
        table = embedding if table is None else table
        logits = keras.layers.Lambda(
            lambda x: ops.matmul(x, ops.transpose(table.embeddings)),
            output_shape=(5, 20),
        )(states)
        return keras.Model(ids, logits), embedding

    teacher, table = tied(None)
    student, _ = tied(table)
    with pytest.raises(ValueError, match="'tokens.*/embeddings' of another"):
        Distiller(teacher, student, [LogitsDistillation()])
    own, _ = tied(None)
    Distiller(teacher, own, [LogitsDistillation()])
