"""Codes rounded to small integers, in training and in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import Distiller
from keras_distilled_embedding import EmbeddingDistillation
from keras_distilled_embedding import LogitsDistillation
from keras_distilled_embedding import compress
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.quantization import formats_of
from keras_distilled_embedding.quantization import round_to_int8
from keras_distilled_embedding.quantization import stored_factors
from tests.shared import basis_and_offset
from tests.shared import lost_share
from tests.shared import random_ids
from tests.shared import tied_model
from tests.shared import to_numpy

ROWS, RANK, COLUMNS = 200, 9, 24
QUANTIZATION = pytest.mark.parametrize("quantization", ["int8", "int4", "int2"])
KINDS = [kind for name in QUANTIZATIONS for kind in formats_of(name)]
KIND = pytest.mark.parametrize(
    "kind",
    KINDS,
    ids=lambda k: f"{k.name}, {'rows' if k.has_row_scales else 'columns'}",
)
# Share of Gaussian numbers' energy that their grid may cost.
LOSS = {"int8": 3e-4, "int4": 0.015, "int2": 0.125}
RANGE = {"int8": (-127, 127), "int4": (-8, 7), "int2": (-2, 1)}


def make_factors(rank=RANK, seed=0):
    """Features, basis and offset."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(ROWS, rank)) * rng.uniform(0.5, 2, (ROWS, 1))
    features += rng.normal(size=rank)
    basis, offset = rng.normal(size=(rank, COLUMNS)), rng.normal(size=COLUMNS)
    return tuple(a.astype("float32") for a in (features, basis, offset))


def round_in_numpy(features, center, scales, kind):
    """The nearest level for every number."""
    low, high = RANGE[kind.name]
    levels = np.arange(low, high + 1) + (0.5 if kind.name == "int2" else 0.0)
    steps = (features - center) / scales
    nearest = np.abs(steps[..., None] - levels).argmin(-1)
    return center + scales * levels[nearest]


# Formats


def test_formats():
    assert QUANTIZATIONS == ("int8", "int4", "int2")
    assert [
        (k.name, k.bits, k.scale_bytes, k.multiple, k.is_delegated)
        for k in KINDS
    ] == [
        ("int8", 8, 0, 1, True),
        ("int4", 4, 2, 32, True),
        ("int4", 4, 0, 2, True),
        ("int2", 2, 12, 4, True),
        ("int2", 2, 0, 4, False),
    ]
    for kind in KINDS:
        assert kind.levels == RANGE[kind.name]
        assert format_of(kind.name, kind.has_row_scales) is kind
    assert format_of("int8") is format_of("int8", row_scales=False)


