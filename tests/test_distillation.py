"""The distiller and its losses, against NumPy."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.distillation import paired_embeddings
from keras_distilled_embedding.layers import DistilledEmbedding

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)

# Keras's word on weights that no loss depends on.
without_gradient = pytest.mark.filterwarnings(
    "ignore:Gradients do not exist:UserWarning"
)

VOCABULARY, WIDTH, RANK = 41, 12, 3
BATCH, LENGTH = 6, 5


class CountCalls(keras.layers.Layer):
    """Passes its inputs on, and counts (where models run eagerly)."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


def make_teacher(
    *, mask_zero=False, dropout=0.0, regularizer=None, vocabulary=VOCABULARY
):
    """A tied language model: ids -> logits."""
    embedding = keras.layers.ReversibleEmbedding(
        vocabulary,
        WIDTH,
        mask_zero=mask_zero,
        embeddings_regularizer=regularizer,
        name="tokens",
    )
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = embedding(ids)
    x = CountCalls(name="counter")(x)
    x = keras.layers.Dropout(dropout)(x)
    x = keras.layers.Dense(
        WIDTH,
        "tanh",
        kernel_regularizer=regularizer,
        activity_regularizer=regularizer,
        name="hidden",
    )(x)
    model = keras.Model(ids, embedding(x, reverse=True), name="model")
    return randomize(model)


def make_classifier(classes=2, vocabulary=VOCABULARY, name="tokens"):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(vocabulary, WIDTH, name=name),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(classes, name="classes"),
        ]
    )
    return randomize(model)


def make_pair(**options):
    teacher = make_teacher(**options)
    student = compress(teacher, rank=RANK, verbose=0)
    for counter in (teacher, student):
        counter.get_layer("counter").calls = 0
    return teacher, student


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.7))
    return model


def make_data(seed=0, vocabulary=VOCABULARY):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocabulary, size=(BATCH, LENGTH)).astype("int32")
    targets = rng.integers(1, vocabulary, size=(BATCH, LENGTH)).astype("int32")
    return ids, targets


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def evaluate(distiller, *data, **options):
    return distiller.evaluate(
        *data, batch_size=BATCH, verbose=0, return_dict=True, **options
    )


def snapshot(model):
    return [ops.convert_to_numpy(v).copy() for v in model.variables]


def assert_unchanged(model, before):
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(variable), value, err_msg=variable.path
        )


def changed(model, before):
    return [
        variable.path
        for variable, value in zip(model.variables, before)
        if not np.array_equal(ops.convert_to_numpy(variable), value)
    ]


# The formulas, in NumPy and float64


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def log_softmax(x):
    x = np.asarray(x, "float64")
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def token_cross_entropy(targets, logits):
    picked = np.take_along_axis(log_softmax(logits), targets[..., None], -1)
    return -picked[..., 0]


