"""A language model: perplexity of a full table, of its factors, of rivals.

A small GPT-2 of KerasHub's is trained on the prose that comes with Python
packages; its table is compressed in several ways, and every student is trained
for as long as the control, which is the teacher itself, trained on. A row is
written when it is done: a run that is stopped goes on where it was.

    python -m benchmarks.language_model
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import sysconfig
import time
import warnings
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import numpy as np
import sentencepiece
import tensorflow as tf
from keras_hub.tokenizers import compute_sentence_piece_proto

import keras_distilled_embedding as kde
from benchmarks._report import environment
from benchmarks._report import write_bytes
from benchmarks._report import write_text
from benchmarks._threads import limit_threads
from examples.nmt.data import Vocabulary
from examples.nmt.evaluate import markdown_table
from examples.nmt.tokens import EOS_ID
from examples.nmt.tokens import UNK_ID
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule
from examples.nmt.train import distil
from examples.nmt.train import fit
from keras_distilled_embedding.factorization import factor_bytes
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import integer_bytes
from keras_distilled_embedding.quantization import round_table

OUTPUT = Path(__file__).parent / "results" / "language_model"
# What this package needs, so that whoever can run it has the text.
PACKAGES = ("numpy", "keras")
SHORTEST = 60  # characters of a paragraph: below are headings and signatures
# Of all documents, one in so many is for the test, one for validation.
ONE_IN = 16


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, of its text and of its training.

    Args:
        vocabulary: Pieces of the vocabulary.
        hidden_dim: Width of the model and of its table.
        num_layers: Of the Transformer.
        num_heads: Of its attention.
        length: Tokens of a window.
        batch: Windows of a batch.
        teacher: How the teacher is trained.
        documents: How many of Python's manual are read, and nothing else;
            `None` reads everything.
        jit_compile: Whether XLA compiles: worth its time in long runs.
    """

    vocabulary: int = 8_000
    hidden_dim: int = 256
    num_layers: int = 2
    num_heads: int = 4
    length: int = 64
    batch: int = 16
    teacher: Schedule = Schedule(
        epochs=2, peak_learning_rate=2e-3, warmup=0.1, smoothing=0.0
    )
    documents: int | None = None
    jit_compile: bool = True

    @property
    def epochs(self) -> int:
        """Of everything after the teacher: half of its own."""
        return self.teacher.epochs // 2


FULL = Settings()
QUICK = Settings(
    vocabulary=500,
    hidden_dim=32,
    num_layers=1,
    num_heads=2,
    length=16,
    documents=20,
    jit_compile=False,
)


# The rows.

OURS, WEIGHTED, PLAIN = "ReLU", "weighted SVD", "plain SVD"
PAPER, CONTROL, TASK_ALONE = "paper", "control", "ReLU, task loss alone"
# docs/distillation.md; without smoothing, for what counts is perplexity.
RECOMMENDED = Recipe(smoothing=0.0)
PAPERS_LOSS = replace(
    RECOMMENDED,
    student_loss_weight=0.5,
    logits_weight=0.0,
    embedding_weight=1.0,
)


@dataclass(frozen=True)
class Row:
    """A model that is made from the teacher, and trained.

    Args:
        kind: What the rows of one line of the picture have in common.
        recipe: How it is trained, but for its length.
        compression: Of the table; `None` leaves it.
        options: Further arguments of `compress`.
        counts: Whether rows of the table count by how often they are used.
    """

    kind: str
    recipe: Recipe
    compression: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    counts: bool = False