@KIND
@pytest.mark.parametrize("columns", [1, 4, 9, 32, 70])
def test_packed_bytes(kind, columns):
    """Unpacked here number by number, the low bits first."""
    stored = kind.stored_columns(columns)
    # Half steps of a row's own scale are a column of ones more.
    assert stored >= columns + (kind.scale_bytes == 12)
    assert stored % kind.multiple == 0 and stored < columns + kind.multiple + 1
    rng = np.random.default_rng(0)
    low, high = kind.levels
    integers = rng.integers(low, high + 1, size=(6, stored)).astype("int8")
    packed, numbers = kind.pack(integers), []
    for byte in packed.tolist():
        for i in range(8 // kind.bits):
            number = byte >> i * kind.bits & 2**kind.bits - 1
            top = 2 ** (kind.bits - 1)
            numbers.append(number - 2 * top if number >= top else number)
    np.testing.assert_array_equal(np.reshape(numbers, (6, stored)), integers)
    scales = {0: 4, 2: 6 * 2, 12: 6 * (4 + 8)}[kind.scale_bytes]
    assert kind.table_bytes(6, columns) == packed.nbytes + scales


@pytest.mark.parametrize("value", ["int3", "INT8", 8, "auto", ""])
def test_unknown_formats_are_refused(value):
    for known in (None, *QUANTIZATIONS):
        check_quantization("quantization", known)
    with pytest.raises(
        ValueError, match=r"`argument`.*'int8', 'int4', 'int2'.*argument="
    ):
        check_quantization("argument", value)
    with pytest.raises(ValueError, match=f"quantization={value!r}$"):
        DistilledEmbedding(20, 8, 2, quantization=value)


# Rounding


@KIND
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_grid_suits_gaussian_numbers(kind, size):
    features = size * make_factors(rank=64)[0]
    center, scales = map(to_numpy, kind.grid(features))
    rows = kind.has_row_scales
    assert scales.shape == ((ROWS, 1) if rows else (1, 64))
    rounded = to_numpy(kind.round(features, center, scales))
    around = features - features.mean(0)
    lost = lost_share(around, rounded - features.mean(0))
    # One scale a column does not know which rows are large.
    assert lost < LOSS[kind.name] * (1.0 if rows else 1.4)
    if kind.scale_bytes == 2:  # as they are stored
        for dtype in ("float16", "bfloat16"):
            np.testing.assert_array_equal(
                scales, scales.astype(dtype).astype("float32")
            )


@KIND
def test_rounds_to_the_nearest_level(kind):
    features = make_factors()[0]
    center, scales = map(to_numpy, kind.grid(features))
    scales = (0.8 * scales).astype("bfloat16").astype("float32")
    np.testing.assert_allclose(
        to_numpy(kind.round(features, center, scales)),
        round_in_numpy(features, center, scales, kind),
        rtol=1e-5,
        atol=1e-5,
    )


@KIND
def test_a_row_is_rounded_by_itself(kind):
    """So that a look-up rounds no more rows than it takes."""
    features = make_factors()[0]
    center, scales = map(to_numpy, kind.grid(features))
    every = to_numpy(kind.round(features, center, scales))
    ids = np.array([[5, 3], [199, 5]])
    of_ids = scales[ids] if kind.has_row_scales else scales
    np.testing.assert_array_equal(
        to_numpy(kind.round(features[ids], center, of_ids)), every[ids]
    )


@KIND
@pytest.mark.parametrize("rank", [1, RANK, 32, 40])
@pytest.mark.parametrize("with_offset", [True, False])
def test_stored_factors_stand_for_the_rounded_table(kind, rank, with_offset):
    features, basis, offset = make_factors(rank)
    center, scales = map(to_numpy, kind.grid(features))
    table = round_in_numpy(features, center, scales, kind) @ basis
    if with_offset:
        table += offset
    stored = stored_factors(
        features, center, scales, basis, offset if with_offset else None, kind
    )
    low, high = kind.levels
    assert stored.integers.dtype == "int8"
    assert stored.integers.shape == (ROWS, kind.stored_columns(rank))
    assert low <= stored.integers.min() and stored.integers.max() <= high
    np.testing.assert_allclose(
        stored.integers * stored.scales @ stored.basis + stored.offset,
        table,
        rtol=1e-4,
        atol=1e-3,
    )


@KIND
@pytest.mark.parametrize("case", ["zeros", "constant columns", "a zero row"])
def test_degenerate_features(kind, case):
    features = make_factors()[0]
    if case == "zeros":
        features[:] = 0.0
    if case == "constant columns":
        features[:] = features[0]
    features[7] = features.mean(0)
    center, scales = map(to_numpy, kind.grid(features))
    rounded = to_numpy(kind.round(features, center, scales))
    assert np.isfinite(rounded).all() and (scales > 0).all()
    if kind.has_row_scales or case != "a zero row":
        close = slice(None) if case != "a zero row" else 7
        np.testing.assert_allclose(rounded[close], features[close], atol=2e-3)


def test_whole_table_in_8_bits():
    features, basis, _ = make_factors()
    table = features @ basis
    table[11] = 0.0
    integers, scale = round_to_int8(table)
    assert integers.dtype == "int8" and scale.shape == (1, 1)
    assert np.abs(integers).max() == 127
    assert np.abs(integers * scale - table).max() <= 0.5001 * scale[0, 0]
    assert not integers[11].any()
    integers, scale = round_to_int8(0 * table)
    assert not integers.any() and np.isfinite(scale).all()


@KIND
@pytest.mark.parametrize("beyond", [False, True])
def test_gradients(kind, beyond):
    """Straight through to the features; the levels for the scales."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients of eager code")
    import tensorflow as tf

    rng = np.random.default_rng(0)
    low, high = kind.levels
    shift = kind.shift
    steps = rng.uniform(low + shift - 0.4, high + shift + 0.4, size=(5, 3))
    if beyond:
        steps = np.where(rng.random((5, 3)) < 0.5, low - 2.0, high + 3.0)
    scales = np.array([[0.5]] * 5 if kind.has_row_scales else [[0.5] * 3])
    features, scales = (
        steps * scales + 1.0,
        tf.Variable(scales, dtype="float32"),
    )
    features = tf.Variable(features, dtype="float32")
    weights = rng.normal(size=(5, 3)).astype("float32")
    with tf.GradientTape() as tape:
        rounded = kind.round(features, np.ones(3, "float32"), scales)
        loss = ops.sum(ops.multiply(rounded, weights))
    of_features, of_scales = tape.gradient(loss, [features, scales])
    np.testing.assert_allclose(of_features, weights)
    levels = (to_numpy(rounded) - 1.0) / 0.5
    each = weights * levels
    axis = 1 if kind.has_row_scales else 0
    np.testing.assert_allclose(
        of_scales, each.sum(axis, keepdims=True), rtol=1e-3, atol=1e-3
    )


# In the layer


def make_layer(quantization, **options):
    options = {"quantization": quantization, "name": "tokens", **options}
    layer = DistilledEmbedding(ROWS, COLUMNS, RANK, **options)
    layer.build()
    features, basis, offset = make_factors()
    layer.codes.assign(features)
    layer.basis.assign(basis)
    if layer.use_bias:
        layer.offset.assign(offset)
    if quantization is not None:
        center, scales = layer.format.grid(ops.relu(features))
        layer.center.assign(center)
        layer.scales.assign(scales)
    return layer


def rounded_table(layer):
    """In NumPy."""
    features = round_in_numpy(
        np.maximum(to_numpy(layer.codes), 0),
        to_numpy(layer.center),
        to_numpy(layer.scales),
        layer.format,
    )
    basis, offset = basis_and_offset(layer)
    return features @ basis + offset


def make_model(layer):
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, layer(layer(ids), reverse=True))


@KIND
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_computes_with_rounded_codes(kind, use_bias):
    layer = make_layer(
        kind.name, row_scales=kind.has_row_scales, use_bias=use_bias
    )
    assert layer.format is kind
    table = rounded_table(layer)
    close = {"rtol": 1e-3, "atol": 1e-2}
    ids = random_ids(ROWS)
    np.testing.assert_allclose(to_numpy(layer(ids)), table[ids], **close)
    hidden = np.random.default_rng(1).normal(size=(2, COLUMNS))
    hidden = hidden.astype("float32")
    np.testing.assert_allclose(
        to_numpy(layer(hidden, reverse=True)), hidden @ table.T, **close
    )
    np.testing.assert_allclose(to_numpy(layer.embeddings), table, **close)
    plain = make_layer(None, use_bias=use_bias)
    assert np.abs(to_numpy(plain.embeddings) - table).max() > 1e-2


@KIND
def test_a_new_layer_has_a_grid_for_its_codes(kind):
    layer = DistilledEmbedding(
        500, 16, 8, quantization=kind.name, row_scales=kind.has_row_scales
    )
    layer.build()
    center, scales = map(to_numpy, kind.grid(ops.relu(layer.codes)))
    np.testing.assert_allclose(to_numpy(layer.center), center, rtol=1e-5)
    np.testing.assert_allclose(to_numpy(layer.scales), scales, rtol=1e-5)
    trained = {v.name for v in layer.trainable_variables}
    of_grid = {"scales"} if kind.bits < 8 else set()
    assert trained == {"codes", "basis", "offset"} | of_grid


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
@pytest.mark.parametrize("quantization", ["int8", "int4", "int2"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_quantizing_a_trained_layer_finds_better_coordinates(
    quantization, activation
):
    layer = make_layer(None, activation=activation)
    # Columns of very different importance.
    layer.basis.assign(
        to_numpy(layer.basis) * np.geomspace(1, 30, RANK)[:, None]
    )
    table = to_numpy(layer.embeddings)
    of_its_codes = to_numpy(
        format_of(quantization).round(
            to_numpy(layer.activation(layer.codes)),
            *format_of(quantization).grid(layer.activation(layer.codes)),
        )
    )
    plain = of_its_codes @ to_numpy(layer.basis) + to_numpy(layer.offset)
    layer.quantize(quantization)
    lost = lost_share(table, to_numpy(layer.embeddings))
    if quantization == "int8":
        assert lost < LOSS["int8"]
    else:
        assert lost < 0.8 * lost_share(table, plain)
    # The codes lie on their levels, so that nothing changes by a training step
    # of a rate of zero.
    features = to_numpy(layer.activation(layer.codes))
    np.testing.assert_allclose(
        round_in_numpy(
            features,
            to_numpy(layer.center),
            to_numpy(layer.scales),
            layer.format,
        ),
        features,
        atol=1e-5,
    )


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantizing_twice_replaces_the_first():
    layer = make_layer(None)
    layer.quantize("int8")
    layer.quantize("int4")
    assert layer.quantization == "int4" and layer.scales.shape == (ROWS, 1)
    assert [v.name for v in layer.variables].count("scales") == 1
    layer.quantize("int8")
    assert layer.scales.shape == (1, RANK)


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_quantizing_keeps_other_activations_and_lora():
    layer = make_layer(None, activation="tanh")
    codes = to_numpy(layer.codes)
    layer.quantize("int4")
    np.testing.assert_array_equal(to_numpy(layer.codes), codes)
    layer = make_layer(None)
    layer.enable_lora(2)
    layer.lora_codes_b.assign(ops.ones((2, RANK)))
    table = to_numpy(layer.embeddings)
    layer.quantize("int8")
    assert lost_share(table, to_numpy(layer.embeddings)) < 1e-3
    layer.quantize("int2")
    # What LoRA adapts stays frozen, the scales too.
    trained = {v.name for v in layer.trainable_variables}
    assert trained == {"lora_codes_a", "lora_codes_b"}


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
@pytest.mark.parametrize("use_bias", [True, False])
def test_another_format_beside_lora_keeps_the_table(use_bias):
    """One that was made from a table, whose basis is a rotated one."""
    table = np.random.default_rng(0).normal(size=(ROWS, COLUMNS))
    layer = DistilledEmbedding.from_embedding(
        table,
        rank=RANK,
        quantization="int4",
        use_bias=use_bias,
        activation=None,
    )
    layer.enable_lora(2)
    before = to_numpy(layer.embeddings)
    layer.quantize("int8")
    assert lost_share(before, to_numpy(layer.embeddings)) < 1e-3


@pytest.mark.filterwarnings("ignore:Layer InputLayer")  # is not quantized
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("how", ["quantize", "quantize a model", "dtype"])
def test_every_way_to_quantize_is_the_same(quantization, how, tmp_path):
    if how == "dtype":
        keras.utils.set_random_seed(0)
        expected = make_layer(quantization)
        layer = make_layer(None, dtype=f"{quantization}_from_float32")
        center, scales = layer.format.grid(ops.relu(layer.codes))
        layer.center.assign(center)
        layer.scales.assign(scales)
    else:
        expected, layer = make_layer(None), make_layer(None)
        expected.quantize(quantization)
        whole = make_model(layer) if how == "quantize a model" else layer
        whole.quantize(quantization)
    assert layer.quantization == quantization
    assert layer.dtype_policy.name == "float32"
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    assert layer.get_config() == expected.get_config()
    ids = random_ids(ROWS)
    np.testing.assert_array_equal(layer(ids), expected(ids))

    model = make_model(layer)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fresh = keras.Model.from_config(model.get_config())
    fresh.load_weights(tmp_path / "model.weights.h5")
    for copy in (loaded, fresh):
        assert copy.get_layer("tokens").quantization == quantization
        np.testing.assert_array_equal(copy(ids), model(ids))


def test_a_model_computes_anew_after_it_is_quantized():
    layer = make_layer(None)
    model = make_model(layer)
    ids = random_ids(ROWS)
    before = model.predict(ids, verbose=0)
    with pytest.warns(UserWarning, match="Layer InputLayer"):
        model.quantize("int8")
    after = model.predict(ids, verbose=0)
    layer = make_layer(None)
    layer.quantize("int8")
    expected = make_model(layer).predict(ids, verbose=0)
    np.testing.assert_array_equal(after, expected)
    assert 0 < np.abs(after - before).max() < 0.02 * np.abs(before).max()


def test_subclasses_are_quantized_like_the_layer():
    class Scaled(DistilledEmbedding):
        def call(self, inputs, reverse=False):
            return 2.0 * super().call(inputs, reverse=reverse)

    layer = Scaled(ROWS, COLUMNS, RANK)
    layer.build()
    layer.set_weights(make_layer(None).get_weights())
    with pytest.warns(UserWarning, match="Layer InputLayer"):
        make_model(layer).quantize("int8")
    plain, ids = make_layer(None), random_ids(ROWS)
    plain.quantize("int8")
    np.testing.assert_allclose(
        to_numpy(layer(ids)), 2 * to_numpy(plain(ids)), rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_other_modes_are_refused():
    layer = make_layer(None)
    with pytest.raises(NotImplementedError, match="mode='float8'$"):
        layer.quantize("float8")
    with pytest.raises(ValueError, match="mode=int7"):
        layer.quantize("int7")
    for mode in ("int8", "int4", "int2"):
        with pytest.raises(ValueError, match="isn't yet built"):
            DistilledEmbedding(10, 8, 2).quantize(mode)
    # Keras warns and leaves the layer alone.
    with pytest.warns(UserWarning, match="'int8', 'int4', 'int2'"):
        make_model(layer).quantize("float8")
    with pytest.raises(NotImplementedError, match="mode='float8'$"):
        DistilledEmbedding(10, 8, 2, dtype="float8_from_float32")
    assert layer.quantization is None


def test_a_format_says_how_it_rounds():
    layer = make_layer(None)
    config = keras.quantizers.Int8QuantizationConfig(
        weight_quantizer=keras.quantizers.AbsMaxQuantizer(axis=0)
    )
    with pytest.raises(ValueError, match=r"config\.weight_quantizer="):
        layer.quantize("int8", config=config)
    assert layer.quantization is None
    config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=None)
    layer.quantize("int8", config=config)
    assert layer.quantization == "int8"


# In training


@QUANTIZATION
@pytest.mark.parametrize("jit_compile", [False, True])
def test_distiller_trains_the_rounded_student(quantization, jit_compile):
    teacher = tied_model(ROWS, COLUMNS)
    student = compress(teacher, rank=6, quantization=quantization, verbose=0)
    layer = student.get_layer("tokens")
    assert layer.quantization == quantization
    # From where the tables are not already as near as they can be.
    layer.basis.assign(0.7 * to_numpy(layer.basis))
    distiller = Distiller(
        teacher,
        student,
        [EmbeddingDistillation(), LogitsDistillation()],
        student_loss_weight=0.0,
    )
    distiller.compile(keras.optimizers.Adam(1e-3), jit_compile=jit_compile)
    ids = random_ids(ROWS, (8, 5))
    before = distiller.evaluate(ids, verbose=0, return_dict=True)
    distiller.fit(ids, epochs=8, verbose=0)
    after = distiller.evaluate(ids, verbose=0, return_dict=True)
    assert after["loss"] < before["loss"]
    # The loss is of the rounded table.
    table = to_numpy(teacher.get_layer("tokens").embeddings)
    rounded = to_numpy(layer.embeddings)
    expected = np.square(table - rounded).sum(-1).mean()
    found = after["embedding_distillation_loss"]
    assert found == pytest.approx(expected, rel=1e-3)