def token_divergence(teacher_logits, student_logits, temperature=1.0):
    log_p = log_softmax(np.asarray(teacher_logits) / temperature)
    log_q = log_softmax(np.asarray(student_logits) / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def row_distances(table, layer, prefix=""):
    codes, basis = (
        to_numpy(getattr(layer, prefix + name)).astype("float64")
        for name in ("codes", "basis")
    )
    rows = np.maximum(codes, 0) @ basis
    return np.square(to_numpy(table) - rows).sum(axis=1)


def reference_embedding_loss(teacher, student):
    table = teacher.get_layer("tokens").embeddings
    return row_distances(table, student.get_layer("tokens")).mean()


# The losses of the distiller


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_loss_equals_numpy(weighted, w):
    teacher, student = make_pair()
    ids, targets = make_data()
    distiller = Distiller(
        teacher,
        student,
        [EmbeddingDistillation(), LogitsDistillation(2.0)],
        [0.7, 1.3],
        student_loss_weight=w,
    )
    distiller.compile(keras.optimizers.SGD(0.0), cross_entropy())
    weights = np.random.default_rng(1).uniform(size=ids.shape)
    weights = weights if weighted else np.ones(ids.shape)
    data = (ids, targets) + ((weights,) if weighted else ())
    logits = teacher(ids), student(ids)

    task = (weights * token_cross_entropy(targets, logits[1])).mean()
    divergences = token_divergence(*logits, temperature=2.0)
    divergence = (weights * divergences).sum() / weights.sum()
    distance = reference_embedding_loss(teacher, student)
    expected = {
        "task_loss": task,
        "embedding_distillation_loss": distance,
        "logits_distillation_loss": divergence,
        "loss": w * task + (1 - w) * (0.7 * distance + 1.3 * divergence),
    }
    for actual in (
        evaluate(distiller, *data[:2], sample_weight=(*data, None)[2]),
        distiller.train_on_batch(*data, return_dict=True),
    ):
        assert actual == pytest.approx(expected, rel=1e-5)


def test_defaults_are_the_papers():
    teacher, student = make_pair()
    ids, targets = make_data()
    distiller = Distiller(teacher, student)
    distiller.compile(loss=cross_entropy())
    task = token_cross_entropy(targets, student(ids)).mean()
    distance = reference_embedding_loss(teacher, student)
    logs = evaluate(distiller, ids, targets)
    assert logs["loss"] == pytest.approx((task + distance) / 2, rel=1e-5)
    assert set(logs) == {"loss", "task_loss", "embedding_distillation_loss"}


def test_regularization_losses_are_added_as_they_are():
    teacher, student = make_pair(regularizer=keras.regularizers.L2(0.01))
    ids, targets = make_data()
    distiller = Distiller(
        teacher, student, LogitsDistillation(), student_loss_weight=0.25
    )
    distiller.compile(keras.optimizers.SGD(0.0), cross_entropy())
    logs = evaluate(distiller, ids, targets)
    task = token_cross_entropy(targets, student(ids)).mean()
    divergence = token_divergence(teacher(ids), student(ids)).mean()
    assert logs["task_loss"] == pytest.approx(task, rel=1e-4)
    layer, hidden = student.get_layer("tokens"), student.get_layer("hidden")
    states = keras.Model(student.input, hidden.output)(ids)
    penalty = 0.01 * sum(
        np.square(to_numpy(x)).sum()
        for x in (layer.codes, layer.basis, hidden.kernel)
    )
    # Keras divides the penalty of activations by the size of the batch.
    penalty += 0.01 * np.square(to_numpy(states)).sum() / BATCH
    expected = 0.25 * task + 0.75 * divergence + penalty
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)


@without_gradient
def test_only_distillation_needs_no_task():
    teacher, student = make_pair()
    ids, _ = make_data()
    distiller = Distiller(teacher, student, student_loss_weight=0.0)
    distiller.compile("sgd")
    before = snapshot(student)
    history = distiller.fit(ids, epochs=2, verbose=0).history
    np.testing.assert_allclose(
        history["embedding_distillation_loss"], history["loss"], rtol=1e-6
    )
    assert history["loss"][1] < history["loss"][0]
    assert set(changed(student, before)) == {"tokens/codes", "tokens/basis"}
    distiller = Distiller(teacher, student, student_loss_weight=0.5)
    distiller.compile("sgd")
    with pytest.raises(ValueError, match="Provide a `loss`"):
        distiller.fit(ids, verbose=0)


# Masks and weights of tokens


def pad(x, by=4):
    return np.pad(x, ((0, 0), (0, by)))


def test_masked_tokens_do_not_count():
    """The mask of `mask_zero` reaches the student's logits."""
    teacher, student = make_pair(mask_zero=True)
    ids, targets = make_data()
    ids[:2, 3:] = 0
    distiller = Distiller(teacher, student, LogitsDistillation())
    distiller.compile(loss=cross_entropy())
    real = ids != 0
    losses = token_divergence(teacher(ids), student(ids))
    logs = evaluate(distiller, ids, targets)
    assert logs["logits_distillation_loss"] == pytest.approx(
        losses[real].mean(), rel=1e-5
    )
    assert logs["task_loss"] == pytest.approx(
        token_cross_entropy(targets, student(ids))[real].mean(), rel=1e-5
    )
    longer = evaluate(distiller, pad(ids), pad(targets))
    assert longer == pytest.approx(logs, rel=1e-5)


