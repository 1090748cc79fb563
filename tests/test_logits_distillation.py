"""`LogitsDistillation` against a reference in NumPy and float64.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import json

import keras
import numpy as np
import pytest

from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.distillation.logits_distillation import (
    TopPredictions,
)
from tests.distillation_models import BATCH
from tests.distillation_models import CLOSE
from tests.distillation_models import LENGTH
from tests.distillation_models import divergences
from tests.distillation_models import divergences_of_top
from tests.distillation_models import float64
from tests.distillation_models import log_softmax
from tests.distillation_models import make_classifier
from tests.distillation_models import make_factors
from tests.distillation_models import make_pair
from tests.distillation_models import make_table


def make_logits(scale=1.0, seed=5, classes=11):
    rng = np.random.default_rng(seed)
    shape = (2, BATCH, LENGTH, classes)
    return (scale * rng.normal(size=shape)).astype("float32")


def logits_loss(teacher, student, *args, sample_weight=None):
    loss = LogitsDistillation(*args)
    return float(
        loss.compute_loss(teacher, student, sample_weight=sample_weight)
    )


# The divergence


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 7.5])
def test_divergence(temperature, scale):
    logits = make_logits(scale)
    expected = divergences(*logits, temperature).mean()
    assert logits_loss(*logits, temperature) == pytest.approx(expected, **CLOSE)
    same = logits_loss(logits[0], logits[0], temperature)
    assert same == pytest.approx(0.0, abs=1e-6 * scale * temperature)


@pytest.mark.parametrize("top_k", [1, 3, 10, 11, 99])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_of_the_top_classes(temperature, top_k):
    """The other classes count as one; with all classes it is the full one."""
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
        # Each class that is distinguished adds to it.
        assert np.all(np.diff(values) > -1e-5 * full)
        assert max(values) <= full * (1 + 1e-5)


@pytest.mark.parametrize("gap", [5.0, 10.0, 14.0, 16.0, 20.0, 40.0])
def test_top_classes_of_a_confident_student(gap):
    """All other classes together may be too few for float32."""
    teacher = np.array([[[1.0, 0.5, 0.0, 0.0]]], "float32")
    student = np.array([[[gap, 0.0, 0.0, -0.5]]], "float32")
    expected = divergences_of_top(teacher, student, 1).mean()
    actual = logits_loss(teacher, student, 1.0, 1)
    assert actual == pytest.approx(expected, rel=1e-5)
    assert actual <= logits_loss(teacher, student) * (1 + 1e-6)


def test_gradient_of_the_top_classes_of_a_confident_student():
    """If the teacher is not confident, the gradient is large."""
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
    # q - p, where the p of the other classes is shared out as q is.
    shares = q[:, 1:] / q[:, 1:].sum(axis=1, keepdims=True)
    p_others = p[:, 1:].sum(axis=1, keepdims=True)
    expected = np.hstack([q[:, :1] - p[:, :1], q[:, 1:] - p_others * shares])
    np.testing.assert_allclose(actual, expected / 2, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4])
def test_divergence_from_stored_predictions(top_k, temperature):
    """A cache stores log probabilities in float16, in descending order."""
    logits = make_logits(2.0)
    log_p = log_softmax(float64(logits[0]) / temperature)
    classes = np.argsort(-log_p, axis=-1)[..., :4]
    log_p = np.take_along_axis(log_p, classes, -1).astype("float16")
    stored = TopPredictions(log_p, classes.astype("uint16"))
    actual = logits_loss(stored, logits[1], temperature, top_k)
    k = top_k or 4
    # The reference rounds to float16 too.
    p = np.exp(log_p.astype("float64"))[..., :k]
    q = np.exp(log_softmax(float64(logits[1]) / temperature))
    q = np.take_along_axis(q, classes, -1)[..., :k]
    others_p, others_q = 1 - p.sum(axis=-1), 1 - q.sum(axis=-1)
    expected = (p * np.log(p / q)).sum(axis=-1)
    expected += others_p * np.log(others_p / others_q)
    assert actual == pytest.approx(temperature**2 * expected.mean(), rel=1e-5)
    # float16 costs little.
    live = logits_loss(*logits, temperature, k)
    assert actual == pytest.approx(live, rel=1e-2)


# Its mean over tokens and outputs


@pytest.mark.parametrize(
    "shape", [(BATCH, LENGTH), (BATCH, LENGTH, 1), (BATCH, 1), (BATCH,)]
)
def test_mean_over_weighted_tokens(shape):
    """The weights are those of tokens or of sequences."""
    logits = make_logits()
    weights = np.random.default_rng(1).uniform(size=shape).astype("float32")
    per_token = weights.reshape(BATCH, -1) * np.ones((BATCH, LENGTH))
    actual = logits_loss(*logits, sample_weight=weights)
    expected = np.average(divergences(*logits), weights=per_token)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_mean_over_several_tokens_at_each_position():
    """The weights are those of the positions."""
    logits = [np.stack([x, x[::-1]], axis=2) for x in make_logits()]
    weights = np.random.default_rng(1).uniform(size=(BATCH, LENGTH))
    values = np.stack(
        [divergences(*(x[:, :, i] for x in logits)) for i in (0, 1)], -1
    )
    actual = logits_loss(*logits, sample_weight=weights.astype("float32"))
    expected = (weights[..., None] * values).sum() / (2 * weights.sum())
    assert actual == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_mean_over_one_prediction_a_sample(shape):
    weights = np.arange(BATCH, dtype="float32")
    logits = make_logits()[:, :, 0]
    actual = logits_loss(*logits, sample_weight=weights.reshape(shape))
    expected = np.average(divergences(*logits), weights=weights)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_mean_over_nothing_is_zero():
    weights = np.zeros((BATCH, LENGTH))
    assert logits_loss(*make_logits(), sample_weight=weights) == 0.0


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_losses_of_several_outputs_are_added(as_dictionary):
    first = make_logits()
    second = first[:, :, 0, :3]
    teacher, student = zip(first, second)
    ones, weights = np.ones(BATCH), np.arange(BATCH, dtype="float32")
    expected = divergences(*first).mean()
    plain = expected + divergences(*second).mean()
    weighted = expected + np.average(divergences(*second), weights=weights)
    sample_weight = [None, weights]
    if as_dictionary:
        names = ("z", "a")  # not in alphabetical order
        teacher, student = dict(zip(names, teacher)), dict(zip(names, student))
        sample_weight = {"a": weights}
    for given, value in (
        (None, plain),
        (ones, plain),
        (sample_weight, weighted),
    ):
        actual = logits_loss(teacher, student, sample_weight=given)
        assert actual == pytest.approx(value, rel=1e-5)


# Configuration and errors


@pytest.mark.parametrize(
    "loss", [LogitsDistillation(2.5), LogitsDistillation(top_k=3)]
)
def test_serialization(loss):
    config = keras.saving.serialize_keras_object(loss)
    config = json.loads(json.dumps(config))
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is LogitsDistillation
    assert restored.get_config() == loss.get_config()


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), "3", None])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature!r}"):
        LogitsDistillation(temperature)


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True, "3"])
def test_bad_top_k(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k!r}"):
        LogitsDistillation(top_k=top_k)


def test_models_of_different_vocabularies():
    teacher = make_classifier(make_table(), 1, classes=3)
    student = make_classifier(make_factors(), 2, classes=2)
    with pytest.raises(ValueError, match=r"\[3\] from the teacher, \[2\]"):
        Distiller(teacher, student, LogitsDistillation())
    # A loss of the tables alone accepts them.
    Distiller(teacher, student)
    # Of tokens, the last dimension counts.
    teacher, _ = make_pair(vocabulary=41)
    _, student = make_pair(vocabulary=53)
    with pytest.raises(ValueError, match=r"\[41\] from the teacher, \[53\]"):
        LogitsDistillation().validate_model_compatibility(teacher, student)


# Outputs that are not logits over classes


def heads(*activations, units=(4,)):
    """A model whose outputs end with these activations."""
    inputs = keras.Input((6,), name="inputs")
    outputs = [
        keras.layers.Dense(size, activation, name=f"head_{i}")(inputs)
        for i, (activation, size) in enumerate(
            zip(activations, units * len(activations))
        )
    ]
    return keras.Model(inputs, outputs if len(outputs) > 1 else outputs[0])


def predictions_of(model, x):
    return [np.asarray(y, "float64") for y in keras.tree.flatten(model(x))]


def softmax(logits):
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def divergence(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1).mean()


def binary_divergence(p, q):
    return (
        divergence(np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1))
        * (p.shape[-1])
    )


def measured(loss, teacher, student, x):
    value = loss.compute_loss(
        teacher(x), student(x), teacher=teacher, student=student
    )
    return float(value)


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("activation", [None, "sigmoid", "softmax"])
def test_outputs_are_read_off_the_last_layers(activation, units):
    if activation == "softmax" and units == 1:
        pytest.skip("a single class")
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    teacher = heads(activation, units=(units,))
    student = heads(activation, units=(units,))
    loss = LogitsDistillation()
    loss.validate_model_compatibility(teacher, student)
    (p,), (q,) = predictions_of(teacher, x), predictions_of(student, x)
    if activation is None and units == 1:
        p, q = 1 / (1 + np.exp(-p)), 1 / (1 + np.exp(-q))
    elif activation is None:
        p, q = softmax(p), softmax(q)
    binary = units == 1 or activation == "sigmoid"
    expected = (binary_divergence if binary else divergence)(p, q)
    assert expected > 0.01
    found = measured(loss, teacher, student, x)
    assert found == pytest.approx(expected, rel=1e-4)


def test_probabilities_have_a_temperature():
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    teacher, student = heads("softmax"), heads("softmax")
    (p,), (q,) = predictions_of(teacher, x), predictions_of(student, x)
    p, q = softmax(np.log(p) / 3), softmax(np.log(q) / 3)
    found = measured(LogitsDistillation(3.0), teacher, student, x)
    assert found == pytest.approx(9 * divergence(p, q), rel=1e-4)


def test_a_softmax_follows_logits():
    """A teacher that ends with a softmax, a student without."""
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    teacher, student = heads("softmax"), heads(None)
    (p,), (q,) = predictions_of(teacher, x), predictions_of(student, x)
    found = measured(LogitsDistillation(), teacher, student, x)
    assert found == pytest.approx(divergence(p, softmax(q)), rel=1e-4)


def test_outputs_can_be_left_out():
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    teacher, student = heads(None, None), heads(None, None)
    with pytest.raises(ValueError, match="outputs=None.*linear"):
        LogitsDistillation().validate_model_compatibility(teacher, student)
    loss = LogitsDistillation(outputs=[None, "logits"])
    loss.validate_model_compatibility(teacher, student)
    p, q = predictions_of(teacher, x)[1], predictions_of(student, x)[1]
    found = measured(loss, teacher, student, x)
    assert found == pytest.approx(divergence(softmax(p), softmax(q)), rel=1e-4)
    copy = LogitsDistillation.from_config(loss.get_config())
    assert copy.outputs == [None, "logits"]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["scores"], r"`outputs` must be of .*Received: outputs=\['scores'\]"),
        ("scores", "Received: outputs='scores'"),
    ],
)
def test_unknown_outputs(outputs, message):
    with pytest.raises(ValueError, match=message):
        LogitsDistillation(outputs=outputs)


def test_outputs_that_do_not_fit():
    with pytest.raises(ValueError, match="each of the outputs.*, 1"):
        LogitsDistillation(
            outputs=["logits", None]
        ).validate_model_compatibility(heads(None), heads(None))
    with pytest.raises(ValueError, match="'sigmoid' of the teacher, 'logits'"):
        LogitsDistillation().validate_model_compatibility(
            heads("sigmoid"), heads(None)
        )
