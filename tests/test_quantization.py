"""Codes rounded to small integers, in training and in files."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import Distiller
from keras_distilled_embedding import EmbeddingDistillation
from keras_distilled_embedding import LogitsDistillation
from keras_distilled_embedding import compress
from keras_distilled_embedding import quantization as module
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.quantization import check_quantization
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_codes
from keras_distilled_embedding.quantization import round_factors
from keras_distilled_embedding.quantization import round_table
from tests.shared import lost_share
from tests.shared import random_ids
from tests.shared import tied_model
from tests.shared import to_numpy

ROWS, RANK, COLUMNS = 200, 9, 24
QUANTIZATION = pytest.mark.parametrize("quantization", ["int8", "int4"])
# Share of the table's energy around its mean that rounding may cost.
LOSS = {"int8": 2e-4, "int4": 2e-2}
RANGE = {"int8": (-127, 127), "int4": (-8, 7)}


def make_factors(rank=RANK, seed=0):
    """Features, basis and offset of very different columns."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1, 20, rank)
    features = np.maximum(rng.normal(size=(ROWS, rank)), 0) * scale
    basis, offset = rng.normal(size=(rank, COLUMNS)), rng.normal(size=COLUMNS)
    return tuple(a.astype("float32") for a in (features, basis, offset))


def table_of(rounded):
    """The equation of `RoundedTable` in NumPy."""
    integers, scales, basis, offset = map(to_numpy, rounded)
    repeats = integers.shape[1] // scales.shape[1]
    return integers * np.repeat(scales, repeats, axis=1) @ basis + offset


def lost_around_the_mean(table, found):
    mean = table.mean(0)
    return lost_share(table - mean, found - mean)


# Formats


def test_formats():
    assert {name: f.bits for name, f in FORMATS.items()} == {
        "int8": 8,
        "int4": 4,
    }
    assert FORMATS["int8"].stored_columns(33) == 33
    assert [FORMATS["int4"].stored_columns(k) for k in (1, 32, 33)] == [
        32,
        32,
        64,
    ]


@QUANTIZATION
@pytest.mark.parametrize("columns", [1, 9, 32, 70])
def test_packed_bytes(quantization, columns):
    """Unpacked here number by number, the low bits first."""
    kind = FORMATS[quantization]
    stored = kind.stored_columns(columns)
    rng = np.random.default_rng(0)
    low, high = RANGE[quantization]
    integers = rng.integers(low, high + 1, size=(6, stored)).astype("int8")
    packed = kind.pack(integers)
    numbers = []
    for byte in packed.tolist():
        parts = [byte] if quantization == "int8" else [byte & 15, byte >> 4]
        sign = 2 ** (kind.bits - 1)
        numbers += [n - 2 * sign if n >= sign else n for n in parts]
    np.testing.assert_array_equal(np.reshape(numbers, (6, stored)), integers)
    scales = 4 if quantization == "int8" else 6 * stored // 32 * 2
    assert kind.table_bytes(6, columns) == packed.nbytes + scales


def test_a_scale_that_clips_is_taken_where_it_is_better():
    values = np.random.default_rng(0).normal(size=(50, 64)).astype("float32")
    values[7] = 0.0
    integers, scales = map(to_numpy, FORMATS["int4"].round(values))
    blocks = values.reshape(50, 2, 32)
    # Of the largest number, in the eight bits that a scale has.
    plain = np.abs(blocks).max(-1, keepdims=True) * np.float32(1 / 7)
    plain = np.maximum(plain.astype("bfloat16").astype("float32"), 2.0**-13)
    assert (scales[..., None] <= plain).all()
    without = np.clip(np.round(blocks / plain), -8, 7) * plain
    without = np.square(without - blocks).sum(-1)
    found = integers.reshape(50, 2, 32) * scales[..., None]
    errors = np.square(found - blocks).sum(-1)
    assert (errors <= without + 1e-6).all()
    assert errors.sum() < 0.95 * without.sum()
    np.testing.assert_array_equal(found[7], 0)


