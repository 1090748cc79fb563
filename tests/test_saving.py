"""`save_model` and `load_model`: what comes back, and what is refused."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import keras_internals
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection
from tests.containers import Containers
from tests.containers import gpt2_backbone
from tests.shared import basis_and_offset
from tests.test_compression import IDS
from tests.test_compression import VOCABULARY
from tests.test_compression import WIDTH
from tests.test_compression import keras_embedding
from tests.test_compression import keras_reversible
from tests.test_compression import make_model
from tests.test_compression import make_nested
from tests.test_compression import make_sequential
from tests.test_compression import randomize

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)
NEEDS_TENSORFLOW = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="the layer runs in TensorFlow's graphs only",
)

RANK = 3
BOTH = [IDS, IDS[::-1]]
POSITIONS = np.array([[0, 2], [3, 1]], dtype="int32")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.keras"


def factorized(model, **options):
    return compress(model, rank=RANK, verbose=0, **options)


def save_and_load(model, path, **options):
    save_model(model, path)
    return load_model(path, **options)


def outputs_of(model, inputs=IDS):
    outputs = model(inputs, training=False)
    return [
        ops.convert_to_numpy(ops.cast(x, "float32"))
        for x in keras.tree.flatten(outputs)
    ]


def values(variables):
    return [ops.convert_to_numpy(ops.cast(v, "float32")) for v in variables]


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        np.testing.assert_array_equal(a, b)


def all_of(model, kind):
    return [
        x for x in keras_internals.iterate_layers(model) if isinstance(x, kind)
    ]


def described(model):
    """Each layer inside, once, as far as it shows from outside."""
    return [
        (type(x), x.name, x.trainable, x.dtype_policy.name)
        for x in keras_internals.iterate_layers(model)
    ]


def assert_same_model(model, loaded, inputs=IDS):
    """Equal, to the last bit, and layers shared as they were."""
    assert type(loaded) is type(model)
    assert loaded.name == model.name
    assert described(loaded) == described(model)
    assert_equal(values(loaded.weights), values(model.weights))
    assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    assert not {id(v) for v in loaded.variables} & {
        id(v) for v in model.variables
    }


# Models


@keras.saving.register_keras_serializable(package="tests_saving")
class Graph(keras.Model):
    """A graph in a class with a configuration of its own, as KerasHub's."""

    def __init__(self, width=WIDTH, **kwargs):
        ids = keras.Input((None,), dtype="int32", name="ids")
        tokens = keras.layers.ReversibleEmbedding(
            VOCABULARY, width, name="tokens"
        )
        x = keras.layers.Dense(width, name="hidden")(tokens(ids))
        super().__init__(ids, tokens(x, reverse=True), **kwargs)
        self.width = width
        self.tokens = tokens

    def get_config(self):
        return {"name": self.name, "width": self.width}


@keras.saving.register_keras_serializable(package="tests_saving")
class Parts(keras.Model):
    """Models as parts: a graph, a sequence, and one that is built late."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        ids = keras.Input((None,), dtype="int32", name="ids")
        self.tokens = keras_reversible()
        states = keras.layers.Dense(WIDTH, name="hidden")(self.tokens(ids))
        self.graph = keras.Model(ids, states, name="graph")
        self.sequence = keras.Sequential(
            [
                keras.Input((None,), dtype="int32"),
                keras.layers.Embedding(VOCABULARY, WIDTH, name="others"),
                keras.layers.Dense(WIDTH, name="more"),
            ],
            name="sequence",
        )
        self.late = keras.Sequential(
            [keras.layers.Dense(WIDTH, name="late")], name="late_sequence"
        )

    def call(self, ids):
        states = self.late(self.graph(ids) + self.sequence(ids))
        return self.tokens(states, reverse=True)


class Unregistered(keras.Model):
    """Unknown to Keras unless it is told."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = keras_reversible()
        self.layers_of = {"in": [keras.layers.Dense(WIDTH, name="hidden")]}
        self.both = (self.tokens, {"out": keras.layers.Dense(WIDTH)})

    def call(self, ids):
        x = self.layers_of["in"][0](self.both[0](ids))
        return self.tokens(self.both[1]["out"](x), reverse=True)


def called(kind):
    model = kind()
    model(IDS)
    return randomize(model)


def make_hub_composites():
    """KerasHub's layers, which are given one another's table."""
    hub = pytest.importorskip("keras_hub")
    ids = keras.Input((4,), dtype="int32", name="ids")
    positions = keras.Input((2,), dtype="int32", name="positions")
    both = hub.layers.TokenAndPositionEmbedding(VOCABULARY, 4, WIDTH)
    states = hub.layers.TransformerEncoder(24, 2, name="encoder")(both(ids))
    head = hub.layers.MaskedLMHead(
        token_embedding=both.token_embedding, name="head"
    )
    return randomize(
        keras.Model([ids, positions], head(states, mask_positions=positions))
    )