def _rows() -> dict[str, Row]:
    rows = {
        f"{CONTROL}, rate {rate:.0e}": Row(
            CONTROL,
            replace(
                RECOMMENDED, student_loss_weight=1.0, peak_learning_rate=rate
            ),
        )
        # That of the students, and half of it.
        for rate in (1e-3, 2e-3)
    }
    # In int8, 2x and 4x are 8x and 16x in bytes.
    for kind, options, counts, sizes in (
        (OURS, {}, True, (2.0, 4.0, 8.0, 16.0)),
        (WEIGHTED, {"activation": None}, True, (8.0, 16.0)),
        (PLAIN, {"activation": None}, False, (8.0, 16.0)),
    ):
        for size in sizes:
            row = Row(kind, RECOMMENDED, size, options, counts)
            rows[f"{kind} {size:g}x"] = row
    rows[f"{PAPER} 8x"] = Row(PAPER, PAPERS_LOSS, 8.0, {"method": "learned"})
    for size in (2.0, 4.0, 8.0):
        rows[f"{TASK_ALONE} {size:g}x"] = Row(
            TASK_ALONE,
            replace(RECOMMENDED, student_loss_weight=1.0),
            size,
            counts=True,
        )
    return rows


ROWS = _rows()


# The text.


def paragraphs(documents: int | None = None) -> dict[str, list[str]]:
    """Paragraphs of each document, each paragraph once in all.

    The documents are the topics of Python's manual (`pydoc_data.topics`) and
    the docstrings of each module of the standard library and of `PACKAGES`.

    Args:
        documents: See `Settings`.
    """
    seen: set[str] = set()
    text = {}
    for name, parts in _documents(documents):
        kept = []
        for part in parts:
            for paragraph in part.split("\n\n"):
                paragraph = " ".join(paragraph.split())
                # ASCII stays as it is when SentencePiece normalizes it.
                if (
                    len(paragraph) >= SHORTEST
                    and paragraph.isascii()
                    and ">>>" not in paragraph
                    and paragraph not in seen
                ):
                    seen.add(paragraph)
                    kept.append(paragraph)
        if kept:
            text[name] = kept
    return text


def _documents(number: int | None) -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics

    for name in sorted(topics)[:number]:
        yield f"topics/{name}", [topics[name]]
    if number is not None:
        return
    folders = {"python": Path(sysconfig.get_path("stdlib"))}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders[package] = Path(spec.origin).parent
    for package, folder in folders.items():
        names = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*.py")
        }
        for name in sorted(names):
            if "site-packages/" not in name:
                yield f"{package}/{name}", _docstrings(names[name])


