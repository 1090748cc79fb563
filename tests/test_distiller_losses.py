"""What a step of `Distiller` computes, against NumPy and float64.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from tests.distillation_models import BATCH
from tests.distillation_models import CLOSE
from tests.distillation_models import LENGTH
from tests.distillation_models import VOCABULARY
from tests.distillation_models import changed
from tests.distillation_models import cross_entropies
from tests.distillation_models import divergences
from tests.distillation_models import divergences_of_top
from tests.distillation_models import evaluate
from tests.distillation_models import float64
from tests.distillation_models import log_softmax
from tests.distillation_models import logits_of
from tests.distillation_models import losses_of
from tests.distillation_models import make_classifiers
from tests.distillation_models import make_data
from tests.distillation_models import make_distiller
from tests.distillation_models import make_pair
from tests.distillation_models import snapshot
from tests.distillation_models import table_distance
from tests.distillation_models import task_loss
from tests.distillation_models import without_gradient

KerasLogits = keras.distillation.LogitsDistillation
KerasFeatures = keras.distillation.FeatureDistillation


def make_weights(kind):
    """What is given to Keras, and what each token weighs."""
    weights = make_data()[2]
    if kind is None:
        return None, np.ones((BATCH, LENGTH))
    if kind == "sequence":
        # Keras's own losses of tokens take no shape (batch,).
        return weights[:, :1], np.repeat(weights[:, :1], LENGTH, axis=1)
    return weights, weights


# The task and all losses


@pytest.mark.parametrize("kind", [None, "token", "sequence"])
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_mixture_of_losses(w, mask_zero, kind):
    """Keras averages the task's loss over unmasked tokens, whatever they
    weigh; the divergence is averaged over the weights themselves."""
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
    teacher_logits, logits = logits_of(models, ids)
    task = (weights * mask * cross_entropies(targets, logits)).sum()
    task /= mask.sum()
    divergence = np.average(
        divergences(teacher_logits, logits, 2.0), weights=weights * mask
    )
    distance = table_distance(models)
    expected = {
        "task_loss": task,
        "embedding_distillation_loss": distance,
        "logits_distillation_loss": divergence,
        "loss": w * task + (1 - w) * (0.7 * distance + 1.3 * divergence),
    }
    assert logs == pytest.approx(expected, **CLOSE)


def test_defaults_are_the_papers():
    models = make_pair()
    ids, targets, _ = make_data()
    logs = evaluate(make_distiller(models), ids, targets)
    task = cross_entropies(targets, models[1](ids)).mean()
    expected = (task + table_distance(models)) / 2
    assert logs["loss"] == pytest.approx(expected, **CLOSE)
    assert set(logs) == {"loss", "task_loss", "embedding_distillation_loss"}


def test_regularization_is_added_as_it_is():
    """That of weights, and of activations, which exists only in a call."""
    models = make_pair(regularizer=keras.regularizers.L2(0.05))
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models, LogitsDistillation(), student_loss_weight=0.25
    )
    logs = losses_of(distiller, ids, targets)
    teacher_logits, logits = logits_of(models, ids)
    task = cross_entropies(targets, logits).mean()
    divergence = divergences(teacher_logits, logits).mean()
    layer, hidden = (models[1].get_layer(x) for x in ("tokens", "hidden"))
    penalty = 0.05 * sum(
        np.square(float64(x)).sum()
        for x in (layer.codes, layer.basis, hidden.kernel)
    )
    # Keras divides the penalty of activations by the size of the batch.
    states = float64(hidden(layer(ids)))
    penalty += 0.05 * np.square(states).sum() / BATCH
    assert logs["task_loss"] == pytest.approx(task, rel=1e-4)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )
    expected = 0.25 * task + 0.75 * divergence + penalty
    assert logs["loss"] == pytest.approx(expected, **CLOSE)
    logs = evaluate(distiller, ids, targets)
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


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
    teacher_logits, logits = logits_of(models, ids)
    smooth = 0.9 * np.eye(VOCABULARY)[targets] + 0.1 / VOCABULARY
    task = -(smooth * log_softmax(logits)).sum(axis=-1).mean()
    divergence = divergences(teacher_logits, logits).mean()
    assert logs["task_loss"] == pytest.approx(task, **CLOSE)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
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
    teacher_logits, logits = logits_of(models, ids)
    task = (weights * cross_entropies(labels, logits)).mean()
    divergence = np.average(
        divergences(teacher_logits, logits), weights=weights
    )
    expected = {
        "task_loss": [task],
        "logits_distillation_loss": [divergence],
        "loss": [(task + divergence) / 2],
    }
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("container", ["list", "dictionary"])
def test_several_outputs(container, weighted):
    names = ("zeta", "alpha")  # not in alphabetical order

    def arrange(values):
        return dict(zip(names, values)) if container != "list" else list(values)

    def arrange_back(outputs):
        return [outputs[n] for n in names] if container != "list" else outputs

    models = make_classifiers(arrange)
    ids = make_data()[0]
    labels = [np.array([0, 1, 2, 1]), np.array([3, 1, 0, 0])]
    weights = np.random.default_rng(6).uniform(size=(2, BATCH))
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(), LogitsDistillation(1.5, outputs="logits")],
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
            float64(arrange_back(model(ids))[i]) for model in models
        )
        values = cross_entropies(labels[i], logits)
        task += factor * (weights[i] * values).mean()
        # The weights of the task's losses are the task's.
        divergence += np.average(
            divergences(teacher_logits, logits, 1.5), weights=weights[i]
        )
    assert logs["task_loss"] == pytest.approx(task, **CLOSE)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, **CLOSE
    )


def test_logs_weigh_batches_by_their_size():
    ids, targets, _ = make_data()
    distiller = make_distiller(make_pair(), LogitsDistillation())
    whole = evaluate(distiller, ids, targets)
    parts = evaluate(distiller, ids, targets, batch_size=BATCH - 1)
    assert parts == pytest.approx(whole, rel=1e-5)


# Losses of Keras, and of users


def hidden_states(models, ids):
    return [
        float64(model.get_layer("hidden")(model.get_layer("tokens")(ids)))
        for model in models
    ]


def keras_divergence():
    # By its name, "kl_divergence", Keras would skip the softmax.
    return KerasLogits(temperature=3, loss=keras.losses.KLDivergence())


def keras_features(loss="mse"):
    return KerasFeatures(loss, "hidden", "hidden")


def squared(models, ids):
    return np.square(np.subtract(*hidden_states(models, ids))).mean(axis=-1)


def cosines(models, ids):
    """-cos, as Keras has it: the smaller, the closer."""
    a, b = (
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in hidden_states(models, ids)
    )
    return -(a * b).sum(axis=-1)


# What makes the loss, and its value for each token.
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


def test_several_losses_are_added_and_named():
    models = make_pair()
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models,
        [keras_divergence(), keras_features(), LogitsDistillation(3.0)],
        student_loss_weight=0.0,
        loss=None,
        optimizer="sgd",
    )
    logs = evaluate(distiller, ids, targets)
    divergence = divergences(*logits_of(models, ids), 3.0).mean()
    expected = {
        "logits_distillation_loss": divergence,
        "feature_distillation_loss": squared(models, ids).mean(),
        "logits_distillation_2_loss": divergence,
    }
    expected["loss"] = sum(expected.values())
    expected["task_loss"] = 0.0
    assert logs == pytest.approx(expected, **CLOSE)
    # They have gradients.
    before = snapshot(models[1])
    distiller.fit(ids, targets, verbose=0)
    assert "hidden/kernel" in changed(models[1], before)


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
    """A user's loss that asks for the weights."""

    def compute_loss(self, teacher_outputs, student_outputs, sample_weight):
        distances = ops.mean(
            ops.square(teacher_outputs - student_outputs), axis=-1
        )
        return ops.sum(sample_weight * distances)


