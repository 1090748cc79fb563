"""`compress`, against dense models that hold the reconstructed tables."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compression
from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.compression import compression_report
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.layers import DistilledEmbedding

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)

VOCABULARY, WIDTH = 61, 16
IDS = np.array([[1, 60, 7, 3], [2, 5, 0, 0]], dtype="int32")


def keras_embedding(**options):
    return keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens", **options)


def keras_reversible(**options):
    return keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens", **options
    )


def keras_untied(**options):
    return keras_reversible(tie_weights=False, **options)


def hub_reversible(**options):
    keras_hub = pytest.importorskip("keras_hub")
    return keras_hub.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens", **options
    )


def nlp_reversible(**options):
    keras_nlp = pytest.importorskip("keras_nlp")
    return keras_nlp.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens", **options
    )


EMBEDDINGS = pytest.mark.parametrize(
    "make_embedding",
    [
        keras_embedding,
        keras_reversible,
        keras_untied,
        hub_reversible,
        nlp_reversible,
    ],
)


def make_model(make_embedding=keras_reversible, **options):
    """ids -> logits of the vocabulary, or of 3 classes; named everywhere."""
    embedding = make_embedding(**options)
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = embedding(ids)
    x = keras.layers.Dense(WIDTH, "tanh", name="hidden")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    if isinstance(embedding, keras.layers.ReversibleEmbedding):
        x = embedding(x, reverse=True)
    else:
        x = keras.layers.Dense(3, name="classes")(x)
    model = keras.Model(ids, x, name="language_model")
    return randomize(model)


def make_sequential(**options):
    return randomize(
        keras.Sequential(
            [
                keras.Input((None,), dtype="int32", name="ids"),
                keras_embedding(**options),
                keras.layers.GlobalAveragePooling1D(name="mean"),
                keras.layers.Dense(3, name="classes"),
            ],
            name="classifier",
        )
    )


def make_nested():
    """One table: in an inner model that is called twice, and outside it."""
    embedding = keras_reversible()
    ids = keras.Input((None,), dtype="int32", name="ids")
    states = keras.layers.Dense(WIDTH, name="hidden")(embedding(ids))
    inner = keras.Model(ids, states, name="inner")
    left = keras.Input((None,), dtype="int32", name="left")
    right = keras.Input((None,), dtype="int32", name="right")
    x = keras.layers.Add(name="add")([inner(left), inner(right)])
    x = keras.layers.Add(name="more")([x, embedding(left)])
    return randomize(
        keras.Model([left, right], embedding(x, reverse=True), name="outer")
    )


def make_two_of_one_name(sizes=(VOCABULARY, 53)):
    """Two tables, each named "tokens" in a nested model of its own."""
    inputs, outputs = [], []
    for i, size in enumerate(sizes):
        ids = keras.Input((None,), dtype="int32")
        embedding = keras.layers.Embedding(size, WIDTH, name="tokens")
        inner = keras.Model(ids, embedding(ids), name=f"inner_{i}")
        inputs.append(keras.Input((None,), dtype="int32", name=f"ids_{i}"))
        outputs.append(inner(inputs[-1]))
    return randomize(keras.Model(inputs, outputs))


def randomize(model):
    """Weights of size one, and no two equal, so that nothing hides."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape) ** 2 + 0.1)
    return model


def to_numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def find(model, name="tokens"):
    """The only layer of that name, at any depth."""
    (layer,) = {
        id(layer): layer
        for layer in model._flatten_layers()
        if layer.name == name
    }.values()
    return layer


def weights_by_path(model, but=()):
    return {
        variable.path: to_numpy(variable)
        for variable in model.variables
        if not any(name in variable.path for name in but)
    }


def reconstructed(layer, prefix=""):
    """The table in NumPy, for the two activations tested here."""
    codes, basis = (
        to_numpy(getattr(layer, prefix + name)) for name in ("codes", "basis")
    )
    if layer.activation is not keras.activations.linear:
        assert layer.activation is keras.activations.relu
        codes = np.maximum(codes, 0)
    return codes @ basis


