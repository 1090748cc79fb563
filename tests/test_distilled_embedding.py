"""The layer, against NumPy and against a dense ReversibleEmbedding."""

import inspect
import math
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import table as table_module
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers.conversion import embedding_tables
from tests.shared import basis_and_offset
from tests.shared import to_floats

# Primes, so that a shape says what a tensor is.
VOCABULARY, WIDTH, RANK = 53, 17, 5
IDS = np.array([[1, 0, 52, 7], [3, 3, 0, 11]], dtype="int32")
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "bfloat16")

# Every variant of the equation.
VARIANTS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": None},
        {"use_bias": False},
        {"centered": True},
        {"tie_weights": False, "activation": "tanh"},
        {"tie_weights": False, "use_bias": False},
    ],
    ids=[
        "tied",
        "linear",
        "no offset",
        "centered",
        "untied",
        "untied, no offset",
    ],
)
# The smallest and the largest of them, where a test is slow.
EXTREMES = pytest.mark.parametrize(
    "options", [{}, {"tie_weights": False}], ids=["tied", "untied"]
)
REVERSE = pytest.mark.parametrize("reverse", [False, True])
tensorflow_only = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="inspects TensorFlow"
)


def make_layer(**options):
    """A built layer with factors of size one, so that nothing hides."""
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK, **options)
    layer.build()
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def make_inputs(reverse, dtype="float32"):
    if not reverse:
        return IDS
    hidden = np.random.default_rng(1).normal(size=(2, 4, WIDTH))
    return ops.cast(hidden, dtype)


def reference_table(layer, prefix=""):
    """The table in NumPy float64, from the equation in the docstring."""

    def get(name):
        return to_floats(getattr(layer, prefix + name)).astype("float64")

    f = {
        "relu": lambda x: np.maximum(x, 0.0),
        "linear": lambda x: x,
        "tanh": np.tanh,
    }[keras.activations.serialize(layer.activation)]
    features, basis = f(get("codes")), get("basis")
    if layer.centered:
        features = features - get("center")
    table = features @ basis
    return table + get("offset") if layer.use_bias else table


def reference_call(layer, inputs, reverse):
    if not reverse:
        return reference_table(layer)[np.asarray(inputs)]
    prefix = "" if layer.tie_weights else "reverse_"
    logits = to_floats(inputs) @ reference_table(layer, prefix).T
    if layer.logit_soft_cap is not None:
        cap = layer.logit_soft_cap
        logits = np.tanh(logits / cap) * cap
    return logits


