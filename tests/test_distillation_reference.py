"""Every loss against a reference in plain NumPy and float64.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)
from keras_distilled_embedding.layers import DistilledEmbedding

VOCABULARY, WIDTH, RANK = 23, 8, 3
BATCH, LENGTH = 4, 5

# What the losses of float32 and their references must agree to.
CLOSE = {"rel": 1e-5, "abs": 1e-7}

KerasLogits = keras.distillation.LogitsDistillation
KerasFeatures = keras.distillation.FeatureDistillation

# Keras's word on weights that no loss depends on.
without_gradient = pytest.mark.filterwarnings(
    "ignore:Gradients do not exist:UserWarning"
)


# Models and data


def randomize(model, seed):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.5))
    return model


def make_model(embedding, seed, other=None):
    """ids -> logits, with a layer whose features are compared."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = embedding(ids)
    if other is not None:
        x = x + other(ids)
    x = keras.layers.Dense(WIDTH, "tanh", name="hidden")(x)
    return randomize(keras.Model(ids, embedding(x, reverse=True)), seed)


def make_pair(mask_zero=False, tie_weights=True, dtype=None, **options):
    common = {
        "mask_zero": mask_zero,
        "tie_weights": tie_weights,
        "dtype": dtype,
        "name": "tokens",
    }
    table = keras.layers.ReversibleEmbedding(VOCABULARY, WIDTH, **common)
    factors = DistilledEmbedding(VOCABULARY, WIDTH, RANK, **options, **common)
    return make_model(table, seed=1), make_model(factors, seed=2)


def make_data(padding=0):
    """Token ids, targets and weights of tokens; zeros at the end."""
    rng = np.random.default_rng(3)
    ids, targets = rng.integers(1, VOCABULARY, size=(2, BATCH, LENGTH))
    weights = rng.uniform(0.1, 2.0, size=(BATCH, LENGTH)).astype("float32")
    ids[0, 3:] = ids[2, 2:] = 0
    return [
        np.pad(array, ((0, 0), (0, padding)))
        for array in (ids.astype("int32"), targets.astype("int32"), weights)
    ]


def task_loss(**options):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **options
    )


def make_distiller(models, losses, *args, loss="task", **options):
    """A compiled distiller, which no step of training changes."""
    compile_options = {
        name: options.pop(name)
        for name in ("loss_weights", "run_eagerly")
        if name in options
    }
    distiller = Distiller(*models, losses, *args, **options)
    distiller.compile(
        keras.optimizers.SGD(0.0),
        task_loss() if loss == "task" else loss,
        **compile_options,
    )
    return distiller


def losses_of(distiller, x, y=None, sample_weight=None):
    """The logs of a step of training."""
    distiller.reset_metrics()
    return distiller.train_on_batch(x, y, sample_weight, return_dict=True)


def evaluate(distiller, x, y=None, sample_weight=None):
    return distiller.evaluate(
        x,
        y,
        batch_size=BATCH,
        sample_weight=sample_weight,
        verbose=0,
        return_dict=True,
    )


# The formulas


def float64(x):
    if not isinstance(x, np.ndarray):
        x = ops.convert_to_numpy(ops.cast(x, "float32"))
    return np.asarray(x, "float64")


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def cross_entropies(targets, logits):
    log_q = log_softmax(float64(logits))
    return -np.take_along_axis(log_q, targets[..., None], -1)[..., 0]


def divergences(teacher, student, temperature=1.0):
    """Of the student's predictions from the teacher's, by token."""
    log_p = log_softmax(float64(teacher) / temperature)
    log_q = log_softmax(float64(student) / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def divergences_of_top(teacher, student, top_k, temperature=1.0):
    """The same over the teacher's best classes, and all others as one."""
    p, q = (
        np.exp(log_softmax(float64(x) / temperature))
        for x in (teacher, student)
    )
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    value = (p * np.log(p / q))[..., :top_k].sum(axis=-1)
    if top_k < p.shape[-1]:
        others_p, others_q = (x[..., top_k:].sum(axis=-1) for x in (p, q))
        value += others_p * np.log(others_p / others_q)
    return temperature**2 * value


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "tanh": np.tanh,
}