def make_with_head(**options):
    """A dense layer projects to the vocabulary."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Dense(WIDTH, name="hidden")(keras_embedding()(ids))
    head = keras.layers.Dense(VOCABULARY, name="head", **options)
    return randomize(keras.Model(ids, head(x), name="with_head"))


MODELS = pytest.mark.parametrize(
    ("make", "inputs", "tables"),
    [
        pytest.param(make_sequential, IDS, 1, id="sequential"),
        pytest.param(make_model, IDS, 1, id="functional"),
        pytest.param(make_nested, BOTH, 1, id="nested"),
        pytest.param(Graph, IDS, 1, id="graph"),
        pytest.param(lambda: called(Containers), IDS, 4, id="containers"),
        pytest.param(lambda: called(Parts), IDS, 2, id="parts"),
        pytest.param(
            make_hub_composites, [IDS, POSITIONS], 1, id="hub-composites"
        ),
    ],
)


# What comes back


@MODELS
@pytest.mark.parametrize("compressed", [False, True])
def test_models_come_back(compressed, make, inputs, tables, path):
    """With each table one layer, however many use it; and once more."""
    model = make()
    kinds = keras.layers.Embedding, keras.layers.ReversibleEmbedding
    if compressed:
        model, kinds = factorized(model), DistilledEmbedding
    assert len(all_of(model, kinds)) == tables
    loaded = save_and_load(model, path)
    assert len(all_of(loaded, kinds)) == tables
    assert_same_model(model, loaded, inputs)
    assert_same_model(model, save_and_load(loaded, path), inputs)


def test_what_was_shared_is_shared(path):
    loaded = save_and_load(factorized(make_nested()), path)
    inner, table = loaded.get_layer("inner"), loaded.get_layer("tokens")
    assert isinstance(table, DistilledEmbedding)
    assert inner.get_layer("tokens") is table
    # Two calls inside, looked up and projected outside: all follow it.
    before = outputs_of(loaded, BOTH), outputs_of(inner)
    table.codes.assign(0 * table.codes)
    for old, new in zip(before, (outputs_of(loaded, BOTH), outputs_of(inner))):
        assert np.abs(old[0] - new[0]).max() > 1e-2


def test_a_subclass_keeps_its_containers(path):
    loaded = save_and_load(factorized(called(Containers)), path)
    assert loaded.in_list[0] is loaded.tokens
    assert loaded.in_dict["b"][0] is loaded.tokens
    assert loaded.in_tuple[1]["c"][0] is loaded.tokens


def test_a_class_that_is_not_registered_is_given(path):
    model = factorized(called(Unregistered))
    given = {"Unregistered": Unregistered}
    loaded = save_and_load(model, path, custom_objects=given)
    assert_same_model(model, loaded)
    assert loaded.both[0] is loaded.tokens
    with pytest.raises(ValueError, match="'Unregistered'.*custom_objects"):
        load_model(path)
    with keras.saving.custom_object_scope(given):
        assert_same_model(model, load_model(path))


@pytest.mark.parametrize(("heads", "tables"), [("tie", 1), ("factorize", 2)])
def test_heads(heads, tables, path):
    model = factorized(make_with_head(activation="softmax"), heads=heads)
    loaded = save_and_load(model, path)
    assert_same_model(model, loaded)
    assert len(all_of(loaded, DistilledEmbedding)) == tables
    (head,) = all_of(loaded, VocabularyProjection)
    tied = head.embedding is loaded.get_layer("tokens")
    assert tied == (heads == "tie")
    assert len(loaded.weights) == len(model.weights)


def under_policy(policy, make=make_model):
    keras.config.set_dtype_policy(policy)
    try:
        return make()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_half_precision(policy, path):
    model = factorized(under_policy(policy))
    loaded = save_and_load(model, path)
    assert_same_model(model, loaded)
    assert [w.dtype for w in loaded.weights] == [w.dtype for w in model.weights]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_models_own_dtype_policy(compressed, path):
    """It casts what the model is given, and tells how losses are scaled."""
    x = keras.Input((None,), dtype="float32", name="x")

    def make():
        ids = keras.Input((None,), dtype="int32", name="ids")
        y = x * 3.0  # an operation, which has no policy of its own
        return randomize(keras.Model([ids, x], [keras_embedding()(ids), y]))

    model = under_policy("mixed_float16", make)
    model = factorized(model) if compressed else model
    model.compile("adam", "mse")
    loaded = save_and_load(model, path)
    assert loaded.dtype_policy.name == "mixed_float16"
    inputs = [IDS, np.full((2, 4), 1.0001, "float32")]
    assert_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    assert type(loaded.optimizer) is type(model.optimizer)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["tokens", "hidden"])
def test_frozen_layers_stay_frozen(name, compressed, path):
    """Of a class whose configuration does not tell."""
    model = Graph()
    model.get_layer(name).trainable = False
    model = factorized(model) if compressed else model
    model.compile("adam", "mse", jit_compile=False)
    targets = np.ones((2, 4, VOCABULARY))
    model.fit(IDS, targets, verbose=0)
    loaded = save_and_load(model, path)
    assert_same_model(model, loaded)
    assert_equal(
        values(loaded.optimizer.variables), values(model.optimizer.variables)
    )


def test_one_layer_in_a_frozen_model_is_not_frozen(path):
    model = make_nested()
    model.get_layer("inner").trainable = False
    model.get_layer("tokens").trainable = True
    model = factorized(model)
    assert model.get_layer("tokens").trainable
    assert_same_model(model, save_and_load(model, path), BOTH)


def test_lora_and_quantized_layers(path):
    model = make_model()
    model.get_layer("hidden").enable_lora(2)
    student = factorized(randomize(model))
    # Saved as the one kernel that they are together.
    (found,), (expected,) = (
        outputs_of(x) for x in (save_and_load(student, path), student)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    model = factorized(make_sequential())
    model.get_layer("classes").quantize("int8")
    assert_same_model(model, save_and_load(model, path))


def policies_of(model):
    return [
        (x.name, x._dtype_policy.name, x.compute_dtype, x.variable_dtype)
        for x in [model, *keras_internals.iterate_layers(model)]
    ]


# Keras's own word of layers that it does not quantize.
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize`")
def test_a_quantized_model_of_keras_hub(path):
    """Its configuration is a map of the policies that its layers use."""
    model = gpt2_backbone()
    randomize(model).quantize("int8")
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    expected = outputs_of(model, inputs), policies_of(model)
    student = factorized(model)
    assert policies_of(model) == expected[1]
    assert_equal(outputs_of(model, inputs), expected[0])
    assert keras.config.dtype_policy().name == "float32"
    names = dict(name[:2] for name in policies_of(student))
    assert names["feedforward_output_dense"] == "int8_from_float32"
    assert names[student.name] == "float32"
    loaded = student
    for _ in range(3):
        before = policies_of(loaded)
        loaded = save_and_load(loaded, path)
        assert policies_of(loaded) == before == policies_of(student)
        assert_same_model(student, loaded, inputs)
    assert keras.config.dtype_policy().name == "float32"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(path)
    keras.saving.load_model(path)


# Layers with a state beside their weights


def adapted(kind, data, **options):
    layer = kind(name="state", **options)
    layer.adapt(data)
    return layer


def text_vectorization(**options):
    return adapted(
        keras.layers.TextVectorization,
        ["one two three", "four five six seven"],
        max_tokens=VOCABULARY,
        **options,
    )


def string_lookup():
    return adapted(keras.layers.StringLookup, np.array(["two", "one"]))


def normalization():
    data = np.array([[1.0, 5.0], [3.0, 9.0]])
    return adapted(keras.layers.Normalization, data)


def discretization():
    data = np.linspace(0, 9, 20)
    return adapted(keras.layers.Discretization, data, num_bins=3)


TEXTS = ["seven two", "one eight"]
WORDS = [["one", "two"], ["three", "one"]]
NUMBERS = [[1.0, 9.0], [4.0, 6.0]]
STATES = {
    "text": (text_vectorization, TEXTS),
    "tf-idf": (lambda: text_vectorization(output_mode="tf_idf"), TEXTS),
    "lookup": (string_lookup, WORDS),
    "normalization": (normalization, NUMBERS),
    "discretization": (discretization, NUMBERS),
}


@NEEDS_TENSORFLOW
@pytest.mark.parametrize(("make", "given"), STATES.values(), ids=STATES)
def test_what_layers_have_learnt_by_adapt(make, given, path):
    """Vocabularies, means, bins: through `compress`, and a file."""
    import tensorflow as tf

    given = tf.constant(given)
    x = keras.Input(given.shape[1:], dtype=given.dtype.name, name="x")
    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model([ids, x], [keras_embedding()(ids), make()(x)])
    inputs = [tf.constant(IDS), given]
    expected = outputs_of(model, inputs)[1]
    assert len(np.unique(expected)) > 1

    student = factorized(model)
    np.testing.assert_array_equal(outputs_of(student, inputs)[1], expected)
    for saved in (model, student):
        loaded = save_and_load(saved, path)
        assert_equal(outputs_of(loaded, inputs), outputs_of(saved, inputs))


@NEEDS_TENSORFLOW
@pytest.mark.parametrize("sequential", [False, True])
def test_models_of_text_keep_their_vocabulary(sequential, path):
    import tensorflow as tf

    words = text_vectorization()
    text = tf.constant(["seven two", "one one"])
    if sequential:
        model = keras.Sequential([words, keras_embedding()])
        model(text)
    else:
        strings = keras.Input((), dtype="string")
        model = keras.Model(strings, keras_embedding()(words(strings)))
    student = factorized(model)
    loaded = save_and_load(student, path)
    for copied in (student, loaded):
        layer = copied.get_layer("state")
        assert layer.get_vocabulary() == words.get_vocabulary()
    assert_same_model(student, loaded, text)


# Compile settings


def train(model, epochs=2, classes=3):
    targets = np.linspace(-1, 1, 2 * classes).reshape(2, classes)
    history = model.fit(IDS, targets, epochs=epochs, shuffle=False, verbose=0)
    return history.history


def test_compile_settings(path):
    model = factorized(make_sequential())
    model.compile(
        keras.optimizers.SGD(0.25, momentum=0.5, clipnorm=2.0),
        keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.25
        ),
        metrics=["mae", keras.metrics.MeanSquaredError(name="squared")],
        run_eagerly=True,
        steps_per_execution=1,
    )
    loaded = save_and_load(model, path)
    assert loaded.compiled
    assert type(loaded.optimizer) is keras.optimizers.SGD
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert float(loaded.optimizer.learning_rate) == 0.25
    assert loaded.loss.get_config() == model.loss.get_config()
    assert loaded.run_eagerly
    targets = np.ones((2, 3))
    found = [
        x.evaluate(IDS, targets, return_dict=True, verbose=0)
        for x in (model, loaded)
    ]
    assert found[0] == found[1]
    assert found[0].keys() == {"loss", "mae", "squared"}


def test_an_uncompiled_model_stays_so(path):
    assert not save_and_load(factorized(make_model()), path).compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_a_task_is_compiled_only_if_it_was(compiled, path):
    hub = pytest.importorskip("keras_hub")
    task = hub.models.GPT2CausalLM(gpt2_backbone(), None, compile=compiled)
    student = factorized(task)
    for copied in (student, save_and_load(student, path)):
        assert copied.compiled == compiled
        optimizer = getattr(copied, "optimizer", None)
        assert (optimizer is not None) == compiled
        assert hasattr(copied, "sampler") == hasattr(task, "sampler")


def test_losses_and_metrics_of_several_outputs(path):
    """As dictionaries, and lists in them, through `compress` and a file."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras_embedding()(ids)
    a, *b = (keras.layers.Dense(2, name=name)(x) for name in "abc")
    model = randomize(keras.Model(ids, {"first": a, "others": b}))
    model.compile(
        "sgd",
        loss={"first": "mse", "others": ["mae", keras.losses.Huber()]},
        metrics={"first": ["mae"], "others": [["mse"], []]},
        jit_compile=False,
    )
    student = factorized(model)
    loaded = save_and_load(student, path)
    targets = np.ones((2, 4, 2))
    targets = {"first": targets, "others": [targets, targets]}
    found = [
        x.evaluate(IDS, targets, return_dict=True, verbose=0)
        for x in (student, loaded)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 6  # the sum, three losses and two metrics


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.Adam(0.05),
        lambda: keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(0.1, 20), use_ema=True
        ),
        lambda: keras.optimizers.SGD(
            0.05, momentum=0.9, gradient_accumulation_steps=2
        ),
    ],
    ids=["adam", "adamw", "accumulating"],
)
def test_training_goes_on_as_if_nothing_had_been(make_optimizer, path):
    model = factorized(make_sequential())
    model.compile(make_optimizer(), "mse", metrics=["mae"], jit_compile=False)
    train(model, epochs=3)
    loaded = save_and_load(model, path)
    assert_equal(
        values(loaded.optimizer.variables), values(model.optimizer.variables)
    )
    assert train(loaded) == train(model)
    assert_equal(values(loaded.weights), values(model.weights))
    assert_equal(
        values(loaded.optimizer.variables), values(model.optimizer.variables)
    )
    # The state tells: with a fresh one the weights are others.
    fresh = load_model(path)
    fresh.compile(make_optimizer(), "mse", jit_compile=False)
    train(fresh)
    assert not np.array_equal(fresh.weights[0], model.weights[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: called(Containers),
        # Float16 trains with another optimizer around the user's.
        lambda: under_policy("mixed_float16"),
    ],
    ids=["subclass", "loss scaling"],
)
def test_training_of_all_kinds_goes_on(make, path):
    model = factorized(make())
    model.compile("adam", "mse", jit_compile=False)
    targets = np.ones((2, 4, VOCABULARY))
    model.fit(IDS, targets, verbose=0)
    loaded = save_and_load(model, path)
    assert type(loaded.optimizer) is type(model.optimizer)
    assert_equal(
        values(loaded.optimizer.variables), values(model.optimizer.variables)
    )
    losses = [
        x.fit(IDS, targets, epochs=2, shuffle=False, verbose=0).history["loss"]
        for x in (model, loaded)
    ]
    assert losses[0] == losses[1]
    assert_equal(values(loaded.weights), values(model.weights))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_what_is_excluded_from_weight_decay(table, policy, path):
    """Neither decays: through `compress`, and a file."""
    model = under_policy(policy)
    optimizer = keras.optimizers.AdamW(0.5, weight_decay=0.5)
    variables = [model.get_layer("hidden").kernel]
    if table:
        variables.append(model.get_layer("tokens").embeddings)
    optimizer.exclude_from_weight_decay(variables, ["bias", "gamma"])
    model.compile(optimizer, "mse", jit_compile=False)
    student = factorized(model)
    loaded = save_and_load(student, path)
    kept = {"bias", "gamma", "kernel"}
    if table:
        kept |= {v.name for v in student.get_layer("tokens").weights}
    for copied in (student, loaded):
        variables = copied.trainable_variables
        before = values(variables)
        inner = getattr(copied.optimizer, "inner_optimizer", copied.optimizer)
        inner.build(variables)
        inner.apply([ops.zeros(v.shape, v.dtype) for v in variables])
        for variable, old, new in zip(variables, before, values(variables)):
            changed = not np.array_equal(old, new)
            assert changed == (variable.name not in kept), variable.path
    assert not getattr(model.optimizer, "built", False)