class Nested(keras.layers.Layer):
    """A layer that owns the embedding, as models do."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding

    def call(self, inputs, reverse=False):
        return self.embedding(inputs, reverse=reverse)


def make_model(layer, reverse=None):
    """ids -> states, states -> logits, or (by default) ids -> logits."""
    if reverse:
        inputs = keras.Input((4, WIDTH))
        return keras.Model(inputs, layer(inputs, reverse=True))
    inputs = keras.Input((4,), dtype="int32")
    outputs = layer(inputs)
    if reverse is None:
        outputs = layer(outputs, reverse=True)
    return keras.Model(inputs, outputs)


# The equation


@VARIANTS
@REVERSE
@pytest.mark.parametrize("logit_soft_cap", [None, 2.0])
def test_call_matches_numpy(options, reverse, logit_soft_cap):
    layer = make_layer(logit_soft_cap=logit_soft_cap, **options)
    inputs = make_inputs(reverse)
    expected = reference_call(layer, inputs, reverse)
    for outputs in (
        layer(inputs, reverse=reverse),
        Nested(layer)(inputs, reverse=reverse),
        make_model(layer, reverse)(inputs),
    ):
        np.testing.assert_allclose(to_floats(outputs), expected, atol=1e-4)


@VARIANTS
@REVERSE
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_reconstructed_table(options, reverse, dtype):
    layer = make_layer(dtype=dtype, **options)
    tied = layer.tie_weights
    assert hasattr(layer, "reverse_embeddings") != tied
    expected = reference_table(
        layer, "reverse_" if reverse and not tied else ""
    )
    table = layer.embeddings
    if reverse and not tied:
        table = ops.transpose(layer.reverse_embeddings)
    atol = 0.3 if dtype == "bfloat16" else 1e-4
    np.testing.assert_allclose(to_floats(table), expected, atol=atol)
    rows = layer.reconstruct(IDS, reverse=reverse)
    np.testing.assert_allclose(to_floats(rows), expected[IDS], atol=atol)
    for tensor in (table, rows):
        assert tensor.dtype == layer.variable_dtype


def test_starts_at_the_scale_of_the_initializer():
    initializer = keras.initializers.RandomNormal(stddev=0.5)
    layer = DistilledEmbedding(400, 300, 64, embeddings_initializer=initializer)
    layer.build()
    assert not to_floats(layer.offset).any()
    assert np.std(to_floats(layer.embeddings)) == pytest.approx(0.5, rel=0.1)


def test_untied_factors_start_apart():
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK, tie_weights=False)
    layer.build()
    for name in ("codes", "basis"):
        one = to_floats(getattr(layer, name))
        other = to_floats(getattr(layer, f"reverse_{name}"))
        assert np.abs(one - other).max() > 1e-3, name


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_variables(tie_weights, use_bias):
    layer = make_layer(tie_weights=tie_weights, use_bias=use_bias)
    names = ["codes", "basis", *["offset"] * use_bias]
    if not tie_weights:
        names += [f"reverse_{name}" for name in names]
    assert [v.path.split("/")[-1] for v in layer.weights] == names
    assert hasattr(layer, "offset") == use_bias
    assert hasattr(layer, "reverse_offset") == (use_bias and not tie_weights)


@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("logit_soft_cap", [None, 2.0])
def test_rank_space(options, dtype, logit_soft_cap):
    """The logits before any cap, from which a loss computes its own."""
    layer = make_layer(
        reverse_dtype=dtype, logit_soft_cap=logit_soft_cap, **options
    )
    hidden = make_inputs(True)
    prefix = "" if layer.tie_weights else "reverse_"
    parts = layer.rank_space(hidden)
    assert all(part.dtype == dtype for part in parts if part is not None)
    states, features, shift = parts
    assert states.shape == (2, 4, RANK)
    assert features.shape == (VOCABULARY, RANK)
    expected = to_floats(hidden) @ reference_table(layer, prefix).T
    found = to_floats(states) @ to_floats(features).T
    if not layer.use_bias:
        assert shift is None
    else:
        assert shift.shape == (2, 4)
        offset = to_floats(getattr(layer, f"{prefix}offset"))
        atol = 1e-4 if dtype == "float32" else 0.3
        np.testing.assert_allclose(
            to_floats(shift), to_floats(hidden) @ offset, atol=atol
        )
        found += to_floats(shift)[..., None]
    scale = np.abs(expected).max()
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


def test_a_softmax_does_not_see_the_offset():
    layer = make_layer()
    hidden = make_inputs(True)
    before = to_floats(ops.softmax(layer(hidden, reverse=True)))
    layer.offset.assign(to_floats(layer.offset) + 3.0)
    after = to_floats(ops.softmax(layer(hidden, reverse=True)))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compression_ratio(tie_weights, use_bias, dtype):
    """Of bytes as they are stored, those of a file, by any dtype."""
    options = {"use_bias": use_bias, "tie_weights": tie_weights}
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK, dtype=dtype, **options)
    full = 4 * VOCABULARY * WIDTH
    ratio = layer.compression_ratio
    layer.build()
    tables = 1 if tie_weights else 2
    assert ratio == tables * full / (4 * layer.count_params())
    assert layer.compression_ratio == ratio
    layer.quantize("int8")
    codes, basis, offset = VOCABULARY * RANK, RANK * WIDTH, 4 * WIDTH
    assert layer.compression_ratio == full / (codes + 4 + basis + offset)
    layer.quantize("int4")
    codes, basis = VOCABULARY * (16 + 2), 32 * WIDTH
    assert layer.compression_ratio == full / (codes + basis + offset)
    layer.quantize("int2")
    stored = -(-(RANK + 1) // 4) * 4
    codes, basis = VOCABULARY * (stored // 4 + 12), stored * WIDTH
    assert layer.compression_ratio == full / (codes + basis + offset)


# Shapes, dtypes, masks


@REVERSE
@pytest.mark.parametrize("policy", POLICIES)
def test_dtypes(policy, reverse):
    layer = make_layer(dtype=policy)
    compute_dtype = keras.DTypePolicy(policy).compute_dtype
    variable_dtype = keras.DTypePolicy(policy).variable_dtype
    # A float32 input too: the reverse product must cast both operands.
    for input_dtype in ("float32", compute_dtype):
        inputs = make_inputs(reverse, input_dtype)
        symbolic = keras.KerasTensor(inputs.shape, inputs.dtype)
        spec = layer.compute_output_spec(symbolic, reverse=reverse)
        assert spec.dtype == compute_dtype
        assert spec.shape == layer.compute_output_shape(
            inputs.shape, reverse=reverse
        )
        for outputs in (
            layer(inputs, reverse=reverse),
            Nested(layer, dtype=policy)(inputs, reverse=reverse),
            Nested(layer, dtype="float32")(inputs, reverse=reverse),
            make_model(layer, reverse)(inputs),
        ):
            assert outputs.dtype == spec.dtype
            assert tuple(outputs.shape) == spec.shape
    assert make_model(layer, reverse).output.dtype == compute_dtype
    assert {v.dtype for v in layer.weights} == {variable_dtype}
    expected = reference_call(layer, inputs, reverse)
    tolerance = 1e-4 if policy == "float32" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(
        to_floats(layer(inputs, reverse=reverse)), expected, atol=tolerance
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_reverse_dtype(policy):
    layer = make_layer(dtype=policy, reverse_dtype="float32")
    hidden = make_inputs(True, "bfloat16")
    outputs = layer(hidden, reverse=True)
    assert outputs.dtype == "float32"
    assert make_model(layer, reverse=True).output.dtype == "float32"
    assert layer(IDS).dtype == "bfloat16"
    np.testing.assert_allclose(
        to_floats(outputs), reference_call(layer, hidden, True), atol=1e-4
    )


@pytest.mark.parametrize("shape", [(), (3,), (None, 4), (2, None, 5)])
def test_output_shapes(shape):
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK)
    ids = keras.KerasTensor(shape, "int32")
    assert layer(ids).shape == (*shape, WIDTH)
    hidden = keras.KerasTensor((*shape, WIDTH))
    assert layer(hidden, reverse=True).shape == (*shape, VOCABULARY)


@REVERSE
@pytest.mark.parametrize("convert", [np.asarray, ops.convert_to_tensor])
def test_output_spec_of_values(convert, reverse):
    """Models ask for it with tensors and arrays, too."""
    layer = make_layer(dtype="mixed_bfloat16")
    inputs = convert(make_inputs(reverse))
    for spec in (
        layer.compute_output_spec(inputs, reverse=reverse),
        make_model(layer, reverse).compute_output_spec(inputs),
    ):
        assert spec.shape == (2, 4, VOCABULARY if reverse else WIDTH)
        assert spec.dtype == "bfloat16"


@pytest.mark.parametrize("mask_zero", [False, True])
def test_mask(mask_zero):
    layer = make_layer(mask_zero=mask_zero)
    hidden = layer(IDS)
    if not mask_zero:
        assert keras.src.backend.get_keras_mask(hidden) is None
        # The mask of other layers survives the projection all the same.
        keras.src.backend.set_keras_mask(hidden, ops.not_equal(IDS, 0))
    for tensor in (hidden, layer(hidden, reverse=True)):
        mask = keras.src.backend.get_keras_mask(tensor)
        np.testing.assert_array_equal(ops.convert_to_numpy(mask), IDS != 0)
    assert layer.supports_masking
    assert (layer.compute_mask(IDS) is not None) == mask_zero
    assert layer.compute_mask(hidden) is None
    assert layer.compute_mask(hidden, "previous") == "previous"


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("mask_zero", [False, True])
def test_sparse_ids(mask_zero, quantization):
    """What is not stored is id 0, as in Keras."""
    layer = make_layer(mask_zero=mask_zero, quantization=quantization)
    positions = np.argwhere(IDS)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        ids = tf.SparseTensor(positions, IDS[IDS != 0], IDS.shape)
    elif keras.backend.backend() == "jax":
        from jax.experimental import sparse

        ids = sparse.BCOO((IDS[IDS != 0], positions), shape=IDS.shape)
    else:
        pytest.skip("no sparse tensors")
    symbolic = layer(keras.KerasTensor(IDS.shape, "int32", sparse=True))
    assert symbolic.shape == (*IDS.shape, WIDTH)
    assert not symbolic.sparse
    rows = layer(ids)
    np.testing.assert_array_equal(to_floats(rows), to_floats(layer(IDS)))
    mask = keras.src.backend.get_keras_mask(rows)
    assert (mask is not None) == mask_zero
    if mask_zero:
        np.testing.assert_array_equal(ops.convert_to_numpy(mask), IDS != 0)


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ids_may_be_floats(mask_zero, dtype):
    """As those of a `keras.Input` without a dtype are."""
    layer = make_layer(mask_zero=mask_zero)
    inputs = keras.Input((4,), dtype=dtype)
    model = keras.Model(inputs, layer(layer(inputs), reverse=True))
    ids = ops.cast(IDS, dtype)
    expected = make_model(layer)(IDS)
    np.testing.assert_array_equal(model(ids), expected)
    for outputs in (layer(ids), model(ids)):
        mask = keras.src.backend.get_keras_mask(outputs)
        assert (mask is not None) == mask_zero
        if mask_zero:
            np.testing.assert_array_equal(ops.convert_to_numpy(mask), IDS != 0)


def test_floats_that_do_not_hold_all_ids():
    layer = DistilledEmbedding(257, WIDTH, RANK)
    layer(ops.cast(IDS, "float16"))
    with pytest.warns(UserWarning, match=r'bfloat16.*=257.*dtype="int32"'):
        layer(ops.cast(IDS, "bfloat16"))


@tensorflow_only
@pytest.mark.parametrize("mask_zero", [False, True])
def test_ragged_ids(mask_zero):
    import tensorflow as tf

    layer = make_layer(mask_zero=mask_zero)
    rows = [[1, 0, 52], [], [3]]
    ids = tf.ragged.constant(rows, dtype="int32")
    inputs = keras.Input((None,), dtype="int32", ragged=True)
    for outputs in (layer(ids), keras.Model(inputs, layer(inputs))(ids)):
        assert outputs.shape == (3, None, WIDTH)
        for found, row in zip(outputs, rows, strict=True):
            np.testing.assert_allclose(
                found, reference_table(layer)[row], atol=1e-5
            )


def test_mask_reaches_the_loss_of_a_model():
    model = make_model(make_layer(mask_zero=True))
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    changed = np.where(IDS == 0, 5, IDS)
    loss = model.evaluate(IDS, IDS, verbose=0)
    assert loss == pytest.approx(model.evaluate(IDS, changed, verbose=0))


# Cost


def _shapes(graph):
    for operation in graph.get_operations():
        for tensor in operation.outputs:
            if tensor.shape.rank is not None:
                yield tuple(tensor.shape)


@tensorflow_only
@VARIANTS
@REVERSE
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
def test_no_call_builds_the_table(options, reverse, training, quantization):
    import tensorflow as tf

    layer = make_layer(quantization=quantization, **options)

    @tf.function
    def run(inputs):
        with tf.GradientTape() as tape:
            outputs = layer(inputs, reverse=reverse)
        if not training:
            return outputs
        return tape.gradient(outputs, layer.trainable_variables)

    inputs = tf.convert_to_tensor(make_inputs(reverse))
    graph = run.get_concrete_function(inputs).graph
    shapes = set(_shapes(graph))
    for function in graph._functions.values():
        if hasattr(function, "graph"):
            shapes |= set(_shapes(function.graph))
    assert (VOCABULARY, RANK) in shapes
    assert (VOCABULARY, WIDTH) not in shapes
    assert (WIDTH, VOCABULARY) not in shapes


@tensorflow_only
@VARIANTS
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_lookup_computes_with_its_own_rows_only(options, policy):
    import tensorflow as tf

    layer = make_layer(dtype=policy, **options)
    graph = tf.function(layer).get_concrete_function(tf.constant(IDS)).graph
    # No activation and no cast of all codes: they are read, not copied.
    of_all_tokens = {
        operation.type
        for operation in graph.get_operations()
        for tensor in operation.outputs
        if tensor.shape.rank and tensor.shape[0] == VOCABULARY
    }
    assert of_all_tokens == {"ReadVariableOp"}


@tensorflow_only
@VARIANTS
def test_gradients_equal_those_through_the_table(options):
    import tensorflow as tf

    layer = make_layer(logit_soft_cap=20.0, **options)
    hidden = tf.constant(make_inputs(True))
    rng = np.random.default_rng(2)
    row_weights = rng.normal(size=(2, 4, WIDTH)).astype("float32")
    logit_weights = rng.normal(size=(2, 4, VOCABULARY)).astype("float32")

    def through_layer():
        return layer(IDS), layer(hidden, reverse=True)

    def through_table():
        table = layer.embeddings
        kernel = tf.transpose(table)
        if not layer.tie_weights:
            kernel = layer.reverse_embeddings
        logits = tf.tanh(tf.matmul(hidden, kernel) / 20.0) * 20.0
        return tf.gather(table, IDS), logits

    gradients = []
    for function in (through_layer, through_table):
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            rows, logits = function()
            loss = tf.reduce_sum(rows * row_weights)
            loss += tf.reduce_sum(logits * logit_weights)
        sources = [*(v.value for v in layer.trainable_variables), hidden]
        gradients.append(
            [tf.convert_to_tensor(g) for g in tape.gradient(loss, sources)]
        )
    for one, other in zip(*gradients, strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one / scale, other / scale, atol=1e-5)


# Training


def _fit(layer, **compile_options):
    model = make_model(layer)
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **compile_options,
    )
    return model.fit(IDS, IDS, verbose=0).history["loss"][0]


@EXTREMES
def test_fit_trains_every_factor(options):
    layer = make_layer(mask_zero=True, **options)
    before = layer.get_weights()
    assert np.isfinite(_fit(layer, jit_compile=True))
    for variable, old in zip(layer.weights, before, strict=True):
        assert np.abs(to_floats(variable) - old).max() > 0, variable.path


@pytest.mark.parametrize("tie_weights", [True, False])
def test_regularizer_sees_both_factors_of_the_lookup(tie_weights):
    layer = make_layer(
        embeddings_regularizer=keras.regularizers.L2(0.1),
        tie_weights=tie_weights,
    )
    expected = [
        0.1 * np.sum(to_floats(factor) ** 2)
        for factor in (layer.codes, layer.basis)
    ]
    np.testing.assert_allclose(layer.losses, expected, rtol=1e-5)


def test_constraint_holds_for_the_codes_only():
    layer = make_layer(embeddings_constraint=keras.constraints.UnitNorm(axis=1))
    _fit(layer)
    norms = np.linalg.norm(to_floats(layer.codes), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-5)
    assert (
        np.abs(np.linalg.norm(to_floats(layer.basis), axis=1) - 1).min() > 0.1
    )


def test_keras_layer_checks():
    testing = pytest.importorskip("keras.src.testing")
    for quantization, (weights, others) in {
        # Codes, basis and offset; scales, of fewer bits trained; center and
        # rotation.
        None: (3, 0),
        "int8": (6, 6),
        "int4": (8, 4),
    }.items():
        options = {"quantization": quantization}
        if quantization is not None:
            options["tie_weights"] = False
        testing.TestCase().run_layer_test(
            DistilledEmbedding,
            init_kwargs={
                "input_dim": VOCABULARY,
                "output_dim": WIDTH,
                "rank": RANK,
                **options,
            },
            input_data=IDS,
            expected_output_shape=(2, 4, WIDTH),
            expected_num_trainable_weights=weights,
            expected_num_non_trainable_weights=others,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
            # Training it checks with random labels, jitted; done above.
            run_training_check=False,
        )


# Configuration and saving


def test_config_is_complete():
    options = {
        "activation": "tanh",
        "use_bias": False,
        "tie_weights": False,
        "embeddings_initializer": keras.initializers.RandomNormal(stddev=0.3),
        "embeddings_regularizer": keras.regularizers.L1(0.2),
        "embeddings_constraint": keras.constraints.MaxNorm(3.0, axis=1),
        "mask_zero": True,
        "reverse_dtype": "float32",
        "logit_soft_cap": 30.0,
        "quantization": "int4",
        "row_scales": False,
        "centered": False,
        "activity_regularizer": keras.regularizers.L2(0.1),
        "trainable": False,
        "dtype": "mixed_bfloat16",
        "name": "tokens",
    }
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK, **options)
    config = layer.get_config()
    signature = {"input_dim", "output_dim", "rank"}
    signature |= {"lora_rank", "lora_alpha"}
    assert set(config) == signature | set(options)
    restored = DistilledEmbedding.from_config(config)
    assert restored.get_config() == config
    serialized = keras.saving.serialize_keras_object(layer)
    assert serialized["registered_name"] == (
        "keras_distilled_embedding>DistilledEmbedding"
    )
    assert serialized["config"]["embeddings_initializer"]["config"] == {
        "mean": 0.0,
        "stddev": 0.3,
        "seed": None,
    }
    restored = keras.saving.deserialize_keras_object(serialized)
    assert restored.get_config() == config


@VARIANTS
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_saved_model_round_trip(tmp_path, options, policy):
    model = make_model(make_layer(dtype=policy, **options))
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(IDS), restored(IDS))

    model.save_weights(tmp_path / "model.weights.h5")
    layer = DistilledEmbedding(VOCABULARY, WIDTH, RANK, dtype=policy, **options)
    other = make_model(layer)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(model(IDS), other(IDS))


@VARIANTS
def test_build_from_config(options):
    layer = make_layer(**options)
    restored = DistilledEmbedding.from_config(layer.get_config())
    restored.build_from_config(layer.get_build_config())
    assert restored.built
    assert [v.path.split("/")[-1] for v in restored.weights] == [
        v.path.split("/")[-1] for v in layer.weights
    ]
    assert len(restored.weights) == len(layer._saved_names())
    called = DistilledEmbedding.from_config(layer.get_config())
    called(IDS)
    restored = DistilledEmbedding.from_config(layer.get_config())
    restored.build_from_config(called.get_build_config())
    restored.set_weights(layer.get_weights())
    np.testing.assert_array_equal(restored(IDS), layer(IDS))


def test_build_twice_keeps_the_weights():
    layer = make_layer()
    layer.build((None, 4))
    assert len(layer.weights) == 3


def test_saving_does_not_compute_the_table(tmp_path, monkeypatch):
    model = make_model(make_layer(tie_weights=False))

    # Counted, since Keras swallows the exceptions of attributes.
    calls = []
    monkeypatch.setattr(
        DistilledEmbedding, "reconstruct", lambda *a, **k: calls.append(a)
    )
    _ = model.layers[1].embeddings
    assert len(calls) == 1
    calls.clear()
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")
    assert not calls


# From a table


@pytest.fixture(scope="module")
def table():
    """A table of rank 4 and a little noise."""
    rng = np.random.default_rng(0)
    product = rng.normal(size=(VOCABULARY, 4)) @ rng.normal(size=(4, WIDTH))
    noise = rng.normal(size=(VOCABULARY, WIDTH))
    return (product + 0.01 * noise).astype("float32")


def make_embedding(table, cls=keras.layers.ReversibleEmbedding, **options):
    layer = cls(*table.shape, **options)
    layer.build()
    weights = [table]
    if not options.get("tie_weights", True):
        weights.append(table[::-1].T.copy())
    layer.set_weights(weights)
    return layer


def hub_embedding():
    hub = pytest.importorskip("keras_hub")
    return hub.layers.ReversibleEmbedding


class CustomEmbedding(keras.layers.Embedding):
    pass


class DuckEmbedding:
    """Not a Keras layer, but it has the table."""

    def __init__(self, table):
        self.embeddings = table


@pytest.mark.parametrize(
    "make",
    [
        lambda table: table,
        ops.convert_to_tensor,
        keras.Variable,
        DuckEmbedding,
        make_embedding,
        lambda table: make_embedding(table, keras.layers.Embedding),
        lambda table: make_embedding(table, CustomEmbedding),
        lambda table: make_embedding(table, hub_embedding()),
        lambda table: DistilledEmbedding.from_embedding(table, rank=6),
    ],
    ids=[
        "array",
        "tensor",
        "variable",
        "duck",
        "reversible",
        "embedding",
        "subclass",
        "keras_hub",
        "distilled",
    ],
)
def test_from_embedding(make, table):
    layer = DistilledEmbedding.from_embedding(make(table), rank=5)
    assert layer.built
    assert layer.rank == 5
    error = np.sum((to_floats(layer.embeddings) - table) ** 2)
    assert error / np.sum(table**2) < 1e-3
    np.testing.assert_allclose(
        to_floats(layer(IDS)), to_floats(layer.embeddings)[IDS], atol=1e-5
    )


@pytest.mark.parametrize("compression", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
def test_from_embedding_by_compression(
    table, compression, use_bias, quantization
):
    options = {"use_bias": use_bias, "quantization": quantization}
    # Two bits with a scale a row hold no offset in a column, and 32 columns
    # of four bits are too many.
    options["row_scales"] = use_bias and compression < 4
    layer = DistilledEmbedding.from_embedding(
        table, compression=compression, **options
    )
    assert layer.quantization == quantization
    if quantization is not None:
        by_row = options["row_scales"] and quantization != "int8"
        assert layer.format.has_row_scales == by_row
    assert layer.compression_ratio >= compression
    larger = DistilledEmbedding(VOCABULARY, WIDTH, layer.rank + 1, **options)
    assert larger.compression_ratio < compression or layer.rank == WIDTH


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_assigned_block_by_block(
    table, quantization, dtype, monkeypatch
):
    """The last block is a shorter one."""
    monkeypatch.setattr(table_module, "CHUNK_ENTRIES", 3 * 7)
    options = {"quantization": quantization, "use_bias": True}
    factors = factorize(table, 3, **options)
    layer = DistilledEmbedding.from_embedding(
        table, rank=3, dtype=dtype, **options
    )
    codes = ops.convert_to_numpy(ops.cast(factors.codes, dtype))
    np.testing.assert_array_equal(
        to_floats(layer.codes), np.asarray(codes, "float32")
    )
    # What a file holds in floats of four bytes is there with bits only.
    kept = [] if quantization is None else ["scales", "rotation", "center"]
    names = [w.name for w in layer.weights if w.dtype != dtype]
    assert names == (kept if dtype == "bfloat16" else [])


def test_from_embedding_assigns_what_factorize_returns(table):
    options = {
        "activation": None,
        "quantization": "int8",
        "row_weights": np.arange(1.0, 1 + VOCABULARY),
    }
    factors = factorize(table, 3, **options)
    layer = DistilledEmbedding.from_embedding(table, rank=3, **options)
    np.testing.assert_array_equal(to_floats(layer.codes), factors.codes)
    basis, offset = basis_and_offset(layer)
    np.testing.assert_allclose(basis, factors.basis, atol=1e-6)
    np.testing.assert_allclose(offset, factors.offset, atol=1e-6)
    np.testing.assert_allclose(
        to_floats(layer.embeddings), factors.reconstruct(), atol=1e-5
    )
    plain = DistilledEmbedding.from_embedding(table, rank=3, use_bias=False)
    assert not plain.use_bias
    assert layer.activation is keras.activations.linear


FRAMES = pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"method": "learned", "activation": "tanh"},
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"quantization": "int2", "row_scales": False},
    ],
    ids=["floats", "learned", "int8", "int4", "int2"],
)


@FRAMES
def test_made_from_a_table_the_basis_is_trained_around_its_mean(table, options):
    """What moves the basis leaves the mean row where it is."""
    layer = DistilledEmbedding.from_embedding(table, rank=3, **options)
    before = to_floats(layer.embeddings)
    noise = np.random.default_rng(0).normal(size=layer.basis.shape)
    layer.basis.assign(to_floats(layer.basis) + noise)
    change = to_floats(layer.embeddings) - before
    assert np.abs(change).max() > 0.5
    # The center of a grid is near the mean.
    limit = 0.2 if layer.quantization else 1e-5
    assert np.abs(change.mean(axis=0)).max() < limit * np.std(change)


@pytest.mark.parametrize("quantization", ["int8", "int4", "int2"])
def test_in_few_bits_the_basis_is_of_principal_components(table, quantization):
    """Rounded are others, in which few bits lose less."""
    layer = DistilledEmbedding.from_embedding(
        table, rank=5, quantization=quantization
    )
    rotation = to_floats(layer.rotation).astype("float64")
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-6)
    features = np.maximum(to_floats(layer.codes), 0)
    of_rounded = np.corrcoef(features.T)
    of_trained = np.corrcoef((features @ rotation).T)
    assert np.abs(of_trained - np.eye(5)).max() < 1e-4
    assert np.abs(of_rounded - np.eye(5)).max() > 0.05


def test_a_center_needs_an_offset(table):
    with pytest.raises(ValueError, match="`centered` needs an offset.*False"):
        DistilledEmbedding(10, 4, 2, use_bias=False, centered=True)
    layer = DistilledEmbedding(10, 4, 2, centered=True)
    layer.build()
    assert not to_floats(layer.center).any()
    assert layer.get_config()["centered"]
    # Without an activation, the exact codes have no mean.
    layer = DistilledEmbedding.from_embedding(table, rank=3, activation=None)
    assert not layer.centered


def test_from_embedding_inherits(table):
    embedding = make_embedding(
        table,
        name="tokens",
        dtype="mixed_bfloat16",
        mask_zero=True,
        embeddings_initializer=keras.initializers.Constant(table),
        embeddings_regularizer="l2",
        embeddings_constraint="unit_norm",
        reverse_dtype="float32",
        logit_soft_cap=30.0,
        trainable=False,
    )
    layer = DistilledEmbedding.from_embedding(embedding, rank=3)
    assert layer.name == "tokens"
    assert layer.dtype_policy.name == "mixed_bfloat16"
    assert layer.mask_zero
    assert layer.tie_weights
    assert not layer.trainable
    assert layer.reverse_dtype == "float32"
    assert layer.logit_soft_cap == 30.0
    assert isinstance(layer.embeddings_regularizer, keras.regularizers.L2)
    assert layer.embeddings_constraint is None
    layer = DistilledEmbedding.from_embedding(
        embedding, rank=3, name="other", dtype="float32", mask_zero=False
    )
    assert layer.name == "other"
    assert not layer.mask_zero
    assert layer.dtype_policy.name == "float32"


def test_from_untied_embedding(table):
    embedding = make_embedding(table, tie_weights=False)
    layer = DistilledEmbedding.from_embedding(embedding, rank=5)
    assert not layer.tie_weights
    np.testing.assert_allclose(to_floats(layer.embeddings), table, atol=0.1)
    np.testing.assert_allclose(
        to_floats(layer.reverse_embeddings), table[::-1].T, atol=0.1
    )
    # Untied on request: two copies of one factorization to start from.
    layer = DistilledEmbedding.from_embedding(table, rank=5, tie_weights=False)
    for name in ("codes", "basis", "offset"):
        np.testing.assert_array_equal(
            getattr(layer, name), getattr(layer, f"reverse_{name}")
        )


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_from_quantized_embedding(table, mode, tie_weights):
    embedding = make_embedding(
        table, tie_weights=tie_weights, logit_soft_cap=50.0
    )
    embedding.quantize(mode, type_check=False)
    tolerance = 0.05 if mode == "int8" else 0.8
    one, *other = embedding_tables(embedding)
    np.testing.assert_allclose(one, table, atol=tolerance)
    assert len(other) == (not tie_weights)
    for reverse in other:
        np.testing.assert_allclose(reverse, table[::-1], atol=tolerance)
    layer = DistilledEmbedding.from_embedding(embedding, rank=5)
    assert layer.dtype_policy.name == "float32"


def test_from_embedding_with_lora(table):
    embedding = make_embedding(table)
    embedding.enable_lora(2)
    embedding.lora_embeddings_b.assign(
        np.random.default_rng(0).normal(size=(2, WIDTH))
    )
    expected = to_floats(embedding.embeddings)
    assert np.abs(expected - table).max() > 0.1
    layer = DistilledEmbedding.from_embedding(embedding, rank=7)
    np.testing.assert_allclose(to_floats(layer.embeddings), expected, atol=0.1)


# Bad input


@pytest.mark.parametrize("name", ["input_dim", "output_dim", "rank"])
@pytest.mark.parametrize("value", [0, -3, True, 2.0, "2", None])
def test_bad_sizes(name, value):
    sizes = {"input_dim": 10, "output_dim": 8, "rank": 2, name: value}
    with pytest.raises(
        ValueError,
        match=f"`{name}` must be a positive integer. Received: {name}="
        + re.escape(repr(value)),
    ):
        DistilledEmbedding(**sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "Received: lora_rank=0$"),
        ({"logit_soft_cap": 0}, "Received: logit_soft_cap=0$"),
        ({"logit_soft_cap": -1.0}, "Received: logit_soft_cap=-1.0$"),
        ({"logit_soft_cap": math.nan}, "Received: logit_soft_cap=nan$"),
        ({"logit_soft_cap": True}, "Received: logit_soft_cap=True$"),
        ({"reverse_dtype": "int8"}, "Received: reverse_dtype='int8'$"),
        ({"reverse_dtype": "floaty"}, "floaty"),
        ({"activation": "relux"}, "relux"),
        ({"size": 3}, "Unrecognized keyword arguments"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DistilledEmbedding(10, 8, 2, **options)


def test_a_rank_that_saves_nothing_is_allowed():
    assert DistilledEmbedding(10, 8, 100).compression_ratio < 1


def test_numpy_sizes_become_integers():
    layer = DistilledEmbedding(np.int64(10), np.int32(8), np.uint8(2))
    assert {type(v) for v in (layer.input_dim, layer.rank)} == {int}


@pytest.mark.parametrize(
    ("inputs", "reverse", "error", "message"),
    [
        (np.ones((2, 3), "bool"), False, TypeError, "dtype bool"),
        (np.ones((2, 3), "int32"), True, TypeError, "dtype int32"),
        (np.ones((2, 3), "float32"), True, ValueError, r"shape \(2, 3\)"),
        (np.float32(1.0), True, ValueError, r"shape \(\)"),
    ],
)
def test_bad_inputs(inputs, reverse, error, message):
    layer = make_layer()
    if inputs.shape:
        with pytest.raises(error, match=message):
            layer(inputs, reverse=reverse)
    symbolic = keras.KerasTensor(inputs.shape, inputs.dtype.name)
    with pytest.raises(error, match=message):
        layer.compute_output_spec(symbolic, reverse=reverse)
    with pytest.raises(error, match=message):
        layer(symbolic, reverse=reverse)


def test_embeddings_of_an_unbuilt_layer():
    layer = DistilledEmbedding(10, 8, 2)
    with pytest.raises(AttributeError, match="before it is built"):
        _ = layer.embeddings


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        # The embedding
        (
            lambda t: keras.layers.Embedding(*t.shape),
            {"rank": 2},
            ValueError,
            "must be built",
        ),
        (lambda t: keras.layers.ReLU(), {"rank": 2}, TypeError, "must be a"),
        (lambda t: t[0], {"rank": 2}, ValueError, r"of shape \(17,\)$"),
        (lambda t: t * np.inf, {"rank": 2}, ValueError, "finite"),
        # The size
        (
            None,
            {},
            ValueError,
            "exactly one .* rank=None, compression=None$",
        ),
        (None, {"rank": 2, "compression": 2.0}, ValueError, "exactly one"),
        (None, {"rank": 0}, ValueError, "rank=0"),
        (None, {"rank": 13}, ValueError, "rank=13"),
        (None, {"rank": 2.0}, ValueError, "rank=2.0"),
        (None, {"compression": 1.0}, ValueError, "compression=1.0"),
        (None, {"compression": 100.0}, ValueError, "at most 10.35"),
        # The rest
        (None, {"rank": 2, "method": "magic"}, ValueError, "method"),
        (None, {"rank": 2, "size": 3}, ValueError, "Unrecognized keyword"),
    ],
)
def test_bad_from_embedding(make, options, error, message, table):
    embedding = table if make is None else make(table)
    with pytest.raises(error, match=message):
        DistilledEmbedding.from_embedding(embedding, **options)


# LoRA


@EXTREMES
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_lora(options, quantization, tmp_path):
    options = {"quantization": quantization, **options}
    layer = make_layer(**options)
    model = make_model(layer)
    before = to_floats(model(IDS))
    layer.enable_lora(2, lora_alpha=3.0)
    # Nothing changes at first; then only the LoRA weights do.
    np.testing.assert_allclose(to_floats(model(IDS)), before, atol=1e-5)
    lookup = {n for n in layer._factor_shapes() if not n.startswith("reverse")}
    trainable = {v.path.split("/")[-1] for v in layer.trainable_variables}
    assert "offset" in lookup
    assert not trainable & lookup
    assert {"lora_codes_a", "lora_codes_b"} <= trainable
    codes = to_floats(layer._read("codes", "float32"))
    _fit(layer)
    delta = to_floats(layer.lora_codes_a) @ to_floats(layer.lora_codes_b)
    assert np.abs(delta).max() > 0
    np.testing.assert_allclose(
        to_floats(layer._read("codes", "float32")),
        codes + 3.0 / 2 * delta,
        atol=1e-6,
    )

    # Saved merged, under the names of a layer without LoRA.
    expected = to_floats(model(IDS))
    tolerance = 1e-4 * max(1.0, np.abs(expected).max())
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        to_floats(restored(IDS)), expected, atol=tolerance
    )
    restored = restored.get_layer(layer.name)
    assert restored.lora_enabled
    assert (restored.lora_rank, restored.lora_alpha) == (2, 3.0)
    model.save_weights(tmp_path / "model.weights.h5")
    plain = make_model(make_layer(**options))
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(to_floats(plain(IDS)), expected, atol=tolerance)
    # Loading into an adapted layer replaces the adaptation.
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(to_floats(model(IDS)), expected, atol=tolerance)
    assert np.abs(to_floats(layer.lora_codes_b)).max() == 0
    assert np.abs(to_floats(layer.lora_codes_a)).max() > 0


def test_policy_map(table):
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["tokens"] = keras.DTypePolicy("mixed_bfloat16")
    embedding = make_embedding(table, name="tokens", dtype=policies)
    assert embedding.compute_dtype == "bfloat16"
    layer = DistilledEmbedding.from_embedding(embedding, rank=3)
    assert layer.dtype_policy.name == "mixed_bfloat16"


def test_lora_argument():
    layer = DistilledEmbedding(
        VOCABULARY, WIDTH, RANK, lora_rank=2, dtype="bfloat16"
    )
    layer(IDS)
    assert layer.lora_enabled
    assert layer.lora_alpha == 2
    assert layer.lora_codes_a.dtype == "float32"
    assert layer.codes.dtype == "bfloat16"


def test_bad_lora():
    with pytest.raises(ValueError, match="not built"):
        DistilledEmbedding(10, 8, 2).enable_lora(2)
    layer = make_layer()
    for rank in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"Received: rank={rank}$"):
            layer.enable_lora(rank)
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="lora is already enabled"):
        layer.enable_lora(2)
    layer = make_layer(embeddings_constraint="non_neg")
    with pytest.raises(ValueError, match="incompatible with embedding constr"):
        layer.enable_lora(2)


@pytest.mark.parametrize(
    "documented", [DistilledEmbedding, DistilledEmbedding.from_embedding]
)
def test_docstrings_state_the_ratio_that_a_layer_has(documented):
    (code,) = re.findall(
        r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL
    )
    # What a line is said to return, it returns.
    code = re.sub(
        r"^(layer\.\w+)  # (.*)", r"said = \2, \1", code, flags=re.MULTILINE
    )
    scope = {"DistilledEmbedding": DistilledEmbedding, "keras": keras, "np": np}
    exec(code, scope)
    said, value = scope["said"]
    assert value == pytest.approx(said, abs=0.005)
