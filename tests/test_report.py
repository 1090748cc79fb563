"""The report of what compression did, and its picture."""

import builtins
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from tests.test_compression import VOCABULARY
from tests.test_compression import WIDTH
from tests.test_compression import find
from tests.test_compression import keras_reversible
from tests.test_compression import keras_untied
from tests.test_compression import make_model
from tests.test_compression import make_nested
from tests.test_compression import make_two_of_one_name


def test_report():
    model = make_model(keras_untied)
    student = compress(model, rank=5, verbose=0)
    report = compression_report(student)
    (row,) = report.rows
    before = 2 * VOCABULARY * WIDTH
    after = 2 * 5 * (VOCABULARY + WIDTH)
    expected = {
        "layer": "tokens",
        "shape": (VOCABULARY, WIDTH),
        "rank": 5,
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": 4 * before,
        "bytes_after": 4 * after,
        "ratio": before / after,
        "error": None,
        "rounding": None,
    }
    assert report.to_dict() == {
        "rows": [expected],
        "model_parameters": model.count_params() - before + after,
        "model_parameters_before": model.count_params(),
        "model_bytes": 4 * (model.count_params() - before + after),
        "model_bytes_before": 4 * model.count_params(),
    }
    assert row.ratio == pytest.approx(find(student).compression_ratio)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["rank"] == 5
    shown = str(report)
    for text in (
        "tokens",
        "61 x 16",
        f"{before:,} -> {after:,}",
        f"{model.count_params():,} -> {student.count_params():,}",
        f"{before / after:.2f}x",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("rounding", "after"),
    [
        ("int8", 5 * VOCABULARY + 4 + 5 * WIDTH + 4 * WIDTH),
        ("int4", (16 + 2) * VOCABULARY + 32 * WIDTH + 4 * WIDTH),
    ],
)
def test_report_of_what_is_rounded(rounding, after):
    """The bytes are those of a file of integers, the error is as computed."""
    model = make_model(keras_untied)
    student = compress(model, rank=5, quantization=rounding, verbose=0)
    report = compression_report(student, model)
    (row,) = report.to_dict()["rows"]
    assert (row["rounding"], row["bytes_after"]) == (rounding, 2 * after)
    assert row["parameters_after"] == 2 * 5 * (VOCABULARY + WIDTH)
    rest = 4 * (model.count_params() - 2 * VOCABULARY * WIDTH)
    assert report.model_bytes == rest + 2 * after
    assert report.model_bytes_before == 4 * model.count_params()
    floats = compression_report(compress(model, rank=5, verbose=0), model)
    assert row["error"] > floats.rows[0].error
    shown = str(report)
    assert f"-> {2 * after:,}" in shown
    assert "stored as" in shown and rounding in shown
    assert "stored as" not in str(floats)


def test_some_tables_are_rounded():
    student = compress(make_two_of_one_name(), rank=3, verbose=0)
    layer = next(x for x in student._flatten_layers() if x.name == "tokens")
    layer.quantization = "int8"
    shown = str(compression_report(student))
    assert "int8" in shown and "floats" in shown


def test_report_of_half_precision_and_of_nested_models():
    student = compress(make_nested(), rank=3, verbose=0)
    assert len(compression_report(student).rows) == 1
    student = compress(make_model(dtype="bfloat16"), rank=3, verbose=0)
    (row,) = compression_report(student).rows
    assert row.bytes_before == 2 * VOCABULARY * WIDTH
    assert row.bytes_after == 2 * 3 * (VOCABULARY + WIDTH)


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
    pairs = [[ops.convert_to_numpy(x) for x in pair] for pair in pairs]
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
        assert got == sum(
            sizes[w.dtype] * int(np.prod(w.shape)) for w in of.weights
        )


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