# Keras's own word of a lambda that it serializes.
@pytest.mark.filterwarnings("ignore:The object being serialized includes a")
def test_a_lambda_as_loss_is_left_out(path):
    model = factorized(make_sequential())
    model.compile("adam", lambda y, x: ops.mean((y - x) ** 2))
    train(model)
    with pytest.warns(UserWarning, match="saved without its compile settings"):
        save_model(model, path)
    loaded = load_model(path)
    assert not loaded.compiled
    assert_same_model(model, loaded)


def own_loss(y, x):
    return ops.mean((y - x) ** 2, axis=-1)


def test_a_loss_that_is_not_registered_is_given(path):
    model = factorized(make_sequential())
    model.compile("adam", own_loss, jit_compile=False)
    train(model)
    save_model(model, path)
    with pytest.warns(UserWarning, match="without its compile sett.*own_loss"):
        loaded = load_model(path)
    assert not loaded.compiled
    assert_same_model(model, loaded)
    loaded = load_model(path, {"own_loss": own_loss})
    assert loaded.loss is own_loss
    assert train(loaded) == train(model)


# Keras's own word of a lambda that it serializes.
@pytest.mark.filterwarnings("ignore:The object being serialized includes a")
def test_a_python_lambda_is_refused(path):
    ids = keras.Input((None,), dtype="int32")
    double = keras.layers.Lambda(lambda x: 2 * x, name="double")
    model = factorized(keras.Model(ids, double(keras_embedding()(ids))))
    with pytest.raises(ValueError, match="must not contain a Python lambda"):
        save_model(model, path)
    assert not list(path.parent.iterdir())