def reconstruct(layer, prefix="", activation="relu", hidden_activation="gelu"):
    """E~ = f(U) W + g(U A + b) B"""
    factors = {
        name: float64(getattr(layer, f"{prefix}{name}"))
        for name in ("codes", "basis", "hidden_kernel", "hidden_bias")
        + ("hidden_basis",)
        if hasattr(layer, f"{prefix}{name}")
    }
    codes = factors["codes"]
    table = ACTIVATIONS[activation](codes) @ factors["basis"]
    if "hidden_kernel" in factors:
        hidden = codes @ factors["hidden_kernel"] + factors["hidden_bias"]
        hidden = ACTIVATIONS[hidden_activation](hidden)
        table += hidden @ factors["hidden_basis"]
    return table


def row_distances(table, layer, prefix="", **activations):
    rows = reconstruct(layer, prefix, **activations)
    return np.square(float64(table) - rows).sum(axis=1)


# EmbeddingDistillation


def embedding_loss(models, **options):
    teacher, student = models
    value = EmbeddingDistillation(**options).compute_loss(
        None, None, teacher=teacher, student=student
    )
    return float(value)


ROW_WEIGHTS = np.random.default_rng(4).exponential(size=VOCABULARY)
# Words that never occur.
ROW_WEIGHTS[5:9] = 0.0


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"activation": None},
        {"activation": "relu", "hidden_dim": 4, "hidden_activation": "gelu"},
        {"activation": None, "hidden_dim": 4, "hidden_activation": "tanh"},
    ],
    ids=["relu", "linear", "funnel", "linear funnel"],
)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_distance_of_tables(tie_weights, options, row_weights):
    models = make_pair(tie_weights=tie_weights, **options)
    old, new = (model.get_layer("tokens") for model in models)
    activations = {k: v for k, v in options.items() if k != "hidden_dim"}
    expected = np.average(
        row_distances(old.embeddings, new, **activations),
        weights=row_weights,
    )
    if not tie_weights:
        # The kernel of a projection has its rows as columns.
        kernel = float64(old.reverse_embeddings).T
        expected += np.average(
            row_distances(kernel, new, "reverse_", **activations),
            weights=row_weights,
        )
    actual = embedding_loss(models, row_weights=row_weights)
    assert actual == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_only_proportions_of_row_weights_matter(scale):
    models = make_pair()
    expected = embedding_loss(models, row_weights=ROW_WEIGHTS)
    actual = embedding_loss(models, row_weights=scale * ROW_WEIGHTS)
    assert actual == pytest.approx(expected, rel=1e-5)


def make_pair_of_two_tables():
    def make(make_layer, seed):
        other = make_layer("other")
        return make_model(make_layer("tokens"), seed, other)

    return (
        make(
            lambda name: keras.layers.ReversibleEmbedding(
                VOCABULARY, WIDTH, name=name
            ),
            seed=1,
        ),
        make(
            lambda name: DistilledEmbedding(VOCABULARY, WIDTH, RANK, name=name),
            seed=2,
        ),
    )


