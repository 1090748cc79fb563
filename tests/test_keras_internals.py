"""Copies of models with layers replaced, and what they rely on in Keras."""

import functools
import gc
import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compress
from keras_distilled_embedding import keras_internals
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.containers import VOCABULARY
from tests.containers import WIDTH
from tests.containers import Containers
from tests.containers import embedding
from tests.containers import gpt2_backbone

IDS = np.array([[1, 60, 7, 3], [2, 5, 0, 0]], dtype="int32")


def to_numpy(x):
    return [ops.convert_to_numpy(y) for y in keras.tree.flatten(x)]


def randomize(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    return model


def all_of(model, kind):
    return [
        x for x in keras_internals.iterate_layers(model) if isinstance(x, kind)
    ]


def assert_equals_dense(model, student, inputs=IDS, names=None):
    """After `model` was given the tables that `student`'s factors are."""
    tables = {
        layer.name: ops.convert_to_numpy(layer.embeddings)
        for layer in all_of(student, DistilledEmbedding)
    }
    before = to_numpy(model(inputs))
    changed = to_numpy(student(inputs))
    for layer in all_of(model, keras.layers.Embedding):
        if layer.name in tables:
            layer.set_weights([tables.pop(layer.name)])
    assert not tables
    for a, b, old in zip(to_numpy(model(inputs)), changed, before):
        atol = 1e-5 * max(1.0, np.abs(a).max())
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
        assert np.abs(old - b).max() > 1e-3


# What the package relies on. If one of these fails, Keras has changed: look for
# the attribute in `keras_internals/`.


@pytest.fixture
def tiny():
    """A table, a dense layer, and the model that they make."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    table = keras.layers.Embedding(3, 2, name="table")
    dense = keras.layers.Dense(2, name="dense")
    return table, dense, keras.Model(ids, dense(table(ids)), name="tiny")


def test_layers_keep_the_layers_inside_them(tiny):
    table, dense, model = tiny
    assert [x for x in model._layers if x is table or x is dense]
    assert model._tracker.config["layers"][1] is model._layers
    assert {id(table), id(dense)} <= model._tracker.stored_ids["layers"]
    flat = {id(model), *map(id, model.layers)}
    assert set(map(id, model._flatten_layers())) == flat


def test_layers_keep_their_own_variables_and_flag(tiny):
    table, _, model = tiny
    assert list(map(id, table._trainable_variables)) == [id(table.embeddings)]
    assert table._non_trainable_variables == []
    assert model._trainable_variables == []
    model.trainable = False
    table._trainable = True
    assert table.trainable
    assert not model.trainable


def test_nodes_are_the_calls_of_operations(tiny):
    table, dense, model = tiny
    (node,) = table._inbound_nodes
    assert node.operation is table
    history = private_keras.KerasHistory(table, 0, 0)
    assert node.outputs[0]._keras_history == history
    assert table._outbound_nodes == dense._inbound_nodes
    graph = private_keras.map_graph(model._inputs, model._outputs)
    assert graph[0] == model._nodes
    assert graph[1] == model._nodes_by_depth
    assert graph[2:] == (model._operations, model._operations_by_depth)


def test_a_functional_model_runs_through_its_graph(tiny):
    table, dense, model = tiny
    run = []

    def operation_fn(operation):
        run.append(operation)
        return operation

    outputs = model._run_through_graph(model.input, operation_fn=operation_fn)
    assert run == [table, dense]
    assert outputs.shape == model.output.shape


def test_a_sequential_model_keeps_a_functional_one():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    assert type(model._functional) is private_keras.Functional
    assert len(model._layers) == len(model.layers) + 1


def test_how_a_layer_was_built_is_kept(tiny):
    _, dense, _ = tiny
    assert list(dense._build_shapes_dict.values()) == [(None, None, 2)]
    assert keras.layers.Layer.build._is_default
    assert not hasattr(keras.layers.Dense.build, "_is_default")


def test_the_arguments_of_compile_are_kept(tiny):
    *_, model = tiny
    model.compile(loss="mse")
    assert model._compile_config.config["loss"] == "mse"


def test_get_config_is_looked_up_on_the_layer_itself(tiny):
    table, *_ = tiny
    object.__setattr__(table, "get_config", lambda: {"name": "own"})
    config = keras.saving.serialize_keras_object(table)["config"]
    assert config == {"name": "own"}


def test_how_a_file_is_written():
    library = private_keras.saving_lib
    parameters = inspect.signature(library._save_state).parameters
    assert list(parameters) == [
        "saveable",
        "weights_store",
        "assets_store",
        "inner_path",
        "visited_saveables",
    ]
    assert library._METADATA_FILENAME == "metadata.json"
    assert library._CONFIG_FILENAME == "config.json"


# Where layers are kept


def test_subclassed_model_keeps_its_layers_in_containers():
    model = Containers()
    model(IDS)
    randomize(model)
    student = compress(model, rank=3, verbose=0)
    assert type(student) is Containers
    assert len(all_of(student, DistilledEmbedding)) == 4
    assert not all_of(student, keras.layers.Embedding)
    assert len(student.weights) == 4 * 4  # with a center each
    assert student.in_dict["b"][0] is student.tokens
    assert student.in_tuple[1]["c"][0] is student.tokens
    names = [layer.name for layer in keras_internals.iterate_layers(model)]
    assert [x.name for x in keras_internals.iterate_layers(student)] == names
    assert_equals_dense(model, student)


@keras.saving.register_keras_serializable(package="tests")
class Lookup(keras.layers.Layer):
    """A layer that is given an embedding, as KerasHub's heads are."""

    def __init__(self, embedding, reverse=False, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding
        self.reverse = reverse

    def build(self, input_shape):
        if not self.embedding.built:
            self.embedding.build(input_shape)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return self.scale * self.embedding(x, reverse=self.reverse)

    def get_config(self):
        config = super().get_config()
        config["embedding"] = keras.saving.serialize_keras_object(
            self.embedding
        )
        return {**config, "reverse": self.reverse}

    @classmethod
    def from_config(cls, config):
        config["embedding"] = keras.saving.deserialize_keras_object(
            config["embedding"]
        )
        return cls(**config)


def make_composites():
    """One table: in two layers, and in the graph between them."""
    shared = embedding()
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Add(name="add")([shared(ids), Lookup(shared)(ids)])
    return randomize(keras.Model(ids, Lookup(shared, reverse=True)(x)))


def test_a_table_shared_by_layers_and_a_graph_stays_one():
    model = make_composites()
    student = compress(model, rank=3, verbose=0)
    (table,) = {id(x) for x in all_of(student, DistilledEmbedding)}
    lookups = all_of(student, Lookup)
    assert [id(lookup.embedding) for lookup in lookups] == [table] * 2
    assert len(student.weights) == 6
    assert_equals_dense(model, student)


def test_a_composite_layer_that_is_nested():
    """In a model in a model, and called twice."""
    inner = make_composites()
    left = keras.Input((None,), dtype="int32")
    right = keras.Input((None,), dtype="int32")
    model = keras.Model(
        [left, right], keras.layers.Add()([inner(left), inner(right)])
    )
    student = compress(model, rank=3, verbose=0)
    assert len(all_of(student, DistilledEmbedding)) == 1
    assert_equals_dense(model, student, [IDS, IDS[::-1]])


def test_several_models_share_a_table():
    """Copied together, they still do, and with what is inside layers."""
    shared = embedding()
    ids = keras.Input((None,), dtype="int32")
    encoder = keras.Model(ids, Lookup(shared)(ids))
    states = keras.Input((None, WIDTH))
    decoder = keras.Model(states, shared(states, reverse=True))
    factors = DistilledEmbedding.from_embedding(shared, rank=3)
    copies = keras_internals.copy_models([encoder, decoder], {shared: factors})
    for copy in copies:
        assert all_of(copy, DistilledEmbedding) == [factors]


@keras.saving.register_keras_serializable(package="tests")
class LazyBlock(keras.layers.Layer):
    """Makes its layers in `build`, and has a state of its own."""

    def build(self, input_shape):
        self.tokens = embedding("inner")
        self.tokens.build(input_shape)
        self.count = self.add_weight(
            shape=(), dtype="int32", trainable=False, name="count"
        )

    def call(self, ids):
        return self.tokens(ids)


def test_layers_that_are_made_when_built():
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, LazyBlock(name="block")(ids))
    block = model.get_layer("block")
    block.tokens.trainable = False
    block.count.assign(7)
    student = compress(model, rank=3, verbose=0)
    copy = student.get_layer("block")
    assert type(copy.tokens) is DistilledEmbedding
    assert int(copy.count) == 7
    assert copy.trainable
    assert not copy.tokens.trainable_variables
    assert_equals_dense(model, student)


@keras.saving.register_keras_serializable(package="tests")
class Closure(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tokens = table = embedding()
        self.look_up = lambda ids: table(ids)

    def call(self, ids):
        return self.look_up(ids)


def test_a_layer_that_a_function_holds_is_refused():
    """Or it would be called on, and nobody would notice."""
    model = Closure()
    model(IDS)
    with pytest.raises(ValueError, match="'tokens' cannot be replaced.*attr"):
        compress(model, rank=3, verbose=0)


@keras.saving.register_keras_serializable(package="tests")
class Forgetful(keras.Model):
    """Its configuration tells less than it is."""

    def __init__(self, depth=1, **kwargs):
        super().__init__(**kwargs)
        self.tokens = embedding()
        self.hidden = [keras.layers.Dense(WIDTH) for _ in range(depth)]

    def call(self, ids):
        x = self.tokens(ids)
        for layer in self.hidden:
            x = layer(x)
        return x

    def get_config(self):
        return {"name": self.name}


def test_a_configuration_that_tells_less_is_refused():
    model = Forgetful(depth=2)
    model(IDS)
    with pytest.raises(ValueError, match="'forgetful.*has 2 layers inside, no"):
        compress(model, rank=3, verbose=0)


@keras.saving.register_keras_serializable(package="tests")
class Custom(keras.layers.Embedding):
    def call(self, ids):
        return 2 * super().call(ids)


def test_an_embedding_with_a_call_of_its_own_is_left_alone():
    ids = keras.Input((None,), dtype="int32")
    own = Custom(VOCABULARY, WIDTH, name="own")
    model = keras.Model(ids, keras.layers.Add()([own(ids), embedding()(ids)]))
    student = compress(model, rank=3, verbose=0)
    assert type(student.get_layer("own")) is Custom
    with pytest.raises(ValueError, match=r"\['tokens'\].*\['own'\]"):
        compress(model, rank=3, layers=["own"], verbose=0)


def test_the_tables_that_the_copy_was_made_with_are_gone():
    """Not kept in memory by TensorFlow's tracking, or by anything else."""

    def count():
        gc.collect()
        kind = keras.layers.ReversibleEmbedding
        return sum(type(x) is kind for x in gc.get_objects())

    model = Containers()
    model(IDS)
    before = count()
    student = compress(model, rank=3, verbose=0)
    assert count() == before
    assert len(all_of(student, DistilledEmbedding)) == 4


def test_weights_only_files_still_go_round(tmp_path):
    model = Containers()
    model(IDS)
    student = compress(model, rank=3, verbose=0)
    other = compress(model, rank=3, verbose=0)
    student.save_weights(tmp_path / "x.weights.h5")
    for variable in other.weights:
        variable.assign(keras.ops.zeros(variable.shape))
    other.load_weights(tmp_path / "x.weights.h5")
    for a, b in zip(to_numpy(student(IDS)), to_numpy(other(IDS))):
        np.testing.assert_array_equal(a, b)


def test_a_text_pipeline_keeps_its_vocabulary():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("strings need TensorFlow")
    import tensorflow as tf

    vectorize = keras.layers.TextVectorization(
        max_tokens=VOCABULARY, name="words"
    )
    vectorize.adapt(["one two three", "four five six seven"])
    model = keras.Sequential([vectorize, embedding()])
    text = tf.constant(["seven two", "one one"])
    model(text)
    student = compress(model, rank=3, verbose=0)
    copy = student.get_layer("words")
    assert copy.get_vocabulary() == vectorize.get_vocabulary()
    assert_equals_dense(model, student, text)


# Functions and classes of the user's own


OFFSET = 3.0


def add_offset(x):
    return x + OFFSET


def make_scaled(scale):
    """Functions of the same name that do different things."""

    def scaled(x):
        return scale * x

    return scaled


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return self.factor * x


class Bias(keras.initializers.Initializer):
    """Not registered with Keras."""

    def __call__(self, shape, dtype=None):
        return ops.ones(shape, dtype)

    def get_config(self):
        return {}


def make_two_scaled(x):
    for scale in (2.0, 5.0):
        x = keras.layers.Dense(WIDTH, activation=make_scaled(scale))(x)
    return x


OWN = {
    "lambda with a name of its module": lambda x: keras.layers.Lambda(
        lambda y: y + OFFSET, output_shape=(None, WIDTH)
    )(x),
    "lambda with a closure": lambda x: keras.layers.Lambda(
        make_scaled(OFFSET), output_shape=lambda shape: shape
    )(x),
    "function": lambda x: keras.layers.Lambda(add_offset)(x),
    "function of Keras": lambda x: keras.layers.Lambda(ops.tanh)(x),
    "function of Python": lambda x: keras.layers.Lambda(abs)(x),
    "partial": lambda x: keras.layers.Lambda(
        functools.partial(ops.add, OFFSET)
    )(x),
    "object": lambda x: keras.layers.Lambda(Times(OFFSET).__call__)(x),
    "argument": lambda x: keras.layers.Lambda(
        lambda y, f: f(y), arguments={"f": add_offset}
    )(x),
    "activations of one name": make_two_scaled,
    "activation lambda": lambda x: keras.layers.Dense(
        WIDTH, activation=lambda y: y * OFFSET
    )(x),
    "activation object": lambda x: keras.layers.Activation(Times(OFFSET))(x),
    "class": lambda x: keras.layers.Dense(WIDTH, bias_initializer=Bias())(x),
    "inside a layer": lambda x: keras.layers.RNN(
        keras.layers.SimpleRNNCell(WIDTH, activation=add_offset),
        return_sequences=True,
    )(x),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_own_functions_and_classes_are_the_same_in_the_copy(make):
    ids = keras.Input((None,), dtype="int32")
    model = randomize(keras.Model(ids, make(embedding()(ids))))
    registered = dict(keras.saving.get_custom_objects())
    student = compress(model, rank=3, verbose=0)
    assert keras.saving.get_custom_objects() == registered
    assert_equals_dense(model, student)


@keras.saving.register_keras_serializable(package="tests")
def split_at_bars(text):
    import tensorflow as tf

    return tf.strings.split(text, sep="|")


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="strings need TensorFlow"
)
@pytest.mark.parametrize("registered", [True, False])
def test_text_is_split_by_a_function(registered):
    import tensorflow as tf

    split = split_at_bars if registered else lambda x: split_at_bars(x)
    vectorize = keras.layers.TextVectorization(split=split, standardize=None)
    vectorize.adapt(["a b|c", "c|d"])
    text = tf.constant(["c|a b", "d|d"])
    model = keras.Sequential([vectorize, embedding()])
    model(text)
    student = compress(model, rank=3, verbose=0)
    assert_equals_dense(model, student, text)


# What refers to a table without calling its layer


class WithTable(keras.layers.Layer):
    """Projects with the table of an embedding."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def build(self, input_shape):
        """Nothing of its own."""

    def call(self, x):
        return x @ ops.transpose(self.embedding.embeddings)

    def get_config(self):
        config = super().get_config()
        config["embedding"] = keras.saving.serialize_keras_object(
            self.embedding
        )
        return config

    @classmethod
    def from_config(cls, config):
        config["embedding"] = keras.saving.deserialize_keras_object(
            config["embedding"]
        )
        return cls(**config)


class KeepsVariable(WithTable):
    def build(self, input_shape):
        self.table = self.embedding.embeddings

    def call(self, x):
        return x @ ops.transpose(self.table)


class KeepsFunction(WithTable):
    def build(self, input_shape):
        table = self.embedding.embeddings
        self.project = lambda x: x @ ops.transpose(table)

    def call(self, x):
        return self.project(x)


class Projects(keras.layers.Layer):
    """By a function that it is given, whatever that refers to."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)

    def get_config(self):
        return {**super().get_config(), "function": self.function}


def in_lambda(table, x):
    return keras.layers.Lambda(
        lambda y: y @ ops.transpose(table.embeddings),
        output_shape=(None, VOCABULARY),
        name="project",
    )(x)


def in_function(table, x):
    return Projects(lambda y: table(y, reverse=True), name="project")(x)


def make_tied(project, names=("tokens", "others")):
    """Two tables are looked up, and the first projects."""
    ids = keras.Input((None,), dtype="int32")
    tokens, others = map(embedding, names)
    x = keras.layers.Add()([tokens(ids), others(ids)])
    for table in (tokens, others):  # before its values can become a constant
        randomize(table)
    return keras.Model(ids, project(tokens, x))


REFUSED = {
    "operation": (
        lambda table, x: ops.einsum("btd,vd->btv", x, table.embeddings),
        "'tokens' cannot be replaced: the operation 'einsum",
    ),
    "constant": (
        lambda table, x: x @ ops.transpose(table.embeddings),
        "'tokens' cannot be replaced: the operation 'matmul",
    ),
    "lambda": (in_lambda, "'project' .Lambda. uses the variable 'tokens/embed"),
    "function": (
        in_function,
        "'project' .Projects. uses the variable 'tokens/e",
    ),
    "variable": (
        lambda table, x: KeepsVariable(table, name="project")(x),
        "'project' .KeepsVariable. keeps the variable 'tokens/embeddings'",
    ),
    "function in build": (
        lambda table, x: KeepsFunction(table, name="project")(x),
        "'project' .KeepsFunction. uses the variable 'tokens/embeddings",
    ),
}


@pytest.mark.parametrize(("project", "match"), REFUSED.values(), ids=REFUSED)
def test_a_table_that_is_used_without_a_call_is_not_replaced(project, match):
    model = make_tied(project)
    before = to_numpy(model.weights), to_numpy(model(IDS))
    with pytest.raises(ValueError, match=match):
        compress(model, rank=3, verbose=0)
    after = to_numpy(model.weights), to_numpy(model(IDS))
    for a, b in zip(keras.tree.flatten(before), keras.tree.flatten(after)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["operation", "variable"])
def test_another_table_can_be_replaced(name):
    """The copy then uses its own copy of the table that stays."""
    model = make_tied(REFUSED[name][0])
    student = compress(model, rank=3, layers=["others"], verbose=0)
    assert_equals_dense(model, student)
    before = to_numpy(student(IDS))
    for variable in model.weights:
        variable.assign(0 * variable)
    np.testing.assert_array_equal(to_numpy(student(IDS)), before)
    student.get_layer("tokens").embeddings.assign_add(
        ops.ones((VOCABULARY, WIDTH))
    )
    assert np.abs(to_numpy(student(IDS))[0] - before[0]).max() > 1e-3


def test_a_layer_that_reads_the_table_in_its_call_is_tied():
    model = make_tied(lambda table, x: WithTable(table)(x))
    student = compress(model, rank=3, verbose=0)
    assert (VOCABULARY, WIDTH) not in [tuple(w.shape) for w in student.weights]
    assert_equals_dense(model, student)


class Global(keras.Model):
    """Its call uses a layer that is no attribute."""

    def __init__(self, table, **kwargs):
        super().__init__(**kwargs)
        self.tokens = embedding()
        self.project = lambda x: table(x, reverse=True)

    def call(self, ids):
        return self.project(self.tokens(ids))

    def get_config(self):
        return {"table": self.tokens, "name": self.name}


def test_a_subclassed_model_that_uses_the_original_is_refused():
    model = Global(None)
    model.project = lambda x: model.tokens(x, reverse=True)
    model(IDS)
    with pytest.raises(
        ValueError, match="'global' .Global. uses the variable 'global/tokens"
    ):
        compress(model, rank=3, verbose=0)


# What configurations do not record


@pytest.mark.parametrize("used", [False, True])
def test_a_preprocessor_keeps_its_lengths(used, tmp_path):
    hub = pytest.importorskip("keras_hub")
    tokens = ["<s>", "<pad>", "</s>", "<mask>", "\u0120", "a", "\u0120a"]
    tokenizer = hub.models.BartTokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=["\u0120 a"],
    )
    preprocessor = hub.models.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=12, decoder_sequence_length=10
    )
    backbone = hub.models.BartBackbone(
        vocabulary_size=len(tokens),
        num_layers=1,
        num_heads=2,
        hidden_dim=4,
        intermediate_dim=8,
        max_sequence_length=12,
    )
    task = hub.models.BartSeq2SeqLM(backbone, preprocessor)
    if used:
        preprocessor.generate_preprocess(["a a"])
    student = compress(task, rank=1, verbose=0)
    save_model(student, tmp_path / "model.keras")
    for found in (student, load_model(tmp_path / "model.keras")):
        copied = found.preprocessor
        assert copied is not preprocessor
        assert copied.encoder_sequence_length == 12
        assert copied.decoder_sequence_length == 10
        if keras.backend.backend() != "tensorflow":
            continue
        inputs = copied.generate_preprocess(["a a"])
        assert inputs["encoder_token_ids"].shape == (1, 12)
        assert inputs["decoder_token_ids"].shape == (1, 10)