def test_a_function_by_name_is_not(path):
    ids = keras.Input((None,), dtype="int32")
    named = keras.layers.Lambda(ops.tanh)
    model = factorized(keras.Model(ids, named(keras_embedding()(ids))))
    assert_same_model(model, save_and_load(model, path))


# Compressing what was loaded


def make_two_tables():
    inputs = [keras.Input((None,), dtype="int32", name=name) for name in "ab"]
    tables = [
        keras.layers.Embedding(VOCABULARY, WIDTH, name=f"table_{x.name}")
        for x in inputs
    ]
    x = keras.layers.Add()([table(x) for table, x in zip(tables, inputs)])
    return randomize(keras.Model(inputs, x))


@pytest.mark.parametrize("verbose", [0, 1])
def test_another_table_of_a_loaded_model_is_compressed(verbose, path, capsys):
    model = make_two_tables()
    first = factorized(model, layers=["table_a"])
    loaded = save_and_load(first, path)
    both = compress(loaded, rank=RANK, layers=["table_b"], verbose=verbose)
    assert len(all_of(both, DistilledEmbedding)) == 2
    assert_equal(outputs_of(loaded, BOTH), outputs_of(first, BOTH))
    # As if both had been compressed at once, and factors are not copied less.
    assert_equal(outputs_of(both, BOTH), outputs_of(factorized(model), BOTH))
    assert_same_model(both, save_and_load(both, path), BOTH)
    rows = compression_report(both, loaded).rows
    assert [row.layer for row in rows] == ["table_a", "table_b"]
    assert bool(capsys.readouterr().out) == bool(verbose)


