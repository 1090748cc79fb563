"""Quality against bytes: every method on the same translation tasks.

Every student starts from the same teacher and sees the same batches as often.
Stages: `prepare` tokenizes the task and needs TensorFlow, `rows` trains and
translates on any backend, `files` writes LiteRT files of the students and
times them.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from itertools import pairwise
from itertools import product
from pathlib import Path

import keras

from benchmarks.harness.files import write_json
from benchmarks.harness.measure import time_in_turns
from benchmarks.harness.plots import plot_lines
from benchmarks.harness.rows import Rows
from benchmarks.harness.rows import merged
from benchmarks.harness.tables import formatted
from benchmarks.harness.tables import markdown_table
from benchmarks.methods import METHODS
from benchmarks.methods import ArrayTable
from benchmarks.methods.ours import OURS
from benchmarks.methods.ours import PAPER
from benchmarks.methods.storage import store_as
from benchmarks.methods.storage import table_bytes
from benchmarks.methods.storage import table_layer
from benchmarks.tasks.translation import SETTINGS
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import prepare
from benchmarks.tasks.translation import ready_task
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule

TITLE = "Quality against bytes"
STAGES = ("prepare", "rows", "files")
SIZES = (4.0, 8.0, 16.0, 32.0, 64.0)
TEACHER = "teacher, as it was"
CONTROL = "teacher, trained on"
SMALLER = "smaller model, logits"
SCRATCH = "smaller model, from scratch"
MODELS = (CONTROL, SMALLER, SCRATCH)  # students without a method
# A little less than a nominal size still counts as it: scales, offsets.
TOLERANCE = 0.97
# What is minimized: its name, and what differs from the setting's recipe.
LOSSES: dict[str, tuple[str, dict]] = {
    "logits": ("logits distillation", {}),
    "none": ("task loss alone", {"student_loss_weight": 1.0}),
    "embedding": (
        "embedding distillation",
        {
            "student_loss_weight": 0.5,
            "logits_weight": 0.0,
            "embedding_weight": 1.0,
        },
    ),
    "both": ("logits and embedding distillation", {"embedding_weight": 0.1}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", choices=SETTINGS, default="multi30k")
    add("--task-dir", type=Path, default=Path("runs/tasks"))
    add("--seed", type=int, default=0)
    add(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=["prepare", "rows"],
        help="`files` needs TensorFlow, `prepare` where it is not done",
    )
    add("--methods", nargs="+", choices=[*MODELS, *METHODS], metavar="METHOD")
    add("--sizes", nargs="+", type=float)
    add("--losses", nargs="+", choices=LOSSES, metavar="LOSS")
    add("--rounds", type=int, default=3, help="of timing files; 0: none")


# The grid


@dataclass(frozen=True)
class Row:
    """A student.

    Args:
        method: One of `METHODS` or `MODELS`.
        size: How many times fewer bytes than the float32 table; 1 where the
            method has no choice.
        loss: A key of `LOSSES`.
    """

    method: str
    size: float = 1.0
    loss: str = "logits"

    @property
    def name(self) -> str:
        """As the report calls it, without the size."""
        own_loss = self.method in (PAPER, SCRATCH) or _one_size(self.method)
        if self.loss == "logits" or own_loss:
            return self.method
        return f"{self.method}, {LOSSES[self.loss][0]}"

    def key(self, task: Task) -> str:
        """Its name among the rows on disk."""
        return (
            f"{task.name} {task.seed} {self.method} {self.loss} {self.size:g}x"
        )


def _one_size(method: str) -> bool:
    return method == CONTROL or (
        method in METHODS and METHODS[method].fixed_size
    )


def key_rows() -> list[Row]:
    """The rows that decide most, in the order of their worth."""
    eight, thirty_two = 8.0, 32.0
    return [
        Row(CONTROL),
        Row(OURS, eight),
        Row("truncated SVD", eight),
        Row("ours, rows weighted", eight),
        Row("weighted SVD", eight),
        Row("GroupReduce", eight),
        Row(OURS, 4.0),
        Row(OURS, 2.0),
        Row(OURS, 16.0),
        Row("Tensor-Train", eight),
        Row("product quantization", eight),
        Row(OURS, thirty_two),
        Row("GroupReduce", thirty_two),
        Row(SMALLER, eight),
        Row(PAPER, eight, "embedding"),
        Row("ours, int4", thirty_two),
        Row("truncated SVD", thirty_two),
        Row("ours, int4", 16.0),
        Row("int4 table"),
        Row("GroupReduce", 4.0),
        Row("truncated SVD", 4.0),
        Row(OURS, eight, "none"),
        Row(OURS, eight, "embedding"),
        Row(OURS, eight, "both"),
        Row("Tensor-Train", thirty_two),
        Row(PAPER, thirty_two, "embedding"),
        Row(SMALLER, thirty_two),
        Row(SCRATCH, eight),
        Row("int8 table"),
        Row("ours, int4", eight),
        Row("truncated SVD", 2.0),
        Row("weighted SVD", 2.0),
        Row("ours, rows weighted", 2.0),
        Row("ours, rows weighted", 4.0),
        Row("ours, rows weighted", 16.0),
        Row("ours, rows weighted", thirty_two),
        Row(OURS, 64.0),
        Row("ours, int4", 64.0),
        Row(SCRATCH, thirty_two),
    ]


def all_rows() -> list[Row]:
    """The key rows, then every method at every size."""
    everything = [
        Row(
            method,
            1.0 if _one_size(method) else size,
            "embedding" if method == PAPER else "logits",
        )
        for size, method in product(SIZES, [*MODELS, *METHODS])
        # Rounding to int8 after training costs nothing: no row of its own.
        if method != "ours, int8"
    ]
    return list(dict.fromkeys([*key_rows(), *everything]))


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for; a row takes a quarter of an hour."""
    named = options.methods or options.task != "multi30k"
    return [
        row
        for row in (all_rows() if named else key_rows())
        if (options.methods is None or row.method in options.methods)
        and (
            options.sizes is None
            or row.size in options.sizes
            or _one_size(row.method)
        )
        and (options.losses is None or row.loss in options.losses)
    ]