def test_adapters_are_merged():
    """KerasHub's configurations do not record them."""
    model = gpt2_backbone()
    model.enable_lora(2)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape))
    expected = [x.trainable for x in keras_internals.iterate_layers(model)]
    student = compress(model, rank=3, verbose=0)
    found = [x.trainable for x in keras_internals.iterate_layers(student)]
    assert found == expected
    assert not [v for v in student.variables if "lora" in v.name]
    names = {v.path.split("/")[-2] for v in student.trainable_variables}
    assert names == {"query", "value"}
    assert "kernel" in {v.name for v in student.trainable_variables}
    inputs = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
    assert_equals_dense(model, student, inputs)


# Classes without `get_config`


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """As in a tutorial: its constructor passes nothing on."""

    def __init__(self, width, activation="tanh"):
        super().__init__()
        self.dense = keras.layers.Dense(width, activation=activation)

    def call(self, x):
        return self.dense(x)


@keras.saving.register_keras_serializable(package="tests")
class Tutorial(keras.Model):
    def __init__(self, scale=1.0, width=5):
        super().__init__()
        self.scale = scale
        self.tokens = embedding()
        self.block = Block(width, activation="relu")
        self.norm = keras.layers.LayerNormalization()

    def call(self, ids):
        return self.scale * self.norm(self.block(self.tokens(ids)))