@without_gradient
@pytest.mark.parametrize(
    "row_weights",
    [
        ROW_WEIGHTS,
        {"tokens": ROW_WEIGHTS},
        {"tokens": ROW_WEIGHTS, "other": 3 * ROW_WEIGHTS[::-1]},
        {},
    ],
    ids=["for both", "for one", "for each", "for none"],
)
def test_row_weights_by_layer(row_weights):
    teacher, student = make_pair_of_two_tables()
    by_name = row_weights
    if not isinstance(row_weights, dict):
        by_name = dict.fromkeys(("tokens", "other"), row_weights)
    expected = sum(
        np.average(
            row_distances(
                teacher.get_layer(name).embeddings, student.get_layer(name)
            ),
            weights=by_name.get(name),
        )
        for name in ("tokens", "other")
    )
    distiller = make_distiller(
        (teacher, student),
        EmbeddingDistillation(row_weights=row_weights),
        student_loss_weight=0.0,
        loss=None,
        run_eagerly=True,
    )
    logs = losses_of(distiller, make_data()[0])
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    ("row_weights", "message"),
    [
        (ROW_WEIGHTS[1:], f"'tokens', {VOCABULARY}.* {VOCABULARY - 1} numbers"),
        (
            {"other": ROW_WEIGHTS[1:]},
            f"'other', {VOCABULARY}.* {VOCABULARY - 1} numbers",
        ),
        (
            {"tokens": ROW_WEIGHTS, "words": ROW_WEIGHTS},
            r"\['other', 'tokens'\].*Received: \['words'\]",
        ),
    ],
)
def test_row_weights_must_fit_the_tables(row_weights, message):
    teacher, student = make_pair_of_two_tables()
    loss = EmbeddingDistillation(row_weights=row_weights)
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, loss)


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_rows_are_those_that_the_seed_draws(tie_weights, row_weights):
    models = make_pair(tie_weights=tie_weights)
    old, new = (model.get_layer("tokens") for model in models)
    distances = [row_distances(old.embeddings, new)]
    if not tie_weights:
        kernel = float64(old.reverse_embeddings).T
        distances.append(row_distances(kernel, new, "reverse_"))
    weights = np.ones(VOCABULARY) if row_weights is None else row_weights
    weights = weights / weights.mean()
    loss = EmbeddingDistillation(6, seed=11, row_weights=row_weights)
    seed_generator = keras.random.SeedGenerator(11)
    for _ in range(3):
        expected = 0.0
        for each in distances:
            ids = ops.convert_to_numpy(
                keras.random.randint((6,), 0, VOCABULARY, seed=seed_generator)
            )
            expected += (weights * each)[ids].mean()
        actual = loss.compute_loss(
            None, None, teacher=models[0], student=models[1]
        )
        assert float(actual) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
def test_drawn_rows_are_unbiased(row_weights):
    models = make_pair()
    old, new = (model.get_layer("tokens") for model in models)
    loss = EmbeddingDistillation(num_rows=200, row_weights=row_weights)
    values = [
        float(
            loss.compute_loss(None, None, teacher=models[0], student=models[1])
        )
        for _ in range(60)
    ]
    full = embedding_loss(models, row_weights=row_weights)
    weights = np.ones(VOCABULARY) if row_weights is None else row_weights
    terms = weights / weights.mean() * row_distances(old.embeddings, new)
    # Of a mean over all rows drawn.
    spread = terms.std() / math.sqrt(200 * 60)
    assert terms.mean() == pytest.approx(full, **CLOSE)
    assert abs(np.mean(values) - full) < 4 * spread
    # Not by drawing the same rows each time, or all rows.
    assert np.std(values) == pytest.approx(
        terms.std() / math.sqrt(200), rel=0.35
    )


# LogitsDistillation


def make_logits(scale=1.0, seed=5, classes=11):
    rng = np.random.default_rng(seed)
    shape = (2, BATCH, LENGTH, classes)
    return (scale * rng.normal(size=shape)).astype("float32")


