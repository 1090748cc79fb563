"""`compress`, against dense models that hold the reconstructed tables."""

import itertools
import tracemalloc

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import factorize
from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.factorization import rounding
from keras_distilled_embedding.factorization import table as table_module
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import conversion
from tests.shared import affine_optimum
from tests.shared import basis_and_offset
from tests.shared import classifier
from tests.shared import lost_share
from tests.shared import random_table
from tests.shared import stored_bytes
from tests.shared import tied_model
from tests.shared import to_numpy

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


EMBEDDINGS = pytest.mark.parametrize(
    "make_embedding",
    [keras_embedding, keras_reversible, keras_untied, hub_reversible],
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


def find(model, name="tokens"):
    """The only layer of that name, at any depth."""
    (layer,) = (
        layer
        for layer in keras_internals.iterate_layers(model)
        if layer.name == name
    )
    return layer


def weights_by_path(model, but=()):
    return {
        variable.path: to_numpy(variable)
        for variable in model.variables
        if not any(name in variable.path for name in but)
    }


def reconstructed(layer, prefix=""):
    """The table in NumPy, for the two activations tested here."""
    codes = to_numpy(getattr(layer, prefix + "codes")).astype("float32")
    basis, offset = basis_and_offset(layer, prefix)
    if layer.activation is not keras.activations.linear:
        assert layer.activation is keras.activations.relu
        codes = np.maximum(codes, 0)
    return (codes @ basis + offset).astype("float32")


def assign_reconstructed(model, student, name="tokens"):
    """Gives a dense model the tables that its compressed copy stands for."""
    layer = find(student, name)
    tables = [reconstructed(layer)]
    if not layer.tie_weights:
        tables.append(reconstructed(layer, "reverse_").T)
    find(model, name).set_weights(tables)


def in_floats(model, compression=3.0, **options):
    """Three times fewer bytes, whatever the test is about."""
    options = {"quantization": None, "verbose": 0, **options}
    return compress(model, compression, **options)


def assert_same_outputs(model, other, inputs=IDS, tolerance=1e-4):
    expected, found = model(inputs), other(inputs)
    keras.tree.assert_same_structure(found, expected)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected)):
        a, b = (to_numpy(ops.cast(x, "float32")) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test in which a table is factorized."""

    def work(*args, **kwargs):
        raise AssertionError("factorize_table was called")

    monkeypatch.setattr(
        "keras_distilled_embedding.compression.factorize_table", work
    )


# What it takes


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="assigns arrays as a whole"
)
def test_no_second_copy_of_the_codes_in_floats(monkeypatch):
    """Beside model and student, their integers and some blocks of rows."""
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 64 * 1_000)
    monkeypatch.setattr(rounding, "_ROWS_AT_A_TIME", 1_000)
    monkeypatch.setattr(conversion, "_SAMPLED_CODES", 1_000)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Embedding(60_000, 64)]
    )
    tracemalloc.start()
    try:
        compress(model, rank=64, quantization="int4", verbose=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * 4 * 60_000 * 64


# What comes out


@EMBEDDINGS
@pytest.mark.parametrize(
    ("activation", "use_bias"), [("relu", True), ("relu", False), (None, True)]
)
def test_equals_the_dense_model_of_the_reconstructed_table(
    make_embedding, activation, use_bias
):
    model = make_model(make_embedding)
    outputs = to_numpy(model(IDS))
    student = in_floats(model, activation=activation, use_bias=use_bias)
    assert type(student) is type(model)
    has_offset = any("offset" in weight.path for weight in student.weights)
    assert has_offset == use_bias

    # The other weights are the teacher's, under the same names.
    before = weights_by_path(model, but=["tokens"])
    copied = weights_by_path(student, but=["tokens"])
    assert copied.keys() == before.keys()
    for path, value in copied.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)

    assert not np.allclose(outputs, to_numpy(student(IDS)), atol=1e-3)
    assign_reconstructed(model, student)
    assert_same_outputs(model, student)


class Noisy(keras.layers.Layer):
    """Keeps a seed, as dropout does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x


def state_of(model):
    """Everything that a training reads or changes."""
    variables = {v.path: to_numpy(v).copy() for v in model.variables}
    optimizer = model.optimizer.variables
    variables |= {v.path: to_numpy(v).copy() for v in optimizer}
    flags = {
        layer.path: (layer.trainable, vars(layer).get("call"))
        for layer in keras_internals.iterate_layers(model)
    }
    return variables, (flags, model.get_config(), model.get_compile_config())


@pytest.mark.parametrize("heads", ["tie", "factorize"])
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_the_original_is_untouched(heads, quantization):
    ids = keras.Input((None,), dtype="int32")
    x = Noisy(name="noisy")(keras_embedding()(ids))
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    x = keras.layers.BatchNormalization(name="norm", trainable=False)(x)
    head = keras.layers.Dense(VOCABULARY, name="head")
    model = keras.Model(ids, head(x))
    model.compile(keras.optimizers.Adam(0.25), "mse", metrics=["mae"])
    model.fit(IDS, np.zeros((*IDS.shape, VOCABULARY)), verbose=0)
    variables, settings = state_of(model)
    assert any("seed" in path for path in variables)
    student = compress(
        model,
        2.0,
        quantization=quantization,
        heads=heads,
        calibration_data=[IDS, IDS],
        verbose=0,
    )
    later, later_settings = state_of(model)
    assert later_settings == settings
    assert later.keys() == variables.keys()
    for path, value in variables.items():
        np.testing.assert_array_equal(later[path], value, err_msg=path)
    own = {id(v) for v in model.variables}
    assert not own & {id(v) for v in student.variables}


def test_sequential():
    model = make_sequential()
    student = in_floats(model)
    assert type(student) is keras.Sequential
    assert [layer.name for layer in student.layers] == [
        layer.name for layer in model.layers
    ]
    assert isinstance(student.layers[0], DistilledEmbedding)
    assert student.inputs[0].name == "ids"
    assert student.inputs[0].dtype == "int32"
    assign_reconstructed(model, student)
    assert_same_outputs(model, student)


def test_a_shared_table_stays_one_layer():
    model = make_nested()
    student = in_floats(model)
    # Codes, basis, offset and center in place of the table.
    assert len(student.weights) == len(model.weights) + 3
    assert student.get_layer("inner").get_layer("tokens") is find(student)
    assign_reconstructed(model, student)
    assert_same_outputs(model, student, [IDS, IDS[::-1]])


def test_two_tables_of_one_name_stay_two():
    model = make_two_of_one_name()
    sizes = (VOCABULARY, 53)
    for layers in (None, ["tokens"]):
        student = in_floats(model, layers=layers)
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
    student = in_floats(model)
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
    assert_same_outputs(model, student, data)


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
    student = in_floats(model)
    assert student([IDS, None]).shape == (2, 4, WIDTH)


def test_ids_of_floats():
    """As they come from a `keras.Input` without a dtype."""
    ids = keras.Input((None,))
    model = randomize(keras.Model(ids, keras_embedding()(ids)))
    student = in_floats(model)
    assign_reconstructed(model, student)
    assert_same_outputs(model, student, IDS.astype("float32"))


@pytest.mark.parametrize("make_embedding", [keras_embedding, keras_reversible])
def test_mask_propagates(make_embedding):
    """The padding that the dense model skips, the compressed one skips."""
    ids = keras.Input((None,), dtype="int32")
    x = make_embedding(mask_zero=True)(ids)
    x = keras.layers.Dense(WIDTH)(x)
    model = randomize(
        keras.Model(ids, keras.layers.GlobalAveragePooling1D()(x))
    )
    student = in_floats(model)
    assign_reconstructed(model, student)
    longer = np.pad(IDS, ((0, 0), (0, 3)))
    for ids in (IDS, longer):
        assert_same_outputs(model, student, ids)
    np.testing.assert_allclose(student(longer), student(IDS), rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_dtype_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = make_model()
    finally:
        keras.config.set_dtype_policy(before)
    student = in_floats(model)
    # The model's own policy decides about loss scaling.
    assert student.dtype_policy.name == policy
    for layer in student.layers[1:]:  # but for the input layer
        assert layer.dtype_policy == model.get_layer(layer.name).dtype_policy
    assert student(IDS).dtype == student.outputs[0].dtype
    assert student.outputs[0].dtype == model.outputs[0].dtype
    assert find(student).codes.dtype == find(model).embeddings.dtype
    scale = np.abs(to_numpy(ops.cast(model(IDS), "float32"))).max()
    assign_reconstructed(model, student)
    assert_same_outputs(model, student, tolerance=0.03 * scale)


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
    student = in_floats(model)
    trainable = {v.path for v in student.trainable_variables}
    expected = {
        v.path for v in model.trainable_variables if "tokens" not in v.path
    }
    assert expected
    factors = {f"tokens/{name}" for name in ("codes", "basis", "offset")}
    assert trainable == expected | factors

    embedding.trainable = False
    student = in_floats(model)
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
    assert not in_floats(model).compiled
    model.compile(keras.optimizers.Adam(0.25), "mse", metrics=["mae"])
    model.fit(IDS, np.zeros((*IDS.shape, VOCABULARY)), verbose=0)
    student = in_floats(model)
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
        assert not in_floats(model).compiled


def test_lambda_layers_are_copied():
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Lambda(lambda x: 2 * x)(keras_embedding()(ids))
    model = keras.Model(ids, x)
    student = in_floats(model)
    assign_reconstructed(model, student)
    assert_same_outputs(model, student)


@EMBEDDINGS
def test_saving(make_embedding, tmp_path):
    student = in_floats(make_model(make_embedding))
    expected = to_numpy(student(IDS))
    student.save(tmp_path / "student.keras")
    restored = keras.saving.load_model(tmp_path / "student.keras")
    np.testing.assert_array_equal(to_numpy(restored(IDS)), expected)
    student.save_weights(tmp_path / "student.weights.h5")
    other = in_floats(make_model(make_embedding))
    for variable in other.weights:
        variable.assign(np.zeros(variable.shape))
    other.load_weights(tmp_path / "student.weights.h5")
    np.testing.assert_array_equal(to_numpy(other(IDS)), expected)


# What is asked for


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
@pytest.mark.parametrize("compression", [1.5, 4, 11.0])
@pytest.mark.parametrize("use_bias", [True, False])
def test_compression_counts_bytes_as_stored(
    compression, quantization, use_bias
):
    """The largest rank is taken that is small enough."""
    rows, columns = 2_500, 96
    student = compress(
        classifier(rows, columns),
        compression,
        quantization=quantization,
        use_bias=use_bias,
        verbose=0,
    )
    layer = student.get_layer("tokens")
    assert layer.quantization == quantization
    assert layer.compression_ratio >= compression
    arguments = (rows, columns, quantization, use_bias, layer.row_scales)
    allowed = 4 * rows * columns / compression
    assert stored_bytes(layer.rank, *arguments) <= allowed
    assert (
        layer.rank == columns
        or stored_bytes(layer.rank + 1, *arguments) > allowed
    )


def test_the_default_is_eight_times():
    model = tied_model()
    layers = [find(compress(model, *size, verbose=0)) for size in ((), (8.0,))]
    assert layers[0].rank == layers[1].rank
    assert layers[0].quantization == layers[1].quantization is not None
    assert layers[0].compression_ratio >= 8.0


def test_a_rank_alone_means_floats():
    for options in ({"rank": 5}, {"compression": None, "rank": np.int64(5)}):
        layer = find(compress(make_model(), **options, verbose=0))
        assert (layer.rank, layer.quantization) == (5, None)
    layer = find(compress(make_model(), rank=5, quantization="int8", verbose=0))
    assert (layer.rank, layer.quantization) == (5, "int8")


@pytest.mark.parametrize("activation", ["relu", None])
def test_reconstruction_is_the_affine_optimum(activation):
    model = make_model()
    table = to_numpy(find(model).embeddings)
    student = compress(model, rank=5, activation=activation, verbose=0)
    lost = lost_share(table, reconstructed(find(student)))
    assert lost == pytest.approx(affine_optimum(table, 5), rel=1e-4)


def test_learned_method():
    model = make_model()
    table = to_numpy(find(model).embeddings)
    student = compress(
        model, rank=6, method="learned", activation="tanh", verbose=0
    )
    layer = find(student)
    assert layer.activation is keras.activations.tanh
    basis, offset = basis_and_offset(layer)
    found = np.tanh(to_numpy(layer.codes)) @ basis + offset
    error = np.square(table - found).sum()
    assert error < 0.5 * np.square(table - table.mean()).sum()


def make_two_tables(rows=(VOCABULARY, 59), width=WIDTH):
    """Tables "a", "b", ... in one graph."""
    inputs, outputs = [], []
    for name, size in zip("abc", rows):
        inputs.append(keras.Input((None,), dtype="int32", name=f"{name}_ids"))
        layer = keras.layers.Embedding(size, width, name=name)
        outputs.append(layer(inputs[-1]))
    return randomize(keras.Model(inputs, outputs))


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
    student = in_floats(model, layers=layers)
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
    student = in_floats(model, verbose=1)
    assert type(student.get_layer("a")) is DistilledEmbedding
    assert type(student.get_layer("b")) is keras.layers.Embedding
    assert "Left as they are: b" in capsys.readouterr().out
    # One that was asked for is not left out silently.
    with pytest.raises(ValueError, match=r"Layer 'b': .* compression=3.0"):
        in_floats(model, layers=["a", "b"])


def test_verbose(capsys):
    model = make_model()
    in_floats(model)
    assert capsys.readouterr().out == ""
    student = in_floats(model, verbose=1)
    shown = capsys.readouterr().out
    assert "Factorizing 'tokens'" in shown
    assert str(compression_report(student, model)) in shown
    assert "Left as they are" not in shown


@pytest.mark.parametrize("max_error", [0.3, 0.05])
def test_max_error_takes_the_fewest_bytes(max_error):
    """Rounding included; the next smaller size loses too much."""
    rows, columns = 200, 40
    model = classifier(rows, columns)
    table = random_table(rows, columns, mean=0.02)
    find(model).set_weights([table])
    sizes = {}
    for quantization in (None, "int8", "int4", "int2", "auto"):
        options = dict(max_error=max_error, quantization=quantization)
        if quantization == "int2" and max_error < 0.1:
            with pytest.raises(ValueError, match="lose so little in int2"):
                compress(model, **options, verbose=0)
            continue
        layer = find(compress(model, **options, verbose=0))
        assert lost_share(table, to_numpy(layer.embeddings)) <= max_error
        form = {"quantization": layer.quantization}
        form |= {"row_scales": layer.row_scales}
        sizes[quantization] = stored_bytes(layer.rank, rows, columns, **form)
        smaller = [
            rank
            for rank in range(layer.rank)
            if stored_bytes(rank, rows, columns, **form) < sizes[quantization]
        ]
        if smaller[1:]:  # a rank above 0
            lost = factorize(table, smaller[-1], **form).relative_error
            # What rounding adds is planned from a sample of the rows.
            assert lost > (0.8 if layer.quantization else 1) * max_error
    assert sizes["auto"] == min(sizes.values())


# What is refused, before any work


class Subclassed(keras.Model):
    """Of a class that does not tell what it is made with."""

    def __init__(self, embedding):
        super().__init__(name="subclassed")
        self.embedding = embedding

    def call(self, ids):
        return self.embedding(ids)


def make_unbuilt():
    return keras.Sequential([keras_embedding()])


def make_subclassed():
    model = Subclassed(keras_embedding())
    model(IDS)
    return model


def make_around_subclassed():
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, make_subclassed()(ids))


def make_without_embedding():
    x = keras.Input((4,))
    return keras.Model(x, keras.layers.Dense(2, name="classes")(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, "must be a `keras.Model`. .* model=None"),
        (lambda: keras_embedding(), TypeError, "must be a `keras.Model`"),
        (make_unbuilt, ValueError, "`model` must be built"),
        (make_subclassed, ValueError, r"'subclassed' \(Subclassed\) cannot"),
        (
            lambda: Subclassed(keras_embedding()),
            ValueError,
            "`model` must be built.*subclassed",
        ),
        (make_around_subclassed, ValueError, r"\(Subclassed\) cannot be"),
        (make_without_embedding, ValueError, r"no embedding.*'classes'\]"),
    ],
)
def test_bad_models(make, error, message, no_work):
    with pytest.raises(error, match=message):
        in_floats(make())


