"""The benchmark of factorization: its rivals are what they are called."""

import json

import numpy as np
import pytest

from benchmarks import factorization as benchmark
from benchmarks import rivals
from benchmarks._tables import RealTable


def make_table(rows=600, columns=24, with_covariance=False):
    random = np.random.default_rng(0)
    basis = random.normal(size=(columns, columns))
    basis *= np.arange(1, columns + 1)[:, np.newaxis] ** -0.5
    values = (random.normal(size=(rows, columns)) @ basis).astype("float32")
    return RealTable(
        name="toy",
        description="a toy",
        values=values,
        counts=(10_000 / np.arange(1, rows + 1) ** 1.2).astype(int),
        second_moment=np.diag(np.geomspace(1, 0.01, columns))
        if with_covariance
        else None,
    )


def lost(made, table, weights=None):
    weights = np.ones(len(table)) if weights is None else weights
    energy = weights @ np.square(table).sum(axis=1)
    return weights @ np.square(made.values - table).sum(axis=1) / energy


@pytest.mark.parametrize("name", list(rivals.BUDGETED))
def test_rivals_gain_by_bytes_and_stay_within_them(name):
    table = make_table(rows=9_000)
    errors = []
    for ratio in (8, 4, 2):
        budget = table.num_bytes // ratio
        made = rivals.BUDGETED[name](table.values, table.weights, budget)
        assert made.values.shape == table.values.shape
        assert 0.5 * budget < made.num_bytes <= budget
        errors.append(lost(made, table.values, table.weights))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0] < 0.9


@pytest.mark.parametrize("name", list(rivals.BUDGETED))
def test_rivals_say_when_a_budget_is_too_small(name):
    table = make_table()
    assert rivals.BUDGETED[name](table.values, table.weights, 300) is None


def test_truncated_svd_stores_its_factors():
    table = make_table()
    made = rivals.truncated_svd(table.values, 24)
    np.testing.assert_allclose(made.values, table.values, atol=1e-5)
    assert made.num_bytes == 4 * 24 * (600 + 24)


def test_group_reduce_beats_one_svd_where_frequencies_matter():
    table = make_table()
    budget = table.num_bytes // 4
    grouped = rivals.group_reduce(table.values, table.weights, budget)
    rank = budget // 4 // (600 + 24)
    plain = rivals.truncated_svd(table.values, rank)
    ours, theirs = (
        lost(made, table.values, table.weights) for made in (grouped, plain)
    )
    assert ours < 0.7 * theirs


def test_tensor_train_is_exact_at_full_rank():
    table = make_table(rows=60)
    row_factors = rivals._three_factors(60, exact=False)
    assert np.prod(row_factors) >= 60
    made = rivals.tensor_train(table.values, table.weights, 10**7)
    np.testing.assert_allclose(made.values, table.values, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "levels", "ratio"),
    [(rivals.int8, 255, 4.0), (rivals.int4, 16, 7.11)],
)
def test_few_bits_have_few_levels(method, levels, ratio):
    table = make_table(columns=32)
    made = method(table.values)
    # Rows of 32 columns are blocks too.
    for row in made.values[:20]:
        assert len(np.unique(row)) <= levels
    step = np.abs(table.values).max(axis=1, keepdims=True) / (levels // 2)
    assert (np.abs(made.values - table.values) <= 4 * step).all()
    assert lost(made, table.values) < 2 / levels**2 * 12
    assert table.num_bytes / made.num_bytes == pytest.approx(ratio, rel=0.15)


@pytest.mark.slow
def test_report_of_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RATIOS", (2.0, 4.0, 8.0))
    monkeypatch.setattr(benchmark, "FUNNEL_RATIOS", (2.0,))
    monkeypatch.setattr(benchmark, "FUNNEL_BARS", {2.0: 1.0})
    table = make_table(with_covariance=True)
    table = RealTable(**{**vars(table), "name": "minilm"})
    done = benchmark.Results(tmp_path / "work")
    errors = done.errors(table)
    results = {
        "errors": errors,
        "time": [benchmark.measure_time("toy", table.values, 2, True)],
        "memory": [benchmark.measure_memory((2_000, 24), 1)],
        "start": [
            {"start": "SVD", "validation_nll": 6.0},
            {"start": "SVD, rows by count", "validation_nll": 4.5},
        ],
    }
    benchmark.write_report(
        results, {"minilm": table}, tmp_path / "out", "the command"
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert "    the command" in report
    assert "minilm 4x: no sweep / SVD(" in report
    gain = "| start at 8x: nats that rows by count gain on SVD | 1.5 | ≥ 1.2 |"
    assert f"{gain} yes |" in report
    for method in (*benchmark.METHODS, *rivals.FIXED):
        assert f"| {method} |" in report
    picture = (tmp_path / "out" / "minilm.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record == json.loads(json.dumps(results))
    # What is there is not measured again.
    monkeypatch.setattr(benchmark, "measure_error", None)
    assert done.errors(table) == errors


def test_claims_tell_what_does_not_hold():
    assert benchmark._claim("a", 1.0, 1.0)[-1] == "yes"
    assert benchmark._claim("a", 1.1, 1.0)[-1] == "NO"
    assert benchmark._claim("a", 1.1, 1.0, at_least=True)[-1] == "yes"
    assert benchmark._claim("a", 0.9, 1.0, at_least=True)[-1] == "NO"
