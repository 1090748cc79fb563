"""Features of layers by name, in models of any class and at any depth.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import keras
import numpy as np
import pytest

from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.distillation_models import BATCH
from tests.distillation_models import VOCABULARY
from tests.distillation_models import WIDTH
from tests.distillation_models import cross_entropies
from tests.distillation_models import divergences
from tests.distillation_models import float64
from tests.distillation_models import make_distiller
from tests.distillation_models import make_factors
from tests.distillation_models import make_table
from tests.distillation_models import randomize
from tests.distillation_models import reconstruct
from tests.distillation_models import row_distances

LENGTH, CLASSES = 6, 5

# Keras warns of weights that no loss depends on.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Gradients do not exist:UserWarning"
)


def make_data():
    rng = np.random.default_rng(3)
    ids = rng.integers(VOCABULARY, size=(BATCH, LENGTH)).astype("int32")
    return ids, rng.integers(CLASSES, size=BATCH).astype("int32")


class Watched(keras.layers.Dense):
    """Counts its calls (where models run eagerly), and fails if told to."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.fails = False

    def call(self, x):
        if self.fails:
            raise ArithmeticError("in the forward pass")
        self.calls += 1
        return super().call(x)


# One computation, in models of several kinds: tokens -> hidden -> classes


def make_layers(make_embedding, hidden="hidden"):
    return {
        "tokens": make_embedding(),
        "hidden": Watched(WIDTH, "tanh", name=hidden),
        "pool": keras.layers.GlobalAveragePooling1D(),
        "classes": keras.layers.Dense(CLASSES, name="classes"),
    }


def chain(layers):
    ids = keras.Input((None,), dtype="int32")
    x = ids
    for layer in layers:
        x = layer(x)
    return keras.Model(ids, x)


def functional(layers):
    return chain(layers.values())


def sequential(layers):
    inputs = keras.Input((None,), dtype="int32")
    return keras.Sequential([inputs, *layers.values()])


def nested(layers):
    """The layer is inside a model inside a model."""
    tokens, hidden, *others = layers.values()
    states = keras.Input((None, WIDTH))
    inner = keras.Model(states, hidden(states), name="inner")
    outer = keras.Model(states, inner(states), name="outer")
    return chain([tokens, outer, *others])


class Block(keras.layers.Layer):
    """A composite layer, which keeps the layer in a list."""

    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        self.inner = list(layers)

    def build(self, input_shape):
        for layer in self.inner:
            layer.build(input_shape)

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def composite(layers):
    tokens, hidden, *others = layers.values()
    return chain([tokens, Block([Block([hidden])]), *others])


class Subclassed(keras.Model):
    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        self.tokens, self.hidden, self.pool, self.classes = layers.values()

    def call(self, ids):
        return self.classes(self.pool(self.hidden(self.tokens(ids))))


class SubclassedOfBlocks(keras.Model):
    def __init__(self, layers, **kwargs):
        super().__init__(**kwargs)
        tokens, hidden, *others = layers.values()
        self.start, self.block = tokens, Block([hidden])
        self.end = keras.Sequential(others)

    def call(self, ids, training=None):
        return self.end(self.block(self.start(ids)), training=training)


def make(kind, layers, seed):
    model = kind(layers)
    model(make_data()[0])
    return randomize(model, seed)


def make_pair(teacher_kind, student_kind=None, hidden="hidden"):
    layers = make_layers(make_table), make_layers(make_factors, hidden)
    teacher = make(teacher_kind, layers[0], seed=1)
    student = make(student_kind or teacher_kind, layers[1], seed=2)
    return (teacher, student), layers


# The computation in NumPy


def hidden_states(layers, ids):
    tokens, hidden = layers["tokens"], layers["hidden"]
    if isinstance(tokens, DistilledEmbedding):
        table = reconstruct(tokens)
    else:
        table = float64(tokens.embeddings)
    return np.tanh(table[ids] @ float64(hidden.kernel) + float64(hidden.bias))


def logits(layers, ids):
    classes = layers["classes"]
    pooled = hidden_states(layers, ids).mean(axis=1)
    return pooled @ float64(classes.kernel) + float64(classes.bias)


def distance(layers, ids):
    states = [hidden_states(each, ids) for each in layers]
    return np.square(states[0] - states[1]).mean()


def features(student="hidden"):
    return keras.distillation.FeatureDistillation(
        "mse", teacher_layer_name="hidden", student_layer_name=student
    )


