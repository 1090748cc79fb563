"""What a distillation step costs: its time, and the memory at its peak.

Every row is one training step, compiled by XLA, of the same student on the
same batch: trained alone, by our `Distiller` with each loss, and by Keras's
own distiller with the nearest equivalent. The rows take turns in one process,
so that whatever else the machine does falls on all of them, and are compared
with each other round by round. Each row's memory is measured in a process of
its own.

    python -m benchmarks.distillation
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress
from rich.progress import TimeElapsedColumn

import keras_distilled_embedding as kde
from benchmarks._memory import peak_mb
from benchmarks._memory import reset_peak
from benchmarks._report import environment
from benchmarks._report import write_bytes
from benchmarks._report import write_text
from examples.nmt.evaluate import markdown_table
from examples.nmt.model import build_transformer
from examples.nmt.train import LabelSmoothedCrossentropy

SEED = 0
COMPRESSION = 8.0
BAR = 1.10
OUTPUT = Path(__file__).parent / "results" / "distillation_steps"

# One call is one step; what it returns is ready when it can be read.
Step = Callable[[], Any]


# What is trained.


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
        return kde.compress(self.teacher(), COMPRESSION, verbose=0)

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


# What is measured.

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


def measure_times(
    steps: dict[str, Step],
    rounds: int,
    count: int,
    done: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds a step, of the wall clock and of the processor.

    Args:
        steps: The rows, compiled.
        rounds: How often each row has its turn; their order is drawn anew.
        count: Steps of one turn, after one that is not counted.
        done: Is called after each round.
    """
    times = {row: {"wall_ms": [], "cpu_ms": []} for row in steps}
    order = list(steps)
    shuffle = random.Random(SEED).shuffle
    for index in range(rounds):
        shuffle(order)
        for row in order:
            step = steps[row]
            _wait(step())
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                outputs = step()
            _wait(outputs)
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            times[row]["wall_ms"].append(1_000 * wall / count)
            times[row]["cpu_ms"].append(1_000 * cpu / count)
        done(f"round {index + 1} of {rounds}")
    return times


def _wait(outputs: Any) -> None:
    for output in keras.tree.flatten(outputs):
        float(tf.reshape(output, [-1])[0])


def measure_memory(
    model: str, row: str, quick: bool, threads: int | None, count: int
) -> dict[str, float]:
    """Megabytes of this process, which is to measure nothing else.

    Returns:
        `"import_mb"`, the peak before any model; `"peak_mb"`, the peak of the
        whole process, XLA's compiler included; and `"steps_mb"`, the peak of
        the steps once compiled (not a number where Linux does not tell).
    """
    _set_threads(threads)
    imported = peak_mb()
    step = ROWS[row].prepare(MODELS[model](quick))
    _wait(step())
    peak = peak_mb()
    reset = reset_peak()
    for _ in range(count):
        _wait(step())
    last = peak_mb()
    return {
        "import_mb": imported,
        "peak_mb": max(peak, last),
        "steps_mb": last if reset else float("nan"),
    }


def _set_threads(threads: int | None) -> None:
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)