def logits_loss(teacher, student, *args, **options):
    loss = LogitsDistillation(*args, **options)
    return float(loss.compute_loss(teacher, student))


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 7.5])
def test_divergence(temperature, scale):
    logits = make_logits(scale)
    expected = divergences(*logits, temperature).mean()
    assert logits_loss(*logits, temperature) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("top_k", [1, 3, 10, 11, 99])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_of_the_top_classes(temperature, top_k):
    """The others, one class more; all of them, the full divergence."""
    logits = make_logits(2.0)
    expected = divergences_of_top(*logits, top_k, temperature).mean()
    full = divergences(*logits, temperature).mean()
    actual = logits_loss(*logits, temperature, top_k)
    assert actual == pytest.approx(expected, **CLOSE)
    if top_k >= logits.shape[-1]:
        assert actual == pytest.approx(full, **CLOSE)
    else:
        assert actual <= full * (1 + 1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_top_classes_never_give_more_than_all(scale):
    for seed in range(2):
        logits = make_logits(scale, seed)
        full = logits_loss(*logits)
        values = [logits_loss(*logits, 1.0, k) for k in range(1, 12)]
        # Each class told apart adds to it.
        assert np.all(np.diff(values) > -1e-5 * full)
        assert max(values) <= full * (1 + 1e-5)


@pytest.mark.parametrize("gap", [5.0, 10.0, 14.0, 16.0, 20.0, 40.0])
def test_top_classes_of_a_student_that_is_sure(gap):
    """All others together may be less than float32 tells from nothing."""
    teacher = np.array([[[1.0, 0.5, 0.0, 0.0]]], "float32")
    student = np.array([[[gap, 0.0, 0.0, -0.5]]], "float32")
    expected = divergences_of_top(teacher, student, 1).mean()
    actual = logits_loss(teacher, student, 1.0, 1)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual <= logits_loss(teacher, student) * (1 + 1e-6)


def test_gradient_of_top_classes_of_a_student_that_is_sure():
    """Where the teacher is not, there is much to learn."""
    rows = np.array([[9.0, 0.0, 0.0, -0.5], [18.0, 0.0, 0.0, -0.5]])
    logits = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(4, use_bias=False)]
    )
    logits.layers[0].kernel.assign(rows)
    one_hot = np.eye(2, dtype="float32")
    targets = np.array([[1.0, 0.5, 0.0, 0.0]] * 2)

    class TowardsTargets(keras.losses.Loss):
        def call(self, y_true, y_pred):
            loss = LogitsDistillation(top_k=1)
            return loss.compute_loss(y_true, y_pred)

    logits.compile(keras.optimizers.SGD(1.0), TowardsTargets())
    logits.train_on_batch(one_hot, targets)
    actual = rows - float64(logits.layers[0].kernel)
    p, q = (np.exp(log_softmax(x)) for x in (targets, rows))
    # q - p, the share of the others' p by their q.
    shares = q[:, 1:] / q[:, 1:].sum(axis=1, keepdims=True)
    p_others = p[:, 1:].sum(axis=1, keepdims=True)
    expected = np.hstack([q[:, :1] - p[:, :1], q[:, 1:] - p_others * shares])
    np.testing.assert_allclose(actual, expected / 2, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_divergence_from_kept_predictions(top_k, temperature):
    """As a cache keeps them: log probabilities in float16, best first."""
    logits = make_logits(2.0)
    log_p = log_softmax(float64(logits[0]) / temperature)
    classes = np.argsort(-log_p, axis=-1)[..., :4]
    log_p = np.take_along_axis(log_p, classes, -1).astype("float16")
    kept = TopPredictions(log_p, classes.astype("uint16"))
    actual = logits_loss(kept, logits[1], temperature, top_k)
    k = top_k or 4
    # The reference rounds to float16 too.
    p = np.exp(log_p.astype("float64"))[..., :k]
    q = np.exp(log_softmax(float64(logits[1]) / temperature))
    q = np.take_along_axis(q, classes, -1)[..., :k]
    others_p, others_q = 1 - p.sum(axis=-1), 1 - q.sum(axis=-1)
    expected = (p * np.log(p / q)).sum(axis=-1)
    expected += others_p * np.log(others_p / others_q)
    assert actual == pytest.approx(temperature**2 * expected.mean(), rel=1e-5)
    # And float16 costs little.
    live = logits_loss(*logits, temperature, k)
    assert actual == pytest.approx(live, rel=1e-2)


# Weights of tokens, masks and mixtures


def make_weights(kind):
    """What is given to Keras, and what each token weighs."""
    weights = make_data()[2]
    if kind is None:
        return None, np.ones((BATCH, LENGTH))
    if kind == "sequence":
        # Keras's own losses of tokens take no shape (batch,).
        return weights[:, :1], np.repeat(weights[:, :1], LENGTH, axis=1)
    return weights, weights


@pytest.mark.parametrize("kind", [None, "token", "sequence"])
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_mixture_of_losses(w, mask_zero, kind):
    """The task's loss by Keras's rule: its mean is over unmasked tokens,
    whatever they weigh; the divergence's, over the weights themselves."""
    models = make_pair(mask_zero=mask_zero)
    ids, targets, _ = make_data()
    given, weights = make_weights(kind)
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(), LogitsDistillation(2.0)],
        [0.7, 1.3],
        student_loss_weight=w,
        # Compiling takes most of a test's time.
        run_eagerly=w in (0.0, 1.0),
    )
    logs = losses_of(distiller, ids, targets, given)
    assert evaluate(distiller, ids, targets, given) == pytest.approx(
        logs, **CLOSE
    )
    mask = ids != 0 if mask_zero else np.ones_like(ids)
    teacher_logits, logits = (float64(model(ids)) for model in models)
    task = (weights * mask * cross_entropies(targets, logits)).sum()
    task /= mask.sum()
    divergence = np.average(
        divergences(teacher_logits, logits, 2.0), weights=weights * mask
    )
    old, new = (model.get_layer("tokens") for model in models)
    distance = row_distances(old.embeddings, new).mean()
    expected = {
        "task_loss": task,
        "embedding_distillation_loss": distance,
        "logits_distillation_loss": divergence,
        "loss": w * task + (1 - w) * (0.7 * distance + 1.3 * divergence),
    }
    assert logs == pytest.approx(expected, **CLOSE)


