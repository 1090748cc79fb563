"""The benchmarks run, and write what they say they write."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from benchmarks import _memory
from benchmarks import _report
from benchmarks import distillation
from benchmarks import recipe
from keras_distilled_embedding.layers import DistilledEmbedding


@pytest.mark.slow
def test_distillation_reports_every_row(tmp_path, capsys):
    rows = [distillation.ALONE, distillation.FORWARD, "ours: logits"]
    options = "--quick --no-memory --models causal_lm --rounds 2 --steps 1"
    distillation.main(
        [*options.split(), "--output", str(tmp_path), "--rows", *rows]
    )
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    record = json.loads((tmp_path / "results.json").read_text())
    rounds = record["models"]["causal_lm"]["rounds"]
    assert list(rounds) == rows
    for times in rounds.values():
        assert all(len(clock) == 2 for clock in times.values())
        assert min(times["wall_ms"]) > 0
    claim = "| ours: logits ≤ 1.10 x (student alone + teacher forward) |"
    assert claim in report
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_paired_by_round():
    times = {
        distillation.ALONE: {"wall_ms": [1.0, 10.0, 100.0]},
        "ours: embedding": {"wall_ms": [2.0, 20.0, 200.0]},
    }
    ratio = distillation.Measurements(times, {}).ratio(
        "ours: embedding", [distillation.ALONE]
    )
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_measuring_runs_every_step(monkeypatch):
    calls = {"a": 0, "b": 0}

    def step(name):
        calls[name] += 1
        return [1.0]

    times = distillation.measure_times(
        {name: lambda name=name: step(name) for name in calls},
        rounds=3,
        count=2,
        done=lambda text: None,
    )
    assert calls == {"a": 9, "b": 9}  # one more a turn, not counted
    assert all(len(row["cpu_ms"]) == 3 for row in times.values())


def test_a_peak_in_megabytes():
    assert 10 < _memory.peak_mb() < 100_000


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "new" / "report.md"
    _report.write_text(path, "÷\n")
    assert path.read_text(encoding="utf-8") == "÷\n"
    assert list(path.parent.iterdir()) == [path]
    assert "tensorflow" in _report.environment()


def recipe_results(teacher_bleu, *rows):
    return [
        {
            "teacher_bleu": teacher_bleu,
            "row": row,
            "seed": seed,
            "recipe": dataclasses.asdict(recipe.ALL[row]),
            "validation_nll": [3.0, 2.0 + seed],
            "validation_bleu": 30.0,
            "test_bleu": 31.0 + seed + (row == "teacher, rate 3e-04"),
            "wall_s": 1.0,
            "cpu_s": 1.0,
        }
        for row in rows
        for seed in (0, 1)
    ]


def test_recipe_reports_means_over_seeds(tmp_path):
    rows = "logits", "logits, 4 epochs", "teacher, rate 3e-04"
    results = recipe_results(32.0, *rows, "logits, factors 3x")
    recipe.write_report(results, tmp_path)
    report = (tmp_path / "report.md").read_text()
    cells = "| 2 | 2.500 | 30.00 | 31.50 | -0.50 | -1.00 | 31.00, 32.00 |"
    assert f"| logits {cells}" in report
    # The teacher was not trained on for so long.
    cells = cells.replace("-1.00", "")
    assert f"| logits, 4 epochs {cells}" in report
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")


def test_recipe_keeps_the_rows_of_other_teachers(tmp_path):
    first = recipe_results(33.0, "logits", "none")
    recipe.write_report(recipe.with_earlier(first, tmp_path), tmp_path)
    for rows in (["logits"], ["logits", "both"]):
        second = recipe_results(32.0, *rows)
        results = recipe.with_earlier(second, tmp_path)
        assert results == first + second
        recipe.write_report(results, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert report.count("| logits | 2 | 2.500 |") == 2
    for delta, bleu in (("-1.50", "33.00"), ("-0.50", "32.00")):
        assert f"## A teacher of test BLEU {bleu}" in report
        assert f"| 31.50 | {delta} |" in report


def test_recipe_can_give_factors_larger_steps():
    layer = DistilledEmbedding(10, 8, 2, activation=None)
    layer.build()
    other = keras.layers.Dense(3)
    other.build((None, 8))
    variables = [layer.codes, layer.basis, other.kernel]
    schedule = recipe.FactorRateRecipe(
        epochs=1, peak_learning_rate=0.01, warmup=1e-9, factor_rate=3.0
    )
    before = [keras.ops.convert_to_numpy(v).copy() for v in variables]
    optimizer = schedule.optimizer(steps_per_epoch=100)
    for _ in range(2):  # the first step of the warm-up is of size 0
        optimizer.apply([keras.ops.ones_like(v) for v in variables], variables)
    steps = [
        np.abs(keras.ops.convert_to_numpy(v) - old).mean()
        for v, old in zip(variables, before)
    ]
    np.testing.assert_allclose(steps[:2], 3 * steps[2], rtol=1e-3)