# What is reported.


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and their quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.percentile(values, [25, 50, 75]))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Measurements:
    """The rounds of one model.

    Args:
        times: As `measure_times` returns them.
        memory: What `measure_memory` returned, by row.
    """

    def __init__(
        self,
        times: dict[str, dict[str, list[float]]],
        memory: dict[str, dict[str, float]],
    ) -> None:
        self.times = times
        self.memory = memory

    def ratio(
        self, row: str, others: Sequence[str], clock: str = "wall_ms"
    ) -> Spread:
        """A row's time over that of others added up, paired by round."""
        own = np.array(self.times[row][clock])
        base = sum(np.array(self.times[other][clock]) for other in others)
        return Spread.of(own / base)

    def time_table(self) -> list[list[str]]:
        table = [
            [
                "step",
                "ms (quartiles)",
                "CPU ms",
                "÷ student alone (quartiles)",
                "CPU ÷ student alone",
                "÷ what must run",
            ]
        ]
        for row, times in self.times.items():
            wall = Spread.of(times["wall_ms"])
            cpu = self.ratio(row, [ALONE], "cpu_ms").median
            against, least = ROWS[row].against, ""
            if set(against) <= set(self.times):
                least = f"{self.ratio(row, against).median:.2f}"
            table.append(
                [
                    row,
                    f"{wall.median:.1f} ({wall.low:.1f} to {wall.high:.1f})",
                    f"{statistics.median(times['cpu_ms']):.1f}",
                    str(self.ratio(row, [ALONE])),
                    f"{cpu:.2f}",
                    least,
                ]
            )
        return table

    def claims_table(self) -> list[list[str]]:
        table = [["claim", "wall (quartiles)", "CPU", "holds"]]
        for name, row in ROWS.items():
            claims = []
            if row.bar is not None:
                claims.append((row.against, row.bar))
            if row.rival is not None:
                claims.append(([row.rival], 1.0))
            for others, bar in claims:
                if {name, *others} <= set(self.times):
                    table.append(self._claim(name, others, bar))
        return table

    def _claim(self, row: str, others: Sequence[str], bar: float) -> list[str]:
        wall = self.ratio(row, others)
        verdict = "yes" if wall.median <= bar else "no"
        if verdict == "no" and wall.low <= bar:
            verdict = "within the noise"
        return [
            f"{row} ≤ {bar:.2f} x ({' + '.join(others)})",
            str(wall),
            f"{self.ratio(row, others, 'cpu_ms').median:.2f}",
            verdict,
        ]

    def memory_table(self) -> list[list[str]]:
        table = [
            [
                "step",
                "peak MB",
                "- student alone",
                "peak MB once compiled",
                "- student alone",
            ]
        ]
        plain = self.memory[ALONE]
        for row, memory in self.memory.items():
            cells = [row]
            for key in ("peak_mb", "steps_mb"):
                cells.append(f"{memory[key]:,.0f}")
                cells.append(f"{memory[key] - plain[key]:+,.0f}")
            table.append(cells)
        return table

    def imported_mb(self) -> float:
        """What importing TensorFlow, Keras and KerasHub takes by itself."""
        return statistics.median(
            memory["import_mb"] for memory in self.memory.values()
        )


def report(
    results: dict[str, Measurements],
    workloads: dict[str, Workload],
    header: Sequence[str],
) -> str:
    """The tables, and what one needs to know to read them."""
    parts = [
        "# Time and memory of a distillation step",
        *header,
        "`÷` is the median over the rounds of the ratio within one round. "
        "`student alone` is `student.fit` without a distiller; `teacher "
        "forward` computes the teacher's logits and nothing else; where a "
        "loss reads the teacher's outputs, what must run is the two together "
        "(of features, XLA leaves out the layers after them). Both "
        "distillers have a task loss of weight 0.5; the embedding loss in "
        "Keras's is our own, wrapped. A claim holds `within the noise` where "
        "the median exceeds the bar and the lower quartile does not. Keras's "
        "distiller ignores sample weights, which ours applies.",
    ]
    for name, result in results.items():
        parts += [
            f"## {name}",
            workloads[name].description,
            markdown_table(result.time_table()),
            markdown_table(result.claims_table()),
        ]
        if not result.memory:
            continue
        parts += [
            markdown_table(result.memory_table()),
            f"Resident megabytes of a process of its own, of which "
            f"{result.imported_mb():,.0f} are the imports. The first peak "
            "includes XLA's compiler; the second is that of the steps after "
            "it, what the compiler could give back given back.",
        ]
    parts.append("![Ratios](steps.png)")
    return "\n\n".join(parts) + "\n"