def test_a_loaded_model_is_compressed_as_the_original(path):
    for make, inputs in ((make_nested, BOTH), (lambda: called(Parts), IDS)):
        model = make()
        loaded = save_and_load(model, path)
        expected = outputs_of(factorized(model), inputs)
        assert_equal(outputs_of(factorized(loaded), inputs), expected)


# Bad files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a good file, and those of its members."""
    path = tmp_path_factory.mktemp("saved") / "good.keras"
    model = factorized(make_sequential())
    model.compile("adam", "mse")
    save_model(model, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return path.read_bytes(), members


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def assert_refused(path, match=None):
    """With one kind of error that names the file, and nothing left behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=match) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert sorted(path.parent.iterdir()) == before


class Evil:
    """Leaves a file where it is unpickled, or imported by name."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_are_not_whole_archives(saved, path, tmp_path):
    """Truncated ones, other ones, and a pickle, which is not run."""
    content, _ = saved
    middle, end = len(content) // 2, len(content)
    rng = np.random.default_rng(0)
    for other in (
        *(content[:n] for n in (0, 1, 22, 100, middle, end - 30, end - 1)),
        rng.integers(256, size=5000, dtype="uint8").tobytes(),
        b"Dear reader,\n\nthis is a letter.\n",
        b"\x89HDF\r\n\x1a\n" + bytes(2000),
        pickle.dumps(Evil(tmp_path / "evil")),
    ):
        path.write_bytes(other)
        assert_refused(path, "not a saved model, or is incomplete")
    assert not (tmp_path / "evil").exists()


def test_another_archive(saved, path):
    _, members = saved
    write_members(path, {"letter.txt": b"Dear reader"})
    assert_refused(path, "has no config.json, metadata.json, model.weights.h5")
    for name in members:
        rest = {k: v for k, v in members.items() if k != name}
        write_members(path, rest)
        assert_refused(path, f"has no {name}")


def test_a_packed_archive(saved, path):
    """It could be of any size, unpacked."""
    write_members(path, saved[1], zipfile.ZIP_DEFLATED)
    assert_refused(path, "damaged, or was not written")


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "assets/../../evil", "..\\evil", "C:\\evil"],
)
def test_a_member_that_leads_elsewhere(name, saved, path):
    write_members(path, {**saved[1], name: b"evil"})
    assert_refused(path, "evil.*leads outside")
    assert not (path.parent.parent / "evil").exists()