def assign_reconstructed(model, student, name="tokens"):
    """Gives a dense model the tables that its compressed copy stands for."""
    layer = find(student, name)
    tables = [reconstructed(layer)]
    if not layer.tie_weights:
        tables.append(reconstructed(layer, "reverse_").T)
    find(model, name).set_weights(tables)


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test in which a table is factorised."""

    def work(*args, **kwargs):
        raise AssertionError("factorize was called")

    monkeypatch.setattr(compression, "factorize", work)


# What comes out


@EMBEDDINGS
@pytest.mark.parametrize("activation", ["relu", None])
def test_equals_the_dense_model_of_the_reconstructed_table(
    make_embedding, activation
):
    model = make_model(make_embedding)
    before = weights_by_path(model)
    outputs = to_numpy(model(IDS))
    student = compress(
        model, 3.0, activation=activation, verbose=0, quantization=None
    )

    # The teacher is untouched, byte for byte.
    after = weights_by_path(model)
    assert before.keys() == after.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path], err_msg=path)
    np.testing.assert_array_equal(outputs, to_numpy(model(IDS)))
    own = {id(v) for v in model.variables}
    assert not own & {id(v) for v in student.variables}

    # The other weights are the teacher's, under the same names.
    copied = weights_by_path(student, but=["tokens"])
    assert copied.keys() == weights_by_path(model, but=["tokens"]).keys()
    for path, value in copied.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)

    assert type(student) is type(model)
    assert not np.allclose(outputs, to_numpy(student(IDS)), atol=1e-3)
    assign_reconstructed(model, student)
    np.testing.assert_allclose(
        to_numpy(student(IDS)), to_numpy(model(IDS)), rtol=1e-5, atol=5e-5
    )


def test_sequential():
    model = make_sequential()
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert type(student) is keras.Sequential
    assert [layer.name for layer in student.layers] == [
        layer.name for layer in model.layers
    ]
    assert isinstance(student.layers[0], DistilledEmbedding)
    assert student.inputs[0].name == "ids"
    assert student.inputs[0].dtype == "int32"
    assign_reconstructed(model, student)
    np.testing.assert_allclose(
        to_numpy(student(IDS)), to_numpy(model(IDS)), rtol=1e-5, atol=1e-5
    )


def test_a_shared_table_stays_one_layer():
    model = make_nested()
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert len(student.weights) == len(model.weights) + 1  # two factors
    layer = find(student)
    assert student.get_layer("inner").get_layer("tokens") is layer
    inputs = [IDS, IDS[::-1]]
    assign_reconstructed(model, student)
    np.testing.assert_allclose(
        to_numpy(student(inputs)), to_numpy(model(inputs)), rtol=1e-4, atol=1e-4
    )


def test_two_tables_of_one_name_stay_two():
    model = make_two_of_one_name()
    sizes = (VOCABULARY, 53)
    for layers in (None, ["tokens"]):
        student = compress(
            model, 3.0, layers=layers, verbose=0, quantization=None
        )
        inner = [student.get_layer(f"inner_{i}") for i in range(2)]
        assert [m.get_layer("tokens").input_dim for m in inner] == [*sizes]
        assert len(compression_report(student).rows) == 2


def test_structures_and_names_of_inputs_and_outputs():
    ids = keras.Input((7,), dtype="int32", name="ids")
    scale = keras.Input((1,), dtype="float32", name="scale")
    embedding = keras_reversible()
    x = embedding(ids) * scale[:, None]  # operations, not layers
    inputs = {"scale": scale, "ids": ids}
    outputs = {
        "logits": embedding(x, reverse=True),
        "others": [ops.mean(x, axis=1), ops.sum(x, axis=1)],
    }
    model = randomize(keras.Model(inputs, outputs, name="structured"))
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert student.name == "structured"
    assert student.output_names == model.output_names
    keras.tree.assert_same_structure(student.input, model.input)
    for old, new in zip(model.inputs, student.inputs):
        assert (old.name, old.shape, old.dtype) == (
            new.name,
            new.shape,
            new.dtype,
        )
    data = {"ids": np.ones((2, 7), "int32"), "scale": np.ones((2, 1))}
    assign_reconstructed(model, student)
    expected, actual = model(data), student(data)
    keras.tree.assert_same_structure(actual, expected)
    for a, b in zip(keras.tree.flatten(actual), keras.tree.flatten(expected)):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4)


def test_optional_input_stays_optional():
    ids = keras.Input((None,), dtype="int32", name="ids")
    extra = keras.Input((None, WIDTH), name="extra", optional=True)

    class AddIfGiven(keras.layers.Layer):
        def call(self, x, extra=None):
            return x if extra is None else x + extra

        def compute_output_shape(self, x_shape, extra_shape=None):
            return x_shape

    model = keras.Model(
        [ids, extra], AddIfGiven()(keras_embedding()(ids), extra)
    )
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert student([IDS, None]).shape == (2, 4, WIDTH)


@pytest.mark.parametrize("make_embedding", [keras_embedding, keras_reversible])
def test_mask_propagates(make_embedding):
    """The padding that the dense model skips, the compressed one skips."""
    ids = keras.Input((None,), dtype="int32")
    x = make_embedding(mask_zero=True)(ids)
    x = keras.layers.Dense(WIDTH)(x)
    model = randomize(
        keras.Model(ids, keras.layers.GlobalAveragePooling1D()(x))
    )
    student = compress(model, 3.0, verbose=0, quantization=None)
    outputs = to_numpy(student(IDS))
    assign_reconstructed(model, student)
    np.testing.assert_allclose(
        outputs, to_numpy(model(IDS)), rtol=1e-5, atol=1e-5
    )
    longer = np.pad(IDS, ((0, 0), (0, 3)))
    np.testing.assert_allclose(to_numpy(student(longer)), outputs, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_dtype_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = make_model()
    finally:
        keras.config.set_dtype_policy(before)
    student = compress(model, 3.0, verbose=0, quantization=None)
    # The model's own policy decides about loss scaling.
    assert student.dtype_policy.name == policy
    for layer in student.layers[1:]:  # but for the input layer
        assert layer.dtype_policy == model.get_layer(layer.name).dtype_policy
    assert student(IDS).dtype == student.outputs[0].dtype
    assert student.outputs[0].dtype == model.outputs[0].dtype
    layer = find(student)
    assert layer.codes.dtype == find(model).embeddings.dtype
    expected = to_numpy(model(IDS))
    assign_reconstructed(model, student)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        to_numpy(student(IDS)), to_numpy(model(IDS)), atol=0.03 * scale
    )


class Pair(keras.layers.Layer):
    """A composite layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(WIDTH, name="first")
        self.second = keras.layers.Dense(WIDTH, name="second")

    def build(self, shape):
        self.first.build(shape)
        self.second.build(shape)
        self.built = True

    def call(self, x):
        return self.second(self.first(x))


