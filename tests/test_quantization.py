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
from keras_distilled_embedding.quantization import BLOCK
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import round_codes
from keras_distilled_embedding.quantization import round_in_place
from keras_distilled_embedding.quantization import round_table

ROUNDING = pytest.mark.parametrize("rounding", ["int8", "int4"])
# Share of the table's energy around its mean that rounding may cost.
LOSS = {"int8": 2e-4, "int4": 2e-2}


def factors(rows=200, rank=9, columns=24, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1, 20, rank)
    codes = np.maximum(rng.normal(size=(rows, rank)), 0) * scale
    basis = rng.normal(size=(rank, columns))
    return codes.astype("float32"), basis.astype("float32")


def to_numpy(x):
    return ops.convert_to_numpy(x)


@ROUNDING
@pytest.mark.parametrize("rank", [1, 9, 24])
def test_rounded_codes_stand_for_the_table(rounding, rank):
    codes, basis = factors(rank=rank)
    integers, scales, new_basis, offset = map(
        to_numpy, round_codes(codes, basis, rounding)
    )
    np.testing.assert_array_equal(integers, np.round(integers))
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}[rounding]
    assert low <= integers.min() and integers.max() <= high
    if rounding == "int8":
        assert integers.shape == (200, rank) and scales.shape == (1, 1)
        # Each column uses all integers.
        assert (np.abs(integers).max(0) == 127).all()
    else:
        assert integers.shape == (200, BLOCK) and scales.shape == (200, 1)
        # As they are stored.
        np.testing.assert_array_equal(
            scales, scales.astype("float16").astype("float32")
        )
    values = integers * np.repeat(
        scales, integers.shape[1] // scales.shape[1], 1
    )
    np.testing.assert_array_equal(
        to_numpy(dequantize(integers, scales)), values
    )
    table = codes @ basis
    lost = np.square(values @ new_basis + offset - table).sum()
    assert lost < LOSS[rounding] * np.square(table - table.mean(0)).sum()


@ROUNDING
def test_coordinates_alone_cost_nothing(rounding, monkeypatch):
    """What is lost is lost by rounding."""
    from keras_distilled_embedding import quantization as module

    monkeypatch.setattr(
        module,
        "_round",
        lambda values, rounding: (values, ops.ones((1, 1))),
    )
    codes, basis = factors()
    values, _, new_basis, offset = map(
        to_numpy, round_codes(codes, basis, rounding)
    )
    np.testing.assert_allclose(
        values @ new_basis + offset, codes @ basis, rtol=1e-3, atol=1e-3
    )


@ROUNDING
def test_in_place_is_the_same_table(rounding):
    codes, basis = factors()
    integers, scales, new_basis, offset = round_codes(codes, basis, rounding)
    stored = to_numpy(dequantize(integers, scales)) @ to_numpy(new_basis)
    trained = to_numpy(round_in_place(codes, basis, rounding)) @ basis
    np.testing.assert_allclose(
        trained, stored + to_numpy(offset), rtol=1e-3, atol=2e-3
    )
    assert np.abs(trained - codes @ basis).max() > 1e-2


@ROUNDING
def test_degenerate_codes(rounding):
    """Columns of one number, rows of zeros, a basis without full rank."""
    codes, basis = factors(rank=4)
    codes[:, 1], codes[7], basis[3] = 2.5, 0.0, basis[2]
    integers, scales, new_basis, offset = map(
        to_numpy, round_codes(codes, basis, rounding)
    )
    values = to_numpy(dequantize(integers, scales)) @ new_basis + offset
    assert np.isfinite(values).all()
    table = codes @ basis
    lost = np.square(values - table).sum() / np.square(table).sum()
    assert lost < LOSS[rounding]


@ROUNDING
def test_whole_table(rounding):
    table = factors()[0] @ factors()[1]
    integers, scales = round_table(table, rounding)
    values = to_numpy(dequantize(integers, scales))[:, : table.shape[1]]
    lost = np.square(values - table).sum() / np.square(table).sum()
    assert 0 < lost < LOSS[rounding]
    zeros = to_numpy(dequantize(*round_table(0 * table, rounding)))
    np.testing.assert_array_equal(zeros, 0)


# In the layer


def make_layer(rounding, **options):
    layer = DistilledEmbedding(200, 24, 9, quantization=rounding, **options)
    layer.build()
    codes, basis = factors()
    layer.codes.assign(codes - 0.3)
    layer.basis.assign(basis)
    return layer