def test_tokens_of_weight_zero_do_not_count():
    teacher, student = make_pair()
    ids, targets = make_data()
    distiller = Distiller(teacher, student, LogitsDistillation())
    distiller.compile(loss=None, weighted_metrics=[])
    distiller.student_loss_weight = 0.0
    weights = np.random.default_rng(1).uniform(size=ids.shape)
    short = evaluate(distiller, ids, targets, sample_weight=weights)
    longer = evaluate(
        distiller, pad(ids), pad(targets), sample_weight=pad(weights)
    )
    assert longer == pytest.approx(short, rel=1e-5)
    nothing = evaluate(
        distiller, ids, targets, sample_weight=np.zeros(ids.shape)
    )
    assert nothing["logits_distillation_loss"] == 0.0


LOGITS = np.random.default_rng(2).normal(size=(2, BATCH, LENGTH, 7))


@pytest.mark.parametrize("temperature", [1, 0.5, 4.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_divergence(temperature, scale):
    loss = LogitsDistillation(temperature)
    expected = token_divergence(*(scale * LOGITS), temperature).mean()
    actual = loss.compute_loss(*(scale * LOGITS))
    assert float(actual) == pytest.approx(expected, rel=1e-4)
    assert float(loss.compute_loss(LOGITS[0], LOGITS[0])) == pytest.approx(
        0.0, abs=1e-6
    )


@pytest.mark.parametrize(
    "shape", [(BATCH, LENGTH), (BATCH, LENGTH, 1), (BATCH, 1), (BATCH,)]
)
def test_divergence_is_a_mean_over_tokens(shape):
    """Also where the weights are those of sequences."""
    weights = np.random.default_rng(1).uniform(size=shape).astype("float32")
    per_token = weights.reshape(BATCH, -1) * np.ones((BATCH, LENGTH))
    losses = token_divergence(*LOGITS)
    actual = LogitsDistillation().compute_loss(*LOGITS, sample_weight=weights)
    assert float(actual) == pytest.approx(
        (per_token * losses).sum() / per_token.sum(), rel=1e-5
    )


def test_divergence_of_several_tokens_at_each_place():
    """The weights are those of the places."""
    logits = [np.stack([x, x[::-1]], axis=2) for x in LOGITS]
    weights = np.random.default_rng(1).uniform(size=(BATCH, LENGTH))
    losses = np.stack(
        [token_divergence(*(x[:, :, i] for x in logits)) for i in (0, 1)], -1
    )
    actual = LogitsDistillation().compute_loss(
        *logits, sample_weight=weights.astype("float32")
    )
    assert float(actual) == pytest.approx(
        (weights[..., None] * losses).sum() / (2 * weights.sum()), rel=1e-5
    )


def test_divergence_of_one_prediction_a_sample():
    weights = np.arange(BATCH, dtype="float32")
    logits = LOGITS[:, :, 0]
    losses = token_divergence(*logits)
    for shape in ((BATCH,), (BATCH, 1)):
        actual = LogitsDistillation().compute_loss(
            *logits, sample_weight=weights.reshape(shape)
        )
        assert float(actual) == pytest.approx(
            (weights * losses).sum() / weights.sum(), rel=1e-5
        )


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_divergences_of_several_outputs_add_up(as_dictionary):
    first, second = LOGITS, LOGITS[:, :, 0, :3]
    teacher, student = zip(first, second)
    ones, weights = np.ones(BATCH), np.arange(BATCH, dtype="float32")
    expected = token_divergence(*first).mean()
    plain = expected + token_divergence(*second).mean()
    weighted = expected + np.average(token_divergence(*second), weights=weights)
    sample_weight = [None, weights]
    if as_dictionary:
        names = ("z", "a")  # not in the order of the alphabet
        teacher, student = dict(zip(names, teacher)), dict(zip(names, student))
        sample_weight = {"a": weights}
    loss = LogitsDistillation()
    for given, value in (
        (None, plain),
        (ones, plain),
        (sample_weight, weighted),
    ):
        actual = loss.compute_loss(teacher, student, sample_weight=given)
        assert float(actual) == pytest.approx(value, rel=1e-5)


def make_two_outputs():
    ids = keras.Input((None,), dtype="int32", name="ids")
    other = keras.Input((1,), name="other")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens")(ids)
    x = keras.layers.GlobalAveragePooling1D()(x) + other
    outputs = {
        "zeta": keras.layers.Dense(3, name="zeta")(x),
        "alpha": keras.layers.Dense(5, name="alpha")(x),
    }
    return randomize(keras.Model({"ids": ids, "other": other}, outputs))


def test_dictionaries_of_inputs_and_outputs():
    teacher = make_two_outputs()
    student = compress(teacher, rank=RANK, verbose=0)
    distiller = Distiller(
        teacher, student, LogitsDistillation(), student_loss_weight=0.5
    )
    losses = {"zeta": cross_entropy(), "alpha": cross_entropy()}
    distiller.compile("sgd", losses)
    ids, _ = make_data()
    inputs = {"ids": ids, "other": np.ones((BATCH, 1), "float32")}
    labels = {name: np.arange(BATCH) % 3 for name in losses}
    teacher_logits, student_logits = teacher(inputs), student(inputs)
    task = sum(
        token_cross_entropy(labels[name], student_logits[name]).mean()
        for name in losses
    )
    divergence = sum(
        token_divergence(teacher_logits[name], student_logits[name]).mean()
        for name in losses
    )
    logs = evaluate(distiller, inputs, labels)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, rel=1e-5
    )
    distiller.fit(inputs, labels, verbose=0)
    assert set(distiller.predict(inputs, verbose=0)) == {"alpha", "zeta"}


# The tables


def test_untied_tables_both_count():
    layer = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, tie_weights=False, name="tokens"
    )
    ids = keras.Input((None,), dtype="int32")
    teacher = randomize(keras.Model(ids, layer(layer(ids), reverse=True)))
    student = compress(teacher, rank=RANK, verbose=0)
    new = student.get_layer("tokens")
    kernel = ops.transpose(layer.reverse_embeddings)
    expected = row_distances(layer.embeddings, new).mean()
    expected += row_distances(kernel, new, "reverse_").mean()
    actual = EmbeddingDistillation().compute_loss(
        None, None, teacher=teacher, student=student
    )
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_sampled_rows_are_unbiased():
    teacher, student = make_pair()
    # No row is like another.
    table = teacher.get_layer("tokens").embeddings
    table.assign(table * np.linspace(0.1, 3.0, VOCABULARY)[:, None])
    loss = EmbeddingDistillation(num_rows=5)
    draws = np.array(
        [
            float(
                loss.compute_loss(None, None, teacher=teacher, student=student)
            )
            for _ in range(300)
        ]
    )
    distances = row_distances(table, student.get_layer("tokens"))
    # Drawn with replacement: the mean of five has a fifth of the variance.
    spread = distances.std() / 5**0.5
    assert draws.std() == pytest.approx(spread, rel=0.2)
    assert abs(draws.mean() - distances.mean()) < 4 * spread / 300**0.5
    assert len(set(draws)) > 290


