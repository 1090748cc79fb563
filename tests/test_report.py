"""The report of what compression did, and its picture."""

import builtins
import json

import keras
import numpy as np
import pytest

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import inspect_model
from keras_distilled_embedding import keras_internals
from tests.shared import lost_share
from tests.shared import random_table
from tests.shared import stored_bytes
from tests.shared import to_numpy
from tests.test_compression import VOCABULARY
from tests.test_compression import WIDTH
from tests.test_compression import find
from tests.test_compression import keras_embedding
from tests.test_compression import keras_reversible
from tests.test_compression import keras_untied
from tests.test_compression import make_model
from tests.test_compression import make_nested
from tests.test_compression import make_two_of_one_name


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "int2"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_report(quantization, use_bias):
    """Every number, of two tables in one layer."""
    model = make_model(keras_untied)
    form = dict(rank=5, quantization=quantization, use_bias=use_bias)
    student = compress(model, **form, verbose=0)
    report = compression_report(student)
    (row,) = report.rows
    by_row = find(student).row_scales and quantization != "int8"
    before = 2 * VOCABULARY * WIDTH
    after = 2 * (5 * (VOCABULARY + WIDTH) + use_bias * WIDTH)
    # Coordinates are weights, too: a center, and what codes are rounded to.
    if quantization is not None:
        after += 2 * ((VOCABULARY if by_row else 5) + 5 * 5 + 5)
    elif use_bias:
        after += 2 * 5
    stored = 2 * stored_bytes(
        5, VOCABULARY, WIDTH, quantization, use_bias, by_row
    )
    rest = model.count_params() - before
    # LiteRT multiplies with rows that are filled up.
    columns = 5
    if quantization == "int4":
        columns = 32 if by_row else 6
    if quantization == "int2":
        columns = 8
    expected = {
        "layer": "tokens",
        "shape": (VOCABULARY, WIDTH),
        "rank": 5,
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": 4 * before,
        "bytes_after": stored,
        "ratio": 4 * before / stored,
        "error": None,
        "quantization": quantization,
        "speedup": pytest.approx(
            VOCABULARY * WIDTH / (columns * (VOCABULARY + WIDTH))
        ),
    }
    assert report.to_dict() == {
        "rows": [expected],
        "model_parameters": rest + after,
        "model_parameters_before": model.count_params(),
        "model_bytes": 4 * rest + stored,
        "model_bytes_before": 4 * model.count_params(),
    }
    assert row.ratio == pytest.approx(find(student).compression_ratio)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["rank"] == 5
    shown = str(report)
    for text in (
        "tokens",
        "61 x 16",
        f"{before:,} -> {after:,}",
        f"{4 * before:,} -> {stored:,}",
        f"{model.count_params():,} -> {rest + after:,}",
        f"{4 * before / stored:.2f}x",
        "stored as",
        quantization or "floats",
    ):
        assert text in shown


def test_rounding_is_part_of_the_error():
    model = make_model()
    errors = []
    for quantization in (None, "int8", "int4", "int2"):
        student = compress(model, rank=5, quantization=quantization, verbose=0)
        (row,) = compression_report(student, model).rows
        table, made = (to_numpy(find(x).embeddings) for x in (model, student))
        assert row.error == pytest.approx(lost_share(table, made), rel=1e-4)
        errors.append(row.error)
    assert errors == sorted(errors) and errors[1] > errors[0]


def test_some_tables_are_rounded():
    student = compress(make_two_of_one_name(), rank=3, verbose=0)
    layer = next(
        layer
        for layer in keras_internals.iterate_layers(student)
        if layer.name == "tokens"
    )
    layer.quantization = "int8"
    shown = str(compression_report(student))
    assert "int8" in shown and "floats" in shown


def test_report_of_half_precision_and_of_nested_models():
    student = compress(make_nested(), rank=3, verbose=0)
    assert len(compression_report(student).rows) == 1
    student = compress(make_model(dtype="bfloat16"), rank=3, verbose=0)
    (row,) = compression_report(student).rows
    assert row.bytes_before == 2 * VOCABULARY * WIDTH
    assert row.bytes_after == 2 * (3 * (VOCABULARY + WIDTH) + WIDTH)


@pytest.mark.parametrize("show", [compression_report, inspect_model])
def test_names_are_shown_in_full(show):
    """A user gives them to `layers=`."""
    name = "token_and_position_embedding_of_the_encoder"
    embedding = keras.layers.Embedding(600, 16, name=name)
    model = keras.Sequential([keras.Input((4,)), embedding])
    if show is compression_report:
        model = compress(model, rank=3, verbose=0)
    lines = [line.split("│") for line in str(show(model)).splitlines()]
    assert name in "".join(cells[1].strip() for cells in lines if cells[1:])


