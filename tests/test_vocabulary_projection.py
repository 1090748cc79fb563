"""Dense heads over a vocabulary, factorized or tied."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import Distiller
from keras_distilled_embedding import EmbeddingDistillation
from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection
from tests.shared import to_floats

VOCABULARY, WIDTH = 61, 16
IDS = np.array([[1, 60, 7, 3], [2, 5, 0, 0]], dtype="int32")


def make_layer(**options):
    embedding = DistilledEmbedding(VOCABULARY, WIDTH, rank=4, name="table")
    layer = VocabularyProjection(embedding, **options)
    layer.build((None, WIDTH))
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def make_model(units=VOCABULARY, activation="softmax", use_bias=True, width=16):
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens")(ids)
    x = keras.layers.Dense(width, "tanh", name="hidden")(x)
    head = keras.layers.Dense(
        units, activation, use_bias, bias_initializer="normal", name="head"
    )
    return keras.Model(ids, head(x))


# The layer


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_equals_dense(activation, use_bias):
    layer = make_layer(activation=activation, use_bias=use_bias)
    states = np.random.default_rng(1).normal(size=(2, 3, WIDTH))
    codes, basis, offset = map(to_floats, layer.embedding.weights)
    logits = states @ (np.maximum(codes, 0) @ basis + offset).T
    if use_bias:
        logits += to_floats(layer.bias)
    if activation == "softmax":
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        logits = exponents / exponents.sum(-1, keepdims=True)
    outputs = layer(states.astype("float32"))
    np.testing.assert_allclose(to_floats(outputs), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_dtypes_and_shapes(policy):
    embedding = DistilledEmbedding(VOCABULARY, WIDTH, rank=4, dtype=policy)
    layer = VocabularyProjection(embedding, dtype=policy)
    symbolic = layer(keras.Input((None, WIDTH), dtype=layer.compute_dtype))
    assert symbolic.shape == (None, None, VOCABULARY)
    states = ops.ones((2, 3, WIDTH), layer.compute_dtype)
    for outputs in (symbolic, layer(states)):
        assert keras.backend.standardize_dtype(outputs.dtype) == (
            layer.compute_dtype
        )
    assert layer.bias.dtype == layer.variable_dtype


def test_configuration():
    layer = make_layer(activation="softmax", use_bias=False, name="head")
    copy = VocabularyProjection.from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert (copy.embedding.rank, copy.use_bias) == (4, False)


def test_needs_a_factorized_embedding():
    with pytest.raises(TypeError, match="`DistilledEmbedding`.*Embedding name"):
        VocabularyProjection(keras.layers.Embedding(3, 2))


# In `compress`


def table_of(layer):
    embedding = getattr(layer, "embedding", layer)
    return to_floats(embedding.embeddings)


@pytest.mark.parametrize("use_bias", [True, False])
def test_factorized_head(use_bias):
    model = make_model(use_bias=use_bias)
    student = compress(model, rank=5, heads="factorize", verbose=0)
    head, old = student.get_layer("head"), model.get_layer("head")
    assert type(head) is VocabularyProjection
    rows = compression_report(student, model).rows
    assert {row.layer for row in rows} == {"tokens", "head"}
    assert all(0 < row.error < 1 for row in rows)
    # Its own factors, of its own kernel, and the bias that it had.
    kernel = to_floats(old.kernel)
    assert np.square(table_of(head) - kernel.T).sum() < np.square(kernel).sum()
    if use_bias:
        np.testing.assert_array_equal(to_floats(head.bias), to_floats(old.bias))
        assert head.bias.value is not old.bias.value
    model.get_layer("tokens").set_weights(
        [table_of(student.get_layer("tokens"))]
    )
    old.set_weights([table_of(head).T, *map(to_floats, old.weights[1:])])
    np.testing.assert_allclose(
        to_floats(student(IDS)), to_floats(model(IDS)), rtol=1e-4, atol=1e-6
    )


def test_tied_head():
    model = make_model()
    student = compress(model, rank=5, heads="tie", verbose=0)
    head = student.get_layer("head")
    assert head.embedding is student.get_layer("tokens")
    assert len(compression_report(student).rows) == 1
    factors = 5 * (VOCABULARY + WIDTH) + WIDTH + 5  # the center
    hidden = WIDTH * (WIDTH + 1)
    assert student.count_params() == factors + hidden + VOCABULARY


@pytest.mark.parametrize("heads", ["factorize", "tie"])
def test_distillation_of_the_tables(heads):
    """The head's factors are drawn to the kernel that it had."""
    model = make_model()
    student = compress(model, rank=5, heads=heads, verbose=0)
    loss = EmbeddingDistillation()
    distiller = Distiller(model, student, [loss], student_loss_weight=0.0)
    distiller.compile("sgd", "sparse_categorical_crossentropy")
    found = loss.compute_loss(None, None, teacher=model, student=student)
    pairs = {"tokens": to_floats(model.get_layer("tokens").embeddings)}
    if heads == "factorize":
        pairs["head"] = to_floats(model.get_layer("head").kernel).T
    expected = sum(
        np.square(table - table_of(student.get_layer(name))).sum(-1).mean()
        for name, table in pairs.items()
    )
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_heads_are_left_alone_and_named(capsys):
    model = make_model()
    student = compress(model, rank=5)
    assert type(student.get_layer("head")) is keras.layers.Dense
    assert "table of its own: head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"heads": "both"}, "heads='both'"),
        ({"units": 3}, {"heads": "tie"}, r"of \[61\] tokens.* heads='tie'"),
        ({"units": 3}, {"heads": "factorize"}, "heads='factorize'"),
        ({"width": 8}, {"heads": "tie"}, r"'head', \(61, 8\)"),
    ],
)
def test_heads_that_are_not(model, options, message):
    with pytest.raises(ValueError, match=message):
        compress(make_model(**model), rank=2, verbose=0, **options)


@pytest.mark.parametrize(
    ("minimum", "chosen"), [(0, "ab"), (700, "ab"), (800, "a"), (976, "a")]
)
def test_min_parameters(minimum, chosen):
    ids = keras.Input((None,), dtype="int32")
    tables = [
        keras.layers.Embedding(rows, WIDTH, name=name)(ids)
        for name, rows in (("a", VOCABULARY), ("b", 44))
    ]
    model = keras.Model(ids, keras.layers.Add()(tables))
    student = compress(model, rank=3, min_parameters=minimum, verbose=0)
    kinds = {name: type(student.get_layer(name)) for name in "ab"}
    assert [n for n in "ab" if kinds[n] is DistilledEmbedding] == list(chosen)


def test_min_parameters_that_leaves_nothing():
    with pytest.raises(ValueError, match=r"\['tokens'\], none.*min_.*=977"):
        compress(make_model(), rank=3, min_parameters=977, verbose=0)
    with pytest.raises(ValueError, match="min_parameters=-1"):
        compress(make_model(), rank=3, min_parameters=-1, verbose=0)