def test_regularization_is_added_as_it_is():
    regularizer = keras.regularizers.L2(0.05)
    models = make_pair(embeddings_regularizer=regularizer)
    # Of a layer's activity too, which exists only while the model runs.
    models[1].get_layer("hidden").activity_regularizer = regularizer
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models, LogitsDistillation(), student_loss_weight=0.25
    )
    logs = losses_of(distiller, ids, targets)
    teacher_logits, logits = (float64(model(ids)) for model in models)
    task = cross_entropies(targets, logits).mean()
    divergence = divergences(teacher_logits, logits).mean()
    layer, hidden = (models[1].get_layer(x) for x in ("tokens", "hidden"))
    states = float64(hidden(layer(ids)))
    penalty = 0.05 * sum(
        np.square(float64(x)).sum() for x in (layer.codes, layer.basis)
    )
    # Keras divides the penalty of activations by the size of the batch.
    penalty += 0.05 * np.square(states).sum() / BATCH
    assert logs["task_loss"] == pytest.approx(task, rel=1e-4)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )
    assert logs["loss"] == pytest.approx(
        0.25 * task + 0.75 * divergence + penalty, **CLOSE
    )


def test_label_smoothing_is_the_tasks_alone():
    models = make_pair()
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models,
        LogitsDistillation(),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.1
        ),
    )
    logs = losses_of(distiller, ids, np.eye(VOCABULARY)[targets])
    teacher_logits, logits = (float64(model(ids)) for model in models)
    log_q = log_softmax(logits)
    smooth = 0.9 * np.eye(VOCABULARY)[targets] + 0.1 / VOCABULARY
    task = -(smooth * log_q).sum(axis=-1).mean()
    divergence = divergences(teacher_logits, logits).mean()
    assert logs["task_loss"] == pytest.approx(task, **CLOSE)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )


def make_classifier(make_layer, seed, outputs=lambda x: x[0]):
    """ids -> logits of two heads, as `outputs` arranges them."""
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = keras.layers.GlobalAveragePooling1D()(make_layer()(ids))
    heads = [
        keras.layers.Dense(3, name="zeta")(x),
        keras.layers.Dense(4, name="alpha")(x),
    ]
    return randomize(keras.Model(ids, outputs(heads)), seed)


def make_classifiers(outputs=lambda x: x[0]):
    return (
        make_classifier(
            lambda: keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens"),
            seed=1,
            outputs=outputs,
        ),
        make_classifier(
            lambda: DistilledEmbedding(VOCABULARY, WIDTH, RANK, name="tokens"),
            seed=2,
            outputs=outputs,
        ),
    )