def test_trainable_flags():
    embedding = keras_reversible()
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Dense(WIDTH, name="frozen")(embedding(ids))
    x = Pair(name="pair")(x)
    inner_input = keras.Input((None, WIDTH))
    inner = keras.Model(
        inner_input, keras.layers.Dense(WIDTH)(inner_input), name="inner"
    )
    model = keras.Model(ids, embedding(inner(x), reverse=True))
    model.get_layer("frozen").trainable = False
    model.get_layer("pair").first.trainable = False
    inner.trainable = False
    student = compress(model, 3.0, verbose=0, quantization=None)
    trainable = {v.path for v in student.trainable_variables}
    expected = {
        v.path for v in model.trainable_variables if "tokens" not in v.path
    }
    assert expected
    assert trainable == expected | {"tokens/codes", "tokens/basis"}

    embedding.trainable = False
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert not find(student).trainable
    model.trainable = False
    assert not compress(
        model, 3.0, verbose=0, quantization=None
    ).trainable_variables
    # A frozen model is frozen, whatever its layers say.
    model.get_layer("pair").trainable = True
    assert not compress(
        model, 3.0, verbose=0, quantization=None
    ).trainable_variables


def test_the_copy_is_compiled_alike_and_trains_alone():
    model = make_model()
    assert not compress(model, 3.0, verbose=0, quantization=None).compiled
    model.compile(keras.optimizers.Adam(0.25), "mse", metrics=["mae"])
    model.fit(IDS, np.zeros((*IDS.shape, VOCABULARY)), verbose=0)
    student = compress(model, 3.0, verbose=0, quantization=None)
    assert student.loss == "mse"
    assert student.optimizer is not model.optimizer
    assert student.optimizer.learning_rate == 0.25
    assert student.optimizer.iterations == 0
    before = weights_by_path(model)
    student.fit(IDS, np.zeros((*IDS.shape, VOCABULARY)), verbose=0)
    for path, value in weights_by_path(model).items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)
    assert "mae" in student.evaluate(
        IDS, np.zeros((*IDS.shape, VOCABULARY)), verbose=0, return_dict=True
    )


