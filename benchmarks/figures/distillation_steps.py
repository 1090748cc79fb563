"""What a distillation step costs in time.

Every row is one training step, compiled by XLA, of the same student on the
same batch. The rows take turns in one process; `÷` is the median over the
rounds of the ratio within one round. `student alone` is `student.fit` without
a distiller; `teacher forward` computes the teacher's logits and nothing else;
where a loss reads the teacher's outputs, what must run is the two together (of
features, XLA leaves out the layers after them). Both distillers, ours and
Keras's, have a task loss of weight 0.5. `int8`, `int4` and `int2`: the same
factors, rounded at every step as a file stores them. A claim holds `within the
noise` where the median exceeds the bar and the lower quartile does not. Keras's
distiller ignores sample weights, which ours applies. Only on TensorFlow.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_distilled_embedding as kde
from benchmarks import harness
from benchmarks.tasks.language_model import QUICK
from benchmarks.tasks.language_model import Settings
from benchmarks.tasks.language_model import build
from benchmarks.tasks.translation import SETTINGS
from examples.nmt.model import build_transformer
from examples.nmt.train import LabelSmoothedCrossentropy
from keras_distilled_embedding.quantization import QUANTIZATIONS

SEED = 0
GPT2 = Settings(vocabulary=16_000, num_layers=4, length=32)
LARGE_TABLE = Settings(
    vocabulary=49_152,
    hidden_dim=576,
    num_layers=2,
    num_heads=9,
    length=64,
    batch=4,
)
COMPRESSION = 8.0
BAR = 1.10

# One call is one step; what it returns is ready when it can be read.
Step = Callable[[], Any]


# What is trained


@dataclass(frozen=True)
class Workload:
    """A teacher to compress, and what its student is trained on.

    Args:
        description: A line for the report.
        teacher: Builds it; every row has its own, since Keras's distiller
            freezes the one it is given.
        inputs: A batch of the model's inputs.
        labels: Of the same batch, one for each token.
        loss: The task's.
        layer: Name of the layer whose outputs `FeatureDistillation` compares.
        rank: Of the student, or that of floats 8x smaller.
    """

    description: str
    teacher: Callable[[], keras.Model]
    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    loss: keras.losses.Loss
    layer: str
    rank: int | None = None

    def student(self, quantization: str | None = None) -> keras.Model:
        """A fresh student of a fresh teacher, in floats of the same rank.

        Args:
            quantization: What its codes are rounded to while it is trained.
        """
        size = {"compression": COMPRESSION}
        if self.rank is not None:
            size = {"rank": self.rank}
        student = kde.compress(
            self.teacher(), **size, quantization=None, verbose=0
        )
        for layer in student.layers if quantization else ():
            if isinstance(layer, kde.layers.DistilledEmbedding):
                layer.quantize(quantization)
        return student

    def dataset(self) -> tf.data.Dataset:
        """One batch, with a weight of one for each token, without end."""
        weights = np.ones(self.labels.shape, "float32")
        batch = (self.inputs, self.labels, weights)
        return tf.data.Dataset.from_tensors(batch).repeat()

    def train(
        self, model: keras.Model, dataset: tf.data.Dataset | None = None
    ) -> Step:
        """Compiles `model`; a step is what `fit` calls for each batch.

        Args:
            model: A student, or a distiller of one.
            dataset: Its batches; those of `dataset()` by default.
        """
        model.compile(
            keras.optimizers.Adam(1e-4), loss=self.loss, jit_compile=True
        )
        dataset = dataset or self.dataset()
        # Keras builds the optimizer's variables in `fit` alone.
        model.fit(dataset, steps_per_epoch=1, shuffle=False, verbose=0)
        function = model.make_train_function()
        batches = iter(dataset)
        return lambda: function(batches)

    def forward(self, model: keras.Model) -> Step:
        """The logits of `model`, compiled as Keras compiles a step."""

        model.compile(jit_compile=True)
        model.make_predict_function()
        batches = iter(self.dataset())
        return lambda: model.predict_function([next(batches)])


def translation(quick: bool) -> Workload:
    """The translation task's model, with its loss."""
    setting = SETTINGS["quick" if quick else "multi30k"]
    vocabulary, sizes = setting.vocabulary_size, setting.model
    batch, length = (4, 6) if quick else (64, 16)
    source, target, labels = _tokens(3, batch, length, vocabulary)
    return Workload(
        description=f"Transformer of `examples.nmt`, table {vocabulary:,} x "
        f"{sizes['d_model']}, {sizes['num_layers']} layers a side, dropout "
        f"{setting.dropout:g}; batches of {batch} x {length} tokens.",
        teacher=lambda: build_transformer(
            vocabulary, 40, **sizes, dropout=setting.dropout, seed=SEED
        ),
        inputs={"source": source, "target": target},
        labels=labels,
        loss=LabelSmoothedCrossentropy(),
        layer="memory",
    )