def test_class_weights_weigh_both_losses():
    models = make_classifiers()
    ids = make_data()[0]
    labels = np.array([0, 1, 2, 1])
    distiller = make_distiller(models, LogitsDistillation(), run_eagerly=True)
    history = distiller.fit(
        ids,
        labels,
        class_weight={0: 1.0, 1: 3.0, 2: 0.5},
        batch_size=BATCH,
        verbose=0,
    ).history
    weights = np.array([1.0, 3.0, 0.5, 3.0])
    teacher_logits, logits = (float64(model(ids)) for model in models)
    task = (weights * cross_entropies(labels, logits)).mean()
    divergence = np.average(
        divergences(teacher_logits, logits), weights=weights
    )
    assert history["task_loss"] == [pytest.approx(task, **CLOSE)]
    assert history["logits_distillation_loss"] == [
        pytest.approx(divergence, **CLOSE)
    ]
    assert history["loss"] == [pytest.approx((task + divergence) / 2, **CLOSE)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("container", ["list", "dictionary"])
def test_several_outputs(container, weighted):
    names = ("zeta", "alpha")  # not in the order of the alphabet

    def arrange(values):
        return dict(zip(names, values)) if container != "list" else list(values)

    models = make_classifiers(arrange)
    ids = make_data()[0]
    labels = [np.array([0, 1, 2, 1]), np.array([3, 1, 0, 0])]
    weights = np.random.default_rng(6).uniform(size=(2, BATCH))
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(), LogitsDistillation(1.5)],
        loss=arrange([task_loss(), task_loss()]),
        loss_weights=arrange([2.0, 0.25]),
        run_eagerly=True,
    )
    logs = losses_of(
        distiller,
        ids,
        arrange(labels),
        arrange(weights.astype("float32")) if weighted else None,
    )
    if not weighted:
        weights = np.ones((2, BATCH))
    task = divergence = 0.0
    for i, factor in enumerate((2.0, 0.25)):
        teacher_logits, logits = (
            float64(keras.tree.flatten(arrange_back(model(ids)))[i])
            for model in models
        )
        task += (
            factor * (weights[i] * cross_entropies(labels[i], logits)).mean()
        )
        # The weights of the task's losses are the task's.
        divergence += np.average(
            divergences(teacher_logits, logits, 1.5), weights=weights[i]
        )
    assert logs["task_loss"] == pytest.approx(task, **CLOSE)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )


def arrange_back(outputs):
    if isinstance(outputs, dict):
        return [outputs["zeta"], outputs["alpha"]]
    return outputs


# Losses of Keras, and of others


def hidden_states(models, ids):
    return [
        float64(model.get_layer("hidden")(model.get_layer("tokens")(ids)))
        for model in models
    ]


def keras_divergence():
    # By name, "kl_divergence", Keras would skip the softmax.
    return KerasLogits(temperature=3, loss=keras.losses.KLDivergence())


def keras_features(loss="mse"):
    return KerasFeatures(loss, "hidden", "hidden")


def squared(models, ids):
    states = hidden_states(models, ids)
    return np.square(states[0] - states[1]).mean(axis=-1)


def cosines(models, ids):
    """-cos, as Keras has it: the smaller, the closer."""
    a, b = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in hidden_states(models, ids)
    )
    return -(a * b).sum(axis=-1)


def logits_of(models, ids):
    return [float64(model(ids)) for model in models]


# What makes the loss, its value for each token, and its name in the logs.
PER_TOKEN_LOSSES = {
    "ours": (
        lambda: LogitsDistillation(2.0),
        lambda models, ids: divergences(*logits_of(models, ids), 2.0),
    ),
    "ours of top classes": (
        lambda: LogitsDistillation(2.0, top_k=4),
        lambda models, ids: divergences_of_top(*logits_of(models, ids), 4, 2.0),
    ),
    "keras divergence": (
        keras_divergence,
        lambda models, ids: divergences(*logits_of(models, ids), 3.0),
    ),
    "keras squared logits": (
        lambda: KerasLogits(2.0, keras.losses.MeanSquaredError()),
        lambda models, ids: np.square(
            np.subtract(*logits_of(models, ids)) / 2.0
        ).mean(axis=-1),
    ),
    "keras absolute logits": (
        # By its name, a function.
        lambda: KerasLogits(2.0, "mae"),
        lambda models, ids: np.abs(
            np.subtract(*logits_of(models, ids)) / 2.0
        ).mean(axis=-1),
    ),
    "keras features": (keras_features, squared),
    "keras cosines": (
        lambda: keras_features(keras.losses.CosineSimilarity()),
        cosines,
    ),
}
per_token_losses = pytest.mark.parametrize(
    ("make_loss", "values"),
    PER_TOKEN_LOSSES.values(),
    ids=PER_TOKEN_LOSSES.keys(),
)


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("kind", [None, "token", "sequence"])
@per_token_losses
def test_mean_over_weighted_tokens(make_loss, values, kind, mask_zero):
    models = make_pair(mask_zero=mask_zero)
    ids, targets, _ = make_data()
    given, weights = make_weights(kind)
    distiller = make_distiller(
        models, make_loss(), student_loss_weight=0.0, run_eagerly=True
    )
    logs = losses_of(distiller, ids, targets, given)
    if mask_zero:
        weights = weights * (ids != 0)
    expected = np.average(values(models, ids), weights=weights)
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


