"""A translation task as arrays of ids: teacher, batches, greedy search.

`prepare` tokenizes once, with what `examples.nmt` has for it, and needs
TensorFlow; everything else reads arrays, and runs on any backend of Keras.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import NamedTuple

import filelock
import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks.harness.files import write_json
from benchmarks.methods import Table
from benchmarks.methods.storage import table_layer
from benchmarks.tasks.students import nats_a_token
from examples.nmt.model import build_transformer
from examples.nmt.stepwise import stepwise_signatures
from examples.nmt.tokens import BOS_ID
from examples.nmt.tokens import EOS_ID
from examples.nmt.tokens import PAD_ID
from examples.nmt.train import Recipe
from examples.nmt.train import Schedule
from examples.nmt.train import distill
from examples.nmt.train import fit

if TYPE_CHECKING:
    import sentencepiece

    from examples.nmt.data import Corpus

SPLITS = ("train", "validation", "test")
SEARCH_BATCH = 125  # rows that are translated together
TOP_K = 64  # classes that are told apart in the teacher's predictions
STUDENT_SEED = 1  # of fine-tuning, above the task's own
DATA_SEED = 100  # of the students' batches, above the task's own
MOMENT_BATCHES = 8  # some 4,000 hidden states for 256 columns


@dataclass(frozen=True)
class Setting:
    """A task's models, batches and budgets.

    Args:
        model: Sizes of the teacher, as of `build_transformer`.
        dropout: Share of units dropped in the teacher's training.
        widths: Sequence lengths to pad to, ascending.
        tokens: Target positions a batch.
        vocabulary_size: Joint SentencePiece pieces.
        teacher: The teacher's training.
        student: Every student's fine-tuning.
        control: The same budget for the teacher itself, from which nothing is
            missing that a large step would bring back.
        max_pairs: Training pairs to use, all by default.
        max_sentences: Validation and test pairs to use, all by default.
        jit_compile: Whether XLA compiles the training step.
    """

    model: dict[str, int]
    dropout: float
    widths: tuple[int, ...]
    tokens: int
    vocabulary_size: int
    teacher: Schedule
    student: Recipe
    control: Recipe
    max_pairs: int | None = None
    max_sentences: int | None = None
    jit_compile: bool = True


_CAPTIONS = Setting(
    dict(d_model=256, num_layers=2, num_heads=8, feed_forward_dim=512),
    dropout=0.2,
    widths=(12, 14, 16, 18, 20, 24, 30, 40),
    tokens=1_024,
    vocabulary_size=8_000,
    teacher=Schedule(epochs=9, peak_learning_rate=1.2e-3),
    student=Recipe(),
    # The better of two rates tried in the figure `recipe`.
    control=Recipe(
        epochs=4,
        peak_learning_rate=3e-4,
        student_loss_weight=1.0,
        dropout=0.2,
    ),
)
SETTINGS = {
    "multi30k": _CAPTIONS,
    # More text, and a table that is most of the model.
    "software_docs": replace(
        _CAPTIONS,
        dropout=0.1,
        widths=(6, 10, 16, 24, 40, 64),
        tokens=2_048,
        vocabulary_size=16_000,
        control=replace(_CAPTIONS.control, dropout=0.1),
    ),
    "cldr": Setting(
        dict(d_model=192, num_layers=1, num_heads=4, feed_forward_dim=256),
        dropout=0.05,
        widths=(12, 20, 44),
        tokens=2_048,
        vocabulary_size=1_000,
        teacher=Schedule(epochs=4, peak_learning_rate=3e-3),
        student=Recipe(epochs=1, peak_learning_rate=3e-3, warmup=0.1),
        control=Recipe(
            epochs=1,
            peak_learning_rate=3e-4,
            warmup=0.1,
            student_loss_weight=1.0,
            dropout=0.05,
        ),
    ),
    # Every stage in seconds, none of the quality.
    "quick": Setting(
        dict(d_model=32, num_layers=1, num_heads=2, feed_forward_dim=32),
        dropout=0.0,
        widths=(16,),
        tokens=512,
        vocabulary_size=500,
        teacher=Schedule(epochs=1, peak_learning_rate=3e-3),
        student=Recipe(epochs=1, peak_learning_rate=3e-3),
        control=Recipe(epochs=1, student_loss_weight=1.0),
        max_pairs=640,
        max_sentences=16,
        jit_compile=False,
    ),
}


class Pairs(NamedTuple):
    """Sentence pairs as ids, each side ending with EOS."""

    source: list[np.ndarray]
    target: list[np.ndarray]


def prepare(name: str, folder: Path, data_dir: str | None = None) -> None:
    """Tokenizes a corpus into a folder, unless that is done."""
    path = folder / "arrays.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "prepare.lock"):
        if not path.exists():
            _prepare(name, folder, data_dir)


def _prepare(name: str, folder: Path, data_dir: str | None) -> None:
    try:
        from examples.nmt.data import Vocabulary
        from examples.nmt.data import load_corpus
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The task '{name}' is not prepared, which needs TensorFlow: run "
            "`python -m benchmarks run translation --prepare` where "
            f"it is installed, and copy {folder} here. {error}"
        ) from error
    setting = SETTINGS[name]
    if name == "software_docs":
        corpus = _read_splits(Path(data_dir or "") / "en-de.tsv.gz")
    else:
        corpus = load_corpus("cldr" if name == "quick" else name, data_dir)
    few = slice(setting.max_sentences)
    texts = (
        corpus.train[: setting.max_pairs],
        corpus.validation[few],
        corpus.test[few],
    )
    vocabulary_path = folder / "vocabulary.spm"
    if not vocabulary_path.exists():
        vocabulary = Vocabulary.train(texts[0], setting.vocabulary_size)
        vocabulary_path.write_bytes(vocabulary.proto)
    vocabulary = Vocabulary(vocabulary_path.read_bytes())
    arrays = {"vocabulary_size": np.array(vocabulary.size)}
    for split, text in zip(SPLITS, texts):
        for side in ("source", "target"):
            rows = vocabulary.encode(getattr(text, side))
            arrays[f"{split}_{side}"] = rows.flat_values.numpy()
            arrays[f"{split}_{side}_lengths"] = rows.row_lengths().numpy()
    write_json(
        folder / "texts.json",
        {split: asdict(text) for split, text in zip(SPLITS, texts)},
    )
    part = folder / "part_arrays.npz"
    np.savez_compressed(part, **arrays)
    part.replace(folder / "arrays.npz")


def _read_splits(path: Path) -> Corpus:
    """Reads lines of split, source, document, sentence and translation."""
    from examples.nmt.data import Corpus
    from examples.nmt.data import ParallelText

    sides: dict[str, tuple[list[str], list[str]]] = {
        split: ([], []) for split in ("train", "dev", "test")
    }
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            split, _, _, *pair = line.rstrip("\n").split("\t")
            for side, sentence in zip(sides[split], pair, strict=True):
                side.append(sentence)
    return Corpus(path.name, *(ParallelText(*pair) for pair in sides.values()))


class Task:
    """A prepared task and its teacher.

    Args:
        name: One of `SETTINGS`.
        folder: What `prepare` wrote; the teacher is kept there too.
        seed: Of the teacher.
    """

    def __init__(self, name: str, folder: Path, seed: int = 0) -> None:
        self.name = name
        self.setting = SETTINGS[name]
        self.seed = seed
        self.folder = folder
        self._arrays = np.load(folder / "arrays.npz")

    # Data

    @cached_property
    def texts(self) -> dict[str, dict[str, list[str]]]:
        """Sentences, by split and by `"source"` and `"target"`."""
        return json.loads((self.folder / "texts.json").read_text("utf-8"))

    @property
    def vocabulary_path(self) -> Path:
        return self.folder / "vocabulary.spm"

    @cached_property
    def pieces(self) -> sentencepiece.SentencePieceProcessor:
        """The vocabulary, for what reads or writes text."""
        # Training does without it.
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(
            model_proto=self.vocabulary_path.read_bytes()
        )

    @property
    def vocabulary_size(self) -> int:
        return int(self._arrays["vocabulary_size"])

    @property
    def token_frequencies(self) -> np.ndarray:
        """How often a model of the training text meets each piece.

        It reads EOS once a source sentence, reads BOS and predicts EOS once a
        target sentence.
        """
        counts = sum(
            np.bincount(
                self._arrays[f"train_{side}"], minlength=self.vocabulary_size
            )
            for side in ("source", "target")
        )
        counts[BOS_ID] += len(self._arrays["train_target_lengths"])
        return counts

    @property
    def max_length(self) -> int:
        return self.setting.widths[-1]

    def pairs(self, split: str) -> Pairs:
        """The pairs of a split."""
        sides = []
        for side in ("source", "target"):
            flat = self._arrays[f"{split}_{side}"].astype("int32")
            ends = np.cumsum(self._arrays[f"{split}_{side}_lengths"])
            sides.append(np.split(flat, ends[:-1]))
        return Pairs(*sides)

    def batches(self, split: str, seed: int | None = None) -> PairBatches:
        """See `PairBatches`; with a seed for training."""
        setting = self.setting
        return PairBatches(
            self.pairs(split), setting.widths, setting.tokens, seed
        )

    # Models

    def build(
        self,
        dropout: float = 0.0,
        embedding: keras.layers.Layer | None = None,
        seed: int = 0,
        **changes: int,
    ) -> keras.Model:
        """A new model of the teacher's shape, but for the `changes`."""
        return build_transformer(
            self.vocabulary_size,
            self.max_length,
            **self.setting.model | changes,
            dropout=dropout,
            seed=seed,
            embedding=embedding,
        )

    @property
    def teacher_path(self) -> Path:
        return self.folder / f"teacher_{self.seed}.keras"

    def train_teacher(self) -> None:
        """Trains the teacher, unless that is done."""
        with filelock.FileLock(self.folder / f"teacher_{self.seed}.lock"):
            if self.teacher_path.exists():
                return
            keras.utils.set_random_seed(self.seed)
            teacher = self.build(self.setting.dropout, seed=self.seed)
            fit(
                teacher,
                self.batches("train", self.seed),
                schedule=self.setting.teacher,
                backup_dir=self.folder / f"teacher_{self.seed}_backup",
                **self._fit_options(),
            )
            part = self.folder / f"part_teacher_{self.seed}.keras"
            teacher.save(part)
            part.replace(self.teacher_path)

    def teacher(self, dropout: float = 0.0) -> keras.Model:
        """The trained teacher, rebuilt with this dropout."""
        model = self.build(dropout)
        trained = keras.saving.load_model(self.teacher_path, compile=False)
        model.set_weights(trained.get_weights())
        return model

    def with_table(
        self,
        embedding: keras.layers.Layer,
        dropout: float = 0.0,
        source: keras.Model | None = None,
    ) -> keras.Model:
        """The teacher (or `source`) with another table, used as it is."""
        source = source or self.teacher()
        model = self.build(dropout, embedding)
        for layer in model.layers:
            if layer is not embedding:
                weights = source.get_layer(layer.name).get_weights()
                layer.set_weights(weights)
        return model

    @cached_property
    def calibration_data(self) -> list[tuple]:
        """A few of the training batches."""
        batches = self.batches("train", self.seed)
        return [batches[i] for i in range(min(MOMENT_BATCHES, len(batches)))]

    @cached_property
    def table(self) -> Table:
        """The teacher's tied table, and how it is used."""
        teacher = self.teacher()
        statistics = kde.calibrate(teacher, self.calibration_data, verbose=0)
        return Table(
            np.array(table_layer(teacher).embeddings),
            self.token_frequencies,
            statistics[table_layer(teacher).name].second_moment,
        )

    @cached_property
    def fingerprint(self) -> int:
        """Tells teachers, so that rows of different ones are not mixed."""
        weights = self.teacher().get_weights()
        return zlib.crc32(b"".join(w.tobytes() for w in weights))

    # Students

    def fine_tune(
        self,
        student: keras.Model,
        recipe: Recipe,
        cached: bool = True,
        seed: int | None = None,
    ) -> keras.callbacks.History:
        """Trains a student by a recipe.

        Args:
            student: The student.
            recipe: Losses and their weights, epochs, step sizes.
            cached: Whether to learn from the stored predictions of the
                teacher, its most likely classes, instead of from the teacher.
            seed: Of batches and dropout; by default the task's own.
        """
        seed = self.seed if seed is None else seed
        keras.utils.set_random_seed(seed + STUDENT_SEED)
        batches = self.batches("train", seed + DATA_SEED)
        options = {"schedule": recipe, **self._fit_options()}
        if recipe.student_loss_weight == 1.0:
            return fit(student, batches, **options)
        if cached:
            batches = self._predictions(batches, seed + DATA_SEED)
        return distill(self.teacher(), student, batches, **options)

    def _predictions(self, batches: PairBatches, seed: int) -> kde.TeacherCache:
        """Training batches with what the teacher predicts of them."""
        folder = self.folder / f"predictions_{seed}"
        with filelock.FileLock(folder.with_suffix(".lock")):
            kde.cache_teacher(self.teacher(), batches, folder, top_k=TOP_K)
        return kde.TeacherCache(folder, seed)

    def _fit_options(self) -> dict:
        return {
            "validation": self.batches("validation"),
            "jit_compile": self.setting.jit_compile,
            "verbose": 2,
        }

    def nll(self, model: keras.Model) -> float:
        """Nats a token of the validation text."""
        return nats_a_token(model, self.batches("validation"))

    def translate(self, model: keras.Model, split: str) -> list[list[int]]:
        """See the function of this name."""
        return translate(model, self.pairs(split).source, self.max_length)

    def evaluate(self, model: keras.Model) -> dict[str, list[str]]:
        """Ids of the test's translations: SentencePiece may be missing."""
        ids = self.translate(model, "test")
        return {"translations": [" ".join(map(str, row)) for row in ids]}

    def decode(self, translations: list[str]) -> list[str]:
        """The text of what `evaluate` returned."""
        return self.pieces.decode(
            [[*map(int, ids.split())] for ids in translations]
        )