def causal_lm(quick: bool) -> Workload:
    """KerasHub's GPT-2."""
    return _gpt2(QUICK if quick else GPT2)


def large_table(quick: bool) -> Workload:
    """The same with a table as large as SmolLM2's, at the rank of 2 bits."""
    return _gpt2(QUICK if quick else LARGE_TABLE, rank=16 if quick else 540)


def _gpt2(setting: Settings, rank: int | None = None) -> Workload:
    size = setting.batch, setting.length, setting.vocabulary
    tokens, labels = _tokens(2, *size)

    def teacher() -> keras.Model:
        # One graph, in which features can be found.
        backbone = build(setting, SEED).backbone
        logits = backbone.token_embedding(backbone.output, reverse=True)
        return keras.Model(backbone.input, logits)

    return Workload(
        description=f"KerasHub's GPT-2, table {size[2]:,} x "
        f"{setting.hidden_dim}, {setting.num_layers} layers; batches of "
        f"{size[0]} x {size[1]} tokens; the student's rank "
        f"{rank or f'that of floats {COMPRESSION:g} times smaller'}.",
        teacher=teacher,
        inputs={"token_ids": tokens, "padding_mask": np.ones_like(tokens)},
        labels=labels,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        layer=f"transformer_layer_{(setting.num_layers - 1) // 2}",
        rank=rank,
    )


def _tokens(
    count: int, batch: int, length: int, vocabulary: int
) -> list[np.ndarray]:
    """Random sentences without padding, which is id 0."""
    draw = np.random.default_rng(SEED)
    size = (count, batch, length)
    return list(draw.integers(1, vocabulary, size=size, dtype="int32"))


MODELS = {
    "translation": translation,
    "causal_lm": causal_lm,
    "large_table": large_table,
}


# What is measured

ALONE, FORWARD = "student alone", "teacher forward"
CACHED = "ours: logits, cached"


@dataclass(frozen=True)
class Row:
    """One way to take a step.

    Args:
        prepare: Builds and compiles the step.
        against: The rows that must run in this one: what it is to cost.
        bar: How many times their sum it may cost, if there is a claim.
        rival: The row of Keras's distiller that does the same.
    """

    prepare: Callable[[Workload], Step]
    against: tuple[str, ...] = (ALONE,)
    bar: float | None = None
    rival: str | None = None


def _distilled(
    distiller: type[keras.distillation.Distiller], *losses: Callable
) -> Callable[[Workload], Step]:
    """A step of a distiller, with losses that are made of a layer's name."""
    return lambda load: load.train(
        distiller(
            load.teacher(),
            load.student(),
            [loss(load.layer) for loss in losses],
        )
    )


def _cached(load: Workload, quantization: str | None = None) -> Step:
    """Learning from what a teacher has predicted before."""
    teacher = load.teacher()
    with tempfile.TemporaryDirectory() as folder:
        cache = kde.cache_teacher(
            teacher, load.dataset().take(1), folder, verbose=0
        )
        batch = cache[0]
    return load.train(
        kde.Distiller(
            teacher, load.student(quantization), [kde.LogitsDistillation()]
        ),
        tf.data.Dataset.from_tensors(batch).repeat(),
    )


def _embedding(layer: str, num_rows: int | None = None) -> Any:
    return kde.EmbeddingDistillation(num_rows=num_rows)


def _logits(layer: str) -> Any:
    return kde.LogitsDistillation()


def _features(layer: str) -> Any:
    return keras.distillation.FeatureDistillation("mse", layer, layer)


def _keras_logits(layer: str) -> Any:
    kl = keras.losses.KLDivergence()
    return keras.distillation.LogitsDistillation(temperature=1.0, loss=kl)


OURS, KERAS = kde.Distiller, keras.distillation.Distiller
_BOTH_RUN = (ALONE, FORWARD)