@without_gradient
def test_sampled_rows_differ_at_every_step_of_a_graph():
    teacher, student = make_pair()
    distiller = Distiller(
        teacher,
        student,
        EmbeddingDistillation(num_rows=5, seed=3),
        student_loss_weight=0.0,
    )
    distiller.compile(keras.optimizers.SGD(0.0))
    ids, _ = make_data()
    history = distiller.fit(ids, epochs=4, verbose=0).history
    assert len(set(history["embedding_distillation_loss"])) == 4


def test_tables_of_one_name_are_paired_in_order():
    inputs, outputs = [], []
    for i in range(3):
        ids = keras.Input((None,), dtype="int32")
        # The first is so small that `compress` leaves it.
        embedding = keras.layers.Embedding(
            VOCABULARY if i else 2, WIDTH, name="tokens"
        )
        inner = keras.Model(ids, embedding(ids), name=f"inner_{i}")
        inputs.append(keras.Input((None,), dtype="int32"))
        outputs.append(inner(inputs[-1]))
    teacher = keras.Model(inputs, outputs)
    student = compress(teacher, rank=RANK, verbose=0)
    pairs = list(paired_embeddings(teacher, student))
    assert len(pairs) == 2
    for i, pair in enumerate(pairs, start=1):
        models = (teacher, student)
        for model, layer in zip(models, pair):
            inner = model.get_layer(f"inner_{i}")
            assert layer is inner.get_layer("tokens")