def test_one_flipped_bit(saved, path):
    """In any member, and in the directory at the end."""
    content, members = saved
    rng = np.random.default_rng(0)
    for member in members.values():
        start = content.index(member)
        for position in rng.integers(len(member), size=5):
            flipped = bytearray(content)
            flipped[start + position] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            assert_refused(path, "has a wrong checksum")
    start = content.index(b"PK\x01\x02")
    loaded = 0
    for position in rng.integers(start, len(content), size=40):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            load_model(path)
            loaded += 1  # a date, an attribute
        except ValueError as error:
            assert str(path) in str(error)
    assert loaded < 30


def edited(saved, edit):
    """The members, with the recipe edited in place or replaced."""
    members = dict(saved[1])
    config = json.loads(members["config.json"])
    new = edit(config["config"])
    members["config.json"] = json.dumps(config if new is None else new)
    return members


BY_NAME = {"class_name": "get_file", "config": {}, "registered_name": None}
DENSE = {
    "module": "keras.layers",
    "class_name": "Dense",
    "config": {"units": 2},
    "registered_name": None,
}


NOT_OURS = {
    "later format": (
        lambda c: c.update(format=2),
        "has format 2.*reads",
    ),
    "no format": (lambda c: c.pop("format") and None, None),
    "a list": (lambda c: [], None),
    "a number": (lambda c: 3, None),
    "a layer": (lambda c: DENSE, None),
    "a layer within": (lambda c: c.update(model=DENSE), "not a Sequential"),
    "no model": (lambda c: c.update(model=None), None),
    "no layers": (lambda c: c.update(layers={}), None),
    "a layer less": (
        lambda c: c["layers"]["children"].pop() and None,
        "layers inside",
    ),
    "others replaced": (lambda c: c.update(replaced={"1": DENSE}), None),
    "no such class": (
        lambda c: c["model"].update(class_name="Nothing", module="keras"),
        None,
    ),
    "a module of no one": (
        lambda c: c.update(model={**BY_NAME, "module": "evil"}),
        "Could not locate class 'get_file'",
    ),
    "a function": (
        lambda c: c.update(model={**BY_NAME, "module": "keras.utils"}),
        "disallowed",
    ),
}


@pytest.mark.parametrize(
    ("edit", "match"),
    [pytest.param(*row, id=name) for name, row in NOT_OURS.items()],
)
def test_another_configuration(edit, match, saved, path, tmp_path, monkeypatch):
    """What Keras's format allows and this is not; a module is not imported."""
    modules = tmp_path / "modules"
    modules.mkdir()
    trace = tmp_path / "imported"
    (modules / "evil.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nclass get_file: pass\n"
    )
    monkeypatch.syspath_prepend(modules)
    write_members(path, edited(saved, edit))
    assert_refused(path, match)
    assert not trace.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "loss",
    [
        {"module": "os", "class_name": "function", "config": "system"},
        {"class_name": "__lambda__", "config": {"code": "4wAA"}},
        {"module": "evil", "class_name": "Evil", "config": {}},
    ],
    ids=["function", "lambda", "class"],
)
def test_compile_settings_that_name_code_are_not_run(loss, saved, path):
    def edit(config):
        config["compile"]["arguments"]["loss"] = {
            "registered_name": "function",
            **loss,
        }

    write_members(path, edited(saved, edit))
    with pytest.warns(UserWarning, match="without its compile settings"):
        assert not load_model(path).compiled


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 50_000 + b"]" * 50_000],
    ids=["empty", "half", "not text", "deep"],
)
def test_a_configuration_that_is_not_json(content, saved, path):
    write_members(path, {**saved[1], "config.json": content})
    assert_refused(path)


def test_weights_that_are_not(saved, path):
    h5py = pytest.importorskip("h5py")
    _, members = saved
    for content in (b"", b"numbers", b"\x89HDF\r\n\x1a\n" + bytes(2000)):
        write_members(path, {**members, "model.weights.h5": content})
        assert_refused(path)

    def fewer(group):
        del group["layers/dense/vars/0"]

    def other(group):
        del group["layers/dense/vars/0"]
        group["layers/dense/vars/0"] = np.ones((3, 3))

    def elsewhere(group):
        del group["layers/dense/vars/0"]
        group["layers/dense/vars/0"] = h5py.ExternalLink("/etc/x.h5", "x")

    for edit in (fewer, other, elsewhere):
        buffer = io.BytesIO(members["model.weights.h5"])
        with h5py.File(buffer, "r+") as file:
            edit(file)
        content = buffer.getvalue()
        write_members(path, {**members, "model.weights.h5": content})
        assert_refused(path)


# Keras's own word of a lambda that it serializes.
@pytest.mark.filterwarnings("ignore:The object being serialized includes a")
def test_a_lambda_in_a_file_of_keras_is_not_run(path):
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Lambda(lambda x: x)]
    )
    model.save(path)
    assert_refused(path, "Python lambda")