ROWS = {
    ALONE: Row(lambda load: load.train(load.student())),
    FORWARD: Row(lambda load: load.forward(load.teacher())),
    "ours: embedding": Row(_distilled(OURS, _embedding), bar=BAR),
    "ours: embedding, 1,024 rows": Row(
        _distilled(OURS, partial(_embedding, num_rows=1_024)), bar=BAR
    ),
    "ours: logits": Row(
        _distilled(OURS, _logits), _BOTH_RUN, BAR, "Keras: logits"
    ),
    CACHED: Row(_cached),
    **{
        f"{CACHED}, {kind}": Row(
            partial(_cached, quantization=kind), (CACHED,), BAR
        )
        for kind in QUANTIZATIONS
    },
    "ours: both": Row(_distilled(OURS, _embedding, _logits), _BOTH_RUN),
    "ours: features": Row(
        _distilled(OURS, _features), _BOTH_RUN, rival="Keras: features"
    ),
    "Keras: logits": Row(_distilled(KERAS, _keras_logits), _BOTH_RUN),
    "Keras: features": Row(_distilled(KERAS, _features), _BOTH_RUN),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--rounds", type=int, default=15, help="turns of each row")
    add("--steps", type=int, default=5, help="steps of each turn")


def run(options: argparse.Namespace) -> None:
    """Times every row of the chosen models."""
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            "This figure needs the TensorFlow backend. "
            f"Received: KERAS_BACKEND={keras.config.backend()}"
        )
    tf.get_logger().setLevel("ERROR")  # many models are many tracings
    # In the order of the tables; everything is compared with the first.
    names = [row for row in ROWS if row == ALONE or row in options.rows]
    for model in options.models:
        options.store.finish(
            f"times {model}", partial(measure_times, model, names, options)
        )


def measure_times(
    model: str, names: Sequence[str], options: argparse.Namespace
) -> dict:
    """Milliseconds a step of each row, all in turns."""
    workload = MODELS[model](options.quick)
    steps = {name: ROWS[name].prepare(workload) for name in names}
    return {
        "model": model,
        "description": workload.description,
        "rounds": harness.time_in_turns(
            steps, options.rounds, options.steps, _wait, SEED
        ),
    }


def _wait(outputs: Any) -> None:
    for output in keras.tree.flatten(outputs):
        float(tf.reshape(output, [-1])[0])


# The report


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return np.percentile(values, [25, 50, 75]).tolist()


def ratio(
    times: dict[str, harness.Times],
    row: str,
    others: Sequence[str],
    clock: str = "wall_ms",
) -> list[float]:
    """Quartiles of a row's time over that of others, paired by round."""
    own = np.array(times[row][clock])
    return quartiles(own / sum(np.array(times[o][clock]) for o in others))


def _spread(values: Sequence[float], form: str) -> str:
    low, median, high = map(form.format, values)
    return f"{median} ({low} to {high})"


def collect(options: argparse.Namespace, earlier: dict) -> dict:
    """Returns the rounds of each model."""
    models = earlier.get("models", {}) | {
        row["model"]: row for row in options.store.read_all() if "rounds" in row
    }
    return {"models": models} if models else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables, and what one needs to know to read them."""
    models = results["models"]
    for name, model in models.items():
        yield f"## {name}"
        yield model["description"]
        yield harness.markdown_table([*_time_cells(model["rounds"])])
        claims = [*_claims(model["rounds"])]
        if claims:
            yield harness.markdown_table(claims)
    names = list(dict.fromkeys(n for m in models.values() for n in m["rounds"]))
    harness.plot_lines(
        {
            model: [
                (
                    ratio(found["rounds"], name, [ALONE])[1],
                    names.index(name),
                )
                for name in found["rounds"]
            ]
            for model, found in models.items()
        },
        folder / "steps.png",
        scatter=True,
        rows=names,
        xlabel="time of a step ÷ student alone",
    )
    yield "![Ratios](steps.png)"


def _time_cells(times: dict[str, harness.Times]) -> Iterator[dict]:
    for row, own in times.items():
        against = ROWS[row].against if row in ROWS else (ALONE,)
        least = ""
        if set(against) <= set(times):
            least = f"{ratio(times, row, against)[1]:.2f}"
        cpu = ratio(times, row, [ALONE], "cpu_ms")[1]
        yield {
            "step": row,
            "ms (quartiles)": _spread(quartiles(own["wall_ms"]), "{:.1f}"),
            "CPU ms": f"{statistics.median(own['cpu_ms']):.1f}",
            "÷ student alone (quartiles)": _spread(
                ratio(times, row, [ALONE]), "{:.2f}"
            ),
            "CPU ÷ student alone": f"{cpu:.2f}",
            "÷ what must run": least,
        }


def _claims(times: dict[str, harness.Times]) -> Iterator[dict]:
    for name, row in ROWS.items():
        for others, bar in ((row.against, row.bar), ([row.rival], 1.0)):
            if bar is None or not {name, *others} <= set(times):
                continue
            wall = ratio(times, name, others)
            verdict = "yes" if wall[1] <= bar else "no"
            if verdict == "no" and wall[0] <= bar:
                verdict = "within the noise"
            cpu = ratio(times, name, others, "cpu_ms")[1]
            yield {
                "claim": f"{name} ≤ {bar:.2f} x ({' + '.join(others)})",
                "wall (quartiles)": _spread(wall, "{:.2f}"),
                "CPU": f"{cpu:.2f}",
                "holds": verdict,
            }