@pytest.mark.parametrize("value", ["int3", "INT8", 8, "auto", ""])
def test_unknown_formats_are_refused(value):
    for known in (None, *FORMATS):
        check_quantization("quantization", known)
    with pytest.raises(
        ValueError, match=r"`argument`.*'int8', 'int4'.*argument="
    ):
        check_quantization("argument", value)
    with pytest.raises(ValueError, match=f"quantization={value!r}$"):
        DistilledEmbedding(20, 8, 2, quantization=value)


# Factors


@QUANTIZATION
@pytest.mark.parametrize("rank", [1, RANK, COLUMNS, 40])
@pytest.mark.parametrize("with_offset", [True, False])
def test_rounded_factors_stand_for_the_table(quantization, rank, with_offset):
    features, basis, offset = make_factors(rank)
    table = features @ basis
    if with_offset:
        table += offset
    rounded = round_factors(
        features, basis, offset if with_offset else None, quantization
    )
    integers, scales = map(to_numpy, rounded[:2])
    np.testing.assert_array_equal(integers, np.round(integers))
    low, high = RANGE[quantization]
    assert low <= integers.min() and integers.max() <= high
    stored = FORMATS[quantization].stored_columns(rank)
    if quantization == "int8":
        assert integers.shape == (ROWS, rank) and scales.shape == (1, 1)
        # Each column uses all integers.
        assert (np.abs(integers).max(0) == 127).all()
    else:
        assert integers.shape == (ROWS, stored)
        assert scales.shape == (ROWS, stored // 32)
        assert not integers[:, rank:].any()
        # As they are stored.
        np.testing.assert_array_equal(
            scales, scales.astype("float16").astype("float32")
        )
    assert lost_around_the_mean(table, table_of(rounded)) < LOSS[quantization]
    np.testing.assert_allclose(
        to_numpy(dequantize(integers, scales)),
        integers * np.repeat(scales, integers.shape[1] // scales.shape[1], 1),
    )


@QUANTIZATION
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_tables_of_any_size_lose_the_same_share(quantization, scale):
    features, basis, offset = make_factors()
    table = features @ basis + offset
    plain, scaled = (
        round_factors(features, size * basis, size * offset, quantization)
        for size in (1.0, scale)
    )
    assert np.isfinite(to_numpy(scaled.scales).astype("float16")).all()
    assert lost_share(table, table_of(scaled) / scale) == pytest.approx(
        lost_share(table, table_of(plain)), rel=0.05
    )


@QUANTIZATION
def test_coordinates_alone_cost_nothing(quantization):
    """What is lost is lost by rounding."""
    features, basis, _ = make_factors()
    center, forth, back = map(
        to_numpy,
        module._coordinates(features, basis, FORMATS[quantization]),
    )
    np.testing.assert_allclose(
        (features - center) @ forth @ (back @ basis) + center @ basis,
        features @ basis,
        rtol=1e-3,
        atol=1e-3,
    )


@QUANTIZATION
def test_round_codes_gives_the_same_table(quantization):
    features, basis, offset = make_factors()
    stored = table_of(round_factors(features, basis, offset, quantization))
    codes = to_numpy(round_codes(features, basis, quantization))
    trained = codes @ basis + offset
    np.testing.assert_allclose(trained, stored, rtol=1e-3, atol=2e-3)
    assert np.abs(trained - features @ basis - offset).max() > 1e-2


@QUANTIZATION
@pytest.mark.parametrize("case", ["some", "one row for all", "all zeros"])
def test_degenerate_factors(quantization, case):
    """Columns of one number, rows of zeros, a basis without full rank."""
    features, basis, offset = make_factors(rank=4)
    features[:, 1], features[7], basis[3] = 2.5, 0.0, basis[2]
    if case == "one row for all":
        features[:] = features[0]
    if case == "all zeros":
        features[:], basis[:], offset[:] = 0.0, 0.0, 0.0
    table = features @ basis + offset
    found = table_of(round_factors(features, basis, offset, quantization))
    trained = to_numpy(round_codes(features, basis, quantization)) @ basis
    for result in (found, trained + offset):
        assert np.isfinite(result).all()
        if case == "some":
            assert lost_share(table, result) < LOSS[quantization]
        else:  # what all rows have in common is not rounded
            np.testing.assert_allclose(result, table, rtol=1e-4, atol=1e-4)


@QUANTIZATION
def test_whole_table(quantization):
    features, basis, _ = make_factors()
    table = features @ basis
    table[11] = 0.0
    found = to_numpy(dequantize(*round_table(table, quantization)))
    found, padding = np.split(found, [COLUMNS], axis=1)
    assert 0 < lost_share(table, found) < LOSS[quantization]
    for zeros in (
        padding,
        found[11],
        to_numpy(dequantize(*round_table(0 * table, quantization))),
    ):
        np.testing.assert_array_equal(zeros, 0)


# In the layer


def make_layer(quantization, **options):
    options = {"quantization": quantization, "name": "tokens", **options}
    layer = DistilledEmbedding(ROWS, COLUMNS, RANK, **options)
    layer.build()
    for variable, value in zip(layer.weights, make_factors()):
        variable.assign(value)
    layer.codes.assign(make_factors()[0] - 0.3)
    return layer


def make_model(layer):
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, layer(layer(ids), reverse=True))


@QUANTIZATION
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_computes_with_rounded_codes(quantization, use_bias):
    layer = make_layer(quantization, use_bias=use_bias)
    features = np.maximum(to_numpy(layer.codes), 0)
    basis = to_numpy(layer.basis)
    table = to_numpy(round_codes(features, basis, quantization)) @ basis
    if use_bias:
        table += to_numpy(layer.offset)
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


@QUANTIZATION
def test_gradients_are_straight_through(quantization):
    """Those of the layer without rounding, at its rounded codes."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients of eager code")
    import tensorflow as tf

    layer = make_layer(quantization)
    ids = np.array([3, 5, 3])
    target = np.random.default_rng(1).normal(size=(3, COLUMNS))
    target = target.astype("float32")
    with tf.GradientTape() as tape:
        loss = ops.sum(ops.multiply(layer(ids), target))
    codes, basis, offset = tape.gradient(loss, [v.value for v in layer.weights])
    close = {"rtol": 1e-3, "atol": 1e-3}
    expected = np.zeros((ROWS, RANK), "float32")
    np.add.at(expected, ids, target @ to_numpy(layer.basis).T)
    expected *= to_numpy(layer.codes) > 0
    np.testing.assert_allclose(to_numpy(codes), expected, **close)
    features = ops.relu(layer.codes)
    rounded = to_numpy(round_codes(features, layer.basis, quantization))
    np.testing.assert_allclose(
        to_numpy(basis), rounded[ids].T @ target, **close
    )
    np.testing.assert_allclose(to_numpy(offset), target.sum(0), **close)


@pytest.mark.filterwarnings("ignore:Layer InputLayer")  # is not quantized
@QUANTIZATION
@pytest.mark.parametrize("how", ["quantize", "quantize a model", "dtype"])
def test_every_way_to_quantize_is_the_same(quantization, how, tmp_path):
    expected = make_layer(quantization)
    if how == "dtype":
        layer = make_layer(None, dtype=f"{quantization}_from_float32")
    else:
        layer = make_layer(None)
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
    expected = make_model(make_layer("int8")).predict(ids, verbose=0)
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
    ids = random_ids(ROWS)
    np.testing.assert_allclose(
        to_numpy(layer(ids)), 2 * to_numpy(make_layer("int8")(ids)), rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_other_modes_are_refused():
    layer = make_layer(None)
    with pytest.raises(NotImplementedError, match="mode='float8'$"):
        layer.quantize("float8")
    # Keras warns and leaves the layer alone.
    with pytest.warns(UserWarning, match="'int8', 'int4'"):
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
