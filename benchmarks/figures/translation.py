"""Quality against bytes: every method on the same translation tasks.

Every student starts from one teacher, sees the same batches as often, and is
trained by the same recipe but for what its name says. `teacher, trained on` is
the teacher trained on for as long, and what Δ and the p-value of a paired
bootstrap compare with; ± is half of a 95 % confidence interval. `int8` and
`int4` say how table or factors are stored: rounded in Keras as a file would
hold them, or, where the size of a file is given, measured with that LiteRT
file. Milliseconds a sentence: that file on one thread. `before`: validation
nats before the fine-tuning. At each size ours is compared with every other
method, each in its form of lowest validation loss that has so few bytes.

Tokenizing the task needs TensorFlow (`--prepare` does nothing else); training
and translating run on any backend, from the arrays that it wrote.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from itertools import pairwise
from itertools import product
from itertools import zip_longest
from pathlib import Path

import keras

from benchmarks import harness
from benchmarks.methods import METHODS
from benchmarks.methods.ours import OURS
from benchmarks.methods.ours import PAPER
from benchmarks.tasks.students import CONTROL
from benchmarks.tasks.students import LOSSES
from benchmarks.tasks.students import evaluate_stored
from benchmarks.tasks.students import make_student
from benchmarks.tasks.students import measure_student
from benchmarks.tasks.translation import SETTINGS
from benchmarks.tasks.translation import Task
from benchmarks.tasks.translation import prepare
from benchmarks.tasks.translation import ready_task
from examples.nmt.train import Recipe

SIZES = (4.0, 8.0, 16.0, 32.0, 64.0)
TEACHER = "teacher, as it was"
SCRATCH = "smaller model, from scratch"
FULL = "full table, float32"
# A little less than a nominal size still counts as it: scales, offsets.
TOLERANCE = 0.97


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prepare", action="store_true", help="only tokenize the task")
    add("--task", choices=SETTINGS, default="multi30k")
    add("--seed", type=int, default=0)
    methods = [CONTROL, SCRATCH, *METHODS]
    add("--methods", nargs="+", choices=methods, metavar="METHOD")
    add("--sizes", nargs="+", type=float)
    add("--losses", nargs="+", choices=LOSSES, metavar="LOSS")
    add("--rate", type=float, default=1.0, help="times the step size")
    add("--epochs", type=int, help="of the students; default: the recipe's")


# The grid


@dataclass(frozen=True)
class Row:
    """A student.

    Args:
        method: One of `METHODS`, `CONTROL` or `SCRATCH`.
        size: How many times fewer bytes than the float32 table; 1 where the
            method has no choice.
        loss: A key of `LOSSES`.
        rate: Times the recipe's largest step size.
        epochs: Of the training, by default the recipe's.
    """

    method: str
    size: float = 1.0
    loss: str = "logits"
    rate: float = 1.0
    epochs: int | None = None

    @property
    def name(self) -> str:
        """As the report calls it, without the size."""
        if self.loss == "logits" or self.method != OURS:
            return self.method
        return f"{self.method}, {LOSSES[self.loss][0]}"

    def key(self, task: Task) -> str:
        """Its name among the rows on disk."""
        name = f"{task.name} {task.seed} {self.method} {self.loss}"
        rate = "" if self.rate == 1.0 else f" rate {self.rate:g}"
        epochs = "" if self.epochs is None else f" epochs {self.epochs}"
        return f"{name} {self.size:g}x{rate}{epochs}"


def _one_size(method: str) -> bool:
    return method == CONTROL or (
        method in METHODS and METHODS[method].fixed_size
    )


OURS_ROUNDED = ("ours, auto", "ours, int8", "ours, int4", "ours, int2")

# What decides most, each at its sizes in the order of their worth.
KEY_SIZES = {
    CONTROL: (1.0,),
    OURS: (8.0, 4.0, 2.0, 16.0, 32.0, 64.0),
    "truncated SVD": (8.0, 32.0, 4.0, 2.0),
    "ours, rows weighted": (8.0, 2.0, 4.0, 16.0, 32.0),
    "weighted SVD": (8.0, 2.0),
    "GroupReduce": (8.0, 32.0, 4.0),
    "Tensor-Train": (8.0, 32.0),
    "product quantization": (8.0,),
    PAPER: (8.0, 32.0),
    "ours, int4": (32.0, 16.0, 8.0, 64.0),
    "full table, int4": (1.0,),
    "round to nearest, int8": (1.0,),
    SCRATCH: (8.0, 32.0),
}


def key_rows() -> list[Row]:
    """The most important sizes of all methods, then the next, and losses."""
    by_worth = zip_longest(*KEY_SIZES.values())
    found = [
        Row(method, size, "embedding" if method == PAPER else "logits")
        for sizes in by_worth
        for method, size in zip(KEY_SIZES, sizes)
        if size is not None
    ]
    return found + [Row(OURS, 8.0, loss) for loss in LOSSES if loss != "logits"]


def _rows(methods: Iterable[str], sizes: Iterable[float]) -> list[Row]:
    """Every method at every size, once where a method has no choice."""
    found = [
        Row(
            method,
            1.0 if _one_size(method) else size,
            "embedding" if method == PAPER else "logits",
        )
        for size, method in product(sizes, methods)
    ]
    return list(dict.fromkeys(found))


def all_rows() -> list[Row]:
    """The key rows, then every method at every size."""
    # Rounding to int8 after training costs nothing: no row of its own.
    methods = [method for method in METHODS if method != "ours, int8"]
    everything = _rows([CONTROL, SCRATCH, *methods], SIZES)
    return list(dict.fromkeys([*key_rows(), *everything]))


def chosen_rows(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for; a row takes a quarter of an hour."""
    if options.methods and options.sizes and not options.losses:
        rows = _rows(options.methods, options.sizes)
    elif options.methods or options.task != "multi30k":
        rows = all_rows()
    else:
        rows = key_rows()
    methods = options.methods or [row.method for row in rows]
    sizes = options.sizes or [row.size for row in rows]
    losses = options.losses or [row.loss for row in rows]
    return [
        replace(row, rate=options.rate, epochs=options.epochs)
        for row in rows
        if row.method in methods
        and (row.size in sizes or _one_size(row.method))
        and row.loss in losses
    ]


