"""The figures of the benchmarks: committed results, reports, quick runs."""

import ast
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.figures import distillation_steps
from benchmarks.figures import factorization
from benchmarks.figures import language_model
from benchmarks.figures import on_device
from benchmarks.figures import recipe
from benchmarks.figures import translation
from benchmarks.methods import METHODS
from benchmarks.methods import Table
from benchmarks.tasks.students import CONTROL
from benchmarks.tasks.students import make_student
from benchmarks.tasks.tables import steep_moment
from keras_distilled_embedding.factorization import learned
from tests.jax_settings import JAX_SETTINGS
from tests.shared import made_once

COMMITTED = Path(command.__file__).parent / "results"
# What of the committed reports came from features that are gone.
GONE = re.compile(r"sweep|funnel|learned|promised|Keras: embedding")


def run(*arguments):
    assert command.main([*map(str, arguments)]) == 0


def rows_of(report):
    """The lines of tables, by their first cell and how many it has had."""
    rows = {}
    for line in report.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows.setdefault(cells[0], []).append(cells)
    return rows


# Committed results


@pytest.mark.parametrize("name", command.FIGURES)
def test_committed_results_are_reported(name, tmp_path, capsys):
    before = (COMMITTED / name / "results.json").exists()
    run("report", name, "--work-dir", tmp_path / "runs", "--output", tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert text in capsys.readouterr().out
    title = ast.get_docstring(ast.parse(command.FIGURES[name].read_text()))
    assert text.startswith(f"# {title.splitlines()[0].rstrip('.')}\n")
    assert f"    python -m benchmarks run {name}" in text
    # Reading changes nothing.
    assert (COMMITTED / name / "results.json").exists() == before
    assert not (tmp_path / "results.json").exists()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    committed = COMMITTED / name / "report.md"
    if not committed.exists():
        return
    old = committed.read_text("utf-8")
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", old)) <= {*pictures}
    found = rows_of(text)
    missing = [
        first
        for first in rows_of(old)
        if first not in found
        and first.replace("quantisation", "quantization") not in found
        and not GONE.search(first)
        and not re.search("[0-9]+x: |memory map|<=|start at", first)
    ]
    assert missing == []


def test_a_report_has_the_numbers_of_its_results(tmp_path):
    run("report", "factorization", "--output", tmp_path)
    rows = rows_of((tmp_path / "report.md").read_text("utf-8"))
    minilm, multi30k = rows["GroupReduce"]
    assert minilm[1:] == [
        "0.4857",
        "0.7040",
        "0.8588",
        "0.9420",
        "0.9715",
        "0.1344",
    ]
    assert multi30k[1] == "0.5426" and multi30k[-1] == "0.2936"
    assert rows["int4"][0][1:] == ["7.11x", "0.007992", "0.008896"]
    run("report", "translation", "--output", tmp_path)
    rows = rows_of((tmp_path / "report.md").read_text("utf-8"))
    shown = [row for row in rows["ours, auto, int4"] if row[1] == "1 (32.77)"]
    assert [row[3:5] + row[8:10] for row in shown] == [
        ["8.0", "240", "1.615", "34.71"]
    ]
    full = {row[8] for row in rows["full table, float32"]}
    assert full >= {"1.617", "2.051", "0.287"}
    run("report", "on_device", "--output", tmp_path)
    rows = rows_of((tmp_path / "report.md").read_text("utf-8"))
    assert rows["projection: int8 against full float32"] == [
        ["projection: int8 against full float32", "56.744", "≥ 40", "yes"]
    ]


def test_commands_in_committed_reports_exist():
    old = re.compile(r"python -m benchmarks\.|run_")
    for path in COMMITTED.rglob("*.md"):
        text = path.read_text("utf-8")
        assert not old.search(text), path
        for figure in re.findall(r"python -m benchmarks run (\w+)", text):
            assert figure in command.FIGURES


# A machine without TensorFlow, and without what reads and judges text.
WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("tensorflow", "tensorflow_text", "sentencepiece",
                   "sacrebleu"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from benchmarks import __main__ as command
command._report = lambda *_: None  # it reads text
command.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained_on_jax(tmp_path_factory):
    """Folders of a task whose teacher and control are trained on JAX alone.

    Each is the tests' own, to go on with.
    """
    trained = made_once(tmp_path_factory, "trained_on_jax", _train_on_jax)
    folder = tmp_path_factory.mktemp("translation")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return types.SimpleNamespace(work=folder / "work", tasks=folder / "tasks")


def _train_on_jax(folder):
    translation.prepare("quick", folder / "tasks" / "quick")
    options = ["run", "translation", "--quick", "--work-dir", folder / "work"]
    options += ["--task-dir", folder / "tasks"]
    options += ["--sizes", "8", "--losses", "logits", "--methods", CONTROL]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *map(str, options)],
        env={**os.environ, **JAX_SETTINGS},
        cwd=COMMITTED.parents[1],
        check=True,
    )


