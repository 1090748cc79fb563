"""LiteRT files of integers: what is stored, how often, and what it computes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import export_litert
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.sizes import factor_bytes
from tests.shared import FORMATS
from tests.shared import stored_columns
from tests.shared import to_numpy

pytest.importorskip("tensorflow")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
pytest.importorskip("ai_edge_quantizer")

VOCABULARY, WIDTH, RANK = 500, 64, 9
QUANTIZATION = pytest.mark.parametrize("quantization", ["int8", "int4", "int2"])
FORMAT = pytest.mark.parametrize(("quantization", "row_scales"), FORMATS)
PER_BYTE = {"int8": 1, "int4": 2, "int2": 4}
# Of the logits of a model that is rounded while it is exported.
ERROR = {"int8": 0.03, "int4": 0.15, "int2": 0.5}
IDS = np.array([[1, 60, 7, 499], [2, 5, 0, 0]], dtype="int32")


def dense(**options):
    return keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, name="tokens", **options
    )


def factorized(**options):
    return DistilledEmbedding(VOCABULARY, WIDTH, RANK, name="tokens", **options)


EMBEDDINGS = pytest.mark.parametrize("make_embedding", [dense, factorized])


def make_ids(vocabulary, shape=(4, 20)):
    rng = np.random.default_rng(0)
    return rng.integers(1, vocabulary, size=shape).astype("int32")


def make_model(make_embedding=factorized, **options):
    keras.utils.set_random_seed(0)
    embedding = make_embedding(**options)
    ids = keras.Input((None,), dtype="int32", name="ids")
    hidden = keras.layers.Dense(embedding.output_dim, "tanh", name="hidden")
    x = hidden(embedding(ids))
    return keras.Model(ids, embedding(x, reverse=True))


def read(path):
    return schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def relative_error(found, expected):
    expected = to_numpy(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def run(path, **inputs):
    outputs = interpreter.Interpreter(str(path)).get_signature_runner()(
        **inputs
    )
    return outputs["output_0"]


def tables_in(path, size):
    """Buffers of that many bytes."""
    return [
        bytes(buffer.data)
        for buffer in read(path).buffers
        if buffer.data is not None and len(buffer.data) == size
    ]


def operators_in(path):
    model = read(path)
    return {code.builtinCode for code in model.operatorCodes}


@EMBEDDINGS
@QUANTIZATION
def test_one_copy_that_computes_what_keras_does(
    make_embedding, quantization, tmp_path
):
    model, path = make_model(make_embedding), tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization=quantization, verbose=False
    )
    assert report.tables == {"tokens": 1}
    columns = WIDTH if make_embedding is dense else RANK
    if make_embedding is factorized or quantization != "int8":
        columns = (
            stored_columns(columns, quantization) // PER_BYTE[quantization]
        )
    assert len(tables_in(path, VOCABULARY * columns)) == 1
    assert schema.BuiltinOperator.EMBEDDING_LOOKUP in operators_in(path)
    assert report.bytes == path.stat().st_size
    found, expected = run(path, ids=IDS), model(IDS)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < ERROR[quantization]
    # Any batch, any length.
    for shape in ((1, 1), (3, 11)):
        ids = np.ones(shape, "int32")
        assert run(path, ids=ids).shape == (*shape, VOCABULARY)


@FORMAT
def test_the_integers_are_those_that_were_trained(
    quantization, row_scales, tmp_path
):
    """And the file computes what the rounded Keras model does."""
    model = make_model(quantization=quantization, row_scales=row_scales)
    path = tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization=quantization, verbose=False
    )
    layer = model.get_layer("tokens")
    bits, scales = 8 // PER_BYTE[quantization], to_numpy(layer.scales)
    steps = np.maximum(to_numpy(layer.codes), 0) - to_numpy(layer.center)
    steps = np.rint(steps / scales - (0.5 if bits == 2 else 0.0))
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    columns = stored_columns(RANK, quantization, row_scales)
    integers = np.zeros((VOCABULARY, columns), "int64")
    integers[:, :RANK] = np.clip(steps, lowest, 2 ** (bits - 1) - 1)
    if (quantization, row_scales) == ("int2", True):
        integers[:, RANK] = 1  # of half a step
    wanted = np.zeros(integers.size // PER_BYTE[quantization], "int64")
    for i in range(PER_BYTE[quantization]):
        numbers = integers.reshape(-1)[i :: PER_BYTE[quantization]]
        wanted += (numbers % 2**bits) << (i * bits)
    (stored,) = tables_in(path, len(wanted))
    assert stored == wanted.astype("uint8").tobytes()
    if (quantization, row_scales) == ("int4", True):
        (stored,) = tables_in(path, 2 * VOCABULARY)
        np.testing.assert_array_equal(
            np.frombuffer(stored, "float16"), scales[:, 0]
        )
    # What is left is int8 of hidden states and of the other matrices.
    assert report.fidelity.relative_rms_error < 0.02
    # Unless another format is asked for.
    for other in {"int8", "int4", "int2"} - {quantization}:
        report = export_litert(model, path, quantization=other, verbose=False)
        assert report.quantization == other
        planned = factor_bytes(RANK, VOCABULARY, WIDTH, other)
        assert report.table_bytes == {"tokens": planned}


@QUANTIZATION
def test_untied(quantization, tmp_path):
    """Look-up and projection each have their own table, once."""
    model, path = make_model(tie_weights=False), tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization=quantization, verbose=False
    )
    assert report.tables == {"tokens": 1}
    size = VOCABULARY * stored_columns(RANK, quantization)
    assert len(tables_in(path, size // PER_BYTE[quantization])) == 2
    error = relative_error(run(path, ids=IDS), model(IDS))
    assert error < ERROR[quantization]


@FORMAT
def test_signatures_share_the_table(quantization, row_scales, tmp_path):
    """And compute what Keras does: look-up and product from one buffer."""
    model = make_model(quantization=quantization, row_scales=row_scales)
    path = tmp_path / "model.tflite"
    embedding = model.get_layer("tokens")
    ids = keras.Input((None,), dtype="int32", name="ids")
    states = keras.Input((None, WIDTH), name="states")
    signatures = {
        "encode": keras.Model(ids, model.get_layer("hidden")(embedding(ids))),
        "decode": keras.Model(states, embedding(states, reverse=True)),
        "all": model,
    }
    report = export_litert(
        model,
        path,
        signatures=signatures,
        fidelity_inputs={"all": [IDS]},
        verbose=False,
    )
    assert report.tables == {"tokens": 1}
    assert set(report.signatures) == {"encode", "decode", "all"}
    assert report.fidelity.relative_rms_error < 0.03
    litert = interpreter.Interpreter(str(path))
    encoded = litert.get_signature_runner("encode")(ids=IDS)["output_0"]
    logits = litert.get_signature_runner("decode")(states=encoded)["output_0"]
    assert relative_error(logits, model(IDS)) < 0.03
    readers = readers_of_the_table(
        path, stored_columns(RANK, *(quantization, row_scales))
    )
    assert sorted(kind for kind, _ in readers) == sorted(
        2 * ["EMBEDDING_LOOKUP"] + 2 * ["FULLY_CONNECTED"]
    )
    assert len({buffer for _, buffer in readers}) == 1


def readers_of_the_table(path, columns):
    """The operators that read codes, by name, and the buffers of these."""
    names = {
        number: name for name, number in vars(schema.BuiltinOperator).items()
    }
    file = read(path)
    return [
        (
            names[file.operatorCodes[operator.opcodeIndex].builtinCode],
            graph.tensors[i].buffer,
        )
        for graph in file.subgraphs
        for operator in graph.operators
        for i in operator.inputs
        if list(graph.tensors[i].shape) == [VOCABULARY, columns]
        and file.buffers[graph.tensors[i].buffer].data is not None
    ]


@pytest.mark.parametrize("quantization", ["int4", "int2"])
def test_scales_are_written_once(quantization, tmp_path):
    """Whatever number of signatures reads them."""
    rows = 4_000
    embedding = DistilledEmbedding(
        rows, WIDTH, RANK, name="tokens", quantization=quantization
    )
    states = keras.Input((None, WIDTH), name="states")
    model = keras.Model(states, embedding(states, reverse=True))
    sizes, path = [], tmp_path / "model.tflite"
    for count in (1, 3):
        signatures = {f"number_{i}": model for i in range(count)}
        if count == 3:
            ids = keras.Input((None,), dtype="int32", name="ids")
            signatures["number_2"] = keras.Model(ids, embedding(ids))
        sizes.append(
            export_litert(
                model, path, signatures=signatures, verbose=False
            ).bytes
        )
        scales = to_numpy(embedding.scales)
        scales = scales.astype("f2" if quantization == "int4" else "f4")
        assert path.read_bytes().count(scales.tobytes()) == 1
    # No zero points, either, which are the largest part of them.
    assert sizes[1] - sizes[0] < 4 * rows


@FORMAT
def test_xnnpack_takes_the_product(quantization, row_scales, tmp_path):
    """Except with four levels that a row does not scale."""
    embedding = DistilledEmbedding(
        VOCABULARY,
        WIDTH,
        33,
        name="tokens",
        quantization=quantization,
        row_scales=row_scales,
    )
    states = keras.Input((WIDTH,), batch_size=1, name="states")
    model = keras.Model(states, embedding(states, reverse=True))
    path = tmp_path / "model.tflite"
    export_litert(model, path, verbose=False)
    litert = interpreter.Interpreter(str(path))
    litert.allocate_tensors()
    (table,) = (
        tensor["index"]
        for tensor in litert.get_tensor_details()
        if tensor["shape"].tolist()
        == [VOCABULARY, stored_columns(33, quantization, row_scales)]
    )
    readers = [
        operator["op_name"]
        for operator in litert._get_ops_details()
        if table in operator["inputs"]
    ]
    is_delegated = (quantization, row_scales) != ("int2", False)
    assert readers == ["FULLY_CONNECTED"] + is_delegated * ["DELEGATE"]
    assert format_of(quantization, row_scales).is_delegated == is_delegated


def test_soft_cap_and_masks(tmp_path):
    keras.utils.set_random_seed(0)
    embedding = factorized(mask_zero=True, logit_soft_cap=0.5)
    ids = keras.Input((None,), dtype="int32", name="ids")
    pooled = keras.layers.GlobalAveragePooling1D()(embedding(ids))
    model = keras.Model(ids, embedding(pooled, reverse=True))
    embedding.basis.assign(20 * embedding.basis)
    path = tmp_path / "model.tflite"
    export_litert(model, path, quantization="int8", verbose=False)
    found, expected = run(path, ids=IDS), ops.convert_to_numpy(model(IDS))
    assert np.abs(found).max() <= 0.5
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_a_layer_quantized_by_keras_is_exported(tmp_path):
    """As it computes since, and in that format by default."""
    model, path = make_model(), tmp_path / "model.tflite"
    model.get_layer("tokens").quantize("int8")
    expected = ops.convert_to_numpy(model(IDS))
    report = export_litert(model, path, verbose=False)
    assert report.quantization == "int8"
    found = run(path, ids=IDS)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.03


def test_sizes(tmp_path):
    """Of a vocabulary that is large enough for the file's own overhead."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedding = DistilledEmbedding(20_000, 256, 31, name="tokens")
    x = keras.layers.Dense(256, name="hidden")(embedding(ids))
    model = keras.Model(ids, embedding(x, reverse=True))
    table = 4 * 20_000 * 256
    for quantization, overhead, ratio in (
        (None, 1.03, 8),
        ("int8", 1.04, 30),
        ("int4", 1.06, 50),
        ("int2", 1.06, 50),
    ):
        report = export_litert(
            model,
            tmp_path / "model.tflite",
            quantization=quantization,
            verbose=False,
        )
        assert 1 <= report.overhead < overhead
        if quantization:
            assert table / report.table_bytes["tokens"] > ratio


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantization", "most"), [("int4", 1.03), ("int2", 1.05)]
)
def test_size_of_a_whole_table(quantization, most, tmp_path):
    """Turned at full rank: codes, scales and the basis that leads back."""
    keras.utils.set_random_seed(0)
    rows, width = 32_000, 512
    embedding = keras.layers.ReversibleEmbedding(rows, width, name="tokens")
    ids = keras.Input((None,), dtype="int32", name="ids")
    model = keras.Model(ids, embedding(ids))
    path = tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization=quantization, verbose=False
    )
    bits, scale = {"int4": (4, 2), "int2": (2, 12)}[quantization]
    theory = rows * (width * bits / 8 + scale) + width * width
    assert theory < report.bytes <= most * theory
    assert report.tables == {"tokens": 1}
    # That of the format, and of no worse coordinates.
    lost = report.fidelity.relative_rms_error**2
    assert lost < {"int4": 0.013, "int2": 0.125}[quantization]


