"""The main job: train, compress, distill, export, translate, compare.

Every stage leaves its result in the work directory and is skipped where it
is already there, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import keras
from rich.console import Console

from .data import Batching
from .data import Corpus
from .data import Vocabulary
from .data import load_corpus
from .data import read_corpus
from .evaluate import Result
from .evaluate import conclusion
from .evaluate import markdown_table
from .evaluate import plot_quality
from .evaluate import plot_training
from .evaluate import print_table
from .evaluate import samples
from .evaluate import score
from .evaluate import signature
from .evaluate import table_cells
from .model import build_transformer
from .stepwise import write_file
from .train import Recipe
from .train import Schedule
from .train import distill
from .train import fit
from .translate import Translations
from .translate import translate_by_turns

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's outcome.

    Args:
        dataset: `"cldr"`, `"multi30k"`, or `"files"`.
        source: Text file of `"files"`, a sentence a line.
        target: The same of the translations.
        vocabulary_size: Joint SentencePiece pieces; by default as many as the
            text bears, see `Vocabulary.train`.
        d_model: Width of the Transformer and of its table.
        num_layers: Encoder layers; as many decoder layers.
        num_heads: Attention heads a layer.
        feed_forward_dim: Hidden units of the feed-forward blocks.
        dropout: Share of units dropped in the teacher's training.
        batching: Batch shapes.
        teacher: The teacher's training.
        student: The student's distillation.
        compression: How many times fewer bytes the student's table takes.
        num_beams: Above 1, beam search is scored beside greedy search.
        max_pairs: Training pairs to use, all by default.
        max_sentences: Validation and test pairs to use, all by default.
        jit_compile: Whether XLA compiles the training step.
        seed: Seed of data, initial weights and dropout.
    """

    dataset: str = "files"
    source: str | None = None
    target: str | None = None
    vocabulary_size: int | None = None
    d_model: int = 256
    num_layers: int = 2
    num_heads: int = 8
    feed_forward_dim: int = 512
    dropout: float = 0.2
    batching: Batching = Batching()
    teacher: Schedule = Schedule(epochs=9, peak_learning_rate=1.2e-3)
    student: Recipe = Recipe()
    compression: float = 16.0
    num_beams: int = 1
    max_pairs: int | None = None
    max_sentences: int | None = None
    jit_compile: bool = True
    seed: int = 0


PRESETS = {
    "cldr": Settings(
        dataset="cldr",
        vocabulary_size=4_000,
        d_model=192,
        num_layers=1,
        num_heads=4,
        feed_forward_dim=256,
        dropout=0.05,
        batching=Batching(widths=(9, 16, 44), tokens=2_048),
        teacher=Schedule(epochs=4, peak_learning_rate=3e-3),
        student=Recipe(epochs=4, peak_learning_rate=3e-3, warmup=0.1),
    ),
    "multi30k": Settings(
        dataset="multi30k", vocabulary_size=8_000, num_beams=4
    ),
    "files": Settings(),
}

# What `--quick` changes: every stage, none of the quality.
QUICK = dict(
    vocabulary_size=500,
    d_model=64,
    num_layers=1,
    num_heads=2,
    feed_forward_dim=64,
    batching=Batching(widths=(16, 64), tokens=1_024),
    teacher=Schedule(epochs=2, peak_learning_rate=3e-3),
    student=Recipe(epochs=2, peak_learning_rate=3e-3),
    compression=8.0,
    num_beams=1,
    max_pairs=500,
    max_sentences=10,
    jit_compile=False,
)


@dataclass(frozen=True)
class Export:
    """A file that is written and compared.

    Args:
        model: The stage whose model it holds.
        quantization: As of `kde.export_litert`: by default as the table was
            trained, with 8 bits for all else.
        title: What it is called in the table of results.
    """

    model: str
    quantization: str | None
    title: str