@pytest.fixture(scope="module")
def _new_process():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *arguments: pool.submit(
            function, *arguments
        ).result()


@pytest.fixture
def one_process(_new_process, monkeypatch):
    """What is measured in processes of its own is so in a common one.

    To start one takes longer than what it measures.
    """
    monkeypatch.setattr(harness, "in_new_process", _new_process)


# Factorization


def test_claims_compare_with_the_optimum_of_the_rank():
    row = {
        "table": "quick",
        "method": "ours",
        "ratio": 8.0,
        "num_bytes": 1,
        "error": 0.5,
        "weighted_error": 0.5,
        "logits_error": None,
        "details": {"rank": 3},
        "affine": 0.5,
        "svd": 0.51,
    }
    claims = [*factorization._claims({"errors": [row]})]
    assert [claim["holds"] for claim in claims] == ["yes", "yes"]
    assert claims[0]["claim"] == "quick 8x: ours / affine optimum of rank 3"
    worse = {**row, "error": 0.52}
    claims = [*factorization._claims({"errors": [worse]})]
    assert [claim["holds"] for claim in claims] == ["NO", "NO"]


def test_few_bits_are_compared_in_the_metric_of_the_states():
    random = np.random.default_rng(0)
    values = random.normal(size=(2_000, 64)).astype("float32")
    moment = np.diag(np.geomspace(1, 1e-3, 64))
    table = Table(values, np.ones(2_000), moment)
    measured = factorization.measure_metric("quick", table)
    assert [
        (row["states"], row["quantization"]) for row in measured["rows"]
    ] == [
        ("steep", "int4"),
        ("steep", "int2"),
        ("own", "int4"),
        ("own", "int2"),
    ]
    rows = measured["rows"]
    for row in rows:
        assert row["feedback"] < 0.45 * row["plain"]
        assert row["feedback"] < row["unweighted"]
    # Gaussian numbers lose as much however they are turned, and as much as
    # their best uniform quantizer does.
    for row, expected in zip(rows[2:], (0.01154, 0.1188)):
        assert row["plain"] == pytest.approx(expected, rel=0.05)
        assert row["unturned"] == pytest.approx(expected, rel=0.05)
    claims = [*factorization._claims({"metric": [measured]})]
    assert [claim["holds"] for claim in claims] == ["yes"] * 4
    moments = np.linalg.eigvalsh(steep_moment(50))[::-1]
    np.testing.assert_allclose(moments[:4], [1489, 202, 79, 18], rtol=1e-9)
    assert moments[-1] == pytest.approx(0.02)


def test_new_rows_replace_those_of_the_same_kind(tmp_path):
    def row(method, error):
        found = {"table": "quick", "method": method, "ratio": 8.0}
        return {**found, "num_bytes": 1, "error": error}

    store = harness.Rows(tmp_path)
    options = type("Options", (), {"store": store})
    store.finish("error quick ours 8.0", lambda: row("ours", 0.2))
    earlier = {"errors": [row("ours", 0.5), row("GroupReduce", 0.4)]}
    found = factorization.collect(options, earlier)["errors"]
    assert [(r["method"], r["error"]) for r in found] == [
        ("ours", 0.2),
        ("GroupReduce", 0.4),
    ]