# Training


def test_teacher_stays_and_student_is_trained():
    teacher, student = make_pair(dropout=0.5)
    teacher.get_layer("hidden").trainable = False
    trainable = [(layer.name, layer.trainable) for layer in teacher.layers]
    ids, targets = make_data()
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    distiller.compile("adam", cross_entropy())
    before, student_before = snapshot(teacher), snapshot(student)
    loss = evaluate(distiller, ids, targets)["loss"]
    distiller.fit(ids, targets, epochs=5, verbose=0)
    # Byte for byte, its dropout's random state included.
    assert_unchanged(teacher, before)
    assert trainable == [(x.name, x.trainable) for x in teacher.layers]
    assert {"tokens/codes", "tokens/basis", "hidden/kernel"} <= set(
        changed(student, student_before)
    )
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
    distiller = Distiller(teacher, student)
    distiller.compile("sgd", cross_entropy())
    before = snapshot(student)
    distiller.fit(*make_data(), verbose=0)
    assert set(changed(student, before)) == {"tokens/codes", "tokens/basis"}


RUNS_EAGERLY = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX traces every step"
)


@RUNS_EAGERLY
@pytest.mark.parametrize(
    "training, student_training", [(False, True), (True, True), (True, False)]
)
def test_dropout_is_the_students_alone(training, student_training):
    teacher, student = make_pair(dropout=0.9)
    ids, targets = make_data()
    distiller = Distiller(
        teacher,
        student,
        keras.distillation.FeatureDistillation(loss=RecordTeacher()),
        student_training=student_training,
    )
    distiller.compile(
        keras.optimizers.SGD(0.0), cross_entropy(), run_eagerly=True
    )
    assert distiller.get_config()["student_training"] == student_training
    if training:
        distiller.train_on_batch(ids, targets)
    else:
        distiller.test_on_batch(ids, targets)
    teacher_outputs, student_outputs = RecordTeacher.last
    np.testing.assert_allclose(teacher_outputs, teacher(ids), atol=1e-5)
    same = np.allclose(student_outputs, student(ids), atol=1e-5)
    assert same != (training and student_training)


class RecordTeacher(keras.losses.Loss):
    last = None

    def call(self, y_true, y_pred):
        RecordTeacher.last = (to_numpy(y_true), to_numpy(y_pred))
        return ops.mean(ops.square(y_true - y_pred), axis=-1)


