"""Corpora, the joint SentencePiece vocabulary, and batches of token ids."""

from __future__ import annotations

import contextlib
import gzip
import random
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import sentencepiece
import tensorflow as tf
from keras_nlp.tokenizers import SentencePieceTokenizer
from keras_nlp.tokenizers import compute_sentence_piece_proto

from .tokens import BOS_ID
from .tokens import EOS_ID
from .tokens import PAD_ID

MULTI30K_URL = (
    "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
)
MULTI30K_SHA256 = {
    "train.en": (
        "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"
    ),
    "train.de": (
        "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"
    ),
    "val.en": (
        "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"
    ),
    "val.de": (
        "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"
    ),
    "test_2016_flickr.en": (
        "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9"
    ),
    "test_2016_flickr.de": (
        "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8"
    ),
}


@dataclass(frozen=True)
class ParallelText:
    """Sentences and their translations: `target[i]` translates `source[i]`."""

    source: list[str]
    target: list[str]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise ValueError(
                "`source` and `target` must hold one sentence each per pair. "
                f"Received: {len(self.source)} source and "
                f"{len(self.target)} target sentences."
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> ParallelText:
        return ParallelText(self.source[rows], self.target[rows])


@dataclass(frozen=True)
class Corpus:
    """A translation task: disjoint training, validation and test pairs."""

    name: str
    train: ParallelText
    validation: ParallelText
    test: ParallelText


def load_corpus(
    name: str = "cldr", data_dir: str | Path | None = None, seed: int = 0
) -> Corpus:
    """Loads one of the two English-German corpora.

    Args:
        name: `"cldr"`, generated from Unicode CLDR data without a download,
            or `"multi30k"`, 29,000 image captions.
        data_dir: Folder that holds Multi30k's six `.gz` files. By default
            they are downloaded, and checked, into the Keras cache.
        seed: Seed of the generated corpus and of its split.

    Returns:
        A `Corpus`.
    """
    if name == "cldr":
        return _load_cldr(seed)
    if name == "multi30k":
        return _load_multi30k(None if data_dir is None else Path(data_dir))
    raise ValueError(
        f"`name` must be 'cldr' or 'multi30k'. Received: name={name!r}"
    )


def read_corpus(
    source: str | Path, target: str | Path, seed: int = 0
) -> Corpus:
    """Reads a corpus of one's own, and holds some of it out.

    A twentieth of the pairs, 1,000 at most, is for validation, and as much
    for the test. No sentence of either side of these is trained on.

    Args:
        source: Text file, a sentence a line; may be compressed (`.gz`).
        target: The same of their translations, line by line.
        seed: Seed of the choice.

    Returns:
        A `Corpus`, without lines that are empty on either side, and each pair
        once.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not UTF-8, if they have different numbers of
            lines, or too few pairs to hold some out.
    """
    sides = [_read_lines(Path(path)) for path in (source, target)]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            "`source` and `target` must have a line each per pair. Received: "
            f"{len(sides[0]):,} lines of {source} and {len(sides[1]):,} of "
            f"{target}"
        )
    pairs = [pair for pair in dict.fromkeys(zip(*sides)) if all(pair)]
    random.Random(seed).shuffle(pairs)
    held_out = min(1_000, len(pairs) // 20)
    if not held_out:
        raise ValueError(
            "`source` and `target` must have at least 20 different pairs. "
            f"Received: {len(pairs)} in {source} and {target}"
        )
    held = pairs[: 2 * held_out]
    known = [{pair[side] for pair in held} for side in (0, 1)]
    train = [
        (sentence, translation)
        for sentence, translation in pairs[2 * held_out :]
        if sentence not in known[0] and translation not in known[1]
    ]
    return Corpus(
        f"{Path(source).name} to {Path(target).name}",
        *map(_parallel, (train, held[:held_out], held[held_out:])),
    )


def _parallel(pairs: list[tuple[str, str]]) -> ParallelText:
    return ParallelText([s for s, _ in pairs], [t for _, t in pairs])


def _load_cldr(seed: int) -> Corpus:
    from .cldr import generate_pairs
    from .cldr import split_pairs

    splits = split_pairs(generate_pairs(seed=seed))
    return Corpus("cldr", *map(_parallel, splits))


def _load_multi30k(data_dir: Path | None) -> Corpus:
    def read(split: str) -> ParallelText:
        return ParallelText(
            *(
                _read_lines(_multi30k_file(f"{split}.{language}", data_dir))
                for language in ("en", "de")
            )
        )

    return Corpus(
        "multi30k", read("train"), read("val"), read("test_2016_flickr")
    )


def _multi30k_file(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        return Path(
            keras.utils.get_file(
                fname=f"{name}.gz",
                origin=f"{MULTI30K_URL}{name}.gz",
                file_hash=MULTI30K_SHA256[name],
                hash_algorithm="sha256",
                cache_subdir="datasets/multi30k",
            )
        )
    path = data_dir / f"{name}.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"`data_dir` has no file {path.name}. Multi30k needs "
            f"{', '.join(f'{n}.gz' for n in MULTI30K_SHA256)}; leave "
            f"`data_dir` out to download them. Received: data_dir={data_dir}"
        )
    return path


def _read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        # Not splitlines(): a sentence may hold other separators than \n.
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error
    return [line.strip() for line in lines[: None if lines[-1] else -1]]


class Vocabulary:
    """The joint SentencePiece vocabulary of both languages.

    Tokenising runs inside the `tf.data` graph (tensorflow-text).

    Args:
        proto: Serialized SentencePiece model, as bytes.
    """

    def __init__(self, proto: bytes) -> None:
        self.proto = proto
        self.size: int = self._tokenizer().vocabulary_size()

    def _tokenizer(self) -> SentencePieceTokenizer:
        # Made for each use: seeding TensorFlow clears its kernel cache, and
        # with it the native resource of every tokenizer made before.
        return SentencePieceTokenizer(proto=self.proto)

    @classmethod
    def train(cls, text: ParallelText, size: int | None = None) -> Vocabulary:
        """Learns pieces from both sides of a text.

        Args:
            text: The text.
            size: How many pieces. By default as many as the text bears: the
                largest of 16,000, 8,000 and so on of which nine in ten occur
                ten times or more.

        Raises:
            ValueError: If the text has not that many different pieces.
        """
        if size is None:
            return cls._as_large_as(text)
        sentencepiece.set_min_log_level(2)  # errors only
        sentences = tf.data.Dataset.from_tensor_slices(
            text.source + text.target
        )
        try:
            return cls(compute_sentence_piece_proto(sentences, size))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                "`size` must be a number of pieces that the text can give. "
                f"Received: size={size}; SentencePiece says: {error}"
            ) from error

    @classmethod
    def _as_large_as(cls, text: ParallelText) -> Vocabulary:
        """As large as a text bears."""
        *sizes, smallest = (16_000, 8_000, 4_000, 2_000, 1_000, 500)
        for size in sizes:
            with contextlib.suppress(ValueError):
                vocabulary = cls.train(text, size)
                counts = vocabulary.token_frequencies(text)
                if np.mean(counts >= 10) >= 0.9:
                    return vocabulary
        return cls.train(text, smallest)

    def encode(self, sentences: list[str]) -> tf.RaggedTensor:
        """Turns strings into ragged ids, each row ending with EOS."""
        tokenizer = self._tokenizer()

        def encode(chunk: tf.Tensor) -> tf.RaggedTensor:
            ids = tokenizer.tokenize(chunk)
            return tf.concat([ids, tf.fill([ids.nrows(), 1], EOS_ID)], axis=1)

        chunks = tf.data.Dataset.from_tensor_slices(sentences).batch(1_000)
        return tf.concat(list(chunks.map(encode)), axis=0)

    def decode(self, ids: np.ndarray) -> list[str]:
        """Ids `(batch, length)` to strings, each up to its first EOS."""
        rows = []
        for row in np.asarray(ids):
            ends = np.flatnonzero(row == EOS_ID)
            row = row[: ends[0]] if len(ends) else row
            rows.append([int(i) for i in row if i not in (PAD_ID, BOS_ID)])
        ragged = tf.ragged.constant(rows, dtype="int32", ragged_rank=1)
        return self._tokenizer().detokenize(ragged)

    def token_frequencies(self, text: ParallelText) -> np.ndarray:
        """Counts how often a model of `text` meets each piece.

        BOS and EOS are counted as the model meets them: it reads EOS once a
        source sentence, reads BOS and predicts EOS once a target sentence.

        Returns:
            int64 array `(size,)`.
        """
        counts = sum(
            np.bincount(self.encode(side).flat_values, minlength=self.size)
            for side in (text.source, text.target)
        )
        counts[BOS_ID] += len(text)
        return counts


