"""Quality against bytes: every method on the same translation tasks.

Students of one teacher start from it, see the same batches as often, and are
trained by the same recipe but for what their names say; so is the full table
in float32. Δ, and the p-value of a paired bootstrap, compare with that table
(with the teacher trained on for as long where there is none); ± is half of a
95 % confidence interval. Names end with how table or factors are stored,
rounded in Keras as a file would hold them. A teacher goes by its seed and, of
several machines, by its own BLEU. `before`: validation nats before the
fine-tuning. Pictures show how far from the full table, means over teachers,
and the teachers' extremes; what is further than they reach is left out. At
each size ours is compared with every other method, each in its form of lowest
validation loss that has so few bytes.

Tokenizing the task needs TensorFlow (`--prepare` does nothing else); training
and translating run on any backend, from the arrays that it wrote.
"""

from __future__ import annotations

import argparse
import math
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
from keras_distilled_embedding.quantization import QUANTIZATIONS

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


OURS_ROUNDED = [
    f"ours, {form}{calibrated}"
    for form in ("auto", *QUANTIZATIONS)
    for calibrated in ("", ", calibrated")
]

# What decides most, each at its sizes in the order of their worth.
KEY_SIZES = {
    FULL: (1.0,),
    "ours, auto, calibrated": (16.0, 8.0, 32.0, 64.0),
    "ours, auto": (16.0, 8.0, 32.0, 64.0),
    "full table, int4": (1.0,),
    "full table, int2": (1.0,),
    "residual quantization": (16.0, 32.0, 8.0),
    "product quantization": (16.0, 8.0),
    "round to nearest, int4": (1.0,),
    "round to nearest, int2": (1.0,),
    OURS: (8.0, 32.0),
    "GroupReduce": (8.0, 32.0),
    "Tensor-Train": (8.0, 32.0),
    PAPER: (8.0, 32.0),
    "truncated SVD": (8.0, 32.0),
    "CARVQ": (16.0,),
    SCRATCH: (8.0, 32.0),
    CONTROL: (1.0,),
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
    int8 = "ours, int8", "ours, int8, calibrated"
    methods = [method for method in METHODS if method not in int8]
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
    for teacher in sorted({_teacher(row) for row in done}):
        name, seed, _ = teacher
        task = Task(name, options.task_dir / name, seed)
        own = [row for row in done if _teacher(row) == teacher]
        own = scored(entries_of(task, own), task)
        duels[f"{name}, teacher {_teacher_name(own[0], own)}"] = find_duels(
            own, task
        )
        for entry in own:
            del entry["translations"]
        entries = harness.merged(own, entries, _identity)
    return {"entries": entries, "duels": duels} if entries else {}


def _teacher(entry: dict) -> tuple:
    return tuple(entry[name] for name in ("task", "seed", "teacher"))


def _teacher_name(entry: dict, entries: list[dict]) -> str:
    """Its seed and, as machines make different ones of a seed, its BLEU."""
    own = [e for e in entries if _teacher(e) == _teacher(entry)]
    bleu = [f" ({e['bleu']:.2f})" for e in own if label(e) == TEACHER]
    return f"{entry['seed']}{''.join(bleu)}"


def _identity(entry: dict) -> tuple:
    names = "name", "storage", "rank", "rate", "epochs"
    trained = tuple(entry[name] for name in names)
    return (*_teacher(entry), *trained, round(entry["ratio"]))


def _baseline(entries: list[dict]) -> dict:
    """Of one teacher's entries what the others are compared with.

    It is trained by the recipe, and of several, the shortest.
    """
    for name in (FULL, CONTROL):
        found = [e for e in entries if label(e) == name and e["rate"] == 1.0]
        if found:
            return min(found, key=lambda entry: entry["epochs"])
    return entries[0]


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
    """Adds BLEU and chrF to one teacher's entries, the baseline first."""
    from benchmarks.tasks.bleu import chrf
    from benchmarks.tasks.bleu import paired_scores

    references = task.texts["test"]["target"]
    baseline = _baseline(entries)
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
    name = entry["name"]
    if storage in ("float32", *re.findall("int[248]", name)):
        return name
    # The table itself, trained in floats and then rounded.
    return f"{'full table' if name == FULL else name}, {storage}"


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables by size, the pictures, and ours against each other."""
    from benchmarks.tasks.bleu import signatures

    bleu, chrf = signatures()
    yield f"BLEU `{bleu}`, chrF `{chrf}`, greedy search."
    entries = results["entries"]
    for task in SETTINGS:
        own = [entry for entry in entries if entry["task"] == task]
        if own:
            yield from _task_section(task, own, folder)
    for name, found in results["duels"].items():
        yield f"## Ours against each other method: {name}"
        if found:
            yield harness.markdown_table([*map(_duel_cells, found)])


def _task_section(
    task: str, entries: list[dict], folder: Path
) -> Iterator[str]:
    yield f"## {task}"
    bounds = [0.0, *SIZES, float("inf")]
    for low, high in pairwise(bounds):
        inside = [
            e
            for e in entries
            if TOLERANCE * low <= e["ratio"] < TOLERANCE * high
        ]
        inside.sort(key=lambda e: e["validation_nll"] or math.inf)
        if low and inside:
            yield f"### {task}, {low:g} times fewer bytes, or more"
        if inside:
            yield harness.markdown_table(
                [_entry_cells(entry, entries) for entry in inside]
            )
    for name, (value, what, axis, limits) in PICTURES.items():
        path = folder / f"{task}_{name}.png"
        _plot(entries, path, value, title=what, ylabel=axis, ylim=limits)
        yield f"![{what}]({path.name})"


def _entry_cells(entry: dict, entries: list[dict]) -> dict:
    own = [e for e in entries if _teacher(e) == _teacher(entry)]
    delta = entry["bleu"] - _baseline(own)["bleu"]
    return {
        "method": label(entry),
        "teacher": _teacher_name(entry, entries),
        "table bytes": f"{entry['table_bytes']:,}",
        "x smaller": f"{entry['ratio']:.1f}",
        "rank": harness.formatted(entry["rank"], "{}"),
        "step size": f"{entry['rate']:g}x",
        "epochs": harness.formatted(entry["epochs"], "{}"),
        "before": harness.formatted(entry["before_nll"], "{:.3f}"),
        "val. nats": harness.formatted(entry["validation_nll"], "{:.3f}"),
        "BLEU": f"{entry['bleu']:.2f}",
        "±": harness.formatted(entry["bleu_ci"], "{:.2f}"),
        "Δ": f"{delta:+.2f}",
        "p": harness.formatted(entry["p_value"], "{:.3f}"),
        "chrF": f"{entry['chrf']:.1f}",
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
    "ours, auto, calibrated",
    "ours, auto",
    "ours, int2, calibrated",
    "ours, int2",
    "ours, int4",
    "ours, int8",
    OURS,
    "full table, int8",
    "full table, int4",
    "full table, int2",
    "round to nearest, int8",
    "round to nearest, int4",
    "round to nearest, int2",
    "residual quantization",
    "CARVQ",
    "product quantization",
    "truncated SVD",
    "Tensor-Train",
    "GroupReduce",
    PAPER,
    SCRATCH,
)


# What is up, what that shows, the axis and its limits, by the file's name.
# What is further from the full table than that is of no use.
PICTURES = {
    "nats": (
        "validation_nll",
        "Validation nats beside the full table, against bytes",
        "nats a token, validation, above the full table's",
        (-0.02, 0.4),
    ),
    "bleu": (
        "bleu",
        "BLEU beside the full table, against bytes",
        "sacreBLEU, test, above the full table's",
        (-6.0, 1.5),
    ),
}


def _plot(
    entries: list[dict], path: Path, value: str, **axes_options: object
) -> None:
    """Each method's distance from the full table of the same teacher."""
    by_teacher: dict[tuple, list[dict]] = {}
    for entry in entries:
        if entry["validation_nll"] and entry["rate"] == 1.0:
            by_teacher.setdefault(_teacher(entry), []).append(entry)
    points: dict[tuple[str, int], list[float]] = {}
    for own in by_teacher.values():
        baseline = _baseline(own)
        for entry in own:
            name = entry["name"]
            # What is trained for longer is not drawn beside what is not.
            if entry["epochs"] != baseline["epochs"] and name != SCRATCH:
                continue
            if not name.startswith("ours, auto"):  # in any format
                name = label(entry)
            distance = entry[value] - baseline[value]
            at = name, entry["table_bytes"]
            points.setdefault(at, []).append(distance)
    lines, bars = {}, {}
    for name in DRAWN:
        own = sorted((x, v) for (of, x), v in points.items() if of == name)
        lines[name] = [(x, statistics.mean(values)) for x, values in own]
        bars[name] = [(min(values), max(values)) for _, values in own]
    harness.plot_lines(
        lines,
        path,
        bars=bars,
        styles={n: {"linewidth": 2.5} for n in DRAWN if n.startswith(OURS)},
        level=("the full table", 0.0),
        log_x=True,
        x_format=lambda x, _: f"{x / 1e3:,.0f} kB",
        xlabel="bytes of the table",
        **axes_options,
    )
