"""BLEU, chrF and confidence intervals of the rows; tables and pictures."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import sacrebleu
from sacrebleu.significance import PairedTest

from benchmarks._report import write_text
from benchmarks.translation.grid import CONTROL
from benchmarks.translation.grid import OURS
from benchmarks.translation.grid import SCRATCH
from benchmarks.translation.grid import SIZES
from benchmarks.translation.grid import Row
from benchmarks.translation.grid import rows
from benchmarks.translation.rows import Results
from examples.nmt.evaluate import markdown_table
from keras_distilled_embedding.factorization import factor_bytes

BOOTSTRAP_SAMPLES = 1_000
TEACHER = "teacher, as it was"
# So much less than a nominal size still counts as it: scales, biases.
TOLERANCE = 0.97


@dataclass(frozen=True)
class Entry:
    """A row, in one of the forms in which it is stored.

    Args:
        task: Of `SETTINGS`.
        seed: Of the teacher and of the fine-tuning.
        teacher: Tells teachers.
        name: The method, and its loss where that is an ablation.
        storage: `"float32"`, `"int8"` or `"int4"`: of table or factors.
        table_bytes: Of them.
        ratio: How many times fewer than the full float32 table's.
        bleu: sacreBLEU of the test, greedy search.
        bleu_ci: Half of its 95 % confidence interval, by bootstrap.
        p_value: That the control's BLEU is no other, by paired bootstrap.
        chrf: chrF2 of the test.
        validation_nll: Nats a token, after the last epoch, of floats.
        file_bytes: Of the LiteRT file with all weights, where there is one.
        ms: Milliseconds a sentence with it, on one thread.
        rank: Of the factors, where there is one.
        cpu_s: Processor seconds of the fine-tuning.
        environment: Versions and machine.
        translations: Of the test; not in the committed results.
    """

    task: str
    seed: int
    teacher: int
    name: str
    storage: str
    table_bytes: int
    ratio: float
    bleu: float = 0.0
    bleu_ci: float = 0.0
    p_value: float | None = None
    chrf: float = 0.0
    validation_nll: float | None = None
    file_bytes: int | None = None
    ms: float | None = None
    rank: int | None = None
    cpu_s: float | None = None
    environment: str = ""
    translations: tuple[str, ...] = field(default=(), repr=False)

    @property
    def is_ours(self) -> bool:
        """As the package does it by default; not an ablation."""
        return self.name in (OURS, "ours, int4")

    @property
    def label(self) -> str:
        """The name with the form in which it is stored."""
        return label(self.record())

    def record(self) -> dict:
        """As the committed results keep it."""
        record = asdict(self)
        del record["translations"]
        return record


class Scores:
    """What the rows of one task and seed have reached.

    Args:
        results: The rows.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.task = results.task

    @cached_property
    def entries(self) -> list[Entry]:
        """Every form of every row that is done."""
        unscored = list(self._teachers())
        for row in rows(self.task.name):
            if self.results.done(row):
                unscored += self._forms(row)
        return self._scored(unscored)

    def _teachers(self) -> Iterable[Entry]:
        path = self.results.folder / "teacher.float32.npz"
        yield Entry(
            self.task.name,
            self.task.seed,
            self.task.fingerprint,
            TEACHER,
            "float32",
            self.task.table_bytes,
            1.0,
            translations=self._decode(path),
        )

    def _forms(self, row: Row) -> Iterable[Entry]:
        result = self.results.read(row)
        if "skipped" in result:
            return
        files = self.results.read(row, ".files.json")
        table = result["table"]
        rounded = table.get("rounding")
        for storage in [rounded] if rounded else ["float32", "int8", "int4"]:
            file = files.get(storage, {})
            # Rounded all along, it has been translated so.
            kept = "float32" if rounded else storage
            ids = self.results.path(row, f".{kept}.npz")
            if file and storage != "float32":
                translations = tuple(file["translations"])
            elif ids.exists():
                translations = self._decode(ids)
            else:
                continue
            num_bytes = self._table_bytes(table, file, storage)
            yield Entry(
                self.task.name,
                self.task.seed,
                result["teacher"],
                row.name,
                storage,
                num_bytes,
                self.task.table_bytes / num_bytes,
                validation_nll=result["validation_nll"][-1],
                file_bytes=file.get("bytes"),
                ms=self._times.get(f"{row.slug}.{storage}"),
                rank=table.get("rank"),
                cpu_s=result["cpu_s"],
                environment=result["environment"],
                translations=translations,
            )

    @cached_property
    def _times(self) -> dict[str, float]:
        path = self.results.folder / "times.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _table_bytes(self, table: dict, file: dict, storage: str) -> int:
        """Of the file where there is one, else as counted."""
        if storage != "float32" and file:
            return file["table_bytes"]
        if storage == "int8" and "bytes_int8" in table:
            return table["bytes_int8"]
        if storage != "float32" and "rank" in table:
            shape = self.task.vocabulary_size, self.task.setting.shape.d_model
            return factor_bytes(table["rank"], *shape, storage)
        return table["bytes"]

    def _decode(self, path: Path) -> tuple[str, ...]:
        arrays = np.load(path)
        ends = np.cumsum(arrays["lengths"])
        ids = np.split(arrays["ids"], ends[:-1])
        return tuple(self.task.pieces.decode([row.tolist() for row in ids]))

    def _scored(self, entries: list[Entry]) -> list[Entry]:
        baseline = next((e for e in entries if e.name == CONTROL), entries[0])
        others = [e for e in entries if e is not baseline]
        references = self.task.test_text["target"]
        metric = sacrebleu.metrics.BLEU(references=[references])
        tested = paired_test([baseline, *others], metric)
        chrf = sacrebleu.metrics.CHRF()
        return [
            replace(
                entry,
                bleu=tested[entry].score,
                bleu_ci=tested[entry].ci,
                p_value=tested[entry].p_value,
                chrf=chrf.corpus_score(entry.translations, [references]).score,
            )
            for entry in entries
        ]

    def duels(self) -> list[dict]:
        """At each size: ours against the best of every other method.

        Of several that are small enough, the one of the lowest validation
        loss stands for a method.
        """
        metric = sacrebleu.metrics.BLEU(
            references=[self.task.test_text["target"]]
        )
        found = []
        for size in SIZES:
            small = [e for e in self.entries if e.ratio >= TOLERANCE * size]
            methods: dict[str, list[Entry]] = {}
            for entry in small:
                name = "ours" if entry.is_ours else entry.label
                methods.setdefault(name, []).append(entry)
            if "ours" not in methods:
                continue
            best = {
                name: min(group, key=lambda e: e.validation_nll)
                for name, group in methods.items()
            }
            ours = best.pop("ours")
            tested = paired_test([ours, *best.values()], metric)
            found += [
                {
                    "size": size,
                    "ours": ours.label,
                    "ours_rank": ours.rank,
                    "ours_bleu": ours.bleu,
                    "rival": rival.label,
                    "rival_ratio": rival.ratio,
                    "rival_bleu": rival.bleu,
                    "p_value": tested[rival].p_value,
                }
                for rival in best.values()
            ]
        return found