SIZES = {"compression": 4.0, "rank": 3, "max_bytes": 1_000, "max_error": 0.1}


@pytest.mark.parametrize("names", list(itertools.combinations(SIZES, 2)))
def test_two_sizes_exclude_each_other(names, no_work):
    first, second = (f"{name}={SIZES[name]}" for name in names)
    with pytest.raises(ValueError, match=f"at most one .* {first}, {second}"):
        compress(make_model(), **{name: SIZES[name] for name in names})


def test_a_positional_size_counts_as_one(no_work):
    with pytest.raises(ValueError, match=r"compression=4.0, rank=8$"):
        compress(make_model(), 4.0, rank=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["tokens", "tokenz"]}, "tokenz"),
        ({"layers": "hidden"}, r"of \['tokens'\]. Received: .*'hidden'"),
        ({"layers": []}, "no embedding"),
        ({"layers": lambda layer: False}, "no embedding"),
        ({"rank": 0}, "`rank` must be a positive integer. .* rank=0"),
        ({"rank": 2.0}, "`rank` must be a positive integer. .* rank=2.0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 13}, "Layer 'tokens': `rank` must be at most 12.* rank=13"),
        ({"compression": 1.0}, "greater than 1.* compression=1.0"),
        ({"compression": "8"}, "compression='8'"),
        ({"compression": True}, "compression=True"),
        ({"compression": float("inf")}, "compression=inf"),
        (
            {"compression": 100.0, "quantization": None},
            "at most 10.49 .*floats.*rank 1.* compression=100.0",
        ),
        ({"max_bytes": 2.5}, "`max_bytes` must be .* max_bytes=2.5"),
        ({"max_bytes": 100}, "`max_bytes` is too small.* max_bytes=100"),
        ({"max_error": 0.0}, "between 0 and 1.* max_error=0.0"),
        ({"max_error": 1}, "max_error=1"),
        ({"max_error": "1"}, "max_error='1'"),
        ({"max_error": 1e-6}, "`max_error` is too small.* max_error=1e-06"),
        ({"min_parameters": 1.5}, "at least 0. .* min_parameters=1.5"),
        ({"quantization": "int3"}, "'int4'.* quantization='int3'"),
        ({"activation": "relux"}, "`activation` must .*'relux'"),
        ({"activation": "gelu"}, 'method="learned"'),
        ({"method": "magic"}, "method='magic'"),
        ({"heads": "both"}, "heads='both'"),
        ({"calibration_data": []}, "`calibration_data` must have at least one"),
        ({"calibration_data": ["a text"]}, "`preprocessor`"),
    ],
)
def test_bad_options(options, message, no_work):
    with pytest.raises(ValueError, match=message):
        compress(make_model(), verbose=0, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("reverse", [False, True])
def test_tables_that_are_not_finite(value, reverse, no_work):
    """The last of the tables too is looked at before the first costs time."""
    first, last = (
        keras.layers.ReversibleEmbedding(
            VOCABULARY, WIDTH, tie_weights=False, name=name
        )
        for name in ("first", "last")
    )
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, last(first(ids), reverse=True))
    model(IDS)
    table = to_numpy(last.weights[reverse]).copy()
    table[3, 5] = value
    last.weights[reverse].assign(table)
    row = 5 if reverse else 3  # the projection's kernel is transposed
    named = f"'last': `table` must be finite.* 1 of its .* first of them {row}"
    with pytest.raises(ValueError, match=named):
        in_floats(model)