@pytest.mark.parametrize(
    ("quantization", "row_scales"), [(None, True), *FORMATS]
)
@pytest.mark.parametrize("rank", [9, 32, 40])
def test_planned_bytes_are_those_of_the_file(
    quantization, row_scales, rank, tmp_path
):
    """Of a model that looks up, whose file holds each factor once."""
    embedding = DistilledEmbedding(
        VOCABULARY,
        WIDTH,
        rank,
        name="tokens",
        quantization=quantization,
        row_scales=row_scales,
    )
    ids = keras.Input((None,), dtype="int32", name="ids")
    pooled = keras.layers.GlobalAveragePooling1D()(embedding(ids))
    model, path = keras.Model(ids, pooled), tmp_path / "model.tflite"
    embedding.offset.assign(np.linspace(-1, 1, WIDTH))
    report = export_litert(model, path, verbose=False)
    planned = factor_bytes(rank, VOCABULARY, WIDTH, embedding.format)
    assert report.table_bytes == {"tokens": planned}
    assert report.weights_bytes == planned
    file, sizes = read(path), {}
    for graph in file.subgraphs:
        for tensor in graph.tensors:
            data = file.buffers[tensor.buffer].data
            if data is not None and tensor.type != schema.TensorType.INT32:
                sizes[tensor.buffer] = len(data)
    # One scale is not in a buffer, nor are those of 12 bytes a row.
    expected = planned
    if quantization is not None:
        expected -= {"int4": 0, "int2": 12 * VOCABULARY}.get(
            quantization if row_scales else None, 4
        )
        basis = stored_columns(rank, quantization, row_scales) * WIDTH
        if basis < 1_024:
            expected += 3 * basis  # so small a basis stays a float
    assert sum(sizes.values()) == expected


