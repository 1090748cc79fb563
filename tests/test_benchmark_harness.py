"""The harness of the benchmarks: rows, tables, timing, the command."""

import json
import multiprocessing

import pytest

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.harness import environment
from benchmarks.harness import files


def measured(value):
    return lambda: {"value": value}


def test_a_row_is_written_when_it_is_done_and_not_measured_again(tmp_path):
    store = harness.Rows(tmp_path / "new")
    row = store.finish("ours, 8x", measured(1))
    assert row["row"] == "ours, 8x" and row["value"] == 1
    assert row["wall_s"] >= 0 and row["cpu_s"] >= 0
    assert "tensorflow" in row["environment"]
    assert "Keras on" in row["environment"]
    assert json.loads((tmp_path / "new" / "ours_8x.json").read_text()) == row
    assert store.finish("ours, 8x", measured(2)) == row
    assert store.read("ours, 8x") == row
    assert store.read("another") is None


def test_a_row_that_fails_is_measured_again(tmp_path):
    store = harness.Rows(tmp_path)

    def fail():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        store.finish("a", fail)
    assert store.finish("a", measured(1))["value"] == 1


def test_rows_are_read_by_the_start_of_their_names(tmp_path):
    store = harness.Rows(tmp_path)
    for name in ("time b", "time a", "memory"):
        store.finish(name, measured(0))
    assert [row["row"] for row in store.read_all("time")] == [
        "time b",
        "time a",
    ]
    assert len(store.read_all()) == 3
    assert harness.Rows(tmp_path / "missing").read_all() == []


def measure_in_another_process(folder, started, finish):
    def measure():
        started.set()
        finish.wait(60)
        return {"value": "other"}

    harness.Rows(folder).finish("row", measure)


def test_a_row_that_another_process_measures_is_left_to_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, finish = context.Event(), context.Event()
    process = context.Process(
        target=measure_in_another_process, args=(tmp_path, started, finish)
    )
    process.start()
    assert started.wait(60)
    store = harness.Rows(tmp_path)
    assert store.finish("row", measured("mine")) is None
    finish.set()
    # Whoever needs the row can wait for it.
    row = store.finish("row", measured("mine"), wait=True)
    process.join()
    assert row["value"] == "other"


def test_new_rows_replace_earlier_ones():
    earlier = [{"name": "a", "value": 1}, {"name": "b", "value": 1}]
    new = [{"name": "a", "value": 2}]
    assert harness.merged(new, earlier, lambda row: row["name"]) == [
        {"name": "a", "value": 2},
        {"name": "b", "value": 1},
    ]


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "new" / "report.md"
    harness.write_text(path, "÷\n")
    assert path.read_text(encoding="utf-8") == "÷\n"
    assert list(path.parent.iterdir()) == [path]


def test_results_are_a_folder_or_a_file(tmp_path):
    assert files.read_results("figure", tmp_path / "figure") == {}
    (tmp_path / "figure.json").write_text('{"a": 1}')
    assert files.read_results("figure", tmp_path / "figure") == {"a": 1}
    harness.write_json(tmp_path / "figure" / "results.json", [{"row": 1}])
    assert files.read_results("figure", tmp_path / "figure") == {
        "rows": [{"row": 1}]
    }


def test_every_environment_is_named_once():
    results = {
        "environment": "a",
        "rows": [{"environment": "b"}, {"environment": "a"}, {"other": 1}],
        "more": {"row": {"environment": "c"}},
    }
    assert environment.environments(results) == ["a", "b", "c"]


def test_tables_are_markdown():
    rows = [{"name": "a", "value": "1"}, {"name": "b", "value": None}]
    assert harness.markdown_table(rows) == (
        "| name | value |\n| --- | ---: |\n| a | 1 |\n| b |  |"
    )
    assert harness.formatted(None, "{:.1f}") == ""
    assert harness.formatted(0.0, "{:.1f}") == "0.0"


@pytest.mark.parametrize(
    ("measured", "sign", "bar", "holds"),
    [
        (1.0, "≤", 1.0, "yes"),
        (1.1, "≤", 1.0, "NO"),
        (1.1, "≥", 1.0, "yes"),
        (0.9, "≥", 1.0, "NO"),
        (1.0, "<", 1.0, "NO"),
    ],
)
def test_claims_tell_what_does_not_hold(measured, sign, bar, holds):
    found = harness.claim("what", measured, sign, bar, "{:.1f}")
    assert found == {
        "claim": "what",
        "measured": f"{measured:.1f}",
        "bar": f"{sign} 1",
        "holds": holds,
    }


def test_timing_runs_every_call_in_every_round():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1
        return name

    waited = []
    times = harness.time_in_turns(
        {name: lambda name=name: count(name) for name in calls},
        rounds=3,
        repeats=2,
        wait=waited.append,
    )
    assert calls == {"a": 9, "b": 9}  # one more a turn, not counted
    assert len(waited) == 12
    for row in times.values():
        assert len(row["wall_ms"]) == len(row["cpu_ms"]) == 3
        assert min(row["wall_ms"]) >= 0


def test_a_peak_in_megabytes():
    assert 10 < harness.resident_mb() <= harness.peak_mb() < 100_000
    # In a process that has done nothing else.
    assert 10 < harness.in_new_process(harness.peak_mb) < 100_000


def test_lines_and_rows_are_drawn(tmp_path):
    harness.plot_lines(
        {"a": [(1.0, 2.0), (4.0, 1.0)], "nothing": []},
        tmp_path / "a.png",
        bars={"a": [(1.5, 2.0), (1.0, 3.0)], "nothing": []},
        styles={"a": {"color": "red"}},
        level=("level", 1.5),
        log_x=True,
        x_format="{x:g}x",
        xlabel="x",
    )
    harness.plot_lines(
        {"a": [(1.0, 0), (2.0, 1)]},
        tmp_path / "b.png",
        rows=["first", "second"],
        scatter=True,
    )
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_list_names_every_figure(capsys):
    assert command.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("factorization", "translation", "language_model", "on_device"):
        assert name in shown
    assert "Quality against bytes" in shown
    assert "_" not in {name[0] for name in command.FIGURES}


def test_unknown_figures_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["run", "nothing"])
    assert error.value.code == 2
    assert "factorization" in capsys.readouterr().err


def test_a_report_without_rows_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    with pytest.raises(SystemExit, match="python -m benchmarks run recipe"):
        command.main(["report", "recipe", "--work-dir", str(tmp_path)])
