"""Models, data and NumPy references that the tests of distillation share.

The references are the formulas of the documentation in float64.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.shared import basis_and_offset

VOCABULARY, WIDTH, RANK = 23, 8, 3
BATCH, LENGTH = 4, 5

# What losses in float32 and their references must agree to.
CLOSE = {"rel": 1e-5, "abs": 1e-7}

# Keras warns of weights that no loss depends on.
without_gradient = pytest.mark.filterwarnings(
    "ignore:Gradients do not exist:UserWarning"
)


# Models


class CountCalls(keras.layers.Layer):
    """Passes its inputs on, and counts its calls in models that run eagerly."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


def randomize(model, seed, scale=0.5):
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=scale))
    return model


def make_model(embedding, seed, other=None, dropout=0.0, regularizer=None):
    """A tied language model: ids -> hidden states -> logits."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = embedding(ids)
    if other is not None:
        x = x + other(ids)
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
    return randomize(model, seed)


def make_pair(
    *,
    mask_zero=False,
    tie_weights=True,
    vocabulary=VOCABULARY,
    dropout=0.0,
    regularizer=None,
    **options,
):
    """A teacher, and a student with factors of its own.

    Args:
        mask_zero: Whether zeros are padding.
        tie_weights: Whether look-up and projection share a table.
        vocabulary: Size of the vocabulary.
        dropout: Dropout of both models.
        regularizer: Regularizer of both models.
        **options: Arguments of the student's `DistilledEmbedding`.
    """
    common = {
        "mask_zero": mask_zero,
        "tie_weights": tie_weights,
        "embeddings_regularizer": regularizer,
        "name": "tokens",
    }
    table = keras.layers.ReversibleEmbedding(vocabulary, WIDTH, **common)
    factors = DistilledEmbedding(vocabulary, WIDTH, RANK, **options, **common)
    return tuple(
        make_model(embedding, seed, dropout=dropout, regularizer=regularizer)
        for seed, embedding in enumerate((table, factors), start=1)
    )


def make_classifier(embedding, seed, outputs=lambda heads: heads[0], classes=3):
    """ids -> logits of two heads, as `outputs` arranges them."""
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = keras.layers.GlobalAveragePooling1D()(embedding(ids))
    heads = [
        keras.layers.Dense(classes, name="zeta")(x),
        keras.layers.Dense(4, name="alpha")(x),
    ]
    return randomize(keras.Model(ids, outputs(heads)), seed)


def make_table(vocabulary=VOCABULARY, name="tokens"):
    return keras.layers.Embedding(vocabulary, WIDTH, name=name)


def make_factors(vocabulary=VOCABULARY, name="tokens"):
    return DistilledEmbedding(vocabulary, WIDTH, RANK, name=name)


def make_classifiers(outputs=lambda heads: heads[0]):
    return (
        make_classifier(make_table(), 1, outputs),
        make_classifier(make_factors(), 2, outputs),
    )


def make_data(padding=0):
    """Token ids, targets and weights of tokens; ids end with zeros."""
    rng = np.random.default_rng(3)
    ids, targets = rng.integers(1, VOCABULARY, size=(2, BATCH, LENGTH))
    weights = rng.uniform(0.1, 2.0, size=(BATCH, LENGTH)).astype("float32")
    ids[0, 3:] = ids[2, 2:] = 0
    return [
        np.pad(array, ((0, 0), (0, padding)))
        for array in (ids.astype("int32"), targets.astype("int32"), weights)
    ]


# Training


def task_loss(**options):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **options
    )


def make_distiller(
    models, losses=None, *args, loss="task", optimizer=None, **options
):
    """A compiled distiller, by default one that training does not change."""
    compile_options = {
        name: options.pop(name)
        for name in ("loss_weights", "run_eagerly", "jit_compile")
        if name in options
    }
    distiller = Distiller(*models, losses, *args, **options)
    distiller.compile(
        optimizer or keras.optimizers.SGD(0.0),
        task_loss() if loss == "task" else loss,
        **compile_options,
    )
    return distiller


def losses_of(distiller, x, y=None, sample_weight=None):
    """The logs of a step of training."""
    distiller.reset_metrics()
    return distiller.train_on_batch(x, y, sample_weight, return_dict=True)


def evaluate(distiller, x, y=None, sample_weight=None, batch_size=BATCH):
    return distiller.evaluate(
        x,
        y,
        batch_size=batch_size,
        sample_weight=sample_weight,
        verbose=0,
        return_dict=True,
    )


def snapshot(model):
    return [ops.convert_to_numpy(v).copy() for v in model.variables]


def changed(model, before):
    """The paths of the variables that differ from a snapshot."""
    return {
        variable.path
        for variable, value in zip(model.variables, before, strict=True)
        if not np.array_equal(ops.convert_to_numpy(variable), value)
    }


# The formulas


def float64(x):
    if not isinstance(x, np.ndarray):
        x = ops.convert_to_numpy(ops.cast(x, "float32"))
    return np.asarray(x, "float64")


def log_softmax(x):
    x = float64(x)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def cross_entropies(targets, logits):
    log_q = log_softmax(logits)
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


ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
}


def reconstruct(layer, prefix="", activation="relu"):
    """E~ = f(U) W + 1 c"""
    basis, offset = basis_and_offset(layer, prefix)
    codes = float64(getattr(layer, f"{prefix}codes"))
    return ACTIVATIONS[activation](codes) @ basis + offset


def row_distances(table, layer, prefix="", activation="relu"):
    rows = reconstruct(layer, prefix, activation)
    return np.square(float64(table) - rows).sum(axis=1)


def table_distance(models):
    """The embedding loss of models with one tied table."""
    old, new = (model.get_layer("tokens") for model in models)
    return row_distances(old.embeddings, new).mean()


def logits_of(models, inputs):
    return [float64(model(inputs)) for model in models]