def assert_nothing_left(layers):
    """What catches a layer's outputs is gone: `call` is its class's again."""
    for each in layers:
        assert "call" not in vars(each["hidden"])
        assert each["hidden"].call.__func__ is Watched.call


def forget_calls(layers):
    for each in layers:
        each["hidden"].calls = 0


KINDS = [
    functional,
    sequential,
    nested,
    composite,
    Subclassed,
    SubclassedOfBlocks,
]


@pytest.mark.parametrize(
    ("teacher_kind", "student_kind"),
    [*((kind, kind) for kind in KINDS)]
    + [(functional, Subclassed), (SubclassedOfBlocks, nested)],
)
def test_features_equal_numpy(teacher_kind, student_kind):
    models, layers = make_pair(teacher_kind, student_kind)
    ids, targets = make_data()
    distiller = make_distiller(models, features(), run_eagerly=True)
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert logs["feature_distillation_loss"] == pytest.approx(
        distance(layers, ids), rel=1e-5
    )
    assert_nothing_left(layers)
    # Not at the first step: Keras may then run models to build them.
    forget_calls(layers)
    distiller.train_on_batch(ids, targets)
    assert [each["hidden"].calls for each in layers] == [1, 1]
    assert_nothing_left(layers)


def test_features_of_layers_of_different_names():
    models, layers = make_pair(functional, Subclassed, hidden="small")
    ids, targets = make_data()
    distiller = make_distiller(models, features("small"), run_eagerly=True)
    logs = distiller.test_on_batch(ids, targets, return_dict=True)
    assert logs["feature_distillation_loss"] == pytest.approx(
        distance(layers, ids), rel=1e-5
    )


@pytest.mark.parametrize("kind", [functional, SubclassedOfBlocks])
def test_features_in_a_compiled_step(kind):
    models, layers = make_pair(kind)
    ids, targets = make_data()
    distiller = make_distiller(
        models,
        [features(), LogitsDistillation()],
        # Mostly the features.
        [10.0, 1.0],
        student_loss_weight=0.1,
        optimizer=keras.optimizers.SGD(0.05),
        jit_compile=True,
    )
    expected = distance(layers, ids)
    history = distiller.fit(
        ids, targets, batch_size=BATCH, epochs=4, verbose=0
    ).history["feature_distillation_loss"]
    assert history[0] == pytest.approx(expected, rel=1e-5)
    # The gradient arrives at the layer and below.
    assert history[3] < history[2] < history[1] < history[0]
    assert_nothing_left(layers)
    # What comes next is of the trained layers, by one more trace.
    logs = distiller.evaluate(ids, targets, verbose=0, return_dict=True)
    assert logs["feature_distillation_loss"] == pytest.approx(
        distance(layers, ids), rel=1e-5
    )
    assert_nothing_left(layers)
    np.testing.assert_allclose(
        models[1](ids), logits(layers[1], ids), rtol=1e-4, atol=1e-5
    )


def test_several_losses_share_one_run():
    models, layers = make_pair(Subclassed)
    losses = [
        features(),
        keras.distillation.FeatureDistillation("mae", "tokens", "tokens"),
        features(),
        LogitsDistillation(),
    ]
    distiller = make_distiller(models, losses, run_eagerly=True)
    distiller.train_on_batch(*make_data())
    for step in (distiller.train_on_batch, distiller.test_on_batch):
        forget_calls(layers)
        logs = step(*make_data(), return_dict=True)
        assert [each["hidden"].calls for each in layers] == [1, 1]
    expected = pytest.approx(distance(layers, make_data()[0]), rel=1e-5)
    assert logs["feature_distillation_loss"] == expected
    assert logs["feature_distillation_3_loss"] == expected


@pytest.mark.parametrize("which", [0, 1], ids=["teacher", "student"])
def test_layers_are_restored_after_an_error(which):
    models, layers = make_pair(Subclassed)
    ids, targets = make_data()
    distiller = make_distiller(models, features(), run_eagerly=True)
    distiller.train_on_batch(ids, targets)
    layers[which]["hidden"].fails = True
    with pytest.raises(ArithmeticError, match="in the forward pass"):
        distiller.train_on_batch(ids, targets)
    assert_nothing_left(layers)
    layers[which]["hidden"].fails = False
    distiller.reset_metrics()
    logs = distiller.train_on_batch(ids, targets, return_dict=True)
    assert logs["feature_distillation_loss"] == pytest.approx(
        distance(layers, ids), rel=1e-5
    )


