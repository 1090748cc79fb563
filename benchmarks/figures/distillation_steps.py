"""What a distillation step costs: its time, and the memory at its peak.

Every row is one training step, compiled by XLA, of the same student on the
same batch: trained alone, by our `Distiller` with each loss, and by Keras's
own distiller with the nearest equivalent. The rows take turns in one process,
and are compared with each other round by round. Each row's memory is measured
in a process of its own. Only on TensorFlow.
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
import keras_hub
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_distilled_embedding as kde
from benchmarks.harness.measure import Times
from benchmarks.harness.measure import in_new_process
from benchmarks.harness.measure import peak_mb
from benchmarks.harness.measure import reset_peak
from benchmarks.harness.measure import time_in_turns
from benchmarks.harness.plots import save
from benchmarks.harness.rows import Rows
from benchmarks.harness.tables import markdown_table
from examples.nmt.model import build_transformer
from examples.nmt.train import LabelSmoothedCrossentropy

TITLE = "Time and memory of a distillation step"
SEED = 0
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
    """

    description: str
    teacher: Callable[[], keras.Model]
    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    loss: keras.losses.Loss
    layer: str

    def student(self) -> keras.Model:
        """A fresh student of a fresh teacher."""
        return kde.compress(
            self.teacher(), COMPRESSION, quantization=None, verbose=0
        )

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

        @tf.function(jit_compile=True)
        def predict(inputs):
            return model(inputs, training=False)

        @tf.function
        def step(batches):
            return predict(batches.get_next()[0])

        batches = iter(self.dataset())
        return lambda: step(batches)


def translation(quick: bool) -> Workload:
    """The translation example's model, with its loss."""
    sizes = dict(d_model=256, num_layers=2, num_heads=8, feed_forward_dim=512)
    vocabulary, batch, length = 8_000, 64, 16
    if quick:
        sizes = dict(d_model=16, num_layers=1, num_heads=2, feed_forward_dim=16)
        vocabulary, batch, length = 200, 4, 6
    source, target, labels = _tokens(3, batch, length, vocabulary)
    return Workload(
        description=f"Transformer of `examples.nmt`, table {vocabulary:,} x "
        f"{sizes['d_model']}, {sizes['num_layers']} layers a side, dropout "
        f"0.2; batches of {batch} x {length} tokens.",
        teacher=lambda: build_transformer(
            vocabulary, 40, **sizes, dropout=0.2, seed=SEED
        ),
        inputs={"source": source, "target": target},
        labels=labels,
        loss=LabelSmoothedCrossentropy(),
        layer="memory",
    )


def causal_lm(quick: bool) -> Workload:
    """KerasHub's GPT-2, with the projection that its `CausalLM` adds.

    `compress` takes Functional models, not KerasHub's own classes: the
    backbone's graph is continued, and the result is plain.
    """
    sizes = dict(hidden_dim=256, num_layers=4, num_heads=4)
    vocabulary, batch, length = 16_000, 16, 32
    if quick:
        sizes = dict(hidden_dim=16, num_layers=1, num_heads=2)
        vocabulary, batch, length = 200, 4, 6

    def teacher() -> keras.Model:
        keras.utils.set_random_seed(SEED)
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=vocabulary,
            intermediate_dim=4 * sizes["hidden_dim"],
            max_sequence_length=length,
            dropout=0.1,
            **sizes,
        )
        logits = backbone.token_embedding(backbone.output, reverse=True)
        return keras.Model(backbone.input, logits)

    tokens, labels = _tokens(2, batch, length, vocabulary)
    middle = (sizes["num_layers"] - 1) // 2
    return Workload(
        description=f"KerasHub's GPT-2, table {vocabulary:,} x "
        f"{sizes['hidden_dim']}, {sizes['num_layers']} layers, dropout 0.1; "
        f"batches of {batch} x {length} tokens.",
        teacher=teacher,
        inputs={"token_ids": tokens, "padding_mask": np.ones_like(tokens)},
        labels=labels,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        layer=f"transformer_layer_{middle}",
    )


