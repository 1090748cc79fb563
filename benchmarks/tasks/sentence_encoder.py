"""A pretrained sentence encoder that comes in a Python package, and sentences.

What is measured is how far its vectors, and what is found with them, move when
its table does.
"""

from __future__ import annotations

import json
import random
from functools import cached_property

import keras
import keras_hub
import numpy as np
from keras_hub.src.utils.transformers import convert_bert

from benchmarks.tasks.pretrained import WeightFile
from benchmarks.tasks.tables import minilm_archive
from benchmarks.tasks.tables import read_minilm
from benchmarks.tasks.translator import read_corpus

LENGTH = 64  # tokens of a sentence, at most
SENTENCES_AT_A_TIME = 64
NEIGHBORS = 10


class Weights(WeightFile):
    """The package's file, as KerasHub's converter reads it."""

    def __init__(self) -> None:
        with minilm_archive() as archive:
            self._tensors, self.vocabulary = read_minilm(archive)
            self.config = json.loads(archive.read("config.json"))

    def get_tensor(self, key: str) -> np.ndarray:
        """The values of a name in Hugging Face's files."""
        return self._tensors[key]


def pretrained_encoder() -> keras.Model:
    """all-MiniLM-L6-v2 as a model of KerasHub."""
    weights = Weights()
    sizes = convert_bert.convert_backbone_config(weights.config)
    # The epsilon of its normalization is KerasHub's too.
    backbone = keras_hub.models.BertBackbone(**sizes, dropout=0.0)
    convert_bert.convert_weights(backbone, weights, {})
    return _embedder(backbone, weights.vocabulary)


def quick_encoder(sentences: list[str]) -> keras.Model:
    """A model of no quality, whose words are those of some sentences."""
    keras.utils.set_random_seed(0)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({w for text in sentences for w in text.lower().split()})
    vocabulary = [*special, *words][:1_000]
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=LENGTH,
        dropout=0.0,
    )
    return _embedder(backbone, vocabulary)


def _embedder(backbone: keras.Model, vocabulary: list[str]) -> keras.Model:
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=vocabulary, lowercase=True
    )
    preprocessor = keras_hub.models.BertTextEmbedderPreprocessor(
        tokenizer, sequence_length=LENGTH
    )
    return keras_hub.models.BertTextEmbedder(backbone, preprocessor)


class SentenceEncoderTask:
    """A sentence encoder, sentences to find, and others to find them with.

    Args:
        data_dir: Folder of the translator's corpus, whose English is read.
        documents: How many sentences are searched, of the training text.
        queries: How many are looked for, of the test's.
        calibration: Sentences of the training text, none of those.
        quick: Whether the model is one of no quality.
    """

    def __init__(
        self,
        data_dir: str | None,
        documents: int,
        queries: int,
        calibration: int,
        quick: bool = False,
    ) -> None:
        chosen = {
            split: _sample([source for source, _ in texts])
            for split, texts in read_corpus(data_dir).items()
        }
        training = chosen["train"]
        self.documents = training[:documents]
        self.calibration_data = training[documents : documents + calibration]
        known = set(self.documents)
        self.queries = [t for t in chosen["test"] if t not in known][:queries]
        self.model = quick_encoder(training) if quick else pretrained_encoder()

    @cached_property
    def _reference(self) -> tuple[np.ndarray, np.ndarray]:
        return self._vectors(self.model)

    def _vectors(self, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of the documents and of the queries."""
        documents, queries = (
            np.asarray(
                model.predict(texts, batch_size=SENTENCES_AT_A_TIME, verbose=0),
                "float32",
            )
            for texts in (self.documents, self.queries)
        )
        return documents, queries

    def evaluate(self, model: keras.Model) -> dict[str, float]:
        """How far a copy of the model is from it.

        Returns:
            The mean cosine between its vector of a sentence and the model's;
            and in the mean over the queries, what share of the model's ten
            nearest documents are among its own, and the rank correlation of
            all documents' similarities.
        """
        pairs = [*zip(self._vectors(model), self._reference)]
        cosine = np.concatenate([(a * b).sum(axis=1) for a, b in pairs])
        documents, queries = pairs
        found, expected = (
            q @ d.T for q, d in zip(queries, documents, strict=True)
        )
        return {
            "cosine": float(cosine.mean()),
            "recall": recall(found, expected, NEIGHBORS),
            "correlation": rank_correlation(found, expected),
        }


def recall(found: np.ndarray, expected: np.ndarray, number: int) -> float:
    """The share of the nearest that are found.

    Args:
        found: Similarities `(queries, documents)`.
        expected: Those that are right, as many.
        number: Of the nearest documents.
    """
    nearest, right = (
        np.argpartition(-values, number - 1, axis=1)[:, :number]
        for values in (found, expected)
    )
    return float(
        np.mean([len(np.intersect1d(a, b)) for a, b in zip(nearest, right)])
        / number
    )


def rank_correlation(found: np.ndarray, expected: np.ndarray) -> float:
    """Spearman's, of each row, in the mean.

    Args:
        found: Similarities `(queries, documents)`.
        expected: Those that are right, as many.
    """
    ranks = [
        values.argsort(axis=1).argsort(axis=1).astype("float64")
        for values in (found, expected)
    ]
    centered = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    products = [
        (a * b).sum(axis=1)
        for a, b in (centered, centered[:1] * 2, centered[1:] * 2)
    ]
    return float((products[0] / np.sqrt(products[1] * products[2])).mean())


def _sample(texts: list[str]) -> list[str]:
    """Different sentences of some length, in an order by chance."""
    unlike = [*dict.fromkeys(t for t in texts if len(t.split()) >= 5)]
    random.Random(0).shuffle(unlike)
    return unlike