def test_bad_report():
    with pytest.raises(ValueError, match="compress it first.*language_model"):
        compression_report(make_model())
    with pytest.raises(TypeError, match="model=None"):
        compression_report(None)


@pytest.mark.parametrize("make", [keras_reversible, keras_untied])
def test_error_against_the_original(make):
    model = make_model(make)
    student = compress(model, rank=5, verbose=0)
    layer, old = find(student), find(model)
    pairs = [(old.embeddings, layer.embeddings)]
    if not layer.tie_weights:
        pairs.append((old.reverse_embeddings, layer.reverse_embeddings))
    pairs = [[to_numpy(x) for x in pair] for pair in pairs]
    lost = sum(np.square(a - b).sum() for a, b in pairs)
    expected = lost / sum(np.square(a).sum() for a, _ in pairs)
    report = compression_report(student, model)
    assert report.rows[0].error == pytest.approx(expected, rel=1e-4)
    assert f"{expected:.3f}" in str(report)
    # As the factors are now, not as they were.
    layer.codes.assign(0 * layer.codes)
    changed = compression_report(student, model).rows[0].error
    assert changed > expected


def test_error_of_tables_of_one_name():
    model = make_two_of_one_name()
    student = compress(model, rank=3, verbose=0)
    errors = [r.error for r in compression_report(student, model).rows]
    assert len(set(errors)) == 2 and all(0 < error < 1 for error in errors)


def test_an_original_that_is_not():
    student = compress(make_model(), rank=5, verbose=0)
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"'tokens'.*\(61, 16\).*None"):
        compression_report(student, other)
    with pytest.raises(TypeError, match="original=3"):
        compression_report(student, 3)


def test_totals_are_those_of_the_models():
    model = make_model(dtype="bfloat16")
    student = compress(model, rank=5, verbose=0)
    report = compression_report(student)
    assert report.model_parameters == student.count_params()
    assert report.model_parameters_before == model.count_params()
    sizes = {"float32": 4, "bfloat16": 2}
    for got, of in (
        (report.model_bytes, student),
        (report.model_bytes_before, model),
    ):
        # A file multiplies the center of the codes into the offset.
        stored = [w for w in of.weights if not w.path.endswith("center")]
        assert len(of.weights) - len(stored) == (of is student)
        assert got == sum(
            sizes[w.dtype] * int(np.prod(w.shape)) for w in stored
        )


# Inspection


def make_three_tables():
    """Embeddings of many and of few rows, and a dense head."""
    ids = keras.Input((None,), dtype="int32")
    tokens = keras.layers.Embedding(300, 64, name="tokens")
    few = keras.layers.Embedding(3, 64, name="few")
    x = keras.layers.Add()([tokens(ids), few(ids % 3)])
    x = keras.layers.Dense(64, name="body")(x)
    return keras.Model(ids, keras.layers.Dense(300, name="head")(x))


def test_inspection_of_a_model():
    """Tables of embeddings and of a dense head, and what could be saved."""
    model = make_three_tables()
    inspection = inspect_model(model)
    assert inspection.bytes == 4 * model.count_params()
    found = {table.layer: table for table in inspection.tables}
    assert found.keys() == {"tokens", "few", "head"}
    head = found["head"]
    assert (head.kind, head.shape) == ("Dense", (300, 64))
    assert head.parameters == 64 * 300 + 300
    assert head.bytes == 4 * head.parameters
    assert all(table.rank is None for table in inspection.tables)
    assert not any(table.factorized for table in inspection.tables)
    # As `compress` does, the head is left, and what is too small to shrink.
    assert [size.compression for size in inspection.sizes] == [4.0, 8.0, 16.0]
    for size in inspection.sizes:
        assert size.layers == ("tokens",)
    as_dict = json.loads(json.dumps(inspection.to_dict()))
    assert [table["layer"] for table in as_dict["tables"]] == list(found)
    for size, row in zip(inspection.sizes, as_dict["sizes"], strict=True):
        assert row["ranks"] == list(size.ranks)
        assert row["table_bytes"] == size.table_bytes
    shown = str(inspection)
    for text in ("300 x 64", "Dense", "4x", "8x", "16x", "tables lost"):
        assert text in shown


def test_out_of_reach():
    """A size that no rank gives is shown as such; others as ever."""
    model = make_three_tables()
    inspection = inspect_model(model, [8.0, 1e4])
    reached, beyond = inspection.sizes
    assert reached.ranks and beyond.ranks == ()
    assert beyond.table_bytes == 4 * 64 * 303
    assert beyond.model_bytes == inspection.bytes
    assert (beyond.error, beyond.speedup) == (0.0, 1.0)
    assert "10000x" in str(inspection) and "out of reach" in str(inspection)