def paired_test(entries: Sequence[Entry], metric: sacrebleu.metrics.BLEU):
    """sacreBLEU's paired bootstrap; the first entry is the baseline."""
    named = [(str(i), e.translations) for i, e in enumerate(entries)]
    if len(named) == 1:
        # There is nothing to pair: against itself, for the interval alone.
        named.append(("1", entries[0].translations))
    _, scores = PairedTest(
        named, {"BLEU": metric}, None, "bs", n_samples=BOOTSTRAP_SAMPLES
    )()
    found = dict(zip(entries, scores["BLEU"]))
    for entry in entries[1:]:
        if entry.translations == entries[0].translations:
            # Where no sample differs, sacreBLEU would call it certain.
            found[entry].p_value = 1.0
    return found


# The report


def write_report(scores: list[Scores], folder: Path) -> None:
    """Writes the tables, the pictures and every entry's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    new = [entry for score in scores for entry in score.entries]
    earlier = _earlier(folder)
    entries = _merged([e.record() for e in new], earlier["entries"])
    duels = earlier["duels"] | {
        f"{s.task.name}, seed {s.task.seed}": s.duels() for s in scores
    }
    write_text(
        folder / "results.json",
        json.dumps({"entries": entries, "duels": duels}, indent=1) + "\n",
    )
    parts = [
        "# Quality against bytes",
        "    python -m benchmarks.translation prepare --task TASK\n"
        "    python -m benchmarks.translation run --task TASK\n"
        "    python -m benchmarks.translation files --task TASK\n"
        "    python -m benchmarks.translation report",
        "Every student starts from one teacher, sees the same batches as "
        "often, and is trained by the same recipe but for what its name says. "
        f"`{CONTROL}` is the teacher trained on for as long, and what Δ and "
        f"the p-value of a paired bootstrap ({BOOTSTRAP_SAMPLES:,} samples) "
        "compare with; ± is half of a 95 % confidence interval. `int8` and "
        "`int4` say how table or factors are stored; what is measured then is "
        "the LiteRT file, where a size of it is given. Milliseconds a "
        "sentence: that file on one thread.",
        f"BLEU `{_signature(sacrebleu.metrics.BLEU())}`, chrF "
        f"`{_signature(sacrebleu.metrics.CHRF())}`, greedy search.",
    ]
    for task in dict.fromkeys(e["task"] for e in entries):
        chosen = [e for e in entries if e["task"] == task]
        parts += _sections(task, chosen)
        plot_bytes(chosen, folder / f"{task}_bytes.png")
        if any(e["ms"] for e in chosen):
            plot_milliseconds(chosen, folder / f"{task}_ms.png")
    for name, found in duels.items():
        parts += [
            f"## Ours against each other method: {name}",
            "At each size the form of lowest validation loss of each method "
            "that has so few bytes. p: paired bootstrap of the two.",
            markdown_table(_duel_cells(found)),
        ]
    parts += ["## Machines and versions"]
    parts += [
        f"- {text}"
        for text in dict.fromkeys(e["environment"] for e in entries)
        if text
    ]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def _earlier(folder: Path) -> dict:
    """What is committed: rows of other machines among it."""
    path = folder / "results.json"
    if not path.exists():
        return {"entries": [], "duels": {}}
    return json.loads(path.read_text())


def _merged(records: list[dict], earlier: list[dict]) -> list[dict]:
    """Keeps the earlier entries that this machine has not."""

    def key(record: dict) -> tuple:
        names = "task", "seed", "teacher", "name", "storage", "rank"
        return (*(record[n] for n in names), round(record["ratio"]))

    known = {key(record) for record in records}
    return records + [r for r in earlier if key(r) not in known]


def _signature(metric) -> str:
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def _sections(task: str, entries: list[dict]) -> list[str]:
    whole = [e for e in entries if e["ratio"] < TOLERANCE * SIZES[0]]
    parts = [f"## {task}", markdown_table(_cells(whole, entries))]
    bounds = [*SIZES, float("inf")]
    for low, high in pairwise(bounds):
        inside = [
            e
            for e in entries
            if TOLERANCE * low <= e["ratio"] < TOLERANCE * high
        ]
        if inside:
            inside.sort(key=lambda e: -e["bleu"])
            title = f"### {task}, {low:g} times fewer bytes, or more"
            parts += [title, markdown_table(_cells(inside, entries))]
    parts.append(f"![BLEU against bytes]({task}_bytes.png)")
    if any(e["ms"] for e in entries):
        parts.append(f"![BLEU against milliseconds]({task}_ms.png)")
    return parts


def _cells(entries: list[dict], everything: list[dict]) -> list[list[str]]:
    control = {e["seed"]: e["bleu"] for e in everything if label(e) == CONTROL}
    cells = [
        [
            "method",
            "seed",
            "table bytes",
            "x smaller",
            "rank",
            "BLEU",
            "±",
            "Δ",
            "p",
            "chrF",
            "val. nats",
            "file MB",
            "ms",
            "cpu s",
        ]
    ]
    for e in entries:
        delta = e["bleu"] - control.get(e["seed"], float("nan"))
        cells.append(
            [
                label(e),
                str(e["seed"]),
                f"{e['table_bytes']:,}",
                f"{e['ratio']:.1f}",
                _optional(e["rank"], "{}"),
                f"{e['bleu']:.2f}",
                _optional(e["bleu_ci"], "{:.2f}"),
                f"{delta:+.2f}",
                _optional(e["p_value"], "{:.3f}"),
                f"{e['chrf']:.1f}",
                _optional(e["validation_nll"], "{:.3f}"),
                _optional(e["file_bytes"] and e["file_bytes"] / 1e6, "{:.2f}"),
                _optional(e["ms"], "{:.2f}"),
                _optional(e["cpu_s"], "{:.0f}"),
            ]
        )
    return cells


def _duel_cells(duels: list[dict]) -> list[list[str]]:
    cells = [["size", "ours", "BLEU", "other", "its size", "BLEU", "Δ", "p"]]
    for duel in duels:
        cells.append(
            [
                f"{duel['size']:g}x",
                f"{duel['ours']}, rank {duel['ours_rank']}",
                f"{duel['ours_bleu']:.2f}",
                duel["rival"],
                f"{duel['rival_ratio']:.1f}x",
                f"{duel['rival_bleu']:.2f}",
                f"{duel['ours_bleu'] - duel['rival_bleu']:+.2f}",
                _optional(duel["p_value"], "{:.3f}"),
            ]
        )
    return cells


def label(record: dict) -> str:
    """The name of a committed entry, with the form in which it is stored."""
    storage, name = record["storage"], record["name"]
    if storage in ("float32", *re.findall("int[48]", name)):
        return name
    return f"{'full table' if name == CONTROL else name}, {storage}"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# Methods that have a colour of their own, in the order of the legend.
COLOURS = {
    "ours": "C3",
    "ours, int8": "C1",
    "ours, int4": "C8",
    "truncated SVD": "C0",
    "truncated SVD, int8": "C9",
    "GroupReduce": "C2",
    "GroupReduce, int8": "olive",
    "Tensor-Train": "C4",
    "product quantisation": "C5",
    "nested ranks": "C6",
    "the paper's recipe": "C7",
    "smaller model, logits": "black",
    SCRATCH: "gold",
    "ours, funnel": "pink",
    "full table, int8": "navy",
    "full table, int4": "teal",
}


def plot_bytes(entries: list[dict], path: Path) -> None:
    """Draws BLEU against the bytes of the table."""
    _plot(entries, path, "table_bytes", "bytes of the table", 2)


def plot_milliseconds(entries: list[dict], path: Path) -> None:
    """Draws BLEU against the time of a sentence."""
    _plot(entries, path, "ms", "milliseconds a sentence, one thread", None)


def _plot(
    entries: list[dict], path: Path, key: str, axis: str, log_base: int | None
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot()
    control = [e["bleu"] for e in entries if label(e) == CONTROL]
    if control:
        axes.axhline(
            statistics.mean(control),
            color="grey",
            linestyle="--",
            label=CONTROL,
        )
    for name, colour in COLOURS.items():
        points: dict[float, list[float]] = {}
        for e in entries:
            if label(e) == name and e[key] is not None:
                points.setdefault(e[key], []).append(e["bleu"])
        if points:
            x = sorted(points)
            axes.plot(
                x,
                [statistics.mean(points[p]) for p in x],
                "o-",
                color=colour,
                label=name,
                linewidth=2.5 if name.startswith("ours") else 1.2,
            )
    if log_base:
        axes.set_xscale("log", base=log_base)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:,.0f} kB")
    axes.set(xlabel=axis, ylabel="sacreBLEU, test")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
