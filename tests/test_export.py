"""Files for LiteRT, run by its interpreter and searched byte by byte."""

import json
import os
import re
import stat
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.export import ExportReport
from keras_distilled_embedding.export import export_litert
from keras_distilled_embedding.export import litert
from keras_distilled_embedding.layers import DistilledEmbedding

tf = pytest.importorskip("tensorflow")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

pytestmark = [
    # Keras's own, whenever it copies a variable to NumPy, as export does.
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't:DeprecationWarning"
    ),
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="the converter takes TensorFlow's saved models",
    ),
]

VOCABULARY, WIDTH, RANK = 211, 24, 5


def make_dense(**options):
    return keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens", **options
    )


def make_factorized(**options):
    return DistilledEmbedding(VOCABULARY, WIDTH, RANK, name="tokens", **options)


def make_model(embedding=None):
    """ids -> logits."""
    embedding = embedding or make_dense()
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = embedding(ids)
    x = keras.layers.Dense(embedding.output_dim, "relu", name="hidden")(x)
    x = keras.layers.Dropout(0.5)(x)
    return randomize(keras.Model(ids, embedding(x, reverse=True)))


def randomize(model):
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.5))
    return model


def make_ids(batch, length, vocabulary=VOCABULARY, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(vocabulary, size=(batch, length)).astype("int32")


def run(path, signature=None, **inputs):
    """The outputs of one signature by name, new shapes allowed."""
    runner = interpreter.Interpreter(str(path)).get_signature_runner(signature)
    return runner(**inputs)


def signature_names(path):
    return set(interpreter.Interpreter(str(path)).get_signature_list())


def builtin_operators_only(path):
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    assert codes
    return all(
        code.BuiltinCode() != schema.BuiltinOperator.CUSTOM
        and code.CustomCode() is None
        for code in codes
    )


def copies(path, array):
    """How often the bytes of a matrix, or of its transpose, are in a file."""
    content = path.read_bytes()
    array = ops.convert_to_numpy(array)
    return content.count(array.tobytes()) + content.count(array.T.tobytes())


def activated(layer, prefix=""):
    codes = ops.convert_to_numpy(getattr(layer, f"{prefix}codes"))
    return np.maximum(codes, 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.tflite"


def export(model, path, **options):
    return export_litert(model, path, verbose=False, **options)


# What the file computes, and holds


@pytest.mark.parametrize(
    "make_embedding",
    [
        make_dense,
        lambda: make_dense(tie_weights=False),
        make_factorized,
        lambda: make_factorized(activation=None),
        lambda: make_factorized(activation="tanh"),
        lambda: make_factorized(tie_weights=False),
        lambda: make_factorized(logit_soft_cap=3.0),
        lambda: make_factorized(use_bias=False),
        lambda: make_factorized(use_bias=False, logit_soft_cap=3.0),
        lambda: make_dense(logit_soft_cap=3.0),
    ],
    ids=[
        "dense",
        "dense-untied",
        "relu",
        "linear",
        "tanh",
        "untied",
        "soft-cap",
        "no-offset",
        "no-offset-soft-cap",
        "dense-soft-cap",
    ],
)
def test_outputs_equal_keras(make_embedding, path):
    model = make_model(make_embedding())
    report = export(model, path)
    for batch, length in ((1, 1), (3, 7)):
        ids = make_ids(batch, length)
        (logits,) = run(path, ids=ids).values()
        assert logits.shape == (batch, length, VOCABULARY)
        np.testing.assert_allclose(
            logits, model(ids), rtol=1e-5, atol=1e-5 * np.abs(logits).max()
        )
    assert builtin_operators_only(path)
    assert report.tables == {"tokens": 1}


def test_one_copy_of_a_dense_table(path):
    model = make_model()
    report = export(model, path)
    assert copies(path, model.get_layer("tokens").embeddings) == 1
    assert report.tables == {"tokens": 1}


@pytest.mark.parametrize("activation", ["relu", None])
def test_one_copy_of_a_compressed_table(activation, path):
    model = make_model()
    student = compress(
        model, rank=RANK, activation=activation, quantization=None, verbose=0
    )
    layer = student.get_layer("tokens")
    # Codes on both sides of zero, which training makes of positive ones.
    layer.codes.assign(np.random.default_rng(0).normal(size=layer.codes.shape))
    report = export(student, path)
    codes = ops.convert_to_numpy(layer.codes)
    if activation is None:
        assert copies(path, codes) == 1
    else:
        center = ops.convert_to_numpy(layer.center)
        assert copies(path, np.maximum(codes, 0) - center) == 1
        assert copies(path, codes) == 0
    assert copies(path, model.get_layer("tokens").embeddings) == 0
    assert report.tables == {"tokens": 1}


def test_one_copy_of_each_untied_table(path):
    model = make_model(make_factorized(tie_weights=False))
    export(model, path)
    layer = model.get_layer("tokens")
    for prefix in ("", "reverse_"):
        assert copies(path, activated(layer, prefix)) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_overhead(compressed, path):
    """A file is hardly larger than the weights in it."""
    model = make_model(
        keras.layers.ReversibleEmbedding(5000, 64, name="tokens")
    )
    if compressed:
        model = compress(model, 4.0, quantization=None, verbose=0)
    report = export(model, path)
    # The center of the codes is a part of the offset there.
    stored = [w for w in model.weights if not w.path.endswith("center")]
    assert len(stored) == len(model.weights) - compressed
    weights = sum(4 * int(np.prod(w.shape)) for w in stored)
    assert report.weights_bytes == weights
    assert report.bytes == path.stat().st_size
    assert report.overhead == path.stat().st_size / weights <= 1.05


def make_encoder_and_decoder(embedding):
    """Two models over one table, and the whole of which they are parts."""
    source = keras.Input((None,), dtype="int32", name="source")
    x = keras.layers.Dense(WIDTH, "relu", name="encoder")(embedding(source))
    encode = keras.Model(source, x, name="encode")
    states = keras.Input((None, WIDTH), name="states")
    target = keras.Input((None,), dtype="int32", name="target")
    context = keras.layers.GlobalAveragePooling1D(keepdims=True)(states)
    x = keras.layers.Add()([embedding(target), context])
    x = keras.layers.Dense(WIDTH, "relu", name="decoder")(x)
    logits = embedding(x, reverse=True)
    decode = keras.Model([target, states], logits, name="decode")
    whole = keras.Model([source, target], decode([target, encode(source)]))
    return randomize(whole), {"encode": encode, "decode": decode}


@pytest.mark.parametrize("make_embedding", [make_dense, make_factorized])
def test_signatures_share_a_table(make_embedding, path):
    model, parts = make_encoder_and_decoder(make_embedding())
    report = export(model, path, signatures=parts)
    assert set(report.signatures) == signature_names(path) == set(parts)
    source, target = make_ids(2, 5), make_ids(2, 3, seed=1)
    (states,) = run(path, "encode", source=source).values()
    (logits,) = run(path, "decode", target=target, states=states).values()
    expected = model([source, target])
    np.testing.assert_allclose(states, parts["encode"](source), atol=1e-5)
    np.testing.assert_allclose(
        logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )
    layer = parts["encode"].get_layer("tokens")
    table = (
        activated(layer)
        if isinstance(layer, DistilledEmbedding)
        else layer.embeddings
    )
    assert copies(path, table) == 1
    assert report.tables == {"tokens": 1}
    assert builtin_operators_only(path)


def test_one_part_alone(path):
    model, parts = make_encoder_and_decoder(make_factorized())
    part = {"encode": parts["encode"]}
    report = export(model, path, signatures=part)
    assert signature_names(path) == {"encode"}
    assert report.weights_bytes == sum(
        4 * int(np.prod(w.shape)) for w in parts["encode"].weights
    )


def test_default_signature(path):
    report = export(make_model(), path)
    assert report.signatures == ("serving_default",)
    assert signature_names(path) == {"serving_default"}


def test_names_of_inputs_and_outputs(path):
    first = keras.Input((None,), dtype="int32", name="zeta")
    second = keras.Input((None,), dtype="int32", name="alpha")
    embedding = make_factorized()
    x, y = embedding(first), embedding(second)
    outputs = {"omega": x - 2.0 * y, "beta": 3.0 * x + y}
    inputs = {"zeta": first, "alpha": second}
    model = randomize(keras.Model(inputs, outputs))
    export(model, path)
    data = {"zeta": make_ids(2, 3), "alpha": make_ids(2, 3, seed=1)}
    actual, expected = run(path, **data), model(data)
    assert set(actual) == {"omega", "beta"}
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


def test_several_inputs_and_outputs_in_order(path):
    model, _ = make_encoder_and_decoder(make_factorized())
    source, target = model.inputs
    model = keras.Model([source, target], [model.output, model.output * 2])
    export(model, path)
    data = [make_ids(2, 3), make_ids(2, 3, seed=1)]
    actual = run(path, source=data[0], target=data[1])
    for i, value in enumerate(model(data)):
        np.testing.assert_allclose(
            actual[f"output_{i}"], value, rtol=1e-4, atol=1e-4
        )


def test_sequential(path):
    model = randomize(
        keras.Sequential(
            [
                keras.Input((None,), dtype="int32", name="ids"),
                make_factorized(),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(3),
            ]
        )
    )
    export(model, path)
    ids = make_ids(3, 4)
    (outputs,) = run(path, ids=ids).values()
    np.testing.assert_allclose(outputs, model(ids), atol=1e-5)


def test_equal_tables_of_two_layers(path):
    ids = keras.Input((None,), dtype="int32", name="ids")
    options = {"embeddings_initializer": "ones"}
    x = keras.layers.Embedding(VOCABULARY, WIDTH, name="a", **options)(ids)
    y = keras.layers.Embedding(VOCABULARY, WIDTH, name="b", **options)(ids)
    report = export(keras.Model(ids, [x, y]), path)
    assert report.tables == {"a": 1, "b": 1}


def test_tables_of_one_name(path):
    inputs, outputs = [], []
    for i in range(2):
        ids = keras.Input((None,), dtype="int32")
        inner = keras.Model(ids, make_factorized()(ids), name=f"inner_{i}")
        inputs.append(keras.Input((None,), dtype="int32", name=f"ids_{i}"))
        outputs.append(inner(inputs[-1]))
    report = export(randomize(keras.Model(inputs, outputs)), path)
    assert report.tables == {"tokens": 1}


def test_model_is_left_as_it_is(path):
    model = make_model(make_factorized())
    model.compile("adam", "mse")
    ids = make_ids(2, 3)
    before = [ops.convert_to_numpy(v).copy() for v in model.variables]
    outputs = ops.convert_to_numpy(model(ids))
    config = model.get_config()
    export(model, path)
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_array_equal(outputs, model(ids))
    assert model.get_layer("tokens").activation is keras.activations.relu
    assert model.get_config() == config
    assert model.compiled


def test_a_quantized_or_adapted_layer_is_merged(path):
    layer = make_factorized()
    model = make_model(layer)
    layer.enable_lora(2)
    layer.lora_codes_b.assign(np.ones(layer.lora_codes_b.shape))
    export(model, path)
    ids = make_ids(2, 3)
    (logits,) = run(path, ids=ids).values()
    np.testing.assert_allclose(logits, model(ids), rtol=1e-4, atol=1e-4)


class Scaled(keras.layers.Embedding):
    """Which is not replaced, since its `call` may do anything."""

    def call(self, ids):
        return 2.0 * super().call(ids)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_an_embedding_with_a_call_of_its_own(quantization, path):
    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, Scaled(VOCABULARY, WIDTH, name="own")(ids))
    report = export(model, path, quantization=quantization)
    assert report.tables == {"own": 1}
    assert report.fidelity.relative_rms_error < 0.01
    assert "own (1 copy)" in str(report)


def test_a_table_that_is_read_beside_its_layer(path):
    embedding = make_dense()
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = embedding(ids)
    logits = ops.matmul(hidden, ops.transpose(embedding.embeddings))
    with pytest.raises(ValueError, match="'tokens' cannot.*`reverse=True`"):
        export(keras.Model(ids, logits), path)
    assert not path.exists()


class Projecting(keras.layers.Embedding):
    """Of whose table the converter makes a second copy, times a vector."""

    def call(self, inputs):
        if keras.backend.is_int_dtype(inputs.dtype):
            return super().call(inputs)
        scales = np.arange(1.0, WIDTH + 1, dtype="float32")
        return ops.matmul(inputs * scales, ops.transpose(self.embeddings))

    def compute_output_spec(self, inputs):
        if keras.backend.is_int_dtype(inputs.dtype):
            return super().compute_output_spec(inputs)
        return keras.KerasTensor((*inputs.shape[:-1], self.input_dim))


def test_a_second_copy_that_is_not_equal(path):
    embedding = Projecting(VOCABULARY, WIDTH, name="own")
    ids = keras.Input((5,), batch_size=1, dtype="int32", name="ids")
    model = randomize(keras.Model(ids, embedding(ops.tanh(embedding(ids)))))
    with pytest.raises(RuntimeError, match="more than once.*'own': 2"):
        export(model, path)
    assert not path.exists()


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
@pytest.mark.parametrize(
    "make_embedding", [make_dense, lambda: make_dense(logit_soft_cap=3.0)]
)
def test_factors_around_a_table_make_no_copy_of_it(
    make_embedding, quantization, path
):
    """Of normalizations before, and of temperatures after a projection."""
    embedding = make_embedding()
    ids = keras.Input((5,), batch_size=1, dtype="int32", name="ids")
    x = keras.layers.RMSNormalization()(embedding(ids))
    model = randomize(keras.Model(ids, 0.5 * embedding(x, reverse=True)))
    report = export(model, path, quantization=quantization)
    assert report.tables == {"tokens": 1}
    # In few bits with a scale a row, a basis that stays a float, being small,
    # once more transposed, and an offset.
    size = {
        None: 4 * VOCABULARY * WIDTH,
        "int8": VOCABULARY * WIDTH,
        "int4": VOCABULARY * (16 + 2) + 2 * 4 * 32 * WIDTH + 4 * WIDTH,
        "int2": VOCABULARY * (28 // 4 + 12) + 2 * 4 * 28 * WIDTH + 4 * WIDTH,
    }[quantization]
    assert path.stat().st_size < 1.1 * size + 4_000
    allowed = {None: 1e-5, "int8": 0.03, "int4": 0.2, "int2": 0.5}[quantization]
    assert report.fidelity.relative_rms_error < allowed


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
def test_tables_that_equal_their_transpose_byte_by_byte(quantization, path):
    """Of one column, of zeros, and codes of rank 1."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    column = keras.layers.Embedding(VOCABULARY, 1, name="column")
    zeros = keras.layers.Embedding(
        VOCABULARY, WIDTH, embeddings_initializer="zeros", name="zeros"
    )
    rank_1 = DistilledEmbedding(VOCABULARY, WIDTH, 1, name="rank_1")
    outputs = column(ids) + zeros(ids) + rank_1(ids)
    report = export(keras.Model(ids, outputs), path, quantization=quantization)
    assert report.tables == {"column": 1, "zeros": 1, "rank_1": 1}
    allowed = {None: 1e-5, "int8": 0.15, "int4": 0.15, "int2": 0.4}
    assert report.fidelity.relative_rms_error < allowed[quantization]


def test_the_converter_does_not_see_tables(path, monkeypatch):
    """Which would take many times their size in its memory."""
    sizes = []
    convert = litert.convert

    def watched(*args, **kwargs):
        content = convert(*args, **kwargs)
        sizes.append(len(content))
        return content

    monkeypatch.setattr(litert, "convert", watched)
    embedding = keras.layers.ReversibleEmbedding(20_000, WIDTH, name="tokens")
    report = export(make_model(embedding), path)
    assert report.bytes > 4 * 20_000 * WIDTH
    assert sizes[0] < 20_000


# Sizes of inputs, and their names


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.LSTM(8),
        keras.layers.GRU(8),
        keras.layers.SimpleRNN(8, return_sequences=True),
        keras.layers.Bidirectional(keras.layers.LSTM(8)),
    ],
    ids=["LSTM", "GRU", "SimpleRNN", "bidirectional"],
)
@pytest.mark.parametrize("mask_zero", [False, True])
def test_recurrent_layers_need_a_batch_size(layer, mask_zero, path):
    layer = type(layer).from_config(layer.get_config())
    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layer(make_factorized(mask_zero=mask_zero)(ids))
    model = randomize(keras.Model(ids, keras.layers.Dense(2)(x)))
    export(model, path, batch_size=3)
    batch = make_ids(3, 12)
    batch[:, 7:] = 0
    (outputs,) = run(path, ids=batch).values()
    np.testing.assert_allclose(outputs, model(batch), rtol=1e-4, atol=1e-5)
    assert builtin_operators_only(path)


def test_a_recurrent_layer_without_a_batch_size(path):
    ids = keras.Input((12,), dtype="int32", name="ids")
    model = keras.Model(ids, keras.layers.LSTM(8)(make_factorized()(ids)))
    with pytest.raises(
        ValueError, match="or a `batch_size` if it has recurrent"
    ):
        export(model, path)
    assert not path.exists()


class ProjectingCell(keras.layers.Layer):
    """A recurrent cell that projects onto a table at every step."""

    def __init__(self, embedding, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding
        self.state_size, self.output_size = WIDTH, VOCABULARY

    def build(self, shape):
        self.embedding.build()

    def call(self, inputs, states):
        state = 0.5 * (inputs + states[0])
        return self.embedding(state, reverse=True), [state]

    def get_config(self):
        embedding = keras.saving.serialize_keras_object(self.embedding)
        return {**super().get_config(), "embedding": embedding}

    @classmethod
    def from_config(cls, config):
        embedding = keras.saving.deserialize_keras_object(config["embedding"])
        return cls(**{**config, "embedding": embedding})


def test_a_table_inside_a_loop(path):
    """Is refused, and works where the loop is unrolled."""

    def make(unroll):
        embedding = make_factorized()
        ids = keras.Input((6,), dtype="int32", name="ids")
        cell = ProjectingCell(embedding)
        x = keras.layers.RNN(cell, unroll=unroll)(embedding(ids))
        return randomize(keras.Model(ids, x))

    with pytest.raises(ValueError, match="'tokens' cannot.*Unroll the loop"):
        export(make(False), path, batch_size=2)
    assert not path.exists()
    report = export(make(True), path, batch_size=2)
    assert report.tables == {"tokens": 1}
    assert report.fidelity.relative_rms_error < 1e-5


@pytest.mark.parametrize(
    ("batch_size", "sequence_length", "shape"),
    [(2, 6, [2, 6]), (2, None, [2, -1]), (None, 6, [-1, 6])],
)
def test_sizes_in_the_file(batch_size, sequence_length, shape, path):
    export(
        make_model(make_factorized()),
        path,
        batch_size=batch_size,
        sequence_length=sequence_length,
    )
    (details,) = interpreter.Interpreter(str(path)).get_input_details()
    assert list(details["shape_signature"]) == shape


@pytest.mark.parametrize("argument", ["batch_size", "sequence_length"])
@pytest.mark.parametrize("value", [0, -1, "4"])
def test_bad_sizes(argument, value, path):
    with pytest.raises(
        ValueError, match=f"`{argument}`.*Received: .*{value!r}"
    ):
        export(make_model(), path, **{argument: value})


def test_nested_inputs_are_named_as_keras_names_them(path):
    title, body = (
        keras.Input((4,), dtype="int32", name=name)
        for name in ("title", "body")
    )
    numbers = keras.Input((3,), name="numbers")
    embedding, pool = make_factorized(), keras.layers.GlobalAveragePooling1D()
    x = [pool(embedding(title)), pool(embedding(body)), numbers]
    outputs = keras.layers.Dense(2)(keras.layers.Concatenate()(x))
    model = randomize(
        keras.Model({"text": [title, body], "numbers": numbers}, outputs)
    )
    data = {
        "title": make_ids(2, 4),
        "body": make_ids(2, 4, seed=1),
        "numbers": np.random.default_rng(0).normal(size=(2, 3)),
    }
    data["numbers"] = data["numbers"].astype("float32")
    batch = {"text": [data["title"], data["body"]], "numbers": data["numbers"]}
    report = export(model, path, fidelity_inputs=[batch, data])
    assert report.fidelity.num_inputs == 2
    assert report.fidelity.relative_rms_error < 1e-5
    (found,) = run(path, **data).values()
    np.testing.assert_allclose(found, model(batch), rtol=1e-4, atol=1e-5)


def test_names_of_inputs_with_spaces(path):
    first = keras.Input((4,), dtype="int32", name="user id")
    second = keras.Input((4,), dtype="int32", name="Größe")
    embedding = make_factorized()
    model = randomize(
        keras.Model([first, second], embedding(first) - embedding(second))
    )
    data = [make_ids(2, 4), make_ids(2, 4, seed=1)]
    report = export(model, path, fidelity_inputs=[data])
    assert report.fidelity.relative_rms_error < 1e-5
    (found,) = run(path, user_id=data[0], Gr__e=data[1]).values()
    np.testing.assert_allclose(found, model(data), rtol=1e-4, atol=1e-5)
    third = keras.Input((4,), dtype="int32", name="user_id")
    model = keras.Model([first, third], embedding(first) + embedding(third))
    with pytest.raises(
        ValueError, match=r"different names.*'user id', 'user_id'"
    ):
        export(model, path)


def test_strings_and_preprocessing_in_the_model(path):
    lookup = keras.layers.StringLookup(vocabulary=[f"u{i}" for i in range(50)])
    user = keras.Input((), dtype="string", name="user")
    embedding = DistilledEmbedding(51, WIDTH, RANK, name="tokens")
    model = keras.Model(user, embedding(lookup(user)))
    words = np.array(["u3", "nobody"], object)
    report = export(model, path)
    assert report.fidelity is None  # which strings would it try?
    report = export(model, path, fidelity_inputs=[words])
    assert report.fidelity.relative_rms_error < 1e-5
    (found,) = run(path, user=words).values()
    table = ops.convert_to_numpy(embedding.embeddings)
    np.testing.assert_allclose(found, table[[4, 0]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "received"),
    [
        ({"idz": make_ids(1, 2)}, "'idz'"),
        ([make_ids(1, 2), make_ids(1, 2)], r"\['input 0', 'input 1'\]"),
    ],
)
def test_fidelity_inputs_that_are_not_the_models(batch, received, path):
    with pytest.raises(ValueError, match=rf"named \['ids'\].*{received}"):
        export(make_model(), path, fidelity_inputs=[batch])
    assert not path.exists()


# The file, and the report


def test_report(path, capsys):
    report = export_litert(make_model(), str(path))
    assert isinstance(report, ExportReport)
    assert capsys.readouterr().out.strip() == str(report)
    assert f"{path}: {path.stat().st_size:,} bytes" in str(report)
    assert f"tokens (1 copy, {4 * VOCABULARY * WIDTH:,} bytes)" in str(report)
    assert report.to_dict() == {
        "filepath": str(path),
        "bytes": path.stat().st_size,
        "weights_bytes": 4 * (VOCABULARY * WIDTH + WIDTH * WIDTH + WIDTH),
        "tables": {"tokens": 1},
        "signatures": ("serving_default",),
        "quantization": None,
        "table_bytes": {"tokens": 4 * VOCABULARY * WIDTH},
        "fidelity": {
            "relative_rms_error": pytest.approx(0.0, abs=1e-5),
            "top1_agreement": 1.0,
            "num_inputs": 2,
            "divergence": None,
        },
    }
    assert json.loads(json.dumps(report.to_dict()))["bytes"] == report.bytes
    export(make_model(), path)
    assert capsys.readouterr().out == ""


def test_file_is_replaced_and_nothing_else_is_left(path):
    path.write_bytes(b"old")
    (path.parent / "other.txt").write_text("kept")
    mode = stat.S_IMODE((path.parent / "other.txt").stat().st_mode)
    export(make_model(), path)
    assert signature_names(path) == {"serving_default"}
    assert {p.name for p in path.parent.iterdir()} == {path.name, "other.txt"}
    # Readable by whom any new file is.
    assert stat.S_IMODE(path.stat().st_mode) == mode


def make_flex():
    """erf is none of LiteRT's operators."""
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, ops.erf(make_dense()(ids)))


class Composite(keras.layers.Layer):
    """Keeps the table inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = make_factorized()

    def build(self, shape):
        self.embedding.build()

    def call(self, ids):
        return self.embedding(self.embedding(ids), reverse=True)

    def compute_output_shape(self, shape):
        return (*shape, VOCABULARY)


def make_composite():
    ids = keras.Input((None,), dtype="int32", name="ids")
    return randomize(keras.Model(ids, Composite()(ids)))


@pytest.mark.parametrize(
    ("make", "failing", "error", "message"),
    [
        (make_model, "converter", ValueError, "converter says: no luck"),
        (make_model, "replace", OSError, "no luck"),
        (make_flex, None, ValueError, "(?s)built-in operators alone.*Erf"),
    ],
)
def test_a_failed_export_leaves_the_old_file(
    make, failing, error, message, path, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError("no luck")

    if failing == "converter":
        broken = types.SimpleNamespace(
            target_spec=types.SimpleNamespace(), convert=fail
        )
        monkeypatch.setattr(
            tf.lite.TFLiteConverter,
            "from_saved_model",
            lambda *args, **kwargs: broken,
        )
    if failing == "replace":
        monkeypatch.setattr(os, "replace", fail)
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        export(make(), path)
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
def test_a_table_inside_a_layer_is_stored_once(quantization, path):
    model = make_composite()
    report = export(model, path, quantization=quantization)
    assert report.tables == {"tokens": 1}
    ids = make_ids(2, 3)
    (found,) = run(path, ids=ids).values()
    expected = ops.convert_to_numpy(model(ids))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    allowed = {None: 1e-5, "int8": 0.03, "int4": 0.2, "int2": 0.6}
    assert error < allowed[quantization]


# What is refused, before any work


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test in which the converter is reached."""

    def work(*args, **kwargs):
        raise AssertionError("the model was converted")

    monkeypatch.setattr("keras_distilled_embedding.export.litert.convert", work)


class Subclassed(keras.Model):
    def call(self, x):
        return x


def make_subclassed():
    model = Subclassed()
    model(np.ones((1, 2)))
    return model


def make_half():
    ids = keras.Input((None,), dtype="int32")
    return keras.Model(ids, make_factorized(dtype="mixed_float16")(ids))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: None, TypeError, "`model` must be a `keras.Model`"),
        (Subclassed, ValueError, "must be built"),
        (make_subclassed, ValueError, "symbolic inputs.*of class Subclassed"),
        (
            lambda: keras.Sequential([make_dense()]),
            ValueError,
            "must be built",
        ),
        (make_half, ValueError, r"float32.*\['tokens'\]"),
    ],
)
def test_bad_models(make, error, message, path, no_work):
    with pytest.raises(error, match=message):
        export(make(), path)
    assert not path.exists()