@dataclass(frozen=True)
class Batching:
    """How sentence pairs become batches of a few fixed shapes.

    A pair goes to the narrowest width that holds both its sides; batches of
    a width hold `tokens // width` pairs. Few shapes, each complete, mean few
    XLA compilations.

    Args:
        widths: Sequence lengths to pad to, ascending.
        tokens: Target positions per batch, padding included.
    """

    widths: tuple[int, ...] = (12, 14, 16, 18, 20, 24, 30, 40)
    tokens: int = 1_024

    @property
    def max_length(self) -> int:
        return self.widths[-1]

    def batches(
        self,
        text: ParallelText,
        vocabulary: Vocabulary,
        shuffle_seed: int | None = None,
    ) -> tf.data.Dataset:
        """Builds the `(inputs, labels, sample_weight)` dataset of `text`.

        Args:
            text: The sentence pairs. Pairs longer than the widest width are
                left out.
            vocabulary: Turns sentences into ids.
            shuffle_seed: Seed of the order, new in every epoch, for training:
                the last, incomplete batch of a width is then dropped. By
                default every pair is kept and the order stays.

        Returns:
            A `tf.data.Dataset` of `({"source": (b, w), "target": (b, w)},
            labels (b, w), sample_weight (b, w))`: int32 ids, and float32
            weights, 1 where the label is a token and 0 where it is padding.
        """
        training = shuffle_seed is not None
        sizes = [self.tokens // width for width in self.widths]
        source = vocabulary.encode(text.source)
        target = vocabulary.encode(text.target)
        lengths = np.maximum(source.row_lengths(), target.row_lengths())
        kept = lengths <= self.max_length
        pairs = tf.data.Dataset.from_tensor_slices(
            (
                tf.ragged.boolean_mask(source, kept),
                tf.ragged.boolean_mask(target, kept),
            )
        ).map(lambda source, target: (_dense(source), _dense(target)))
        if training:
            pairs = pairs.shuffle(int(kept.sum()), seed=shuffle_seed)
        batches = pairs.bucket_by_sequence_length(
            lambda source, target: tf.maximum(tf.size(source), tf.size(target)),
            bucket_boundaries=[width + 1 for width in self.widths],
            bucket_batch_sizes=[*sizes, 1],
            pad_to_bucket_boundary=True,
            drop_remainder=training,
        )
        # Known beforehand, so that Keras shows how far an epoch is.
        bucket = np.searchsorted(self.widths, lengths[kept])
        counts = np.bincount(bucket, minlength=len(sizes))
        round_to_batches = np.floor if training else np.ceil
        number = int(round_to_batches(counts / sizes).sum())
        batches = batches.apply(tf.data.experimental.assert_cardinality(number))
        if not training:
            batches = batches.map(self._complete)
        return batches.map(_teacher_forcing).prefetch(2)

    def _complete(self, source: tf.Tensor, target: tf.Tensor) -> tuple:
        """Fills a width's last batch with empty rows, of weight zero."""
        shape = tf.shape(source)
        missing = self.tokens // shape[1] - shape[0]
        return tuple(
            tf.pad(t, [[0, missing], [0, 0]]) for t in (source, target)
        )


def _dense(ids: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
    return tf.ensure_shape(tf.convert_to_tensor(ids), [None])


def _teacher_forcing(source: tf.Tensor, labels: tf.Tensor) -> tuple:
    """The decoder reads the labels shifted right by one, after BOS."""
    begin = tf.fill([tf.shape(labels)[0], 1], BOS_ID)
    target = tf.concat([begin, labels[:, :-1]], axis=1)
    # The EOS that the shift may leave in the input predicts only padding.
    weights = tf.cast(labels != PAD_ID, "float32")
    return {"source": source, "target": target}, labels, weights