def _tokens(
    count: int, batch: int, length: int, vocabulary: int
) -> list[np.ndarray]:
    """Random sentences without padding, which is id 0."""
    draw = np.random.default_rng(SEED)
    size = (count, batch, length)
    return list(draw.integers(1, vocabulary, size=size, dtype="int32"))


MODELS = {"translation": translation, "causal_lm": causal_lm}


# What is measured

ALONE, FORWARD = "student alone", "teacher forward"


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


def _ours(
    *losses: Callable[[Workload], keras.distillation.DistillationLoss],
) -> Callable[[Workload], Step]:
    return lambda load: load.train(
        kde.Distiller(
            load.teacher(), load.student(), [loss(load) for loss in losses]
        )
    )


def _keras(
    loss: Callable[
        [Workload, keras.Model, keras.Model],
        keras.distillation.DistillationLoss,
    ],
) -> Callable[[Workload], Step]:
    def prepare(load: Workload) -> Step:
        teacher, student = load.teacher(), load.student()
        return load.train(
            keras.distillation.Distiller(
                teacher, student, [loss(load, teacher, student)]
            )
        )

    return prepare


class _WithModels(keras.distillation.DistillationLoss):
    """Our loss, for a distiller that does not hand it the models."""

    def __init__(self, loss, teacher: keras.Model, student: keras.Model):
        self._loss = loss
        self._models = {"teacher": teacher, "student": student}

    def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
        return self._loss.compute_loss(
            teacher_outputs, student_outputs, **self._models
        )


def _cached(load: Workload) -> Step:
    """Learning from what a teacher has predicted before."""
    teacher = load.teacher()
    with tempfile.TemporaryDirectory() as folder:
        cache = kde.cache_teacher(
            teacher, load.dataset().take(1), folder, verbose=0
        )
        batch = cache[0]
    return load.train(
        kde.Distiller(teacher, load.student(), [kde.LogitsDistillation()]),
        tf.data.Dataset.from_tensors(batch).repeat(),
    )


def _features(load: Workload, *_: keras.Model):
    return keras.distillation.FeatureDistillation(
        teacher_layer_name=load.layer, student_layer_name=load.layer
    )


def _keras_logits(*_: Any):
    return keras.distillation.LogitsDistillation(
        temperature=1.0, loss=keras.losses.KLDivergence()
    )


_BOTH_RUN = (ALONE, FORWARD)