@pytest.mark.parametrize("quantization", ["int3", "float16", 8, True])
def test_bad_quantization(quantization, path, no_work):
    with pytest.raises(
        ValueError, match=f"None or one of.*quantization={quantization!r}"
    ):
        export(make_model(), path, quantization=quantization)


def test_bad_paths(tmp_path, no_work):
    missing = tmp_path / "missing" / "model.tflite"
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(missing)))):
        export(make_model(), missing)
    assert not missing.parent.exists()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        export(make_model(), tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: {}, TypeError, "non-empty dictionary.*signatures={}"),
        (lambda model: [model], TypeError, "non-empty dictionary"),
        (lambda model: {"a": None}, TypeError, "Received: model=None"),
        (
            lambda model: {"a": make_subclassed()},
            ValueError,
            "class Subclassed",
        ),
        (
            lambda model: {"whole": model, "other": make_model()},
            ValueError,
            "parts of `model`. Received: 'other' .*tokens/embeddings",
        ),
        (
            lambda model: {"serve": model, "other": model},
            ValueError,
            r"'serve'.*\['serve', 'other'\]",
        ),
    ],
)
def test_bad_signatures(make, error, message, path, no_work):
    model = make_model()
    with pytest.raises(error, match=message):
        export(model, path, signatures=make(model))