def ready_task(
    name: str, folder: Path, seed: int = 0, data_dir: str | None = None
) -> Task:
    """Returns a task with its teacher; makes what is missing of both."""
    prepare(name, folder / name, data_dir)
    task = Task(name, folder / name, seed)
    task.train_teacher()
    return task


class PairBatches(keras.utils.PyDataset):
    """Batches of a few fixed shapes, for `fit`.

    A pair goes to the narrowest width that holds both its sides; batches of a
    width hold `tokens // width` pairs, so that few programs are compiled.

    Args:
        pairs: The sentence pairs. Those longer than the widest width are left
            out.
        widths: Sequence lengths to pad to, ascending.
        tokens: Target positions a batch, padding included.
        seed: For training. Which pairs share a batch is drawn once, and what
            does not fill a batch is left out; the batches' order is drawn
            anew in each epoch. By default everything stays in order, and
            the last batch of a width is filled up with empty rows.
    """

    def __init__(
        self,
        pairs: Pairs,
        widths: tuple[int, ...],
        tokens: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self._pairs = pairs
        self._random = None if seed is None else np.random.default_rng(seed)
        lengths = np.array([max(map(len, pair)) for pair in zip(*pairs)])
        order = np.arange(len(lengths))
        if self._random is not None:
            self._random.shuffle(order)
        bucket = np.searchsorted(widths, lengths[order])
        self._batches = []
        for index, width in enumerate(widths):
            rows = order[bucket == index]
            size = tokens // width
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                if seed is None or len(chosen) == size:
                    self._batches.append((width, size, chosen))
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        if self._random is not None:
            self._random.shuffle(self._batches)
        # From the first two batches Keras concludes which dimensions vary.
        first = self._batches[0][0]
        widths = np.array([width for width, _, _ in self._batches])
        for other in np.flatnonzero(widths != first)[:1]:
            batches = self._batches
            batches[1], batches[other] = batches[other], batches[1]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple:
        """`({"source": (b, w), "target": (b, w)}, labels, weights)`."""
        width, size, rows = self._batches[index]
        source = _padded([self._pairs.source[i] for i in rows], size, width)
        labels = _padded([self._pairs.target[i] for i in rows], size, width)
        # The decoder reads the labels shifted right by one, after BOS.
        target = np.roll(labels, 1, axis=1)
        target[:, 0] = BOS_ID
        inputs = {"source": source, "target": target}
        return inputs, labels, (labels != PAD_ID).astype("float32")


def _padded(rows: list[np.ndarray], size: int, width: int) -> np.ndarray:
    batch = np.full((size, width), PAD_ID, "int32")
    for row, ids in zip(batch, rows):
        row[: len(ids)] = ids
    return batch


def translate(
    model: keras.Model, sources: list[np.ndarray], max_length: int
) -> list[list[int]]:
    """Translates sentences, greedily, token by token.

    Args:
        model: A model of `build_transformer`, compressed or not.
        sources: Ids of sentences; what is longer than the model is cut.
        max_length: Of the model.

    Returns:
        For each sentence its ids, without BOS, EOS and what follows it.
    """
    parts = stepwise_signatures(model, max_length)
    caches = {
        tensor.name: tensor.shape[1:]
        for tensor in parts["decode"].inputs
        if tensor.name.startswith("self_")
    }
    translations = []
    for start in range(0, len(sources), SEARCH_BATCH):
        chosen = [s[:max_length] for s in sources[start:][:SEARCH_BATCH]]
        source = _padded(chosen, SEARCH_BATCH, max_length)
        found = _search(**parts, caches=caches, source=source)
        for ids in found.tolist()[: len(chosen)]:
            end = ids.index(EOS_ID) if EOS_ID in ids else len(ids)
            translations.append(ids[:end])
    return translations


def _search(
    encode: keras.Model,
    decode: keras.Model,
    caches: dict[str, tuple],
    source: np.ndarray,
) -> np.ndarray:
    """Source ids `(b, s)` to target ids `(b, t)`."""
    size, max_length = source.shape
    state = encode.predict_on_batch({"source": source})
    state |= {n: np.zeros((size, *s), "float32") for n, s in caches.items()}
    token = np.full((size, 1), BOS_ID, "int32")
    finished = ~(source != PAD_ID).any(axis=1)
    found = []
    for position in range(max_length - 1):
        state["token"] = token
        state["position"] = np.array([position], "int32")
        outputs = decode.predict_on_batch(state)
        token = outputs.pop("logits").argmax(axis=-1).astype("int32")[:, None]
        state |= outputs
        found.append(token[:, 0])
        finished |= token[:, 0] == EOS_ID
        if finished.all():
            break
    return np.stack(found, axis=1)