def _docstrings(path: Path) -> list[str]:
    """Those of a module, its classes and its functions."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the code that is read
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # tests of Python's own parser
        return []
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    return [docstring for docstring in found if docstring]


def split_of(document: str) -> str:
    """By name, so that it does not depend on what else there is."""
    number = zlib.crc32(document.encode()) % ONE_IN
    return {0: "test", 1: "validation"}.get(number, "train")


@dataclass(frozen=True)
class Corpus:
    """The text as ids, each split one stream that begins with EOS.

    Args:
        ids: int32 ids of each split; every paragraph ends with EOS.
        about: What the report says of the text.
    """

    ids: dict[str, np.ndarray]
    about: dict[str, Any]

    @classmethod
    def make(cls, settings: Settings, folder: Path) -> Corpus:
        """Reads it from `folder`, or gathers it and writes it there."""
        path = folder / "corpus.npz"
        if path.exists():
            with np.load(path) as saved:
                ids = {name: saved[name] for name in saved.files}
            about = json.loads((folder / "corpus.json").read_text("utf-8"))
            return cls(ids, about)
        documents: dict[str, list[str]] = {}
        splits: dict[str, list[str]] = {}
        for name, kept in paragraphs(settings.documents).items():
            documents.setdefault(split_of(name), []).append(name)
            splits.setdefault(split_of(name), []).extend(kept)
        sentencepiece.set_min_log_level(2)  # errors only
        proto = compute_sentence_piece_proto(
            tf.data.Dataset.from_tensor_slices(splits["train"]),
            settings.vocabulary,
        )
        write_bytes(folder / "vocabulary.spm", proto)
        vocabulary = Vocabulary(proto)
        ids, about = {}, {}
        for name, kept in splits.items():
            flat = vocabulary.encode(kept).flat_values.numpy()
            ids[name] = np.concatenate([[EOS_ID], flat]).astype("int32")
            text = "".join(f"{paragraph}\n" for paragraph in kept).encode()
            about[name] = {
                "documents": len(documents[name]),
                "paragraphs": len(kept),
                "tokens": len(flat),
                # EOS stands for the end of the line.
                "bytes": len(text),
                "unknown": int((flat == UNK_ID).sum()),
                "sha256": hashlib.sha256(text).hexdigest(),
            }
        write_text(folder / "corpus.json", json.dumps(about, indent=1))
        file = io.BytesIO()
        np.savez_compressed(file, **ids)
        write_bytes(path, file.getvalue())
        return cls(ids, about)

    def batches(
        self, split: str, settings: Settings, shuffle_seed: int | None = None
    ) -> tf.data.Dataset:
        """Batches of windows `(inputs, labels, sample_weight)`.

        Every token is predicted once, from those before it in its window.

        Args:
            split: Name of the split.
            settings: Tell the shape, which all batches have.
            shuffle_seed: Of the order, new in every epoch; whatever fills no
                batch is then left out. By default the order stays, and the
                last batch is filled up with weights of zero.
        """
        stream, length = self.ids[split], settings.length
        number = len(stream) - 1
        if shuffle_seed is None:
            size = length * settings.batch
            padded = -(-number // size) * size
        else:
            padded = number // length * length
        stream = np.pad(stream, (0, max(0, padded - number)))
        weights = (np.arange(padded) < number).astype("float32")
        tokens, labels, weights = (
            values.reshape(-1, length)
            for values in (stream[:padded], stream[1 : padded + 1], weights)
        )
        inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
        windows = tf.data.Dataset.from_tensor_slices((inputs, labels, weights))
        if shuffle_seed is not None:
            windows = windows.shuffle(len(tokens), seed=shuffle_seed)
        return windows.batch(settings.batch, drop_remainder=True).prefetch(2)


# The models.


def build(settings: Settings, seed: int) -> keras.Model:
    """KerasHub's GPT-2, untrained.

    Without dropout: no text is seen more than a few times.
    """
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=settings.vocabulary,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        hidden_dim=settings.hidden_dim,
        intermediate_dim=4 * settings.hidden_dim,
        dropout=0.0,
        max_sequence_length=settings.length,
    )
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)


def table_of(model: keras.Model) -> keras.layers.Layer:
    """The layer that this benchmark is about."""
    return model.backbone.token_embedding


def table_bytes(model: keras.Model, storage: str) -> int:
    """What a file has to hold of it, in float32 or in int8."""
    table = table_of(model)
    shape = table.input_dim, table.output_dim
    rounding = None if storage == "float32" else storage
    if isinstance(table, DistilledEmbedding):
        return factor_bytes(table.rank, *shape, rounding)
    if rounding is None:
        return 4 * math.prod(shape)
    return integer_bytes(*shape, rounding)


def store_in_int8(model: keras.Model) -> None:
    """Rounds the table, or both factors, as `export_litert` stores them."""
    table = table_of(model)
    if not isinstance(table, DistilledEmbedding):
        table.embeddings.assign(
            dequantize(*round_table(table.embeddings, "int8"))
        )
        return
    table.quantization = "int8"
    basis = keras.ops.convert_to_numpy(table.basis)
    scales = np.abs(basis).max(axis=1, keepdims=True) / 127
    table.basis.assign(np.round(basis / scales) * scales)


class Benchmark:
    """The rows of one work directory and seed.

    Args:
        settings: Sizes.
        work_dir: Folder of the text, the teacher and a file for each row.
        seed: Of the teacher; of the students, too.
    """

    def __init__(self, settings: Settings, work_dir: Path, seed: int) -> None:
        self.settings, self.work_dir, self.seed = settings, work_dir, seed

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus.make(self.settings, self.work_dir)

    def path(self, name: str, suffix: str = ".json") -> Path:
        slug = re.sub(r"\W+", "_", name)
        return self.work_dir / f"{slug}__{self.seed}{suffix}"

    def finish_teacher(self) -> None:
        """Trains, evaluates and writes the teacher."""

        def train() -> tuple[keras.Model, dict]:
            teacher = build(self.settings, self.seed)
            schedule = self.settings.teacher
            history = self._fit(teacher, schedule)
            part = self.path("part teacher", ".weights.h5")
            # The backbone's, for those of the task bring an optimizer.
            teacher.backbone.save_weights(part)
            part.replace(self.path("teacher", ".weights.h5"))
            return teacher, self._training(schedule, history)

        self._finish("teacher", train)

    def finish(self, name: str) -> None:
        """Makes, trains, evaluates and writes one row."""
        row = ROWS[name]
        recipe = replace(row.recipe, epochs=self.settings.epochs)

        def train() -> tuple[keras.Model, dict]:
            student, result = self.teacher(), {}
            if row.compression is not None:
                start = time.process_time()
                student = self._compress(row)
                result["compress_cpu_s"] = time.process_time() - start
                result["before"] = self.evaluate(student, "test")
            keras.utils.set_random_seed(self.seed + 1)
            if recipe.student_loss_weight == 1.0:
                history = self._fit(student, recipe)
            else:
                history = distil(
                    self.teacher(), student, **self._arguments(recipe)
                )
            if row.compression is not None:
                kde.save_model(student, self.path(name, ".keras"))
            return student, {**result, **self._training(recipe, history)}

        self._finish(name, train)

    def _finish(
        self, name: str, train: Callable[[], tuple[keras.Model, dict]]
    ) -> None:
        if self.path(name).exists():
            return
        print(name, flush=True)
        self.corpus  # noqa: B018 - gathered outside of what is timed
        wall, cpu = time.perf_counter(), time.process_time()
        model, result = train()
        result = {
            "row": name,
            "seed": self.seed,
            **result,
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "parameters": model.count_params(),
            "stored": {},
        }
        for storage in ("float32", "int8"):
            if storage == "int8":
                store_in_int8(model)
            result["stored"][storage] = {
                "table_bytes": table_bytes(model, storage),
                **self.evaluate(model, "test"),
            }
        write_text(self.path(name), json.dumps(result, indent=1) + "\n")

    def teacher(self) -> keras.Model:
        """The trained teacher, a fresh one in each call."""
        teacher = build(self.settings, self.seed)
        teacher.backbone.load_weights(self.path("teacher", ".weights.h5"))
        return teacher

    def _compress(self, row: Row) -> keras.Model:
        counts = None
        if row.counts:
            # What the model reads and what it predicts is the same stream.
            counts = kde.count_tokens(
                [self.corpus.ids["train"]], self.settings.vocabulary, verbose=0
            )
        return kde.compress(
            self.teacher(),
            row.compression,
            token_frequencies=counts,
            verbose=0,
            **row.options,
        )

    def _arguments(self, schedule: Schedule) -> dict[str, Any]:
        """Of `fit` and `distil`."""
        batches = self.corpus.batches
        return {
            "training": batches("train", self.settings, self.seed),
            "validation": batches("validation", self.settings),
            "schedule": schedule,
            "jit_compile": self.settings.jit_compile,
            "verbose": 2,
        }

    def _fit(
        self, model: keras.Model, schedule: Schedule
    ) -> keras.callbacks.History:
        return fit(model, **self._arguments(schedule))

    def _training(
        self, schedule: Schedule, history: keras.callbacks.History
    ) -> dict:
        return {
            "recipe": asdict(schedule),
            "training_nll": history.history["nll"],
            "validation_nll": history.history["val_nll"],
        }

    def evaluate(self, model: keras.Model, split: str) -> dict[str, float]:
        """Nats a token, perplexity, and bits a byte of the text."""
        metric = keras.metrics.SparseCategoricalCrossentropy(
            from_logits=True, name="nll"
        )
        model.compile(
            weighted_metrics=[metric], jit_compile=self.settings.jit_compile
        )
        nll = model.evaluate(
            self.corpus.batches(split, self.settings),
            verbose=0,
            return_dict=True,
        )["nll"]
        about = self.corpus.about[split]
        bits = nll * about["tokens"] / math.log(2)
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "bits_per_byte": bits / about["bytes"],
        }

    def results(self) -> list[dict]:
        """What is there so far, in the order of the rows."""
        paths = [self.path(name) for name in ("teacher", *ROWS)]
        return [
            json.loads(path.read_text("utf-8"))
            for path in paths
            if path.exists()
        ]


# The report.


def control_of(results: list[dict]) -> dict | None:
    """The teacher trained on, at the rate that validation prefers."""
    controls = [r for r in results if r["row"].startswith(CONTROL)]
    return min(controls, key=lambda r: r["validation_nll"][-1], default=None)


def _control_name(results: list[dict]) -> str:
    control = control_of(results)
    if control is None:
        return "which is missing"
    return f"`{control['row']}`, the better of its rates in validation"


def table_cells(results: list[dict]) -> list[list[str]]:
    """Headings, then each model in float32 and in int8."""
    control = control_of(results)
    full = results[0]["stored"]["float32"]["table_bytes"]
    cells = [
        [
            "model",
            "table",
            "bytes",
            "÷",
            "before",
            "perplexity",
            "Δ",
            "bits a byte",
            "validation",
            "s",
            "CPU s",
        ]
    ]
    for result in results:
        for storage, stored in result["stored"].items():
            delta, before, rest = "", "", ["", "", ""]
            if control is not None:
                best = control["stored"]["float32"]["perplexity"]
                delta = f"{stored['perplexity'] - best:+.2f}"
            if storage == "float32":
                if "before" in result:
                    before = f"{result['before']['perplexity']:.1f}"
                rest = [
                    f"{math.exp(result['validation_nll'][-1]):.2f}",
                    f"{result['wall_s']:.0f}",
                    f"{result['cpu_s']:.0f}",
                ]
            cells.append(
                [
                    result["row"],
                    storage,
                    f"{stored['table_bytes']:,}",
                    f"{full / stored['table_bytes']:.1f}",
                    before,
                    f"{stored['perplexity']:.2f}",
                    delta,
                    f"{stored['bits_per_byte']:.4f}",
                    *rest,
                ]
            )
    return cells


def text_cells(about: dict[str, dict]) -> list[list[str]]:
    """Headings, then what each split holds."""
    names = ["documents", "paragraphs", "tokens", "bytes", "unknown"]
    cells = [["split", *names, "SHA-256"]]
    for split in ("train", "validation", "test"):
        values = about[split]
        cells.append(
            [
                split,
                *(f"{values[name]:,}" for name in names),
                f"`{values['sha256'][:16]}`",
            ]
        )
    return cells


def _schedule_line(settings: Settings) -> str:
    teacher, student = settings.teacher, RECOMMENDED
    return (
        f"The teacher is trained for {teacher.epochs} epochs, Adam at a peak "
        f"of {teacher.peak_learning_rate:g} and a cosine to zero; everything "
        f"else for {settings.epochs} more, at a peak of "
        f"{student.peak_learning_rate:g} but for the controls, in batches of "
        f"{settings.batch} x {settings.length} tokens, without dropout."
    )


def write_report(
    results: list[dict],
    about: dict[str, dict],
    settings: Settings,
    folder: Path,
    command: str,
) -> str:
    """Writes the tables, the picture and every row's figures."""
    weight = RECOMMENDED.student_loss_weight
    parts = [
        "# A language model and its table",
        f"    {command}",
        f"{environment()}, sentencepiece {version('sentencepiece')}; seed "
        f"{results[0]['seed']}, one run each.",
        f"KerasHub's GPT-2, {settings.num_layers} layers of width "
        f"{settings.hidden_dim}, a tied table of {settings.vocabulary:,} x "
        f"{settings.hidden_dim}; {results[0]['parameters']:,} parameters in "
        f"all. {_schedule_line(settings)}",
        markdown_table(table_cells(results)),
        "Perplexity is of a token of the test, predicted from those before it "
        f"in its window of {settings.length} tokens; bits a byte, of the text, "
        "do not depend on the vocabulary. `before`: compressed and not yet "
        f"trained. `Δ`: against the control, {_control_name(results)}. "
        "Seconds are of compressing and training, beside other work.",
        f"- `{CONTROL}`: the teacher, trained on without distillation.\n"
        f"- `{OURS}`: `compress(model)` as it is, with `token_frequencies`.\n"
        f"- `{WEIGHTED}`: with `activation=None`, a truncated SVD of rows that "
        f"count by their frequency; `{PLAIN}`: without frequencies, too.\n"
        f"- These three are distilled as recommended: {weight:g} task + "
        f"{1 - weight:g} `LogitsDistillation()`.\n"
        f"- `{TASK_ALONE}`: without the teacher's predictions.\n"
        f'- `{PAPER}`: its recipe, `method="learned"`, no frequencies, 0.5 '
        "task + 0.5 `EmbeddingDistillation()`.\n"
        "- int8: rounded after training, as `export_litert` stores the table: "
        "codes with one scale, the basis with one for each row; nothing else "
        "is rounded.",
        "![Perplexity and bytes](quality.png)",
        "## The text",
        "Topics of Python's manual (`pydoc_data.topics`) and the docstrings of "
        f"the standard library, {' and '.join(PACKAGES)}, as installed with "
        f"the versions above: paragraphs of {SHORTEST} characters or more, "
        "ASCII only, none with a `>>>`, each once. Documents, which are topics "
        "and modules, are split by the CRC-32 of their names. The vocabulary "
        "is SentencePiece's, of the training text; every paragraph ends with "
        "EOS, which counts as a token and as one byte.",
        markdown_table(text_cells(about)),
    ]
    text = "\n\n".join(parts) + "\n"
    record = {
        "command": command,
        "environment": environment(),
        "settings": asdict(settings),
        "text": about,
        "rows": results,
    }
    write_text(folder / "results.json", json.dumps(record, indent=1) + "\n")
    write_bytes(folder / "quality.png", draw(results))
    write_text(folder / "report.md", text)
    return text