# By the names of the files.
EXPORTS = {
    "full_float32": Export("teacher", "float32", "full, float32"),
    "full_int8": Export("teacher", "int8", "full, int8"),
    "undistilled": Export("compressed", None, "compressed, not distilled"),
    "translator": Export("student", None, "compressed, distilled"),
}
FULL, SHIPPED = "full_float32", "translator"


class Run:
    """One run of the main job, in one work directory.

    Args:
        settings: What to run.
        work_dir: Folder of the results; made when missing.
        data_dir: Folder of Multi30k's files, see `data.load_corpus`.
        verbose: Whether progress is shown.
    """

    def __init__(
        self,
        settings: Settings,
        work_dir: str | Path,
        data_dir: str | Path | None = None,
        verbose: bool = True,
    ) -> None:
        self.settings = settings
        self.work_dir = Path(work_dir)
        self._data_dir = data_dir
        self._verbose = verbose
        self._console = Console(quiet=not verbose)
        self._claim_work_dir()

    def _claim_work_dir(self) -> None:
        """Refuses results of other settings; remembers these."""
        path = self.work_dir / "settings.json"
        wanted = json.loads(json.dumps(asdict(self.settings)))
        if path.exists():
            found = json.loads(path.read_text())
            changed = [key for key in wanted if found.get(key) != wanted[key]]
            if changed:
                raise ValueError(
                    f"`work_dir` {self.work_dir} holds a run with another "
                    f"{', '.join(changed)}: name another folder, or delete "
                    f"this one. Received: "
                    + ", ".join(f"{k}={wanted[k]!r}" for k in changed)
                )
        self.work_dir.mkdir(parents=True, exist_ok=True)
        _write_json(path, wanted)

    def run(self) -> list[Result]:
        """Runs what is missing, prints the table, draws the pictures."""
        for stage in (
            self.train_teacher,
            self.compress,
            self.distill,
            self.export,
            self.translate,
        ):
            stage()
        return self.report()

    # Inputs.

    @cached_property
    def corpus(self) -> Corpus:
        settings = self.settings
        if settings.source and settings.target:
            corpus = read_corpus(
                settings.source, settings.target, settings.seed
            )
        else:
            corpus = load_corpus(
                settings.dataset, self._data_dir, settings.seed
            )
        few = slice(settings.max_sentences)
        return Corpus(
            corpus.name,
            corpus.train[: settings.max_pairs],
            corpus.validation[few],
            corpus.test[few],
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        path = self._vocabulary_path
        if not path.exists():
            vocabulary = Vocabulary.train(
                self.corpus.train, self.settings.vocabulary_size
            )
            _write(path, lambda part: part.write_bytes(vocabulary.proto))
        return Vocabulary(path.read_bytes())

    # Stages.

    def train_teacher(self) -> Path:
        """Trains the Transformer with its full table."""

        def train() -> keras.Model:
            teacher = self._build(self.settings.dropout)
            fit(
                teacher,
                self._batches(training=True),
                **self._training("teacher", self.settings.teacher),
            )
            return teacher

        return self._model_stage("teacher", train)

    def compress(self) -> Path:
        """Replaces the table by factors in few bits, planned by the bytes."""

        def compress() -> keras.Model:
            import keras_distilled_embedding as kde

            model = self._build(self.settings.student.dropout)
            model.set_weights(self.model("teacher").get_weights())
            return kde.compress(
                model,
                self.settings.compression,
                calibration_data=self._batches(training=True),
                verbose=int(self._verbose),
            )

        return self._model_stage("compressed", compress)

    def distill(self) -> Path:
        """Trains the compressed model to translate as its teacher does.

        Its codes are rounded at every step as the file rounds them.
        """

        def train() -> keras.Model:
            student = self.model("compressed")
            distill(
                self.model("teacher"),
                student,
                self._batches(training=True),
                **self._training("student", self.settings.student),
            )
            return student

        return self._model_stage("student", train)

    def export(self) -> None:
        """Writes files that translate, token by token, tokenizer included."""
        for name, export in EXPORTS.items():
            sizes = self.work_dir / f"{name}.json"
            if sizes.exists():
                continue
            with self._stage(f"export {name}"):
                model = self.model(export.model)
                path = self.work_dir / f"{name}.tflite"
                report = write_file(
                    model,
                    path,
                    self._vocabulary_path,
                    self.settings.batching.max_length,
                    quantization=export.quantization,
                    verbose=self._verbose,
                )
                table = model.get_layer("token_embedding")
                _write_json(
                    sizes,
                    {
                        # A table that is neither factorized nor rounded is
                        # one matrix among others in the file.
                        "table_bytes": sum(report.table_bytes.values())
                        or 4 * table.count_params(),
                        "file_bytes": path.stat().st_size,
                    },
                )

    def translate(self) -> None:
        """Translates the test set with every file, and scores that."""
        path = self.work_dir / "results.json"
        if path.exists():
            return
        test = self.corpus.test
        with self._stage("translate"):
            found = self._translations()
            beams = (
                self._translations(self.settings.num_beams)
                if self.settings.num_beams > 1
                else {}
            )
            results = []
            for name, export in EXPORTS.items():
                lines = found[name].lines
                self._write_text(f"test_{name}.txt", lines)
                results.append(
                    Result(
                        name=export.title,
                        bleu=score(lines, test.target),
                        ms_per_sentence=found[name].ms_per_sentence,
                        beam_bleu=score(beams[name].lines, test.target)
                        if beams
                        else None,
                        **self._read_json(f"{name}.json"),
                    ).to_dict()
                )
            self._write_text("test_source.txt", test.source)
            self._write_text("test_reference.txt", test.target)
            _write_json(path, results)

    def report(self) -> list[Result]:
        """Prints the table of results and draws the pictures."""
        results = [Result(**row) for row in self._read_json("results.json")]
        title = (
            f"{self.corpus.name}: table of {self.vocabulary.size:,} x "
            f"{self.settings.d_model}, {self.settings.compression:g}x smaller"
        )
        lines = {
            title: self._read_text(f"test_{name}.txt")
            for title, name in (
                ("source", "source"),
                ("reference", "reference"),
                (EXPORTS[FULL].title, FULL),
                (EXPORTS[SHIPPED].title, SHIPPED),
            )
        }
        picture = self.work_dir / "quality.png"
        if self._verbose:
            print_table(results, title)
            self._console.print(
                f"\n{samples(lines)}\n", highlight=False, soft_wrap=True
            )
            self._console.print(conclusion(results), soft_wrap=True)
        self._write_report(results, title, samples(lines))
        plot_training(
            {
                name: self.work_dir / f"{name}_history.csv"
                for name in ("teacher", "student")
            },
            self.work_dir / "training.png",
        )
        plot_quality(results, picture)
        translator = self.work_dir / f"{SHIPPED}.tflite"
        self._console.print(
            f"The file to ship: {translator}\n"
            f"Translate with it: python keras_distilled_embedding_runner.py "
            f"{translator} {lines['source'][0]!r}\n"
            f"Pictures: {picture}, {self.work_dir / 'training.png'}; all "
            f"figures: {self.work_dir / 'report.md'}\n"
            f"In a browser: {self._web_command()}",
            highlight=False,
            soft_wrap=True,
        )
        return results

    def _web_command(self) -> str:
        if self.work_dir == Path("runs") / self.settings.dataset:
            dataset = self.settings.dataset
            return "make web" + f" DATASET={dataset}" * (dataset != "cldr")
        return f"python -m examples.web --work-dir {self.work_dir}"

    def _write_report(
        self, results: list[Result], title: str, samples: str
    ) -> None:
        """Writes the table, and what one needs to know about it, to a file."""
        stages = [["stage", "wall seconds", "processor seconds"]]
        for line in (self.work_dir / "stages.jsonl").read_text().splitlines():
            stages.append([str(cell) for cell in json.loads(line).values()])
        versions = ", ".join(
            f"{package} {version(package)}"
            for package in ("keras", "tensorflow", "keras-hub", "sacrebleu")
        )
        parts = [
            f"# {title}",
            markdown_table(table_cells(results)),
            conclusion(results),
            f"sacreBLEU `{signature()}`. Milliseconds: one sentence at a time "
            "by the file, one thread; the files take turns.",
            f"```text\n{samples}\n```",
            markdown_table(stages),
            f"Python {platform.python_version()}, {versions}; "
            f"{os.cpu_count()} cores, {platform.machine()}. Settings:",
            f"```json\n{json.dumps(asdict(self.settings), indent=2)}\n```",
        ]
        _write(
            self.work_dir / "report.md",
            lambda part: part.write_text("\n\n".join(parts) + "\n", "utf-8"),
        )

    # Parts of stages.

    def _translations(self, num_beams: int = 1) -> dict[str, Translations]:
        return translate_by_turns(
            {name: self.work_dir / f"{name}.tflite" for name in EXPORTS},
            self.corpus.test.source,
            self.vocabulary,
            self.settings.batching.max_length,
            num_beams,
        )

    def _build(self, dropout: float) -> keras.Model:
        settings = self.settings
        return build_transformer(
            self.vocabulary.size,
            settings.batching.max_length,
            d_model=settings.d_model,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            feed_forward_dim=settings.feed_forward_dim,
            dropout=dropout,
            seed=settings.seed,
        )

    def model(self, name: str) -> keras.Model:
        """Loads the model a stage has saved."""
        return keras.saving.load_model(self._model_path(name), compile=False)

    def _model_path(self, name: str) -> Path:
        return self.work_dir / f"{name}.keras"

    def _model_stage(self, name: str, make: Callable[[], keras.Model]) -> Path:
        path = self._model_path(name)
        if not path.exists():
            with self._stage(name):
                keras.utils.set_random_seed(self.settings.seed)
                model = make()
                _write(path, model.save)
        return path

    def _batches(self, training: bool) -> tf.data.Dataset:
        corpus, settings = self.corpus, self.settings
        return settings.batching.batches(
            corpus.train if training else corpus.validation,
            self.vocabulary,
            shuffle_seed=settings.seed if training else None,
        )

    def _training(self, name: str, schedule: Schedule) -> dict:
        """Arguments of `train.fit` and `train.distill` for one model."""
        return dict(
            validation=self._batches(training=False),
            schedule=schedule,
            backup_dir=self.work_dir / f"{name}_backup",
            jit_compile=self.settings.jit_compile,
            callbacks=[
                keras.callbacks.CSVLogger(
                    str(self.work_dir / f"{name}_history.csv"), append=True
                )
            ],
            verbose=self._fit_verbosity,
        )

    @property
    def _fit_verbosity(self) -> int:
        if not self._verbose:
            return 0
        return 1 if sys.stdout.isatty() else 2

    @property
    def _vocabulary_path(self) -> Path:
        return self.work_dir / "vocabulary.spm"

    def _read_json(self, name: str) -> Any:
        return json.loads((self.work_dir / name).read_text())

    def _write_text(self, name: str, lines: list[str]) -> None:
        text = "".join(line.replace("\n", " ") + "\n" for line in lines)
        (self.work_dir / name).write_text(text, "utf-8")

    def _read_text(self, name: str) -> list[str]:
        # Not splitlines(): a sentence may hold other separators than \n.
        return (self.work_dir / name).read_text("utf-8").split("\n")[:-1]

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Announces a stage and keeps its wall and processor seconds."""
        self._console.rule(name)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        seconds = {
            "stage": name,
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
        }
        self._console.print(
            f"{name}: {seconds['wall_s']} s, {seconds['cpu_s']} cpu-seconds"
        )
        with (self.work_dir / "stages.jsonl").open("a") as log:
            log.write(json.dumps(seconds) + "\n")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"part_{path.name}")
    write(part)
    os.replace(part, path)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2) + "\n"
    _write(path, lambda part: part.write_text(text))