def test_no_file(tmp_path):
    for path in (tmp_path / "none.keras", tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(FileNotFoundError, match="path=") as error:
            load_model(path)
        assert str(path) in str(error.value)


# Writing


def test_bad_arguments_of_save_model(tmp_path):
    model = make_sequential()
    with pytest.raises(IsADirectoryError, match="must be a file, not a folder"):
        save_model(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="folder of `path` does not"):
        save_model(model, tmp_path / "none" / "model.keras")
    for other in (None, keras.layers.Dense(2)):
        with pytest.raises(TypeError, match=r"must be a `keras\.Model`"):
            save_model(other, tmp_path / "model.keras")
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="`model` must be built"):
        save_model(unbuilt, tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def test_any_name_and_a_string(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = factorized(make_sequential())
    save_model(model, "model")
    assert_same_model(model, load_model("model"))
    save_model(make_sequential(), "model")  # replaced
    assert not all_of(load_model("model"), DistilledEmbedding)
    assert os.listdir() == ["model"]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_file_appears_whole_or_not_at_all(error, path, monkeypatch):
    def write_half(model, recipe, file):
        file.write(b"half of it")
        raise error

    def write():
        with monkeypatch.context() as patched:
            patched.setattr(keras_internals, "write_archive", write_half)
            with pytest.raises(type(error)):
                save_model(model, path)

    model = factorized(make_sequential())
    write()
    assert not list(path.parent.iterdir())
    save_model(model, path)
    content = path.read_bytes()
    write()
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_inside_leaves_nothing(path, monkeypatch):
    """Half of the members are written when a layer fails to save."""
    model = factorized(make_sequential())
    save_model(model, path)
    content = path.read_bytes()

    def fail(*args):
        raise RuntimeError("no weights today")

    layer = model.get_layer("classes")
    monkeypatch.setattr(type(layer), "save_own_variables", fail)
    with pytest.raises(RuntimeError, match="no weights today"):
        save_model(model, path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


# What Keras saves by itself


@pytest.mark.parametrize(
    ("make", "loaded"),
    [
        (Graph, False),
        (Graph, True),
        (lambda: called(Containers), False),
        (lambda: called(Parts), True),
        (make_hub_composites, True),
    ],
    ids=["graph", "graph-loaded", "containers", "parts-loaded", "hub-loaded"],
)
def test_what_keras_would_forget_it_refuses_to_save(make, loaded, path):
    student = factorized(make())
    if loaded:
        student = save_and_load(student, path)
    path.write_bytes(b"precious")
    for save in (
        lambda: student.save(path),
        lambda: copy.deepcopy(student),
        lambda: pickle.dumps(student),
        lambda: student.to_json(),
    ):
        with pytest.raises(ValueError, match=r"embedding\.save_model\("):
            save()
        assert path.read_bytes() == b"precious"
    with pytest.raises(ValueError, match=r"embedding\.save_model\("):
        keras.saving.save_model(student, path.with_name("other.keras"))
    save_model(student, path)  # which does not
    assert len(load_model(path).weights) == len(student.weights)


def test_a_part_that_would_forget_refuses_too(path):
    hub = pytest.importorskip("keras_hub")
    student = factorized(hub.models.GPT2CausalLM(gpt2_backbone(), None))
    for part in (student, student.backbone):
        with pytest.raises(ValueError, match=r"embedding\.save_model\("):
            part.save(path)
        with pytest.raises(ValueError, match=r"embedding\.save_model\("):
            part.save_to_preset(path.parent / "preset")
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda: factorized(make_model()),
        lambda: factorized(make_sequential()),
        lambda: factorized(make_with_head(), heads="tie"),
        lambda: factorized(make_with_head(), heads="factorize"),
    ],
    ids=["functional", "sequential", "tie", "factorize"],
)
def test_graphs_save_themselves(make, path):
    """Where the configuration tells all, Keras's own files do, too."""
    student = make()
    student.compile("adam", "mse", jit_compile=False)
    student.fit(IDS, np.ones(student(IDS).shape), verbose=0)
    student.save(path)
    expected = outputs_of(student)
    for load in (keras.saving.load_model, load_model):
        loaded = load(path)
        assert_equal(outputs_of(loaded), expected)
        assert len(loaded.weights) == len(student.weights)
        assert loaded.compiled
    assert_equal(outputs_of(copy.deepcopy(student)), expected)
    assert_equal(outputs_of(pickle.loads(pickle.dumps(student))), expected)


# Another process, and text


SENTENCES = [
    "the quick brown fox jumped over the lazy dog",
    "a table of tokens is a large table",
    "one fox and another dog",
]


def make_gpt2():
    """With a byte-pair tokenizer of fifteen tokens."""
    hub = pytest.importorskip("keras_hub")
    space = "\u0120"
    tokens = ["<|endoftext|>", *"abcdefghij", space, "ab", "cd", f"{space}c"]
    tokenizer = hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=["a b", "c d", f"{space} c"],
    )
    backbone = gpt2_backbone(len(tokens), length=16)
    preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, 16)
    return hub.models.GPT2CausalLM(backbone, preprocessor)