def make_large(tie_weights):
    """A model with a table of which much is left at 16 times fewer bytes."""
    ids = keras.Input((None,), dtype="int32")
    layer = keras.layers.ReversibleEmbedding(
        2000, 64, tie_weights=tie_weights, name="tokens"
    )
    hidden = keras.layers.Dense(64, "tanh")(layer(ids))
    model = keras.Model(ids, layer(hidden, reverse=True))
    weights = [random_table(2000, 64), random_table(2000, 64, seed=1).T]
    layer.set_weights(weights[: len(layer.weights)])
    return model


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("compression", [2.0, 8.0, 16.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_sizes_are_those_of_compress(tie_weights, compression, calibrated):
    """What is foretold is what `compress` then does."""
    model = make_large(tie_weights)
    data = None
    if calibrated:
        rng = np.random.default_rng(0)
        data = [rng.integers(2000, size=(8, 32)) for _ in range(4)]
    inspection = inspect_model(model, compression, calibration_data=data)
    student = compress(model, compression, calibration_data=data, verbose=0)
    assert inspection.of_logits == calibrated
    assert ("logits lost" in str(inspection)) == calibrated
    (size,) = inspection.sizes
    report = compression_report(student, model)
    (row,) = report.rows
    assert (size.layers, size.ranks) == (("tokens",), (row.rank,))
    assert size.quantization == row.quantization
    assert size.row_scales == find(student).row_scales
    assert size.table_bytes == row.bytes_after
    assert compression * size.table_bytes <= row.bytes_before
    assert size.model_bytes == report.model_bytes
    assert size.speedup == pytest.approx(row.speedup)
    # The body has a matrix, in a byte each, and a bias.
    assert size.int8_model_bytes == size.table_bytes + 64 * 64 + 4 * 64
    if not calibrated:  # in a sample, before basis and offset are fitted
        assert size.error == pytest.approx(row.error, rel=0.25)
    shown = str(inspection)
    for text in (f"{size.table_bytes:,}", f"{size.model_bytes:,}"):
        assert text in shown


def test_sizes_in_half_precision():
    """Floats take the bytes of their layer's precision."""
    model = make_model(dtype="bfloat16")
    (size,) = inspect_model(model, 1.2).sizes
    student = compress(model, 1.2, verbose=0)
    report = compression_report(student)
    assert size.quantization == report.rows[0].quantization
    assert size.table_bytes == report.rows[0].bytes_after
    assert size.model_bytes == report.model_bytes


def test_nothing_is_left_to_plan():
    student = compress(make_model(), rank=5, verbose=0)
    inspection = inspect_model(student)
    assert inspection.sizes == ()
    assert "What `compress`" not in str(inspection)


@pytest.mark.parametrize("make", [keras_embedding, keras_untied])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspection_of_a_compressed_model(make, dtype):
    student = compress(make_model(make, dtype=dtype), rank=5, verbose=0)
    (table,) = inspect_model(student).tables
    assert (table.kind, table.factorized) == ("DistilledEmbedding", True)
    assert (table.rank, table.shape) == (5, (VOCABULARY, WIDTH))
    copies = 2 if make is keras_untied else 1
    parameters = copies * (5 * (VOCABULARY + WIDTH) + WIDTH)
    parameters += copies * 5  # the center
    assert table.parameters == parameters
    assert table.bytes == parameters * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("x",), TypeError, "`model` must be a `keras.Model`.* model='x'"),
        ((keras.Sequential(),), ValueError, "`model` must be built"),
        ((make_nested(), 1.0), ValueError, "greater than 1.*compression=1.0"),
        ((make_nested(), "8"), ValueError, "compression='8'"),
        ((make_nested(), [4.0, 1.0]), ValueError, "compression=1.0"),
    ],
)
def test_what_cannot_be_inspected(arguments, error, match):
    with pytest.raises(error, match=match):
        inspect_model(*arguments)


# The picture


def test_picture(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    student = compress(make_model(), rank=5, verbose=0)
    report = compression_report(student)
    figure = report.plot(tmp_path / "bytes.png")
    assert isinstance(figure, matplotlib.figure.Figure)
    assert (tmp_path / "bytes.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = figure.axes
    widths = {}
    for bars, label in zip(*axes.get_legend_handles_labels()):
        widths[label] = [bar.get_width() * 1e6 for bar in bars]
    row = report.rows[0]
    assert widths["tokens"] == pytest.approx(
        [row.bytes_before, row.bytes_after]
    )
    assert widths["the rest"][0] == pytest.approx(
        report.model_bytes - row.bytes_after
    )


def test_picture_without_matplotlib(monkeypatch):
    report = compression_report(compress(make_model(), rank=5, verbose=0))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"keras-distilled-embedding\[plots"):
        report.plot()