def recipe_of(row: Row, task: Task) -> Recipe:
    """How a row's student is trained."""
    setting = task.setting
    if row.method == CONTROL:
        recipe = setting.control
    elif row.method == SCRATCH:
        # The teacher's budget and the students' together.
        epochs = setting.teacher.epochs + setting.student.epochs
        recipe = replace(
            setting.student, epochs=epochs, student_loss_weight=1.0
        )
    else:
        recipe = replace(setting.student, **LOSSES[row.loss][1])
    return replace(
        recipe,
        peak_learning_rate=row.rate * recipe.peak_learning_rate,
        epochs=row.epochs or recipe.epochs,
    )


# What is measured


def run(options: argparse.Namespace) -> None:
    """Prepares the task, trains its teacher and the chosen rows."""
    if options.quick:
        options.task = "quick"
    prepare(options.task, options.task_dir / options.task, options.data_dir)
    if options.prepare:
        return
    task = ready_task(options.task, options.task_dir, options.seed)
    options.store.finish(
        f"{task.name} {task.seed} teacher",
        lambda: {
            **_identity_of(task, TEACHER),
            "stored": evaluate_stored(task, task.teacher()),
        },
    )
    for row in chosen_rows(options):
        options.store.finish(
            row.key(task), partial(measure, row, task, options.store)
        )


def measure(row: Row, task: Task, store: harness.Rows) -> dict:
    """Makes a student, trains it, and translates the test with it."""
    recipe = recipe_of(row, task)
    keras.utils.set_random_seed(task.seed)
    if row.method == SCRATCH:
        student = _narrower_model(task, row.size)
    else:
        student = make_student(task, row.method, row.size, recipe.dropout)
    weights = store.path(row.key(task), ".weights.h5")
    return {
        **_identity_of(task, row.name),
        "size": row.size,
        "rate": row.rate,
        **measure_student(task, student, recipe, weights),
    }