def draw(results: dict[str, Measurements]) -> bytes:
    """Each row's time over the student's alone, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results) + 2, 4.5), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    colors = {"ours": "C0", "Keras": "C1"}
    for axes, (name, result) in zip(panels, results.items()):
        for y, row in enumerate(result.times):
            ratio = result.ratio(row, [ALONE])
            color = colors.get(row.split(":")[0], "0.6")
            axes.barh(y, ratio.median, color=color, alpha=0.8)
            axes.plot([ratio.low, ratio.high], [y, y], color="0.2")
            bar, against = ROWS[row].bar, ROWS[row].against
            if bar is None or not set(against) <= set(result.times):
                continue
            limit = bar / result.ratio(ALONE, against).median
            (line,) = axes.plot([limit] * 2, [y - 0.4, y + 0.4], "r", lw=2)
            line.set_label(f"{bar:.2f} x what must run")
        axes.set_yticks(range(len(result.times)), list(result.times))
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
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return file.getvalue()


# The command.


def run(
    model: str,
    options: argparse.Namespace,
    done: Callable[[str], None],
) -> tuple[Workload, Measurements]:
    """Measures every row of one model."""
    # New processes, not forks: TensorFlow's threads do not survive one.
    context = multiprocessing.get_context("spawn")
    memory = {}
    with ProcessPoolExecutor(
        1, mp_context=context, max_tasks_per_child=1
    ) as pool:
        for row in options.rows if options.memory else ():
            arguments = (model, row, options.quick, options.threads)
            future = pool.submit(measure_memory, *arguments, options.steps)
            memory[row] = future.result()
            done(f"{model}: memory of {row}")
    workload = MODELS[model](options.quick)
    steps = {}
    for name in options.rows:
        steps[name] = ROWS[name].prepare(workload)
        _wait(steps[name]())
        done(f"{model}: compiled {name}")
    times = measure_times(
        steps,
        options.rounds,
        options.steps,
        lambda text: done(f"{model}: {text}"),
    )
    return workload, Measurements(times, memory)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation")
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    add("--no-memory", dest="memory", action="store_false")
    add("--rounds", type=int, default=15, help="turns of each row")
    add("--steps", type=int, default=5, help="steps of each turn")
    add("--output", type=Path, default=OUTPUT, help="folder of the report")
    add("--quick", action="store_true", help="tiny models, to try it out")
    add("--threads", type=int, help="of TensorFlow; default: all cores")
    if arguments is None:
        arguments = sys.argv[1:]
    options = parser.parse_args(arguments)
    if keras.config.backend() != "tensorflow":
        parser.error("the benchmark needs KERAS_BACKEND=tensorflow")
    # In the order of the tables; everything is compared with the first.
    options.rows = [row for row in ROWS if row == ALONE or row in options.rows]
    _set_threads(options.threads)
    tf.get_logger().setLevel("ERROR")  # many models are many tracings
    load = [os.getloadavg()[0]]
    start = time.perf_counter()
    workloads, results = {}, {}
    console = Console()
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, disable=not console.is_terminal
    ) as progress:
        work = (1 + options.memory) * len(options.rows) + options.rounds
        task = progress.add_task("", total=len(options.models) * work)

        def done(text: str) -> None:
            progress.update(task, advance=1, description=text)
            if not console.is_terminal:
                print(text, flush=True)

        for model in options.models:
            workloads[model], results[model] = run(model, options, done)
    load.append(os.getloadavg()[0])
    command = ["python", "-m", "benchmarks.distillation", *arguments]
    header = [
        f"    {shlex.join(command)}",
        f"{options.rounds} rounds of {options.steps} steps a row, seed {SEED}, "
        f"{time.perf_counter() - start:.0f} seconds in all. {environment()}; "
        f"load average {load[0]:.1f} at the start, {load[1]:.1f} at the end "
        "(this run's own part included).",
    ]
    record = {
        "command": header[0].strip(),
        "environment": environment(),
        "load_average": load,
        "seed": SEED,
        "models": {
            name: {
                "description": workloads[name].description,
                "rounds": result.times,
                "memory": result.memory,
            }
            for name, result in results.items()
        },
    }
    text = report(results, workloads, header)
    write_bytes(options.output / "steps.png", draw(results))
    write_text(
        options.output / "results.json", json.dumps(record, indent=1) + "\n"
    )
    write_text(options.output / "report.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
