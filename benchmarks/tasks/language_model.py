"""A language model's task: the prose that comes with Python packages.

Whoever can run the benchmark has the text. The model is a small GPT-2 of
KerasHub's.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import math
import sysconfig
import warnings
import zlib
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import keras
import keras_hub
import numpy as np
import sentencepiece
import tensorflow as tf
from keras_hub.tokenizers import compute_sentence_piece_proto

from benchmarks.harness.files import write_bytes
from benchmarks.harness.files import write_json
from benchmarks.methods import Table
from benchmarks.methods.storage import table_layer
from benchmarks.tasks.students import nats_a_token
from examples.nmt.data import Vocabulary
from examples.nmt.tokens import EOS_ID
from examples.nmt.tokens import UNK_ID
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule
from examples.nmt.train import distill
from examples.nmt.train import fit

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
        student: How everything else is trained: docs/distillation.md, without
            smoothing, for what counts is perplexity.
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
    student: Recipe = Recipe(epochs=1, smoothing=0.0)
    documents: int | None = None
    jit_compile: bool = True


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


# The text


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
                yield f"{package}/{name}", docstrings(names[name])


def docstrings(path: Path) -> list[str]:
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
    def load(cls, settings: Settings, folder: Path) -> Corpus:
        """Reads it from `folder`; gathers it there where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "corpus.npz"
        with filelock.FileLock(folder / "corpus.lock"):
            if not path.exists():
                _gather(settings, folder)
        with np.load(path) as saved:
            ids = {name: saved[name] for name in saved.files}
        return cls(ids, json.loads((folder / "corpus.json").read_text("utf-8")))

    def batches(
        self, split: str, setting: Settings, shuffle_seed: int | None = None
    ) -> tf.data.Dataset:
        """Batches of windows `(inputs, labels, sample_weight)`.

        Every token is predicted once, from those before it in its window.

        Args:
            split: Name of the split.
            setting: Tells the shape, which all batches have.
            shuffle_seed: Of the order, new in every epoch; whatever fills no
                batch is then left out. By default the order stays, and the
                last batch is filled up with weights of zero.
        """
        stream, length = self.ids[split], setting.length
        number = len(stream) - 1
        if shuffle_seed is None:
            size = length * setting.batch
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
        # KerasHub's `fit` takes no other data set than TensorFlow's.
        windows = tf.data.Dataset.from_tensor_slices((inputs, labels, weights))
        if shuffle_seed is not None:
            windows = windows.shuffle(len(tokens), seed=shuffle_seed)
        return windows.batch(setting.batch, drop_remainder=True).prefetch(2)


def _gather(settings: Settings, folder: Path) -> None:
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
    write_json(folder / "corpus.json", about)
    file = io.BytesIO()
    np.savez_compressed(file, **ids)
    write_bytes(folder / "corpus.npz", file.getvalue())


# The model


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


class LanguageModelTask:
    """A language model to compress, its text and its training.

    Its table becomes the package's own layer: rivals have no place in it.

    Args:
        setting: Sizes.
        folder: Of the text and the teacher.
        seed: Of the teacher; of the students, too.
    """

    def __init__(self, setting: Settings, folder: Path, seed: int) -> None:
        self.setting, self.folder, self.seed = setting, folder, seed

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus.load(self.setting, self.folder)

    @property
    def _teacher_path(self) -> Path:
        return self.folder / f"teacher_{self.seed}.weights.h5"

    def train_teacher(self) -> tuple[keras.Model, keras.callbacks.History]:
        """Trains the teacher and keeps it."""
        teacher = build(self.setting, self.seed)
        history = self._fit(fit, teacher, self.setting.teacher)
        part = self.folder / f"part_{self._teacher_path.name}"
        # The backbone's, for those of the task bring an optimizer.
        teacher.backbone.save_weights(part)
        part.replace(self._teacher_path)
        return teacher, history

    def teacher(self, dropout: float = 0.0) -> keras.Model:
        """The trained teacher, a new one in each call; without dropout."""
        del dropout
        teacher = build(self.setting, self.seed)
        teacher.backbone.load_weights(self._teacher_path)
        return teacher

    @cached_property
    def table(self) -> Table:
        """The teacher's tied table, and how often its rows are used."""
        layer = table_layer(self.teacher())
        # What the model reads and what it predicts is the same stream.
        counts = np.bincount(
            self.corpus.ids["train"], minlength=self.setting.vocabulary
        )
        return Table(np.array(layer.embeddings), counts)

    def fine_tune(
        self, student: keras.Model, recipe: Recipe
    ) -> keras.callbacks.History:
        """Trains a student by a recipe."""
        keras.utils.set_random_seed(self.seed + 1)
        if recipe.student_loss_weight == 1.0:
            return self._fit(fit, student, recipe)
        return self._fit(partial(distill, self.teacher()), student, recipe)

    def _fit(
        self, train: Callable, model: keras.Model, schedule: Schedule
    ) -> keras.callbacks.History:
        return train(
            model,
            self.corpus.batches("train", self.setting, self.seed),
            self.corpus.batches("validation", self.setting),
            schedule,
            jit_compile=self.setting.jit_compile,
            verbose=2,
        )

    def nll(self, model: keras.Model) -> float:
        """Nats a token of the test."""
        batches = self.corpus.batches("test", self.setting)
        return nats_a_token(model, batches, self.setting.jit_compile)

    def evaluate(self, model: keras.Model) -> dict[str, float]:
        """Nats a token, perplexity, and bits a byte of the test."""
        nll, about = self.nll(model), self.corpus.about["test"]
        bits = nll * about["tokens"] / math.log(2)
        return {
            "nll": nll,
            "perplexity": math.exp(nll),
            "bits_per_byte": bits / about["bytes"],
        }