class PlainMean(keras.distillation.DistillationLoss):
    """A user's loss that does not."""

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
    ids, targets, _ = make_data()
    expected = values(models, ids)[ids != 0].mean()
    task = cross_entropies(targets, models[1](ids))[ids != 0].mean()
    assert logs[0]["loss"] == pytest.approx((expected + task) / 2, **CLOSE)


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
    row_weights = np.random.default_rng(4).exponential(size=VOCABULARY)
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(row_weights=row_weights), LogitsDistillation(2)],
        [0.7, 1.3],
        student_loss_weight=0.4,
        # A step of the gradient itself.
        optimizer=keras.optimizers.SGD(1.0),
    )
    table = float64(teacher.get_layer("tokens").embeddings)
    teacher_logits = float64(teacher(ids))
    layer, hidden = (student.get_layer(x) for x in ("tokens", "hidden"))
    variables = {
        "codes": layer.codes,
        "basis": layer.basis,
        "offset": layer.offset,
        "kernel": hidden.kernel,
    }
    before = {name: float64(v) for name, v in variables.items()}
    bias = float64(hidden.bias)

    def loss(values):
        rows = np.maximum(values["codes"], 0) @ values["basis"]
        rows = rows + values["offset"]
        states = np.tanh(rows[ids] @ values["kernel"] + bias)
        logits = states @ rows.T
        task = (weights * cross_entropies(targets, logits)).mean()
        distance = np.average(
            np.square(table - rows).sum(axis=1), weights=row_weights
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


def test_mixed_precision_scales_the_loss():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = make_pair()
    finally:
        keras.config.set_dtype_policy(policy)
    ids, targets, _ = make_data()
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(), LogitsDistillation()],
        optimizer=keras.optimizers.SGD(0.1),
    )
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    teacher_logits, logits = logits_of(models, ids)
    task = cross_entropies(targets, logits).mean()
    divergence = divergences(teacher_logits, logits).mean()
    distance = table_distance(models)
    codes = models[1].get_layer("tokens").codes
    before = float64(codes)
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert logs["task_loss"] == pytest.approx(task, rel=5e-3)
    assert logs["logits_distillation_loss"] == pytest.approx(
        divergence, rel=5e-3
    )
    # The tables are compared as they are stored, in float32.
    assert logs["embedding_distillation_loss"] == pytest.approx(
        distance, **CLOSE
    )
    assert logs["loss"] == pytest.approx(
        (task + distance + divergence) / 2, rel=5e-3
    )
    # The scale is 2^15 at first: a step not divided by it would show.
    assert 0 < np.abs(float64(codes) - before).max() < 1
    history = distiller.fit(ids, targets, epochs=8, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert history["loss"][-1] < logs["loss"]