def test_settings_that_cannot_be_renewed_are_dropped_with_a_warning():
    class Metric(keras.metrics.Mean):
        def __init__(self, needed):
            super().__init__()

    model = make_model()
    model.compile("adam", "mse", metrics=[Metric(needed=1)])
    with pytest.warns(UserWarning, match="not compiled as the model was"):
        assert not compress(model, 3.0, verbose=0, quantization=None).compiled


def test_lambda_layers_are_copied():
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Lambda(lambda x: 2 * x)(keras_embedding()(ids))
    model = keras.Model(ids, x)
    student = compress(model, 3.0, verbose=0, quantization=None)
    assign_reconstructed(model, student)
    np.testing.assert_allclose(
        to_numpy(student(IDS)), to_numpy(model(IDS)), atol=1e-5
    )


@EMBEDDINGS
def test_saving(make_embedding, tmp_path):
    model = make_model(make_embedding)
    student = compress(model, 3.0, verbose=0, quantization=None)
    expected = to_numpy(student(IDS))
    student.save(tmp_path / "student.keras")
    restored = keras.saving.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(to_numpy(restored(IDS)), expected)
    student.save_weights(tmp_path / "student.weights.h5")
    other = compress(
        randomize(make_model(make_embedding)), 3.0, verbose=0, quantization=None
    )
    for variable in other.weights:
        variable.assign(np.zeros(variable.shape))
    other.load_weights(tmp_path / "student.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(IDS)), expected)


# What is asked for


@pytest.mark.parametrize("compression", [1.5, 3.0, 12])
def test_compression_is_reached_by_the_largest_rank(compression):
    student = compress(make_model(), compression, verbose=0, quantization=None)
    layer = find(student)
    dense = VOCABULARY * WIDTH
    assert dense / (layer.rank * (VOCABULARY + WIDTH)) >= compression
    assert dense / ((layer.rank + 1) * (VOCABULARY + WIDTH)) < compression


def test_rank_stands_in_for_compression():
    layer = find(compress(make_model(), rank=5, verbose=0))
    assert layer.rank == 5
    layer = find(compress(make_model(), None, rank=5, verbose=0))
    assert layer.rank == 5


@pytest.mark.parametrize("activation", ["relu", None])
def test_reconstruction_is_as_good_as_an_svd(activation):
    model = make_model()
    table = to_numpy(find(model).embeddings)
    student = compress(model, rank=5, activation=activation, verbose=0)
    error = np.square(table - reconstructed(find(student))).sum()
    spectrum = np.square(np.linalg.svd(table, compute_uv=False))
    assert error >= spectrum[5:].sum() * (1 - 1e-4)
    bound = spectrum[5:] if activation is None else spectrum[4:]
    assert error <= bound.sum() * (1 + 1e-4)


def test_learned_method():
    model = make_model()
    table = to_numpy(find(model).embeddings)
    student = compress(
        model, rank=6, method="learned", activation="tanh", verbose=0
    )
    layer = find(student)
    assert layer.activation is keras.activations.tanh
    codes, basis = to_numpy(layer.codes), to_numpy(layer.basis)
    error = np.square(table - np.tanh(codes) @ basis).sum()
    assert error < 0.5 * np.square(table - table.mean()).sum()


@pytest.mark.parametrize("as_dictionary", [False, True])
@pytest.mark.parametrize(
    "dtype", ["int64", "float32"], ids=["counts", "shares"]
)
def test_token_frequencies(as_dictionary, dtype):
    model = make_model()
    frequencies = (1000 / np.arange(1, VOCABULARY + 1) ** 1.5).astype(dtype)
    given = {"tokens": frequencies} if as_dictionary else frequencies
    table = to_numpy(find(model).embeddings)

    def weighted_error(**options):
        layer = find(compress(model, rank=4, verbose=0, **options))
        lost = np.square(table - reconstructed(layer)).sum(axis=1)
        return frequencies @ lost

    assert weighted_error(token_frequencies=given) < 0.7 * weighted_error()


def make_two_tables(rows=(VOCABULARY, 59), width=WIDTH):
    """Tables "a", "b", ... in one graph."""
    inputs, outputs = [], []
    for name, size in zip("abc", rows):
        inputs.append(keras.Input((None,), dtype="int32", name=f"{name}_ids"))
        layer = keras.layers.Embedding(size, width, name=name)
        outputs.append(layer(inputs[-1]))
    return randomize(keras.Model(inputs, outputs))


def test_token_frequencies_of_some_tables():
    model = make_two_tables()
    plain = compress(model, 3.0, verbose=0, quantization=None)
    weighted = compress(
        model,
        3.0,
        token_frequencies={"b": np.arange(59)},
        verbose=0,
        quantization=None,
    )
    same = [
        np.array_equal(
            reconstructed(plain.get_layer(name)),
            reconstructed(weighted.get_layer(name)),
        )
        for name in "ab"
    ]
    assert same == [True, False]


@pytest.mark.parametrize(
    ("layers", "compressed"),
    [
        (None, "ab"),
        ("a", "a"),
        (["b"], "b"),
        (["b", "a"], "ab"),
        (lambda layer: layer.input_dim == 59, "b"),
    ],
)
def test_layers(layers, compressed):
    model = make_two_tables()
    student = compress(model, 3.0, layers=layers, verbose=0, quantization=None)
    for name in "ab":
        expected = (
            DistilledEmbedding if name in compressed else keras.layers.Embedding
        )
        assert type(student.get_layer(name)) is expected
        if name not in compressed:
            np.testing.assert_array_equal(
                student.get_layer(name).embeddings,
                model.get_layer(name).embeddings,
            )


def test_tiny_tables_are_left_out(capsys):
    model = make_two_tables(rows=(VOCABULARY, 2))
    student = compress(model, 3.0, quantization=None)
    assert type(student.get_layer("a")) is DistilledEmbedding
    assert type(student.get_layer("b")) is keras.layers.Embedding
    assert "Left as they are: b" in capsys.readouterr().out
    # One that was asked for is not left out silently.
    with pytest.raises(ValueError, match=r"Layer 'b': compression=3.0"):
        compress(model, 3.0, layers=["a", "b"], verbose=0, quantization=None)


def test_verbose(capsys):
    model = make_model()
    compress(model, 3.0, verbose=0, quantization=None)
    assert capsys.readouterr().out == ""
    student = compress(model, 3.0, quantization=None)
    shown = capsys.readouterr().out
    assert "Factorising 'tokens'" in shown
    assert str(compression_report(student, model)) in shown
    assert "Left as they are" not in shown


# Sizes by bytes and by error


def decaying(layer, decay):
    """A table whose singular values fall by the factor `decay`."""
    rows, columns = layer.input_dim, layer.output_dim
    random = np.random.default_rng(rows)
    left, _ = np.linalg.qr(random.normal(size=(rows, columns)))
    right, _ = np.linalg.qr(random.normal(size=(columns, columns)))
    layer.set_weights([(left * decay ** np.arange(columns)) @ right])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_max_bytes_are_spread_by_the_spectra(dtype):
    with _policy(dtype):
        model = make_two_tables()
    decaying(model.get_layer("a"), 0.98)
    decaying(model.get_layer("b"), 0.5)
    itemsize = 4 if dtype == "float32" else 2
    max_bytes = 1_200 * itemsize
    student = compress(model, max_bytes=max_bytes, verbose=0, quantization=None)
    ranks = [student.get_layer(name).rank for name in "ab"]
    assert ranks[0] > 1.5 * ranks[1]
    total = sum(row.bytes_after for row in compression_report(student).rows)
    one_more = (VOCABULARY + WIDTH) * itemsize
    assert max_bytes - one_more < total <= max_bytes


@contextlib.contextmanager
def _policy(dtype):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_max_error_takes_the_smallest_rank(activation, weighted):
    model = make_two_tables()
    decaying(model.get_layer("a"), 0.9)
    decaying(model.get_layer("b"), 0.6)
    frequencies = np.arange(1, VOCABULARY + 1.0) if weighted else None
    options = {"activation": activation, "verbose": 0}
    if weighted:
        options["token_frequencies"] = {"a": frequencies}
    student = compress(model, max_error=0.1, **options)
    for name in "ab":
        table = to_numpy(model.get_layer(name).embeddings)
        weights = (
            frequencies if weighted and name == "a" else np.ones(len(table))
        )
        lost = table - reconstructed(student.get_layer(name))
        error = (
            weights
            @ np.square(lost).sum(1)
            / (weights @ np.square(table).sum(1))
        )
        # The sweeps of the ReLU form are for free.
        assert error <= 0.1
        root = np.sqrt(weights)[:, np.newaxis]
        energies = np.linalg.svd(root * table, compute_uv=False) ** 2
        shares = 1 - np.cumsum(energies) / energies.sum()
        rank = int(np.argmax(shares <= 0.1)) + 1 + (activation == "relu")
        assert student.get_layer(name).rank == rank


def test_hidden_covariances_keep_the_logits():
    model = make_model()
    layer = find(model)
    root = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    root *= np.geomspace(3, 0.1, WIDTH)[:, np.newaxis]
    covariance = root.T @ root
    table = to_numpy(layer.embeddings)

    def logits_error(**options):
        student = find(compress(model, rank=4, verbose=0, **options))
        return np.square((table - reconstructed(student)) @ root.T).sum()

    for given in (covariance, {"tokens": covariance}):
        error = logits_error(hidden_covariances=given)
        assert error < 0.7 * logits_error()


def test_hidden_dim():
    """The funnel of the student is the one that `factorize` learned."""
    model = make_model()
    student = compress(
        model, rank=3, hidden_dim=4, hidden_activation="tanh", verbose=0
    )
    table = to_numpy(find(model).embeddings)
    expected = factorize(
        table, 3, hidden_dim=4, hidden_activation="tanh"
    ).reconstruct()
    student_table = to_numpy(find(student).embeddings)
    np.testing.assert_allclose(student_table, expected, atol=1e-5)


# What is refused, before any work


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.embedding = keras_embedding()

    def call(self, ids):
        return self.embedding(ids)


def make_unbuilt():
    return keras.Sequential([keras_embedding()])


def make_subclassed():
    model = Subclassed()
    model(IDS)
    return model


def make_around_subclassed():
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, make_subclassed()(ids))