@ROUNDING
def test_layer_computes_with_rounded_codes(rounding):
    layer, plain = make_layer(rounding), make_layer(None)
    codes = np.maximum(to_numpy(layer.codes), 0)
    basis = to_numpy(layer.basis)
    table = to_numpy(round_in_place(codes, basis, rounding)) @ basis
    ids = np.array([[3, 199, 0], [7, 7, 100]])
    np.testing.assert_allclose(
        to_numpy(layer(ids)), table[ids], rtol=1e-4, atol=1e-4
    )
    hidden = np.random.default_rng(1).normal(size=(2, 24)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(layer(hidden, reverse=True)),
        hidden @ table.T,
        rtol=1e-3,
        atol=1e-2,
    )
    np.testing.assert_allclose(
        to_numpy(layer.embeddings), table, rtol=1e-4, atol=1e-4
    )
    assert np.abs(to_numpy(plain.embeddings) - table).max() > 1e-2
    folded = layer.with_activation_applied()
    np.testing.assert_allclose(
        to_numpy(folded.embeddings), table, rtol=1e-4, atol=1e-4
    )


@ROUNDING
def test_gradients_are_straight_through(rounding):
    """Those of the layer without rounding, at its rounded codes."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("gradients of eager code")
    import tensorflow as tf

    layer = make_layer(rounding)
    ids = np.array([3, 5, 3])
    target = np.random.default_rng(1).normal(size=(3, 24)).astype("float32")
    with tf.GradientTape() as tape:
        loss = ops.sum(ops.multiply(layer(ids), target))
    codes, basis = tape.gradient(loss, [v.value for v in layer.weights])
    folded = layer.with_activation_applied()
    expected = np.zeros((200, 9), "float32")
    np.add.at(expected, ids, target @ to_numpy(layer.basis).T)
    expected *= to_numpy(layer.codes) > 0
    np.testing.assert_allclose(to_numpy(codes), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        to_numpy(basis),
        to_numpy(folded.codes)[ids].T @ target,
        rtol=1e-3,
        atol=1e-3,
    )


def test_configuration():
    layer = make_layer("int4")
    copy = DistilledEmbedding.from_config(layer.get_config())
    assert copy.quantization == "int4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rounding": "int2"},
            r"`rounding`.*'int8', 'int4'.*quantization='int2'",
        ),
        ({"rounding": "int8", "hidden_dim": 3}, "hidden_dim=3"),
    ],
)
def test_bad_roundings(options, message):
    with pytest.raises(ValueError, match=message):
        DistilledEmbedding(20, 8, 2, **options)


# In training


def make_teacher():
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(200, 24, name="tokens")
    hidden = keras.layers.Dense(24, "tanh")(embedding(ids))
    return keras.Model(ids, embedding(hidden, reverse=True))


@ROUNDING
@pytest.mark.parametrize("jit_compile", [False, True])
def test_distiller_trains_the_rounded_student(rounding, jit_compile):
    teacher = make_teacher()
    student = compress(teacher, rank=6, verbose=0)
    distiller = Distiller(
        teacher,
        student,
        [EmbeddingDistillation(), LogitsDistillation()],
        student_loss_weight=0.0,
        quantization=rounding,
    )
    assert student.get_layer("tokens").quantization == rounding
    distiller.compile(keras.optimizers.Adam(1e-3), jit_compile=jit_compile)
    ids = np.random.default_rng(0).integers(200, size=(8, 5))
    before = distiller.evaluate(ids, verbose=0, return_dict=True)
    distiller.fit(ids, epochs=20, verbose=0)
    after = distiller.evaluate(ids, verbose=0, return_dict=True)
    assert after["loss"] < before["loss"]
    # The loss is of the rounded table.
    table = to_numpy(teacher.get_layer("tokens").embeddings)
    rounded = to_numpy(student.get_layer("tokens").embeddings)
    expected = np.square(table - rounded).sum(-1).mean()
    found = after["embedding_distillation_loss"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_distiller_refuses_what_cannot_be_rounded():
    teacher = make_teacher()
    student = compress(teacher, rank=6, verbose=0)
    loss = [EmbeddingDistillation()]
    with pytest.raises(ValueError, match="quantization='int3'"):
        Distiller(teacher, student, loss, quantization="int3")
    student = compress(teacher, rank=4, hidden_dim=8, verbose=0)
    with pytest.raises(ValueError, match=r"hidden_dim.*\['tokens'\]"):
        Distiller(teacher, student, loss, quantization="int8")