def test_weights_of_sequences_without_a_task():
    """Keras's task losses need shape (batch, 1); ours take (batch,) too."""
    models = make_pair()
    ids, targets, weights = make_data()
    distiller = make_distiller(
        models, LogitsDistillation(), student_loss_weight=0.0, loss=None
    )
    expected = np.average(
        divergences(*logits_of(models, ids)).mean(axis=1), weights=weights[:, 0]
    )
    logs = losses_of(distiller, ids, targets, weights[:, 0])
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize(
    "name", [name for name in PER_TOKEN_LOSSES if name.startswith("keras")]
)
def test_without_weights_losses_of_keras_are_keras_own(name):
    models = make_pair()
    ids, targets, _ = make_data()
    loss = PER_TOKEN_LOSSES[name][0]()
    if isinstance(loss, KerasFeatures):
        outputs = hidden_states(models, ids)
    else:
        outputs = logits_of(models, ids)
    expected = loss.compute_loss(*(x.astype("float32") for x in outputs))
    distiller = make_distiller(
        models, loss, student_loss_weight=0.0, run_eagerly=True
    )
    logs = losses_of(distiller, ids, targets)
    assert logs["loss"] == pytest.approx(float(expected), rel=1e-6)


@without_gradient
def test_some_outputs_may_be_left_out_of_keras_losses():
    models = make_classifiers(list)
    ids = make_data()[0]
    loss = KerasLogits(3.0, loss=[None, keras.losses.KLDivergence()])
    distiller = make_distiller(
        models, loss, student_loss_weight=0.0, loss=None, run_eagerly=True
    )
    teacher_logits, logits = (float64(model(ids)[1]) for model in models)
    expected = divergences(teacher_logits, logits, 3.0).mean()
    logs = losses_of(distiller, ids)
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


class WeightedMean(keras.distillation.DistillationLoss):
    """A user's own, which asks for the weights."""

    def compute_loss(self, teacher_outputs, student_outputs, sample_weight):
        distances = ops.mean(
            ops.square(teacher_outputs - student_outputs), axis=-1
        )
        return ops.sum(sample_weight * distances)


class PlainMean(keras.distillation.DistillationLoss):
    """A user's own, which does not."""

    def compute_loss(self, teacher_outputs, student_outputs):
        return ops.mean(ops.square(teacher_outputs - student_outputs))


def test_losses_of_users():
    models = make_pair()
    ids, targets, weights = make_data()
    distiller = make_distiller(
        models, [WeightedMean(), PlainMean()], student_loss_weight=0.0
    )
    logs = losses_of(distiller, ids, targets, weights)
    distances = np.square(np.subtract(*logits_of(models, ids))).mean(axis=-1)
    assert logs["weighted_mean_loss"] == pytest.approx(
        (weights * distances).sum(), **CLOSE
    )
    assert logs["plain_mean_loss"] == pytest.approx(distances.mean(), **CLOSE)


# Padding


@pytest.mark.parametrize("by", ["mask", "weights"])
@per_token_losses
def test_twice_the_padding_is_the_same_loss(make_loss, values, by):
    models = make_pair(mask_zero=by == "mask")
    distiller = make_distiller(
        models,
        make_loss(),
        loss=task_loss(reduction="mean_with_sample_weight"),
        run_eagerly=True,
    )
    logs = []
    for padding in (0, LENGTH):
        ids, targets, _ = make_data(padding)
        assert ids.shape == (BATCH, LENGTH + padding)
        weights = None
        if by == "weights":
            weights = (ids != 0).astype("float32")
        logs.append(losses_of(distiller, ids, targets, weights))
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    real = make_data()[0] != 0
    expected = values(models, make_data()[0])[real].mean()
    task = cross_entropies(make_data()[1], models[1](make_data()[0]))
    assert logs[0]["loss"] == pytest.approx(
        (expected + task[real].mean()) / 2, **CLOSE
    )