def draw(results: list[dict]) -> bytes:
    """Perplexity against the bytes of the table, as a PNG file."""
    from matplotlib.figure import Figure

    control = control_of(results) or results[0]
    lines = {"full table": [control]}
    for result in results:
        if result["row"] in ROWS and ROWS[result["row"]].kind != CONTROL:
            lines.setdefault(ROWS[result["row"]].kind, []).append(result)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (kind, of_kind) in enumerate(lines.items()):
        for storage, style in (("float32", "-"), ("int8", ":")):
            points = [result["stored"][storage] for result in of_kind]
            axes.plot(
                [point["table_bytes"] / 1e6 for point in points],
                [point["perplexity"] for point in points],
                f"{'osD^vP'[index % 6]}{style}",
                color=f"C{index}",
                fillstyle="full" if storage == "float32" else "none",
                label=f"{kind}, {storage}",
            )
    axes.axhline(
        control["stored"]["float32"]["perplexity"],
        color="0.6",
        linestyle="--",
        linewidth=0.8,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="table, MB (log scale)",
        ylabel="perplexity of the test, a token",
        title="Perplexity against size",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return file.getvalue()


# The command.


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:
        arguments = sys.argv[1:]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model")
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("runs/language_model"))
    add("--output", type=Path, help=f"folder of the report; default: {OUTPUT}")
    add("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--seed", type=int, default=0)
    add("--threads", type=int, help="of TensorFlow; default: all cores")
    add("--quick", action="store_true", help="a tiny model, to try it out")
    options = parser.parse_args(arguments)
    if options.threads:
        limit_threads(options.threads)
    settings, work_dir, output = FULL, options.work_dir, options.output
    if options.quick:
        settings, work_dir = QUICK, work_dir / "quick"
    if output is None:
        output = work_dir / "report" if options.quick else OUTPUT
    benchmark = Benchmark(settings, work_dir, options.seed)
    benchmark.finish_teacher()
    for name in options.rows:
        benchmark.finish(name)
    command = ["python", "-m", "benchmarks.language_model", *arguments]
    print(
        write_report(
            benchmark.results(),
            benchmark.corpus.about,
            settings,
            output,
            shlex.join(command),
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