@pytest.mark.parametrize("kind", [functional, Subclassed])
def test_subclassed_models_as_a_whole(kind):
    """The teacher's table is found by the name of the student's factors."""
    models, layers = make_pair(kind, Subclassed)
    ids, targets = make_data()
    distiller = make_distiller(
        models,
        [EmbeddingDistillation(), LogitsDistillation()],
        student_loss_weight=0.1,
        optimizer=keras.optimizers.Adam(0.01),
    )
    old, new = (each["tokens"] for each in layers)
    teacher_logits, student_logits = (logits(each, ids) for each in layers)
    expected = {
        "task_loss": cross_entropies(targets, student_logits).mean(),
        "embedding_distillation_loss": row_distances(
            old.embeddings, new
        ).mean(),
        "logits_distillation_loss": divergences(
            teacher_logits, student_logits
        ).mean(),
    }
    task, *others = expected.values()
    expected["loss"] = 0.1 * task + 0.9 * sum(others)
    before = float64(old.embeddings)
    history = distiller.fit(
        ids, targets, batch_size=BATCH, epochs=5, verbose=0
    ).history
    first = {name: values[0] for name, values in history.items()}
    assert first == pytest.approx(expected, rel=1e-4)
    for name in ("embedding_distillation_loss", "logits_distillation_loss"):
        assert history[name][-1] < history[name][0]
    np.testing.assert_array_equal(float64(old.embeddings), before)


# What is refused


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("kind", [functional, Subclassed])
def test_a_name_that_no_layer_has(kind, which):
    models, _ = make_pair(kind)
    names = {"teacher": "hidden", "student": "hidden"} | {which: "hiden"}
    loss = keras.distillation.FeatureDistillation("mse", *names.values())
    with pytest.raises(ValueError, match=f"`{which}` has no layer 'hiden'"):
        Distiller(*models, loss)


class Twins(Subclassed):
    """Two layers of one name, neither on the model's surface."""

    def __init__(self, layers):
        twin = Watched(WIDTH, "tanh", name="hidden")
        block = Block([Block([layers["hidden"]]), Block([twin])])
        super().__init__(layers | {"hidden": block})


def test_a_name_that_two_layers_have():
    models, _ = make_pair(Subclassed, Twins)
    with pytest.raises(ValueError, match="name 'hidden'. Received: 2 layers"):
        Distiller(*models, features())


def test_a_layer_on_the_surface_is_meant_before_those_inside():
    """As `get_layer` finds it."""

    class Shadowed(Subclassed):
        def __init__(self, layers):
            super().__init__(layers)
            self.block = Block([Watched(WIDTH, name="hidden")])

        def call(self, ids):
            x = self.block(self.tokens(ids))
            return self.classes(self.pool(self.hidden(x)))

    (teacher, _), (teacher_layers, _) = make_pair(Subclassed)
    layers = make_layers(make_factors)
    student = make(Shadowed, layers, seed=2)
    distiller = make_distiller((teacher, student), features(), run_eagerly=True)
    ids, targets = make_data()
    distiller.train_on_batch(ids, targets)
    logs = distiller.test_on_batch(ids, targets, return_dict=True)
    outputs = [
        hidden_states(teacher_layers, ids),
        layers["hidden"](student.block(layers["tokens"](ids))),
    ]
    assert logs["feature_distillation_loss"] == pytest.approx(
        np.square(np.subtract(*map(float64, outputs))).mean(), rel=1e-5
    )


class CalledTwice(Subclassed):
    def call(self, ids):
        x = self.hidden(self.hidden(self.tokens(ids)))
        return self.classes(self.pool(x))


class NeverCalled(Subclassed):
    def call(self, ids):
        if not self.built:
            self.hidden(self.tokens(ids))
        return self.classes(self.pool(self.tokens(ids)))


@pytest.mark.parametrize(
    ("kind", "times"), [(CalledTwice, 2), (NeverCalled, 0)]
)
def test_a_layer_must_be_called_once(kind, times):
    models, layers = make_pair(Subclassed, kind)
    distiller = make_distiller(models, features(), run_eagerly=True)
    with pytest.raises(
        ValueError,
        match=f"'hidden' of the student, called {times} times",
    ):
        distiller.train_on_batch(*make_data())
    assert_nothing_left(layers)