def make_without_embedding():
    x = keras.Input((4,))
    return keras.Model(x, keras.layers.Dense(2, name="classes")(x))


def make_float_input():
    ids = keras.Input((None,))
    return keras.Model(ids, keras_embedding()(ids))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, "must be a `keras.Model`. .* model=None"),
        (lambda: keras_embedding(), TypeError, "must be a `keras.Model`"),
        (make_unbuilt, ValueError, "`model` must be built"),
        (make_subclassed, ValueError, "'subclassed' of class Subclassed"),
        (Subclassed, ValueError, "`model` must be built.*subclassed"),
        (make_around_subclassed, ValueError, "of class Subclassed"),
        (make_without_embedding, ValueError, r"no embedding.*'classes'\]"),
        (make_float_input, TypeError, r'keras\.Input.*dtype="int32"'),
    ],
)
def test_bad_models(make, error, message, no_work):
    with pytest.raises(error, match=message):
        compress(make(), 3.0, verbose=0, quantization=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["tokens", "tokenz"]}, "tokenz"),
        ({"layers": "hidden"}, r"of \['tokens'\]. Received: .*'hidden'"),
        ({"layers": []}, "no embedding"),
        ({"layers": lambda layer: False}, "no embedding"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": 13}, "Layer 'tokens': rank=13 .* rank of at most 12"),
        ({"compression": 1.0}, "compression=1.0"),
        ({"compression": 0.5}, "compression=0.5"),
        ({"compression": "8"}, "compression='8'"),
        ({"compression": None}, "Give one of `compression`, `rank`"),
        ({"compression": 100.0}, "out of reach .* rank 1"),
        ({"hidden_dim": 400}, "hidden_dim=400: rank 1"),
        ({"activation": "relux"}, "relux"),
        ({"rank": 3, "max_error": 0.1}, "at most one of .* 'max_error': 0.1"),
        ({"max_bytes": 300}, "`max_bytes` is too small.* max_bytes=300"),
        ({"max_bytes": 2.5}, "max_bytes=2.5"),
        ({"max_error": 0.0}, "between 0 and 1.* max_error=0.0"),
        ({"max_error": 1}, "max_error=1"),
        ({"hidden_covariances": np.eye(3)}, r"'tokens': .* \(16, 16\)"),
        ({"hidden_covariances": -np.eye(16)}, "positive semidefinite"),
        ({"hidden_covariances": {"b": np.eye(16)}}, r"\['tokens'\].*\['b'\]"),
        ({"token_frequencies": np.ones(3)}, r"shape \(61,\).* shape \(3,\)"),
        ({"token_frequencies": np.ones((61, 1))}, r"shape \(61, 1\)"),
        ({"token_frequencies": -np.ones(61)}, "not negative.* -1.0 to -1.0"),
        ({"token_frequencies": np.full(61, np.nan)}, "finite"),
        ({"token_frequencies": np.zeros(61)}, "only zeros"),
        ({"token_frequencies": ["a"] * 61}, "must be numbers"),
        ({"token_frequencies": {"b": np.ones(61)}}, r"\['tokens'\].*\['b'\]"),
        ({"token_frequencies": {"tokens": [1]}}, "'tokens' must have shape"),
    ],
)
def test_bad_options(options, message, no_work):
    with pytest.raises(ValueError, match=message):
        compress(make_model(), verbose=0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method='magic'"),
        ({"activation": "gelu"}, 'method="learned"'),
        ({"hidden_activation": "gleu"}, "gleu"),
    ],
)
def test_bad_options_of_factorize(options, message):
    with pytest.raises(ValueError, match=message):
        compress(make_model(), 3.0, verbose=0, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("reverse", [False, True])
def test_tables_that_are_not_finite(value, reverse, no_work):
    """The last of the tables too is looked at before the first costs time."""
    first, last = (
        keras_untied(),
        keras.layers.ReversibleEmbedding(
            VOCABULARY, WIDTH, tie_weights=False, name="last"
        ),
    )
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, last(first(ids), reverse=True))
    model(IDS)
    table = to_numpy(last.weights[reverse]).copy()
    table[3, 5] = value
    last.weights[reverse].assign(table)
    row = 5 if reverse else 3  # the projection's kernel is transposed
    named = f"'last': table must be finite.* 1 of its .* first of them {row}"
    with pytest.raises(ValueError, match=named):
        compress(model, 3.0, verbose=0, quantization=None)