def make_tutorial():
    model = Tutorial(scale=3.0)
    model(IDS)
    return randomize(model)


def make_with_block():
    ids = keras.Input((None,), dtype="int32")
    return randomize(keras.Model(ids, Block(5)(embedding()(ids))))


@pytest.mark.parametrize("make", [make_tutorial, make_with_block])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_constructors_without_keyword_arguments(make, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    student = compress(model, rank=3, verbose=0)
    assert type(student) is type(model)
    assert student.name == model.name
    save_model(student, tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    for found in (student, loaded):
        for old, new in zip(
            keras_internals.iterate_layers(model),
            keras_internals.iterate_layers(found),
            strict=True,
        ):
            assert new.name == old.name
            assert new.dtype_policy.name == old.dtype_policy.name == policy
            if type(new) is type(old):
                assert [v.dtype for v in new.variables] == [
                    v.dtype for v in old.variables
                ]
    assert tuple(student(IDS).shape) == (2, 4, 5)
    if policy == "float32":
        assert_equals_dense(model, student)
        for a, b in zip(to_numpy(student(IDS)), to_numpy(loaded(IDS))):
            np.testing.assert_array_equal(a, b)


def test_an_argument_that_keras_does_not_record():
    """It records the default: Keras's own fault, of models only."""
    model = Tutorial(width=7)
    model(IDS)
    with pytest.raises(ValueError, match="class whose constructor"):
        compress(model, rank=3, verbose=0)


class Composed(keras.Model):
    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def call(self, ids):
        return self.tokens(ids)


def test_constructors_with_layers_need_a_configuration():
    model = Composed(embedding())
    model(IDS)
    with pytest.raises(ValueError, match="'composed' .*Define `get_config"):
        compress(model, rank=3, verbose=0)
