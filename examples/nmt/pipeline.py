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

import keras
from rich.console import Console

from .data import Batching
from .data import Corpus
from .data import ParallelText
from .data import Vocabulary
from .data import load_corpus
from .evaluate import Result
from .evaluate import markdown_table
from .evaluate import plot_quality
from .evaluate import plot_training
from .evaluate import print_table
from .evaluate import score
from .evaluate import signature
from .evaluate import table_cells
from .model import build_transformer
from .model import decoder
from .model import encoder
from .train import Recipe
from .train import Schedule
from .train import distill
from .train import fit
from .translate import LiteRTTranslator
from .translate import Translator
from .translate import translate_to_file


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's outcome.

    Args:
        dataset: `"cldr"` or `"multi30k"`.
        vocabulary_size: Joint SentencePiece pieces.
        d_model: Width of the Transformer and of its table.
        num_layers: Encoder layers; as many decoder layers.
        num_heads: Attention heads a layer.
        feed_forward_dim: Hidden units of the feed-forward blocks.
        dropout: Share of units dropped in the teacher's training.
        batching: Batch shapes.
        teacher: The teacher's training.
        student: The student's distillation.
        compression: How many times smaller the student's table is, in floats.
        activation: f in E ~ f(U) W + 1 c; `None` is plain low rank.
        num_beams: Above 1, beam search is scored beside greedy search.
        max_pairs: Training pairs to use, all by default.
        max_sentences: Validation and test pairs to use, all by default.
        jit_compile: Whether XLA compiles the training step.
        seed: Seed of data, initial weights and dropout.
    """

    dataset: str = "cldr"
    vocabulary_size: int = 1_000
    d_model: int = 192
    num_layers: int = 1
    num_heads: int = 4
    feed_forward_dim: int = 256
    dropout: float = 0.05
    batching: Batching = Batching(widths=(12, 20, 44), tokens=2_048)
    teacher: Schedule = Schedule(epochs=4, peak_learning_rate=3e-3)
    student: Recipe = Recipe(
        epochs=5, peak_learning_rate=3e-3, warmup=0.1, embedding_weight=0.01
    )
    compression: float = 8.0
    activation: str | None = "relu"
    num_beams: int = 1
    max_pairs: int | None = None
    max_sentences: int | None = None
    jit_compile: bool = True
    seed: int = 0


PRESETS = {
    "cldr": Settings(),
    "multi30k": Settings(
        dataset="multi30k",
        vocabulary_size=8_000,
        d_model=256,
        num_layers=2,
        num_heads=8,
        feed_forward_dim=512,
        dropout=0.2,
        batching=Batching(),
        teacher=Schedule(epochs=9, peak_learning_rate=1.2e-3),
        student=Recipe(),
        num_beams=4,
    ),
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
    num_beams=1,
    max_pairs=500,
    max_sentences=10,
    jit_compile=False,
)

# The rows of the table: what is evaluated, and how it is called there.
EVALUATED = {
    "teacher": "teacher",
    "compressed": "compressed, before distillation",
    "student": "compressed, distilled",
    "teacher_litert": "teacher, LiteRT",
    "student_litert": "compressed, distilled, LiteRT",
}


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
            self.evaluate,
        ):
            stage()
        return self.report()

    # Inputs.

    @cached_property
    def corpus(self) -> Corpus:
        settings = self.settings
        corpus = load_corpus(settings.dataset, self._data_dir, settings.seed)
        few = slice(settings.max_sentences)
        return Corpus(
            corpus.name,
            corpus.train[: settings.max_pairs],
            corpus.validation[few],
            corpus.test[few],
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        path = self.work_dir / "vocabulary.spm"
        if not path.exists():
            vocabulary = Vocabulary.train(
                self.corpus.train, self.settings.vocabulary_size
            )
            _write(path, lambda part: part.write_bytes(vocabulary.proto))
        return Vocabulary(path.read_bytes())

    @property
    def training_text(self) -> ParallelText:
        """What the student learns: the corpus, or its teacher's translation."""
        text = self.corpus.train
        if not self.settings.student.sequence_level:
            return text
        translator = Translator(
            self.model("teacher"),
            self.vocabulary,
            self.settings.batching,
            num_beams=4,
            jit_compile=True,
        )
        path = self.work_dir / "train_teacher_beam4.txt"
        return ParallelText(
            text.source, translate_to_file(translator, text.source, path)
        )

    # Stages.

    def train_teacher(self) -> Path:
        """Trains the Transformer with its full table."""

        def train() -> keras.Model:
            teacher = self._build(self.settings.dropout)
            fit(
                teacher,
                **self._training(
                    "teacher", self.corpus.train, self.settings.teacher
                ),
            )
            return teacher

        return self._model_stage("teacher", train)

    def compress(self) -> Path:
        """Replaces the table by factors, all rows weighed alike."""

        def compress() -> keras.Model:
            import keras_distilled_embedding as kde

            return kde.compress(
                self.teacher_with_dropout(self.settings.student.dropout),
                self.settings.compression,
                quantization=None,
                activation=self.settings.activation,
                verbose=int(self._verbose),
            )

        return self._model_stage("compressed", compress)

    def distill(self) -> Path:
        """Trains the compressed model to translate as its teacher does."""

        def train() -> keras.Model:
            student = self.model("compressed")
            distill(
                self.model("teacher"),
                student,
                **self._training(
                    "student", self.training_text, self.settings.student
                ),
            )
            return student

        return self._model_stage("student", train)

    def export(self) -> None:
        """Writes teacher and student as LiteRT files."""
        import keras_distilled_embedding as kde

        for name in ("teacher", "student"):
            path = self.work_dir / f"{name}.tflite"
            if path.exists():
                continue
            with self._stage(f"export {name}"):
                model = self.model(name)
                kde.export_litert(
                    model,
                    path,
                    signatures={
                        "encode": encoder(model),
                        "decode": decoder(model),
                    },
                    verbose=self._verbose,
                )

    def evaluate(self) -> None:
        """Translates the test set with every model; a file for each."""
        for name in EVALUATED:
            path = self._result_path(name)
            if not path.exists():
                with self._stage(f"evaluate {name}"):
                    _write_json(path, self._evaluate(name).to_dict())

    def report(self) -> list[Result]:
        """Prints the table of results and draws the pictures."""
        results = [
            Result(**json.loads(self._result_path(name).read_text()))
            for name in EVALUATED
        ]
        settings = self.settings
        title = (
            f"{settings.dataset} en-de, table "
            f"{self.vocabulary.size} x {settings.d_model}, "
            f"compressed {settings.compression:g}x"
        )
        print_table(results, title)
        self._write_report(results, title)
        plot_training(
            {
                name: self.work_dir / f"{name}_history.csv"
                for name in ("teacher", "student")
            },
            self.work_dir / "training.png",
        )
        plot_quality(results, self.work_dir / "quality.png")
        self._console.print(f"Files and pictures: {self.work_dir}")
        return results

    def _write_report(self, results: list[Result], title: str) -> None:
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
            f"sacreBLEU `{signature()}`. Milliseconds: Keras in batches of "
            "64; LiteRT one sentence at a time, one thread.",
            markdown_table(stages),
            f"Python {platform.python_version()}, {versions}; "
            f"{os.cpu_count()} cores, {platform.machine()}. Settings:",
            f"```json\n{json.dumps(asdict(self.settings), indent=2)}\n```",
        ]
        _write(
            self.work_dir / "report.md",
            lambda part: part.write_text("\n\n".join(parts) + "\n"),
        )

    # Parts of stages.

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

    def teacher_with_dropout(self, dropout: float) -> keras.Model:
        """The trained teacher, rebuilt with another dropout."""
        model = self._build(dropout)
        model.set_weights(self.model("teacher").get_weights())
        return model

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

    def _training(
        self, name: str, text: ParallelText, schedule: Schedule
    ) -> dict:
        """Arguments of `train.fit` and `train.distill` for one model."""
        settings = self.settings
        batches = settings.batching.batches
        return dict(
            training=batches(text, self.vocabulary, shuffle_seed=settings.seed),
            validation=batches(self.corpus.validation, self.vocabulary),
            schedule=schedule,
            backup_dir=self.work_dir / f"{name}_backup",
            jit_compile=settings.jit_compile,
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

    def _result_path(self, name: str) -> Path:
        return self.work_dir / f"result_{name}.json"

    def _evaluate(self, name: str) -> Result:
        settings = self.settings
        model = self.model(name.removesuffix("_litert"))
        beam_bleu = None
        if name.endswith("_litert"):
            file = self.work_dir / f"{name.removesuffix('_litert')}.tflite"
            model_bytes = file.stat().st_size
            translator = LiteRTTranslator(
                file, self.vocabulary, settings.batching.max_length
            )
        else:
            model_bytes = _weights_bytes(model)
            arguments = (model, self.vocabulary, settings.batching)
            translator = Translator(*arguments)
            if settings.num_beams > 1:
                beam_bleu, _ = self._score(
                    f"{name}_beam", Translator(*arguments, settings.num_beams)
                )
        bleu, milliseconds = self._score(name, translator)
        return Result(
            name=EVALUATED[name],
            bleu=bleu,
            embedding_bytes=_weights_bytes(model.get_layer("token_embedding")),
            model_bytes=model_bytes,
            ms_per_sentence=milliseconds,
            beam_bleu=beam_bleu,
        )

    def _score(
        self, name: str, translator: Translator | LiteRTTranslator
    ) -> tuple[float, float]:
        """BLEU, and milliseconds a sentence once everything is warm."""
        sentences = self.corpus.test.source
        translator.translate(sentences[:1])
        start = time.perf_counter()
        translations = translator.translate(sentences)
        seconds = time.perf_counter() - start
        (self.work_dir / f"translations_{name}.txt").write_text(
            "\n".join(translations) + "\n", encoding="utf-8"
        )
        bleu = score(translations, self.corpus.test.target)
        return bleu, 1_000 * seconds / len(sentences)

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


def _weights_bytes(layer: keras.layers.Layer) -> int:
    return sum(weight.numpy().nbytes for weight in layer.weights)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"part_{path.name}")
    write(part)
    os.replace(part, path)


def _write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2) + "\n"
    _write(path, lambda part: part.write_text(text))