def recipe_of(row: Row, task: Task) -> Recipe:
    """How a row's student is trained."""
    setting = task.setting
    if _one_size(row.method):
        # Nothing is missing that a large step would bring back.
        return _task_loss_alone(setting.control, setting.shape.dropout)
    if row.method == SCRATCH:
        # The teacher's budget and the students' together.
        epochs = setting.teacher.epochs + setting.student.epochs
        return _task_loss_alone(replace(setting.student, epochs=epochs), 0.0)
    return replace(setting.student, **LOSSES[row.loss][1])


def _task_loss_alone(schedule: Schedule, dropout: float) -> Recipe:
    return Recipe(
        schedule.epochs,
        schedule.peak_learning_rate,
        schedule.warmup,
        schedule.smoothing,
        student_loss_weight=1.0,
        dropout=dropout,
    )


def make_student(row: Row, task: Task) -> keras.Model | None:
    """The student before its training; `None` where none is so small."""
    dropout = recipe_of(row, task).dropout
    if row.method == CONTROL:
        return task.teacher(dropout)
    if row.method in MODELS:
        return _narrower_model(task, row.size)
    budget = int(task.table.values.nbytes / row.size)
    return METHODS[row.method].student(task, budget, dropout)


def _narrower_model(task: Task, size: float) -> keras.Model | None:
    """A Transformer so much narrower, with new weights."""
    shape = task.setting.shape
    width = int(shape.d_model / size)
    if width < 4:
        return None
    return task.build(
        seed=task.seed + 1,
        d_model=width,
        num_heads=max(1, min(shape.num_heads, width // 8)),
        feed_forward_dim=max(8, int(shape.feed_forward_dim / size)),
    )


# The stages


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Runs the chosen stages for the chosen rows."""
    if options.quick:
        options.task = "quick"
    prepare(options.task, options.task_dir / options.task, options.data_dir)
    if options.stages == ["prepare"]:
        return
    task = ready_task(options.task, options.task_dir, options.seed)
    chosen = chosen_rows(options)
    if "rows" in options.stages:
        rows.finish(
            f"{task.name} {task.seed} teacher", lambda: _measure_teacher(task)
        )
        for row in chosen:
            key = row.key(task)
            rows.finish(
                key,
                lambda row=row, key=key: measure(
                    row, task, rows.path(key, ".weights.h5")
                ),
            )
    if "files" in options.stages:
        for row in chosen:
            key = row.key(task)
            done = rows.read(key)
            if done and "skipped" not in done:
                rows.finish(
                    f"files {key}",
                    lambda row=row, done=done: export(row, task, done, rows),
                )
        if options.rounds:
            _time_files(chosen, task, rows, options.rounds)


def _measure_teacher(task: Task) -> dict:
    return {
        "task": task.name,
        "seed": task.seed,
        "teacher": task.fingerprint,
        "name": TEACHER,
        "table_bytes": {"float32": task.table.values.nbytes},
        "translations": {"float32": _translate(task, task.teacher())},
    }


def measure(row: Row, task: Task, weights: Path) -> dict:
    """Makes a student, trains it, and translates the test with it.

    Args:
        row: The row.
        task: The task.
        weights: File of the trained student's weights.
    """
    recipe = recipe_of(row, task)
    keras.utils.set_random_seed(task.seed)
    student = make_student(row, task)
    result = {
        "task": task.name,
        "seed": task.seed,
        "teacher": task.fingerprint,
        "name": row.name,
        "size": row.size,
        "recipe": asdict(recipe),
    }
    if student is None:
        return result | {"skipped": "nothing of this kind is so small"}
    history = task.fine_tune(student, recipe)
    student.save_weights(weights)
    layer, trained = table_layer(student), student.get_weights()
    result |= {
        "validation_nll": history.history["val_nll"],
        "rank": getattr(layer, "rank", None),
        "table_bytes": {},
        "translations": {},
    }
    for storage in _storages(row, layer):
        quantization = None if storage == "float32" else storage
        if quantization and layer_quantization(layer) is None:
            store_as(layer, quantization)
        result["table_bytes"][storage] = table_bytes(layer, quantization)
        result["translations"][storage] = _translate(task, student)
        student.set_weights(trained)
    return result


def layer_quantization(layer: keras.layers.Layer) -> str | None:
    """The format in which a table is trained; `None` for floats."""
    return getattr(layer, "quantization", None)


def _storages(row: Row, layer: keras.layers.Layer) -> list[str]:
    """The forms in which a student is worth a row."""
    if layer_quantization(layer):
        return [layer_quantization(layer)]
    return ["float32", "int8"] + ["int4"] * (row.method == CONTROL)


def _translate(task: Task, model: keras.Model) -> list[str]:
    """Translates the test to ids: SentencePiece may be missing here."""
    return [" ".join(map(str, ids)) for ids in task.translate(model, "test")]


def export(row: Row, task: Task, done: dict, rows: Rows) -> dict:
    """Writes a LiteRT file of each form of a student, and translates with it.

    Of students whose table is a full one or the package's own layer; what
    rivals make of a table has no exporter.
    """
    from benchmarks.tasks import litert

    key = row.key(task)
    result = {"of": key, "files": {}}
    student = make_student(row, task)
    student.load_weights(rows.path(key, ".weights.h5"))
    layer = table_layer(student)
    if isinstance(layer, ArrayTable):
        if list(layer.arrays) != ["table"]:
            return result
        # As a layer of Keras, which the exporter rounds in the same way.
        dense = keras.layers.ReversibleEmbedding(
            layer.input_dim, layer.output_dim, name="token_embedding"
        )
        dense.build()
        dense.set_weights(layer.get_weights())
        student = task.with_table(dense, source=student)
    for storage in done["table_bytes"]:
        path = rows.path(key, f".{storage}.tflite")
        quantization = None if storage == "float32" else storage
        sizes = litert.export_translator(student, task, path, quantization)
        result["files"][storage] = {
            "bytes": path.stat().st_size,
            "table_bytes": sizes["table_bytes"],
            "translations": litert.translate_test(path, task),
        }
    return result


def _time_files(chosen: list[Row], task: Task, rows: Rows, rounds: int) -> None:
    """Milliseconds a sentence, one thread, all files in turns."""
    from benchmarks.tasks import litert

    calls, number = {}, 1
    for row, storage in product(chosen, ("float32", "int8", "int4")):
        path = rows.path(row.key(task), f".{storage}.tflite")
        if path.exists():
            calls[f"{row.key(task)} {storage}"], number = (
                litert.timed_translation(path, task)
            )
    name = f"times {task.name} {task.seed}"
    medians = {
        key: round(statistics.median(times["wall_ms"]) / number, 3)
        for key, times in time_in_turns(calls, rounds).items()
    }
    write_json(rows.path(name), {"row": name, "ms": medians})


# The report


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Scores what is done, and keeps what other machines have done."""
    entries = earlier.get("entries", [])
    duels = dict(earlier.get("duels", {}))
    done = rows.read_all()
    tasks = {(r["task"], r["seed"]) for r in done if "translations" in r}
    for name, seed in sorted(tasks):
        task = Task(name, options.task_dir / name, seed)
        own = [
            r for r in done if (r.get("task"), r.get("seed")) == (name, seed)
        ]
        own = scored(entries_of(task, own, done), task)
        duels[f"{name}, seed {seed}"] = find_duels(own, task)
        for entry in own:
            del entry["translations"]
        entries = merged(own, entries, _identity)
    return {"entries": entries, "duels": duels} if entries else {}


def _identity(entry: dict) -> tuple:
    names = "task", "seed", "teacher", "name", "storage", "rank"
    return (*(entry[n] for n in names), round(entry["ratio"]))


def entries_of(task: Task, own: list[dict], done: list[dict]) -> list[dict]:
    """Every form of every student, with its translations.

    Args:
        task: The task.
        own: Its rows.
        done: All rows, those of files and times among them.
    """
    files = {row["of"]: row["files"] for row in done if "of" in row}
    times = {k: ms for row in done for k, ms in row.get("ms", {}).items()}
    full = 4 * task.vocabulary_size * task.setting.shape.d_model
    found = []
    forms = [
        (row, storage) for row in own for storage in row.get("table_bytes", {})
    ]
    for row, storage in forms:
        file = files.get(row["row"], {}).get(storage, {})
        translations = task.decode(
            [[*map(int, ids.split())] for ids in row["translations"][storage]]
        )
        num_bytes = row["table_bytes"][storage]
        if file and storage != "float32":
            translations = file["translations"]
            num_bytes = file["table_bytes"]
        found.append(
            {
                **{name: row[name] for name in ("task", "seed", "teacher")},
                "name": row["name"],
                "storage": storage,
                "table_bytes": num_bytes,
                "ratio": full / num_bytes,
                "validation_nll": row.get("validation_nll", [None])[-1],
                "file_bytes": file.get("bytes"),
                "ms": times.get(f"{row['row']} {storage}"),
                "rank": row.get("rank"),
                "cpu_s": row["cpu_s"] if "recipe" in row else None,
                "environment": row["environment"],
                "translations": translations,
            }
        )
    # Ties between rows are shown in the order of their worth.
    order = {name: i for i, name in enumerate([TEACHER, *_names()])}
    return sorted(found, key=lambda e: order.get(e["name"], len(order)))


def _names() -> list[str]:
    return list(dict.fromkeys(row.name for row in all_rows()))


def scored(entries: list[dict], task: Task) -> list[dict]:
    """Adds BLEU and chrF to entries; the control is the baseline."""
    from benchmarks.tasks.bleu import chrf
    from benchmarks.tasks.bleu import paired_scores

    references = task.texts["test"]["target"]
    controls = [e for e in entries if label(e) == CONTROL]
    baseline = (controls or entries)[0]
    entries = [baseline] + [e for e in entries if e is not baseline]
    scores = paired_scores([e["translations"] for e in entries], references)
    for entry, score in zip(entries, scores):
        entry |= {
            "bleu": score.bleu,
            "bleu_ci": score.ci,
            "p_value": score.p_value,
            "chrf": chrf(entry["translations"], references),
        }
    return entries


def find_duels(entries: list[dict], task: Task) -> list[dict]:
    """At each size: ours against the best of every other method.

    Of several that are small enough, the one of the lowest validation loss
    stands for a method.
    """
    from benchmarks.tasks.bleu import paired_scores

    found = []
    for size in SIZES:
        methods: dict[str, list[dict]] = {}
        for entry in entries:
            if entry["ratio"] >= TOLERANCE * size:
                ours = entry["name"] in (OURS, "ours, int4")
                name = OURS if ours else label(entry)
                methods.setdefault(name, []).append(entry)
        best = {
            name: min(group, key=lambda entry: entry["validation_nll"])
            for name, group in methods.items()
        }
        ours = best.pop(OURS, None)
        if ours is None:
            continue
        scores = paired_scores(
            [e["translations"] for e in (ours, *best.values())],
            task.texts["test"]["target"],
        )
        found += [
            {
                "size": size,
                "ours": label(ours),
                "ours_rank": ours["rank"],
                "ours_bleu": ours["bleu"],
                "rival": label(rival),
                "rival_ratio": rival["ratio"],
                "rival_bleu": rival["bleu"],
                "p_value": score.p_value,
            }
            for rival, score in zip(best.values(), scores[1:])
        ]
    return found


def label(entry: dict) -> str:
    """The name of an entry, with the form in which it is stored."""
    storage = entry["storage"]
    # Earlier results have the other spelling.
    name = entry["name"].replace("quantisation", "quantization")
    if storage in ("float32", *re.findall("int[248]", name)):
        return name
    return f"{'full table' if name == CONTROL else name}, {storage}"


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables by size, the pictures, and ours against each other."""
    from benchmarks.tasks.bleu import BOOTSTRAP_SAMPLES
    from benchmarks.tasks.bleu import signatures

    bleu, chrf = signatures()
    yield (
        "Every student starts from one teacher, sees the same batches as "
        "often, and is trained by the same recipe but for what its name says. "
        f"`{CONTROL}` is the teacher trained on for as long, and what Δ and "
        f"the p-value of a paired bootstrap ({BOOTSTRAP_SAMPLES:,} samples) "
        "compare with; ± is half of a 95 % confidence interval. `int8` and "
        "`int4` say how table or factors are stored; what is measured then is "
        "the LiteRT file, where a size of it is given. Milliseconds a "
        "sentence: that file on one thread."
    )
    yield f"BLEU `{bleu}`, chrF `{chrf}`, greedy search."
    entries = results["entries"]
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        yield from _task_section(task, own, folder)
    for name, found in results["duels"].items():
        yield f"## Ours against each other method: {name}"
        yield (
            "At each size the form of lowest validation loss of each method "
            "that has so few bytes. p: paired bootstrap of the two."
        )
        if found:
            yield markdown_table([*map(_duel_cells, found)])


def _task_section(
    task: str, entries: list[dict], folder: Path
) -> Iterator[str]:
    control = {e["seed"]: e["bleu"] for e in entries if label(e) == CONTROL}
    bounds = [0.0, *SIZES, float("inf")]
    for low, high in pairwise(bounds):
        inside = [
            e
            for e in entries
            if TOLERANCE * low <= e["ratio"] < TOLERANCE * high
        ]
        if low:
            inside.sort(key=lambda e: -e["bleu"])
        yield (
            f"### {task}, {low:g} times fewer bytes, or more"
            if low
            else (f"## {task}")
        )
        if inside:
            yield markdown_table([_entry_cells(e, control) for e in inside])
    for key, axis, log_x in (
        ("table_bytes", "bytes of the table", True),
        ("ms", "milliseconds a sentence, one thread", False),
    ):
        if any(e[key] for e in entries if label(e) in STYLES):
            name = f"{task}_{key.removeprefix('table_')}.png"
            _plot(entries, control, folder / name, key, axis, log_x)
            yield f"![BLEU against {key.removeprefix('table_')}]({name})"


def _entry_cells(entry: dict, control: dict) -> dict:
    file_mb = entry["file_bytes"] and entry["file_bytes"] / 1e6
    delta = entry["bleu"] - control.get(entry["seed"], float("nan"))
    return {
        "method": label(entry),
        "seed": str(entry["seed"]),
        "table bytes": f"{entry['table_bytes']:,}",
        "x smaller": f"{entry['ratio']:.1f}",
        "rank": formatted(entry["rank"], "{}"),
        "BLEU": f"{entry['bleu']:.2f}",
        "±": formatted(entry["bleu_ci"], "{:.2f}"),
        "Δ": f"{delta:+.2f}",
        "p": formatted(entry["p_value"], "{:.3f}"),
        "chrF": f"{entry['chrf']:.1f}",
        "val. nats": formatted(entry["validation_nll"], "{:.3f}"),
        "file MB": formatted(file_mb, "{:.2f}"),
        "ms": formatted(entry["ms"], "{:.2f}"),
        "cpu s": formatted(entry["cpu_s"], "{:.0f}"),
    }


def _duel_cells(duel: dict) -> dict:
    return {
        "size": f"{duel['size']:g}x",
        "ours": f"{duel['ours']}, rank {duel['ours_rank']}",
        "BLEU": f"{duel['ours_bleu']:.2f}",
        "other": duel["rival"],
        "its size": f"{duel['rival_ratio']:.1f}x",
        "its BLEU": f"{duel['rival_bleu']:.2f}",
        "Δ": f"{duel['ours_bleu'] - duel['rival_bleu']:+.2f}",
        "p": formatted(duel["p_value"], "{:.3f}"),
    }


# What is drawn, in the order of the legend, and its colors.
STYLES = {
    name: {
        "color": color,
        "marker": "o",
        "linewidth": 2.5 if name.startswith(OURS) else 1.2,
    }
    for name, color in {
        OURS: "C3",
        "ours, int8": "C1",
        "ours, int4": "C8",
        "truncated SVD": "C0",
        "truncated SVD, int8": "C9",
        "GroupReduce": "C2",
        "GroupReduce, int8": "olive",
        "Tensor-Train": "C4",
        "Tensor-Train, int8": "C6",
        "product quantization": "C5",
        PAPER: "C7",
        SMALLER: "black",
        SCRATCH: "gold",
        "full table, int8": "navy",
        "full table, int4": "teal",
    }.items()
}


def _plot(
    entries: list[dict],
    control: dict,
    path: Path,
    key: str,
    axis: str,
    log_x: bool,
) -> None:
    lines = {}
    for name in STYLES:
        points: dict[float, list[float]] = {}
        for entry in entries:
            if label(entry) == name and entry[key] is not None:
                points.setdefault(entry[key], []).append(entry["bleu"])
        lines[name] = [(x, statistics.mean(points[x])) for x in sorted(points)]
    plot_lines(
        lines,
        path,
        styles=STYLES,
        level=(CONTROL, statistics.mean(control.values())) if control else None,
        log_x=log_x,
        x_format=(lambda x, _: f"{x / 1e3:,.0f} kB") if log_x else None,
        xlabel=axis,
        ylabel="sacreBLEU, test",
    )