ROWS = {
    ALONE: Row(lambda load: load.train(load.student())),
    FORWARD: Row(lambda load: load.forward(load.teacher())),
    "ours: embedding": Row(
        _ours(lambda load: kde.EmbeddingDistillation()),
        bar=BAR,
        rival="Keras: embedding",
    ),
    "ours: embedding, 1,024 rows": Row(
        _ours(lambda load: kde.EmbeddingDistillation(num_rows=1_024)),
        bar=BAR,
    ),
    "ours: logits": Row(
        _ours(lambda load: kde.LogitsDistillation()),
        against=_BOTH_RUN,
        bar=BAR,
        rival="Keras: logits",
    ),
    "ours: logits, cached": Row(_cached),
    "ours: both": Row(
        _ours(
            lambda load: kde.EmbeddingDistillation(),
            lambda load: kde.LogitsDistillation(),
        ),
        against=_BOTH_RUN,
    ),
    "ours: features": Row(
        _ours(_features), against=_BOTH_RUN, rival="Keras: features"
    ),
    "Keras: embedding": Row(
        _keras(
            lambda load, *models: _WithModels(
                kde.EmbeddingDistillation(), *models
            )
        ),
    ),
    "Keras: logits": Row(_keras(_keras_logits), against=_BOTH_RUN),
    "Keras: features": Row(_keras(_features), against=_BOTH_RUN),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--no-memory", dest="memory", action="store_false")
    add("--rounds", type=int, default=15, help="turns of each row")
    add("--steps", type=int, default=5, help="steps of each turn")


def run(rows: Rows, options: argparse.Namespace) -> None:
    """Measures memory and times of every row of the chosen models."""
    if keras.config.backend() != "tensorflow":
        raise RuntimeError(
            "This figure needs the TensorFlow backend. "
            f"Received: KERAS_BACKEND={keras.config.backend()}"
        )
    tf.get_logger().setLevel("ERROR")  # many models are many tracings
    # In the order of the tables; everything is compared with the first.
    names = [row for row in ROWS if row == ALONE or row in options.rows]
    for model in options.models:
        for name in names if options.memory else ():
            arguments = model, name, options.quick, options.steps
            rows.finish(
                f"memory {model} {name}",
                partial(in_new_process, measure_memory, *arguments),
            )
        rows.finish(
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
        "rounds": time_in_turns(
            steps, options.rounds, options.steps, _wait, SEED
        ),
    }


def _wait(outputs: Any) -> None:
    for output in keras.tree.flatten(outputs):
        float(tf.reshape(output, [-1])[0])


def measure_memory(
    model: str, name: str, quick: bool, count: int
) -> dict[str, Any]:
    """Megabytes of this process, which is to measure nothing else.

    Returns:
        `"import_mb"`, the peak before any model; `"peak_mb"`, the peak of the
        whole process, XLA's compiler included; and `"steps_mb"`, the peak of
        the steps once compiled (`None` where Linux does not tell).
    """
    imported = peak_mb()
    step = ROWS[name].prepare(MODELS[model](quick))
    _wait(step())
    peak = peak_mb()
    reset = reset_peak()
    for _ in range(count):
        _wait(step())
    last = peak_mb()
    return {
        "model": model,
        "name": name,
        "import_mb": imported,
        "peak_mb": max(peak, last),
        "steps_mb": last if reset else None,
    }


# The report


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.percentile(values, [25, 50, 75]))

    def formatted(self, form: str) -> str:
        low, median, high = map(form.format, (self.low, self.median, self.high))
        return f"{median} ({low} to {high})"


def ratio(
    times: dict[str, Times],
    row: str,
    others: Sequence[str],
    clock: str = "wall_ms",
) -> Spread:
    """A row's time over that of others added up, paired by round."""
    own = np.array(times[row][clock])
    base = sum(np.array(times[other][clock]) for other in others)
    return Spread.of(own / base)


def collect(rows: Rows, earlier: dict, options: argparse.Namespace) -> dict:
    """Returns the rounds and the memory of each model."""
    del options
    models = dict(earlier.get("models", {}))
    done = rows.read_all()
    for row in done:
        if "rounds" in row:
            models[row["model"]] = {
                "description": row["description"],
                "rounds": row["rounds"],
                "environment": row["environment"],
                "memory": {
                    m["name"]: {
                        k: m[k] for k in ("import_mb", "peak_mb", "steps_mb")
                    }
                    for m in done
                    if "peak_mb" in m and m["model"] == row["model"]
                },
            }
    return {**earlier, "models": models} if models else {}


def report(results: dict, folder: Path) -> Iterator[str]:
    """Writes the tables, and what one needs to know to read them."""
    yield (
        "`÷` is the median over the rounds of the ratio within one round. "
        "`student alone` is `student.fit` without a distiller; `teacher "
        "forward` computes the teacher's logits and nothing else; where a "
        "loss reads the teacher's outputs, what must run is the two together "
        "(of features, XLA leaves out the layers after them). Both "
        "distillers have a task loss of weight 0.5; the embedding loss in "
        "Keras's is our own, wrapped. A claim holds `within the noise` where "
        "the median exceeds the bar and the lower quartile does not. Keras's "
        "distiller ignores sample weights, which ours applies."
    )
    models = results["models"]
    for name, model in models.items():
        yield f"## {name}"
        yield model["description"]
        yield markdown_table([*_time_cells(model["rounds"])])
        claims = [*_claims(model["rounds"])]
        if claims:
            yield markdown_table(claims)
        if model["memory"]:
            yield from _memory_section(model["memory"])
    _plot({n: model["rounds"] for n, model in models.items()}, folder)
    yield "![Ratios](steps.png)"