def test_twice_the_padding_is_the_same_loss_in_a_compiled_step():
    """There a mask is attached to a symbol, not to an array."""
    models = make_pair(mask_zero=True)
    losses = [make_loss() for make_loss, _ in PER_TOKEN_LOSSES.values()]
    distiller = make_distiller(models, losses)
    short, long = (
        losses_of(distiller, *make_data(padding)[:2]) for padding in (0, LENGTH)
    )
    assert short == pytest.approx(long, rel=1e-6)
    ids = make_data()[0]
    for name, (_, values) in zip(
        distiller.distillation_loss_names, PER_TOKEN_LOSSES.values()
    ):
        expected = values(models, ids)[ids != 0].mean()
        assert short[name] == pytest.approx(expected, **CLOSE)


# Gradients


def test_gradient_is_that_of_finite_differences():
    models = make_pair()
    teacher, student = models
    ids, targets, weights = make_data()
    distiller = Distiller(
        teacher,
        student,
        [EmbeddingDistillation(row_weights=ROW_WEIGHTS), LogitsDistillation(2)],
        [0.7, 1.3],
        student_loss_weight=0.4,
    )
    # A step of the gradient itself.
    distiller.compile(keras.optimizers.SGD(1.0), task_loss())
    table = float64(teacher.get_layer("tokens").embeddings)
    teacher_logits = float64(teacher(ids))
    layer, hidden = (student.get_layer(x) for x in ("tokens", "hidden"))
    variables = {
        "codes": layer.codes,
        "basis": layer.basis,
        "kernel": hidden.kernel,
    }
    before = {name: float64(v) for name, v in variables.items()}
    bias = float64(hidden.bias)

    def loss(values):
        rows = np.maximum(values["codes"], 0) @ values["basis"]
        states = np.tanh(rows[ids] @ values["kernel"] + bias)
        logits = states @ rows.T
        task = (weights * cross_entropies(targets, logits)).mean()
        distance = np.average(
            np.square(table - rows).sum(axis=1), weights=ROW_WEIGHTS
        )
        divergence = np.average(
            divergences(teacher_logits, logits, 2), weights=weights
        )
        return 0.4 * task + 0.6 * (0.7 * distance + 1.3 * divergence)

    logged = distiller.train_on_batch(ids, targets, weights, return_dict=True)
    assert logged["loss"] == pytest.approx(loss(before), **CLOSE)
    for name, variable in variables.items():
        gradient = before[name] - float64(variable)
        expected = np.zeros_like(gradient)
        for index in np.ndindex(*gradient.shape):
            step = np.zeros_like(gradient)
            step[index] = 1e-6
            expected[index] = loss(before | {name: before[name] + step})
            expected[index] -= loss(before | {name: before[name] - step})
        expected /= 2e-6
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-3, atol=2e-6, err_msg=name
        )


# Mixed precision


def test_loss_scaling_does_not_show():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = make_pair()
    finally:
        keras.config.set_dtype_policy(policy)
    ids, targets, _ = make_data()
    distiller = Distiller(
        *models, [EmbeddingDistillation(), LogitsDistillation()]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    distiller.compile(optimizer, task_loss())
    teacher_logits, logits = logits_of(models, ids)
    old, new = (model.get_layer("tokens") for model in models)
    expected = {
        "task_loss": cross_entropies(targets, logits).mean(),
        "embedding_distillation_loss": row_distances(
            old.embeddings, new
        ).mean(),
        "logits_distillation_loss": divergences(teacher_logits, logits).mean(),
    }
    first, *others = expected.values()
    expected["loss"] = (first + sum(others)) / 2
    before = float64(new.codes)
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert logs == pytest.approx(expected, rel=5e-3)
    # The scale is 2^15 at first: a step not divided by it would show.
    step = np.abs(float64(new.codes) - before).max()
    assert 0 < step < 1
    history = distiller.fit(ids, targets, epochs=8, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert history["loss"][-1] < logs["loss"]