def test_missing_package_names_the_extra(path, monkeypatch, no_work):
    for name in list(sys.modules):
        if name.split(".")[0] == "ai_edge_litert":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    with pytest.raises(
        ImportError,
        match=r'`ai_edge_litert.*pip install "keras-distilled-emb.*\[litert\]"',
    ):
        export(make_model(), path)


# Large vocabularies

EXPORT_LARGE = """
import resource, sys, time
import keras
from keras_distilled_embedding import export_litert, layers

rows, width, rank = map(int, sys.argv[1:4])
tokens = layers.DistilledEmbedding(rows, width, rank, name="tokens")
ids = keras.Input((8,), dtype="int32", name="ids")
states = keras.Input((1, width), name="states")
body = keras.layers.Dense(width, "tanh")
model = keras.Model(ids, tokens(body(tokens(ids)), reverse=True))
signatures = {
    "all": model,
    "look_up": keras.Model(ids, tokens(ids)),
    "project": keras.Model(states, tokens(states, reverse=True)),
}
floats = 4 * model.count_params()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
export_litert(
    model,
    sys.argv[4],
    quantization="int8",
    signatures=signatures,
    verbose=False,
)
seconds = time.process_time() - start
added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print("RESULT", 1024 * added / floats, seconds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(262_144, 640, 320), (1_000_000, 64, 64)])
def test_memory_of_a_large_vocabulary(shape, tmp_path):
    """Grows with the file, not with what TensorFlow makes of constants."""
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            EXPORT_LARGE,
            *map(str, shape),
            str(tmp_path / "model.tflite"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    added, seconds = map(float, process.stdout.split("RESULT")[1].split())
    assert added < 2.5  # times the model's floats
    assert seconds < 90