def _time_cells(times: dict[str, Times]) -> Iterator[dict]:
    for row, own in times.items():
        against = ROWS[row].against
        least = ""
        if set(against) <= set(times):
            least = f"{ratio(times, row, against).median:.2f}"
        cpu = ratio(times, row, [ALONE], "cpu_ms").median
        yield {
            "step": row,
            "ms (quartiles)": Spread.of(own["wall_ms"]).formatted("{:.1f}"),
            "CPU ms": f"{statistics.median(own['cpu_ms']):.1f}",
            "÷ student alone (quartiles)": ratio(times, row, [ALONE]).formatted(
                "{:.2f}"
            ),
            "CPU ÷ student alone": f"{cpu:.2f}",
            "÷ what must run": least,
        }


def _claims(times: dict[str, Times]) -> Iterator[dict]:
    for name, row in ROWS.items():
        bars = []
        if row.bar is not None:
            bars.append((row.against, row.bar))
        if row.rival is not None:
            bars.append(([row.rival], 1.0))
        for others, bar in bars:
            if not {name, *others} <= set(times):
                continue
            wall = ratio(times, name, others)
            verdict = "yes" if wall.median <= bar else "no"
            if verdict == "no" and wall.low <= bar:
                verdict = "within the noise"
            cpu = ratio(times, name, others, "cpu_ms").median
            yield {
                "claim": f"{name} ≤ {bar:.2f} x ({' + '.join(others)})",
                "wall (quartiles)": wall.formatted("{:.2f}"),
                "CPU": f"{cpu:.2f}",
                "holds": verdict,
            }


def _memory_section(memory: dict[str, dict]) -> Iterator[str]:
    def cells(row: str) -> dict:
        found = {"step": row}
        for key, title in (
            ("peak_mb", "peak MB"),
            ("steps_mb", "peak MB once compiled"),
        ):
            own, alone = memory[row][key], memory[ALONE][key]
            known = own is not None and alone is not None
            found[title] = f"{own:,.0f}" if known else ""
            found[f"{title} - student alone"] = (
                f"{own - alone:+,.0f}" if known else ""
            )
        return found

    imported = statistics.median(row["import_mb"] for row in memory.values())
    yield markdown_table([*map(cells, memory)])
    yield (
        f"Resident megabytes of a process of its own, of which {imported:,.0f} "
        "are the imports. The first peak includes XLA's compiler; the second "
        "is that of the steps after it, what the compiler could give back "
        "given back."
    )


def _plot(models: dict[str, dict[str, Times]], folder: Path) -> None:
    """Draws each row's time over the student's alone."""
    figure = Figure(figsize=(5.5 * len(models) + 2, 4.5), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    colors = {"ours": "C0", "Keras": "C1"}
    for axes, (name, times) in zip(panels, models.items()):
        for y, row in enumerate(times):
            spread = ratio(times, row, [ALONE])
            color = colors.get(row.split(":")[0], "0.6")
            axes.barh(y, spread.median, color=color, alpha=0.8)
            axes.plot([spread.low, spread.high], [y, y], color="0.2")
            bar, against = ROWS[row].bar, ROWS[row].against
            if bar is None or not set(against) <= set(times):
                continue
            limit = bar / ratio(times, ALONE, against).median
            (line,) = axes.plot([limit] * 2, [y - 0.4, y + 0.4], "r", lw=2)
            line.set_label(f"{bar:.2f} x what must run")
        axes.set_yticks(range(len(times)), list(times))
        axes.axvline(1.0, color="0.4", lw=0.8, ls=":")
        axes.set(xlabel="time of a step ÷ student alone", title=name)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
        # One entry for all bars of one kind.
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles))
        if once:
            axes.legend(once.values(), once.keys(), loc="upper right")
    panels[0].invert_yaxis()
    save(figure, folder / "steps.png")