@RUNS_EAGERLY
@pytest.mark.parametrize(
    ("make_losses", "teacher_calls"),
    [
        (lambda: EmbeddingDistillation(), 0),
        (lambda: LogitsDistillation(), 1),
        (lambda: [LogitsDistillation(), EmbeddingDistillation()], 1),
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
    teacher, student = make_pair()
    distiller = Distiller(teacher, student, make_losses())
    distiller.compile("sgd", cross_entropy(), run_eagerly=True)
    counters = [m.get_layer("counter") for m in (teacher, student)]
    for step in (distiller.train_on_batch, distiller.test_on_batch):
        for counter in counters:
            counter.calls = 0
        step(*make_data())
        assert [c.calls for c in counters] == [teacher_calls, 1]


def test_losses_of_keras():
    teacher, student = make_pair()
    ids, targets = make_data()
    distiller = Distiller(
        teacher,
        student,
        [
            # By name, "kl_divergence", Keras would skip the softmax.
            keras.distillation.LogitsDistillation(
                temperature=2.0, loss=keras.losses.KLDivergence()
            ),
            keras.distillation.FeatureDistillation(
                loss="mse",
                teacher_layer_name="hidden",
                student_layer_name="hidden",
            ),
            LogitsDistillation(temperature=2.0),
        ],
        student_loss_weight=0.0,
    )
    distiller.compile("sgd")
    logs = evaluate(distiller, ids, targets)
    hidden = [
        to_numpy(keras.Model(m.input, m.get_layer("hidden").output)(ids))
        for m in (teacher, student)
    ]
    divergence = token_divergence(teacher(ids), student(ids), 2.0).mean()
    expected = {
        "logits_distillation_loss": divergence,
        "feature_distillation_loss": np.square(hidden[0] - hidden[1]).mean(),
        "logits_distillation_2_loss": divergence,
    }
    expected["loss"] = sum(expected.values())
    expected["task_loss"] = 0.0
    assert logs == pytest.approx(expected, rel=1e-4)
    # The features' loss has a gradient.
    before = snapshot(student)
    distiller.fit(ids, targets, verbose=0)
    assert "hidden/kernel" in changed(student, before)


def test_features_of_sequential_models():
    teacher = make_classifier()
    student = compress(teacher, rank=RANK, verbose=0)
    loss = keras.distillation.FeatureDistillation(
        teacher_layer_name="tokens", student_layer_name="tokens"
    )
    distiller = Distiller(teacher, student, loss, student_loss_weight=0.0)
    distiller.compile("sgd")
    ids, _ = make_data()
    difference = to_numpy(teacher.layers[0](ids)) - student.layers[0](ids)
    assert evaluate(distiller, ids)["loss"] == pytest.approx(
        np.square(difference).mean(), rel=1e-5
    )


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


class CountEpochs(keras.callbacks.Callback):
    epochs = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs += 1


def test_fit_with_callbacks_metrics_and_validation_data(tmp_path):
    teacher, student = make_pair()
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    distiller.compile(
        "adam",
        cross_entropy(),
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
    history = distiller.fit(
        *make_data(),
        validation_data=make_data(1),
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
    logs = evaluate(distiller, *make_data(1))
    assert logs["loss"] == pytest.approx(history["val_loss"][0], rel=1e-5)
    randomize(student, seed=9)
    assert evaluate(distiller, *make_data(1))["loss"] != logs["loss"]
    distiller.load_weights(path)
    logs = evaluate(distiller, *make_data(1))
    assert logs["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_backup_and_restore(tmp_path):
    def make():
        distiller = Distiller(*make_pair(), LogitsDistillation())
        distiller.compile("adam", cross_entropy())
        return distiller

    def fit(distiller, *callbacks):
        distiller.fit(*make_data(), epochs=4, verbose=0, callbacks=[*callbacks])

    whole = make()
    fit(whole)
    folder = tmp_path / "backup"
    with pytest.raises(KeyboardInterrupt):
        fit(make(), keras.callbacks.BackupAndRestore(folder), Interrupt())
    resumed, counter = make(), CountEpochs()
    fit(resumed, keras.callbacks.BackupAndRestore(folder), counter)
    assert counter.epochs == 2
    # As if it had not been interrupted.
    for a, b in zip(whole.student.weights, resumed.student.weights):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=a.path)


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
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    optimizer = keras.optimizers.Adam(1e-3, **optimizer_options)
    distiller.compile(optimizer, cross_entropy(), **options)
    before, student_before = snapshot(teacher), snapshot(student)
    history = distiller.fit(
        *make_data(), batch_size=BATCH // 2, epochs=2, verbose=0
    ).history
    assert history["loss"][1] < history["loss"][0]
    assert_unchanged(teacher, before)
    assert changed(student, student_before)


def test_mixed_precision_scales_the_loss():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        teacher = make_teacher()
    finally:
        keras.config.set_dtype_policy(policy)
    student = compress(teacher, rank=RANK, verbose=0)
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    distiller.compile(keras.optimizers.SGD(1e-3), cross_entropy())
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    ids, targets = make_data()
    before = snapshot(student)
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert changed(student, before)
    assert all(np.isfinite(v).all() for v in snapshot(student))
    student.set_weights(before[: len(student.weights)])
    divergence = token_divergence(
        to_numpy(teacher(ids)), to_numpy(student(ids))
    ).mean()
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, rel=1e-3
    )
    # The tables are compared as they are stored, in float32.
    assert logs["embedding_distillation_loss"] == pytest.approx(
        reference_embedding_loss(teacher, student), rel=1e-5
    )


def test_class_weight():
    teacher = make_classifier()
    student = compress(teacher, rank=RANK, verbose=0)
    distiller = Distiller(teacher, student, LogitsDistillation())
    distiller.compile(keras.optimizers.SGD(0.0), cross_entropy())
    ids, _ = make_data()
    labels = np.array([0, 1, 1, 0, 1, 0])
    logs = distiller.train_on_batch(
        ids, labels, class_weight={0: 1.0, 1: 3.0}, return_dict=True
    )
    weights = np.where(labels == 1, 3.0, 1.0)
    task = (weights * token_cross_entropy(labels, student(ids))).mean()
    divergence = np.average(
        token_divergence(teacher(ids), student(ids)), weights=weights
    )
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, rel=1e-5
    )


def test_logs_weigh_batches_by_their_size():
    teacher, student = make_pair()
    ids, targets = make_data()
    distiller = Distiller(teacher, student, LogitsDistillation())
    distiller.compile(loss=cross_entropy())
    whole = evaluate(distiller, ids, targets)
    parts = distiller.evaluate(
        ids, targets, batch_size=4, verbose=0, return_dict=True
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_outputs_are_the_students():
    teacher, student = make_pair()
    ids, _ = make_data()
    distiller = Distiller(teacher, student)
    np.testing.assert_array_equal(distiller(ids), student(ids))
    np.testing.assert_allclose(
        distiller.predict(ids, verbose=0), student(ids), atol=1e-5
    )


# Saving


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
    teacher, student = make_pair()
    distiller = Distiller(
        teacher, student, make_losses(), student_loss_weight=0.3, name="d"
    )
    distiller.compile("adam", cross_entropy())
    distiller.fit(*make_data(), verbose=0)
    expected = evaluate(distiller, *make_data(1))
    path = tmp_path / "distiller.keras"
    distiller.save(path)
    restored = keras.saving.load_model(
        path, custom_objects={"CountCalls": CountCalls}
    )
    assert restored.name == "d"
    assert evaluate(restored, *make_data(1)) == pytest.approx(
        expected, rel=1e-5
    )
    # And training goes on as it would have.
    for model in (distiller, restored):
        model.fit(*make_data(), verbose=0)
    for a, b in zip(distiller.weights, restored.weights):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=a.path)


@pytest.mark.parametrize(
    "loss",
    [
        EmbeddingDistillation(),
        EmbeddingDistillation(num_rows=7, seed=3),
        EmbeddingDistillation(row_weights=np.arange(3.0)),
        EmbeddingDistillation(row_weights={"tokens": np.arange(3.0)}),
        LogitsDistillation(2.5),
        LogitsDistillation(top_k=3),
    ],
)
def test_losses_are_serializable(loss):
    config = keras.saving.serialize_keras_object(loss)
    config = json.loads(json.dumps(config))
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is type(loss)
    assert restored.get_config() == loss.get_config()


# What is refused, before any work


def make_student_of(teacher):
    return compress(teacher, rank=RANK, verbose=0)


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
        (
            lambda t, s: (t, make_classifier(3)),
            ValueError,
            r"no `DistilledEmbedding` .* `compress\(teacher\)`",
        ),
        (
            lambda t, s: (make_classifier(name="other"), s),
            ValueError,
            r"no embedding named 'tokens'.*\['other'\]",
        ),
        (
            lambda t, s: (make_classifier(vocabulary=53), s),
            ValueError,
            r"\(53, 12\) in the teacher, \(41, 12\) in the student",
        ),
    ],
)
def test_bad_models(make, error, message):
    teacher = make_classifier()
    with pytest.raises(error, match=message):
        Distiller(*make(teacher, make_student_of(teacher)))