@pytest.mark.parametrize("untied", [False, True])
@QUANTIZATION
def test_planned_bytes_are_those_reported(quantization, untied, tmp_path):
    """Of tables that are multiplied with, too, and of two."""
    model, path = make_model(tie_weights=not untied), tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization=quantization, verbose=False
    )
    planned = factor_bytes(RANK, VOCABULARY, WIDTH, quantization)
    assert report.table_bytes == {"tokens": (1 + untied) * planned}


# What the layers are rounded to decides


@QUANTIZATION
def test_the_model_says_how_it_is_stored(quantization, tmp_path):
    model = make_model(quantization=quantization)
    default, asked = tmp_path / "default.tflite", tmp_path / "asked.tflite"
    report = export_litert(model, default, verbose=False)
    assert report.quantization == quantization
    export_litert(model, asked, quantization=quantization, verbose=False)
    assert default.read_bytes() == asked.read_bytes()
    # As floats, on demand: those of the rounded codes.
    report = export_litert(model, asked, quantization="float32", verbose=False)
    assert report.quantization is None
    layer = model.get_layer("tokens")
    variables = layer.scales, layer.center, layer.rotation
    of_grid = sum(np.prod(v.shape) for v in variables)
    assert report.weights_bytes == 4 * (model.count_params() - of_grid)
    np.testing.assert_allclose(
        run(asked, ids=IDS), ops.convert_to_numpy(model(IDS)), atol=1e-5
    )