@pytest.mark.slow
def test_quick_factorization_has_every_method_and_goes_on(
    trained_on_jax, one_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(factorization, "RATIOS", (4.0, 8.0))
    monkeypatch.setattr(learned, "EPOCHS", 2)  # it is enough that it runs
    options = ["factorization", "--quick", "--rounds", 1]
    options += ["--work-dir", tmp_path / "factorization"]
    options += ["--task-dir", trained_on_jax.tasks]
    run("run", *options)
    folder = tmp_path / "factorization" / "quick" / "report"
    report = (folder / "report.md").read_text("utf-8")
    rows = rows_of(report)
    for name in METHODS:
        # Its codebooks alone are too large for so small a table.
        assert name in rows or name == "product quantization"
    assert "| quick 8x: ours / affine optimum of rank 3 | 1.0000" in report
    assert "memory map 2,000 x 64 float16: peak GiB" in report
    assert (folder / "quick.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text())
    assert record["command"].startswith("python -m benchmarks run factor")
    # What is there is not measured again.
    monkeypatch.setattr(factorization, "measure_error", None)
    capsys.readouterr()
    run("run", *options)
    assert "error quick" not in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text()) == record


# Translation


@pytest.mark.slow
def test_rows_train_without_tensorflow_and_are_reported(trained_on_jax, capsys):
    folders = ["--work-dir", trained_on_jax.work]
    folders += ["--task-dir", trained_on_jax.tasks]
    quick = ["run", "translation", "--quick", *folders]
    chosen = ["--sizes", "8", "--losses", "logits", "--methods"]
    chosen += [CONTROL, "ours", "GroupReduce"]
    run(*quick, *chosen)
    folder = trained_on_jax.work / "quick" / "report"
    record = json.loads((folder / "results.json").read_text())
    entries = {translation.label(e): e for e in record["entries"]}
    assert {translation.TEACHER, CONTROL, "ours", "GroupReduce"} <= {*entries}
    rounded = {"ours, int8", "GroupReduce, int8", f"{CONTROL}, int8"}
    assert rounded <= {*entries}
    for entry in entries.values():
        assert 0 <= entry["bleu"] <= 100
        assert entry["ratio"] >= 0.97
    assert entries["ours"]["ratio"] >= 8
    assert entries["ours, int8"]["ratio"] > 25
    ((key, duels),) = record["duels"].items()
    assert key.startswith("quick, teacher 0 (")
    rivals = {duel["rival"] for duel in duels}
    assert {"GroupReduce", "GroupReduce, int8"} <= rivals
    assert "Keras on jax" in entries[CONTROL]["environment"]
    assert "Keras on tensorflow" in entries["ours"]["environment"]
    text = (folder / "report.md").read_text("utf-8")
    assert all(f"| {name} |" in text for name in entries)
    for name in ("quick_nats.png", "quick_bleu.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    # All is there.
    capsys.readouterr()
    run(*quick, *chosen)
    assert capsys.readouterr().out.startswith("# Quality against bytes")
    # What another machine had done stays in the report.
    other = {**record["entries"][0], "seed": 7}
    record["entries"].append(other)
    (folder / "results.json").write_text(json.dumps(record))
    run("report", "translation", "--quick", *folders)
    run(*quick, *chosen)
    record = json.loads((folder / "results.json").read_text())
    assert other in record["entries"]


def test_forms_have_labels_of_their_own():
    def label(name, storage):
        return translation.label({"name": name, "storage": storage})

    assert label("ours", "float32") == "ours"
    assert label("ours", "int8") == "ours, int8"
    assert label("ours, int4", "int4") == "ours, int4"
    assert label("full table, float32", "float32") == "full table, float32"
    assert label("full table, float32", "int8") == "full table, int8"
    assert label("ours, int4, calibrated", "int4") == "ours, int4, calibrated"


def test_pictures_show_how_far_from_the_full_table_of_the_same_teacher(
    tmp_path, monkeypatch
):
    def entry(teacher, name, num_bytes, nats, **other):
        return {
            "task": "quick",
            "seed": 0,
            "teacher": teacher,
            "name": name,
            "storage": "float32",
            "table_bytes": num_bytes,
            "validation_nll": nats,
            "rate": 1.0,
            "epochs": 4,
            **other,
        }

    entries = [
        # Trained for longer, or in other steps: nothing to compare with.
        entry(1, "full table, float32", 800, 1.25, epochs=8),
        entry(1, "full table, float32", 800, 1.75, rate=0.5),
        entry(1, "full table, float32", 800, 1.5),
        entry(2, "full table, float32", 800, 2.5),
        entry(1, "ours", 100, 1.75),
        entry(2, "ours", 100, 2.625),
        entry(2, "ours", 50, 3.0),
        # Neither another recipe nor what was not trained is drawn.
        entry(1, "ours", 100, 1.0, epochs=8),
        entry(1, "ours", 100, 1.0, rate=0.5),
        entry(1, translation.TEACHER, 800, None, epochs=None),
    ]
    drawn = {}
    monkeypatch.setattr(
        harness, "plot_lines", lambda *lines, **o: drawn.update(o, lines=lines)
    )
    translation._plot(entries, tmp_path, "validation_nll", title="nats")
    assert drawn["lines"][0]["ours"] == [(50, 0.5), (100, 0.1875)]
    assert drawn["bars"]["ours"] == [(0.5, 0.5), (0.125, 0.25)]
    assert drawn["level"] == ("the full table", 0.0)
    # Nor do tables and p-values.
    assert translation._baseline(entries[:3])["validation_nll"] == 1.5


# Recipe


def recipe_rows(teacher_bleu, *rows):
    return [
        {
            "teacher_bleu": teacher_bleu,
            "name": row,
            "row": row,
            "seed": seed,
            "recipe": dataclasses.asdict(recipe.ALL[row]),
            "validation_nll": [3.0, 2.0 + seed],
            "test_bleu": 31.0 + seed + (row == "teacher, rate 3e-04"),
        }
        for row in rows
        for seed in (0, 1)
    ]


def test_recipe_reports_means_over_seeds(tmp_path):
    rows = "logits", "logits, 4 epochs", "teacher, rate 3e-04"
    results = {"rows": recipe_rows(32.0, *rows)}
    report = "\n".join(recipe.report(results, tmp_path))
    cells = "| 2 | 2.500 |  | 31.50 | -0.50 | -1.00 | 31.00, 32.00 |"
    assert f"| logits {cells}" in report
    # The teacher was not trained on for so long.
    assert f"| logits, 4 epochs {cells.replace('-1.00', '')}" in report
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")


def test_recipe_keeps_the_rows_of_other_teachers(tmp_path):
    store = harness.Rows(tmp_path)
    options = type("Options", (), {"store": store})
    first = {"rows": recipe_rows(33.0, "logits", "none")}
    assert recipe.collect(options, first) == first
    for row in recipe_rows(32.0, "logits"):
        store.finish(f"logits seed {row['seed']}", lambda row=row: row)
    found = recipe.collect(options, first)
    assert found["rows"][:4] == first["rows"]
    assert [row["teacher_bleu"] for row in found["rows"][4:]] == [32.0, 32.0]
    # The same teacher's rows are replaced.
    assert len(recipe.collect(options, found)["rows"]) == 6
    report = "\n".join(recipe.report(found, tmp_path))
    assert report.count("| logits | 2 | 2.500 |") == 2
    for delta, bleu in (("-1.50", "33.00"), ("-0.50", "32.00")):
        assert f"## A teacher of test BLEU {bleu}" in report
        assert f"| 31.50 | {delta} |" in report


# The language model


def test_the_control_is_the_rate_that_validation_prefers():
    rows = [
        {"row": row, "validation_nll": [1.0, nll]}
        for row, nll in (
            ("teacher", 1.0),
            ("control, rate 2e-03", 3.0),
            ("control, rate 1e-03", 2.0),
        )
    ]
    assert language_model.control_of(rows) == rows[2]
    assert language_model.control_of(rows[:1]) is None


@pytest.mark.slow
def test_quick_language_model_learns_and_goes_on(tmp_path, capsys):
    rows = ["control, rate 1e-03", "ReLU 8x"]
    options = ["run", "language_model", "--quick"]
    options += ["--work-dir", tmp_path / "lm", "--rows", *rows]
    run(*options)
    folder = tmp_path / "lm" / "quick" / "report"
    report = (folder / "report.md").read_text("utf-8")
    assert report in capsys.readouterr().out
    assert "    python -m benchmarks run language_model --quick" in report
    assert (folder / "quality.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "results.json").read_text("utf-8"))
    teacher, control, student = record["rows"]
    assert [control["row"], student["row"]] == rows
    assert "| control, rate 1e-03 | float32 | 64,000 | 1.0 |" in report
    assert "| ReLU 8x | int8 | 1,728 | 37.0 |" in report
    # Everything learns: a guess has a perplexity of 500.
    for row in record["rows"]:
        for stored in row["stored"].values():
            assert stored["perplexity"] < 250
            assert 2 < stored["bits_per_byte"] < 4
    assert len(teacher["validation_nll"]) == 2 * len(control["validation_nll"])
    perplexity = student["stored"]["float32"]["perplexity"]
    assert perplexity < np.exp(student["before_nll"])
    # What is there is not trained again.
    capsys.readouterr()
    run(*options)
    assert capsys.readouterr().out.startswith("# A language model")
    assert json.loads((folder / "results.json").read_text()) == record


# Costs


def test_ratios_are_paired_by_round():
    times = {
        distillation_steps.ALONE: {"wall_ms": [1.0, 10.0, 100.0]},
        "ours: embedding": {"wall_ms": [2.0, 20.0, 200.0]},
    }
    found = distillation_steps.ratio(
        times, "ours: embedding", [distillation_steps.ALONE]
    )
    assert found == [2.0, 2.0, 2.0]


@pytest.mark.slow
def test_quick_distillation_steps_report_every_row(tmp_path):
    rows = [
        distillation_steps.ALONE,
        distillation_steps.FORWARD,
        "ours: logits",
    ]
    options = [
        "--quick",
        "--models",
        "causal_lm",
        "--rounds",
        "2",
        "--steps",
        "1",
    ]
    options += ["--work-dir", tmp_path, "--rows", *rows]
    run("run", "distillation_steps", *options)
    folder = tmp_path / "quick" / "report"
    record = json.loads((folder / "results.json").read_text())
    rounds = record["models"]["causal_lm"]["rounds"]
    assert list(rounds) == rows
    for times in rounds.values():
        assert all(len(clock) == 2 for clock in times.values())
        assert min(times["wall_ms"]) > 0
    claim = "| ours: logits ≤ 1.10 x (student alone + teacher forward) |"
    assert claim in (folder / "report.md").read_text("utf-8")
    assert (folder / "steps.png").read_bytes().startswith(b"\x89PNG")


def untrained(row, task, store):
    """A student as it is made, in place of `translation.measure`."""
    student = make_student(task, row.method, row.size)
    student.save_weights(store.path(row.key(task), ".weights.h5"))
    return {}


@pytest.mark.slow
def test_quick_run_on_device(trained_on_jax, tmp_path, monkeypatch):
    """What rows become as files; the test above trains students."""
    monkeypatch.setattr(on_device, "measure", untrained)
    # Rows that claims are made of, but for time.
    for name in list(on_device.ROWS):
        gone = "16x", "default", "full, int4", "full, int2", "8x, int2"
        if any(part in name for part in gone):
            monkeypatch.delitem(on_device.ROWS, name)
    run(
        *("run", "on_device", "--quick", "--rounds", 1, "--threads", 1),
        *("--work-dir", tmp_path / "on_device"),
        *("--task-dir", trained_on_jax.tasks),
    )
    folder = tmp_path / "on_device" / "quick" / "report"
    text = (folder / "report.md").read_text("utf-8")
    assert "| file / weights, translation, int8 |" in text
    rows = rows_of(text)
    for name in ("full, float32", "ours 8x, int8", "ours 8x, int4"):
        # But for its ratio to int8.
        table, sentences = (cells for cells in rows[name] if len(cells) > 2)
        assert int(table[1].replace(",", "")) > 10_000
        assert 0 <= float(sentences[4]) <= 100
    ratios = rows["rank 256, int2"][-1]
    assert len(ratios) == 2 and float(ratios[1]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compress_large", "large_vocabulary"])
def test_quick_costs_are_measured(name, one_process, tmp_path):
    run("run", name, "--quick", "--work-dir", tmp_path)
    text = (tmp_path / "quick" / "report" / "report.md").read_text("utf-8")
    assert "| claim | measured | bar | holds |" in text


def test_a_scale_plan_is_arithmetic(tmp_path):
    run("run", "scale_plan", "--work-dir", tmp_path, "--output", tmp_path)
    rows = rows_of((tmp_path / "report.md").read_text("utf-8"))
    (plan,) = rows["256,000 x 1,024"]
    assert plan[1:5] == ["1.05 GB", "127", "131 MB", "33 MB"]