def test_quantized_teacher():
    teacher = make_classifier()
    student = make_student_of(teacher)
    teacher.get_layer("tokens").quantize("int8")
    with pytest.raises(ValueError, match="'tokens' with .*mode='int8'"):
        Distiller(teacher, student)


def test_bad_logits():
    student = make_student_of(make_classifier(2))
    with pytest.raises(ValueError, match=r"\[3\] from the teacher, \[2\]"):
        Distiller(make_classifier(3), student, LogitsDistillation())
    # A loss of the tables alone does not mind.
    Distiller(make_classifier(3), student)
    # Of tokens, the last dimension counts.
    other = make_teacher(vocabulary=53)
    with pytest.raises(ValueError, match=r"\[41\] from the teacher, \[53\]"):
        LogitsDistillation().validate_model_compatibility(make_teacher(), other)


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
    ],
)
def test_bad_options(options, error, message):
    teacher = make_classifier()
    with pytest.raises(error, match=message):
        Distiller(teacher, make_student_of(teacher), **options)


@pytest.mark.parametrize("num_rows", [0, -1, 2.0, True, "3"])
def test_bad_num_rows(num_rows):
    with pytest.raises(ValueError, match=f"num_rows={num_rows!r}"):
        EmbeddingDistillation(num_rows=num_rows)