def test_a_layer_without_quantization_follows_the_others(tmp_path):
    model = make_two(None, "int8")
    path = tmp_path / "model.tflite"
    report = export_litert(model, path, verbose=False)
    assert report.quantization == "int8"
    assert set(report.table_bytes) == {"a", "b"}


def test_layers_of_different_formats(tmp_path):
    model, path = make_two("int8", "int4"), tmp_path / "model.tflite"
    with pytest.raises(
        ValueError, match="`quantization` must be.*'a': 'int8', 'b': 'int4'"
    ):
        export_litert(model, path, verbose=False)
    assert not path.exists()
    report = export_litert(model, path, quantization="int4", verbose=False)
    planned = factor_bytes(RANK, VOCABULARY, WIDTH, "int4")
    assert report.table_bytes == {"a": planned, "b": planned}


def make_two(*formats):
    ids = keras.Input((None,), dtype="int32", name="ids")
    tables = [
        DistilledEmbedding(VOCABULARY, WIDTH, RANK, name=name, quantization=r)(
            ids
        )
        for name, r in zip("ab", formats)
    ]
    return keras.Model(ids, keras.layers.Add()(tables))


@pytest.mark.parametrize("min_speedup", [None, 1.5])
def test_a_plan_is_what_is_written(min_speedup, tmp_path):
    """From a budget of bytes to a file: the same bytes, the same numbers."""
    model, path = make_model(dense), tmp_path / "model.tflite"
    student = compress(
        model,
        max_bytes=12_000,
        quantization="auto",
        min_speedup=min_speedup,
        verbose=0,
    )
    (row,) = compression_report(student).rows
    report = export_litert(student, path, verbose=False)
    assert row.quantization is not None
    assert report.quantization == row.quantization
    assert report.table_bytes == {"tokens": row.bytes_after}
    assert 10_000 < row.bytes_after <= 12_000
    # Not the rounding of the codes, which Keras computes too: int8 of hidden
    # states and of the other matrices.
    assert report.fidelity.relative_rms_error < 0.02