def make_gemma():
    """With a tokenizer of SentencePiece, of forty pieces."""
    hub = pytest.importorskip("keras_hub")
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=proto,
        vocab_size=40,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
    )
    tokenizer = hub.models.GemmaTokenizer(proto=proto.getvalue())
    backbone = hub.models.GemmaBackbone(
        vocabulary_size=40,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        hidden_dim=16,
        intermediate_dim=24,
    )
    preprocessor = hub.models.GemmaCausalLMPreprocessor(tokenizer, 16)
    return hub.models.GemmaCausalLM(backbone, preprocessor)


GENERATE = {"max_length": 14, "stop_token_ids": None}
TASKS = {"gpt2": (make_gpt2, "ab cd"), "gemma": (make_gemma, "the dog")}


def make_task(make):
    """Of random weights, so that it says something else at each step."""
    task = make()
    rng = np.random.default_rng(1)
    for variable in task.weights:
        variable.assign(rng.normal(size=variable.shape))
    task.compile(
        optimizer=keras.optimizers.SGD(0.125),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
        jit_compile=False,
    )
    return task


def run_python(code, *arguments):
    """What another process prints, as JSON in its last line."""
    shown = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout.splitlines()[-1])


# KerasHub's own: its tokenizer leaves a file to be closed by itself.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.slow
def test_tasks_generate_in_another_process(tmp_path):
    """The same text from the dense model of their tables, and from a file."""
    expected = {}
    for name, (make, prompt) in TASKS.items():
        task = make_task(make)
        dense = task.generate(prompt, **GENERATE)  # before it is copied, too
        student = factorized(task)
        assert type(student) is type(task)
        assert student.preprocessor is not task.preprocessor
        text = student.generate(prompt, **GENERATE)
        assert text.startswith(prompt)
        assert len(set(text[len(prompt) :])) > 1, text
        assert text != dense
        table = student.backbone.token_embedding
        basis, offset = basis_and_offset(table)
        (codes,) = values([table.codes])
        task.backbone.token_embedding.set_weights(
            [np.maximum(codes, 0) @ basis + offset]
        )
        assert task.generate(prompt, **GENERATE) == text
        save_model(student, tmp_path / f"{name}.keras")
        expected[name] = [text, "GreedySampler", 0.125, True]
    code = """
import json, sys
import keras_distilled_embedding as kde
assert "keras_hub" not in sys.modules
found = {}
for name, path, prompt in zip(*[iter(sys.argv[1:])] * 3):
    model = kde.load_model(path)
    found[name] = [
        model.generate(prompt, max_length=14, stop_token_ids=None),
        type(model.sampler).__name__,
        float(model.optimizer.learning_rate),
        model.loss.get_config()["from_logits"],
    ]
print(json.dumps(found))
"""
    arguments = [
        (name, tmp_path / f"{name}.keras", prompt)
        for name, (_, prompt) in TASKS.items()
    ]
    assert run_python(code, *sum(arguments, ())) == expected


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("set_later", [False, True])
def test_a_task_comes_back_with_its_tokenizer(set_later, used, path):
    """And its sampler; whether or not it has made all of its layers yet."""
    hub = pytest.importorskip("keras_hub")
    task = make_task(make_gpt2)
    if set_later:
        preprocessor = task.preprocessor
        task = type(task)(task.backbone)
        task.preprocessor = preprocessor
    if used:
        task.preprocessor.generate_preprocess(["ab cd"])
    student = factorized(task)
    student.compile(
        sampler=hub.samplers.TopKSampler(k=3, seed=1), jit_compile=False
    )
    loaded = save_and_load(student, path)
    assert loaded.sampler.get_config() == student.sampler.get_config()
    tokenizer = task.preprocessor.tokenizer
    for copied in (student, loaded):
        own = copied.preprocessor.tokenizer
        assert own is not tokenizer
        assert own.get_vocabulary() == tokenizer.get_vocabulary()
        assert own.merges == tokenizer.merges
        assert list(own("ab cd")) == [12, 11, 13]
    table = loaded.backbone.token_embedding
    assert isinstance(table, DistilledEmbedding)
    assert loaded.get_layer("token_embedding") is table


@pytest.mark.slow
def test_keras_loads_the_file_in_another_process(tmp_path):
    """With this package imported, models of all kinds that are Keras's own."""
    models = {
        "nested": (factorized(make_nested()), BOTH),
        "hub": (factorized(make_hub_composites()), [IDS, POSITIONS]),
        "tied": (factorized(make_with_head(), heads="tie"), IDS),
    }
    for name, (model, inputs) in models.items():
        save_model(model, tmp_path / f"{name}.keras")
        arrays = inputs if isinstance(inputs, list) else [inputs]
        np.savez(
            tmp_path / f"{name}.npz", *arrays, outputs_of(model, inputs)[0]
        )
    code = """
import json, pathlib, sys
import keras
import keras_distilled_embedding
import numpy as np
for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
    *inputs, expected = np.load(path.with_suffix(".npz")).values()
    model = keras.saving.load_model(path)
    outputs = model(inputs if len(inputs) > 1 else inputs[0])
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(outputs), expected, rtol=1e-6, atol=1e-6
    )
    try:
        model.save(path.with_name("own.keras"))
    except ValueError as error:
        assert "save_model(" in str(error)
    else:
        assert path.stem != "hub"
print("[]")
"""
    assert run_python(code, tmp_path) == []