@pytest.mark.parametrize(
    ("row_weights", "message"),
    [
        ([1.0, -1.0], r"shape=\(2,\), from -1.0 to 1.0"),
        ([1.0, np.nan], r"shape=\(2,\)"),
        ([1.0, np.inf], "from 1.0 to inf"),
        ([0.0, 0.0], "not all zero.*from 0.0 to 0.0"),
        ([[1.0], [2.0]], r"shape=\(2, 1\), from 1.0 to 2.0"),
        ([], r"shape=\(0,\), from inf to -inf"),
    ],
)
def test_bad_row_weights(row_weights, message):
    for given in (row_weights, {"tokens": row_weights}):
        with pytest.raises(ValueError, match=message):
            EmbeddingDistillation(row_weights=given)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "3", None])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r}"):
        LogitsDistillation(temperature)


def test_student_may_be_built_by_hand():
    """Layers of the package in a subclassed model, by name."""

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.tokens = DistilledEmbedding(
                VOCABULARY, WIDTH, RANK, name="tokens"
            )

        def call(self, ids):
            return self.tokens(self.tokens(ids), reverse=True)

    teacher, student = make_teacher(), Model()
    ids, targets = make_data()
    student(ids)
    distiller = Distiller(
        teacher, student, [EmbeddingDistillation(), LogitsDistillation()]
    )
    distiller.compile("adam", cross_entropy())
    logs = evaluate(distiller, ids, targets)
    divergence = token_divergence(teacher(ids), student(ids)).mean()
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, rel=1e-5
    )
    distiller.fit(ids, targets, verbose=0)