@QUANTIZATION
def test_sums_do_not_add_up_an_error(quantization, tmp_path):
    """None that is the same in every row: the offset makes up for it."""
    ids = keras.Input((200,), dtype="int32", name="ids")
    layer = DistilledEmbedding(
        2_000, 64, 48, name="tokens", quantization=quantization
    )
    model = keras.Model(ids, ops.sum(layer(ids), axis=1))
    rng = np.random.default_rng(0)
    # Far from zero, so that the center of the codes is large.
    layer.codes.assign(np.abs(rng.normal(size=(2_000, 48))) + 2)
    layer.basis.assign(rng.normal(size=(48, 64)))
    center, scales = layer.format.grid(ops.relu(layer.codes))
    layer.center.assign(center)
    layer.scales.assign(scales)
    layer.offset.assign(-ops.mean(layer.embeddings, axis=0))
    path, batch = tmp_path / "model.tflite", make_ids(2_000, (8, 200))
    export_litert(model, path, verbose=False)
    table = ops.convert_to_numpy(layer.embeddings)
    expected = table[batch].sum(1)
    error = run(path, ids=batch) - expected
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected)


@QUANTIZATION
def test_a_row_of_zeros_stays_one(quantization, tmp_path):
    """That of padding, of which a sum has many."""
    ids = keras.Input((200,), dtype="int32", name="ids")
    layer = DistilledEmbedding(2_000, 64, 48, activation=None, name="tokens")
    model = keras.Model(ids, ops.sum(layer(ids), axis=1))
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(2_000, 48))
    codes[0] = 0
    layer.codes.assign(codes)
    layer.offset.assign(np.zeros(64))
    path, padding = tmp_path / "model.tflite", np.zeros((1, 200), "int32")
    export_litert(model, path, quantization=quantization, verbose=False)
    np.testing.assert_array_equal(run(path, ids=padding), np.zeros((1, 64)))


def test_fidelity_on_given_inputs(tmp_path):
    model, path = make_model(), tmp_path / "model.tflite"
    report = export_litert(
        model, path, quantization="int8", fidelity_inputs=[IDS], verbose=False
    )
    found, expected = run(path, ids=IDS), ops.convert_to_numpy(model(IDS))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    assert report.fidelity.num_inputs == 1
    assert report.fidelity.relative_rms_error == pytest.approx(error, rel=1e-4)
    assert report.fidelity.top1_agreement == pytest.approx(same)
    assert f"{error:.2%}" in str(report)
    with pytest.raises(ValueError, match="idz"):
        export_litert(
            model, path, fidelity_inputs=[{"idz": IDS}], verbose=False
        )


def test_refused(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="'int2'.* quantization='int3'"):
        export_litert(make_model(), path, verbose=False, quantization="int3")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_compressed_model_of_kerashub(tmp_path):
    """Tables inside layers, too."""
    pytest.importorskip("keras_hub")
    from tests.architectures import ARCHITECTURES

    architecture = next(a for a in ARCHITECTURES if a.name == "OPT")
    student = compress(architecture.make(), rank=4, verbose=0)
    path, batch = tmp_path / "model.tflite", architecture.inputs()
    report = export_litert(student, path, quantization="int8", verbose=False)
    assert report.tables == {"token_embedding": 1}
    found = run(path, **batch)
    expected = ops.convert_to_numpy(student(batch))
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.1