def _identity_of(task: Task, name: str) -> dict:
    return {
        "task": task.name,
        "seed": task.seed,
        "teacher": task.fingerprint,
        "name": name,
    }


def _narrower_model(task: Task, size: float) -> keras.Model | None:
    """A Transformer so much narrower, with new weights."""
    sizes = task.setting.model
    width = int(sizes["d_model"] / size)
    if width < 4:
        return None
    return task.build(
        seed=task.seed + 1,
        d_model=width,
        num_heads=max(1, min(sizes["num_heads"], width // 8)),
        feed_forward_dim=max(8, int(sizes["feed_forward_dim"] / size)),
    )


# The report


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Scores what is done, and keeps what other machines have done."""
    entries = earlier.get("entries", [])
    duels = dict(earlier.get("duels", {}))
    done = [row for row in options.store.read_all() if "stored" in row]
    for name, seed in sorted({(row["task"], row["seed"]) for row in done}):
        task = Task(name, options.task_dir / name, seed)
        own = [r for r in done if (r["task"], r["seed"]) == (name, seed)]
        own = scored(entries_of(task, own), task)
        duels[f"{name}, seed {seed}"] = find_duels(own, task)
        for entry in own:
            del entry["translations"]
        entries = harness.merged(own, entries, _identity)
    return {"entries": entries, "duels": duels} if entries else {}


def _identity(entry: dict) -> tuple:
    names = "task", "seed", "teacher", "name", "storage", "rank"
    # Earlier results have one step size, and the recipe's epochs.
    trained = entry.get("rate", 1.0), entry.get("epochs")
    return (*(entry[n] for n in names), *trained, round(entry["ratio"]))


def entries_of(task: Task, rows: list[dict]) -> list[dict]:
    """Every form of every row, with its translations."""
    full = 4 * task.vocabulary_size * task.setting.model["d_model"]
    return [
        {
            **{name: row[name] for name in ("task", "seed", "teacher", "name")},
            "storage": storage,
            "table_bytes": stored["table_bytes"],
            "ratio": full / stored["table_bytes"],
            "before_nll": row.get("before_nll"),
            "validation_nll": row.get("validation_nll", [None])[-1],
            "rank": row.get("rank"),
            "rate": row.get("rate", 1.0),
            "epochs": row.get("recipe", {}).get("epochs"),
            "cpu_s": row["cpu_s"] if "recipe" in row else None,
            "environment": row["environment"],
            "translations": task.decode(stored["translations"]),
        }
        for row in rows
        for storage, stored in row["stored"].items()
        # Of the untrained teacher the rounded forms say nothing.
        if "recipe" in row or storage == "float32"
    ]


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
            "bleu": score.score,
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
                ours = entry["name"] in (OURS, *OURS_ROUNDED)
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
    from benchmarks.tasks.bleu import signatures

    bleu, chrf = signatures()
    yield f"BLEU `{bleu}`, chrF `{chrf}`, greedy search."
    entries = results["entries"]
    for task in dict.fromkeys(entry["task"] for entry in entries):
        own = [entry for entry in entries if entry["task"] == task]
        yield from _task_section(task, own, folder)
    for name, found in results["duels"].items():
        yield f"## Ours against each other method: {name}"
        if found:
            yield harness.markdown_table([*map(_duel_cells, found)])


def _task_section(
    task: str, entries: list[dict], folder: Path
) -> Iterator[str]:
    control = {e["seed"]: e["bleu"] for e in entries if label(e) == CONTROL}
    yield f"## {task}"
    bounds = [0.0, *SIZES, float("inf")]
    for low, high in pairwise(bounds):
        inside = [
            e
            for e in entries
            if TOLERANCE * low <= e["ratio"] < TOLERANCE * high
        ]
        if low and inside:
            inside.sort(key=lambda e: -e["bleu"])
            yield f"### {task}, {low:g} times fewer bytes, or more"
        if inside:
            yield harness.markdown_table(
                [_entry_cells(e, control) for e in inside]
            )
    for name, (key, value, what) in PICTURES.items():
        if any(e.get(key) and e[value] for e in entries if label(e) in DRAWN):
            file = f"{task}_{name}.png"
            _plot(entries, folder / file, key, value)
            yield f"![{what}]({file})"


def _entry_cells(entry: dict, control: dict) -> dict:
    file_bytes = entry.get("file_bytes")
    delta = p_value = None  # without a control
    if entry["seed"] in control:
        delta = entry["bleu"] - control[entry["seed"]]
        p_value = entry["p_value"]
    return {
        "method": label(entry),
        "seed": str(entry["seed"]),
        "table bytes": f"{entry['table_bytes']:,}",
        "x smaller": f"{entry['ratio']:.1f}",
        "rank": harness.formatted(entry["rank"], "{}"),
        "step size": f"{entry.get('rate', 1.0):g}x",
        "epochs": harness.formatted(entry.get("epochs"), "{}"),
        "BLEU": f"{entry['bleu']:.2f}",
        "±": harness.formatted(entry["bleu_ci"], "{:.2f}"),
        "Δ": harness.formatted(delta, "{:+.2f}"),
        "p": harness.formatted(p_value, "{:.3f}"),
        "chrF": f"{entry['chrf']:.1f}",
        "before": harness.formatted(entry.get("before_nll"), "{:.3f}"),
        "val. nats": harness.formatted(entry["validation_nll"], "{:.3f}"),
        "file MB": harness.formatted(file_bytes and file_bytes / 1e6, "{:.2f}"),
        "ms": harness.formatted(entry.get("ms"), "{:.2f}"),
        "cpu s": harness.formatted(entry["cpu_s"], "{:.0f}"),
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
        "p": harness.formatted(duel["p_value"], "{:.3f}"),
    }


# What is drawn, in the order of the legend.
DRAWN = (
    OURS,
    "ours, auto, int4",
    "ours, auto, int2",
    "ours, int8",
    "ours, int4",
    "ours, int2",
    "truncated SVD",
    "truncated SVD, int8",
    "GroupReduce",
    "GroupReduce, int8",
    "Tensor-Train",
    "Tensor-Train, int8",
    "product quantization",
    PAPER,
    SCRATCH,
    "full table, int8",
    "full table, int4",
)


# What is across, what is up and what that shows, by the name of the file.
PICTURES = {
    "nats": ("table_bytes", "validation_nll", "Validation nats against bytes"),
    "bytes": ("table_bytes", "bleu", "BLEU against bytes"),
    "ms": ("ms", "bleu", "BLEU against ms"),
}
AXES = {
    "table_bytes": "bytes of the table",
    "ms": "milliseconds a sentence, one thread",
    "validation_nll": "nats a token, validation",
    "bleu": "sacreBLEU, test",
}


def _plot(entries: list[dict], path: Path, key: str, value: str) -> None:
    """Means over the teachers; the control, or the full table, is level."""
    lines = {}
    for name in DRAWN:
        points: dict[float, list[float]] = {}
        for entry in entries:
            if label(entry) == name and entry.get(key) and entry[value]:
                points.setdefault(entry[key], []).append(entry[value])
        lines[name] = [(x, statistics.mean(points[x])) for x in sorted(points)]
    levels = {
        name: [e[value] for e in entries if label(e) == name and e[value]]
        for name in (FULL, CONTROL)
    }
    name = CONTROL if levels[CONTROL] else FULL
    log_x = key == "table_bytes"
    harness.plot_lines(
        lines,
        path,
        styles={n: {"linewidth": 2.5} for n in DRAWN if n.startswith(OURS)},
        level=(name, statistics.mean(levels[name])) if levels[name] else None,
        log_x=log_x,
        x_format=(lambda x, _: f"{x / 1e3:,.0f} kB") if log_x else None,
        xlabel=AXES[key],
        ylabel=AXES[value],
    )
