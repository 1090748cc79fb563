"""One row: a student is made, fine-tuned, and translates the test."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np

import keras_distilled_embedding as kde
from benchmarks._report import environment
from benchmarks._report import write_text
from benchmarks.translation.grid import METHODS
from benchmarks.translation.grid import Row
from benchmarks.translation.grid import recipe
from benchmarks.translation.tables import GroupedTable
from benchmarks.translation.task import Task
from benchmarks.translation.task import translate
from examples.nmt.train import Recipe
from examples.nmt.train import distil
from examples.nmt.train import fit
from keras_distilled_embedding.layers import DistilledEmbedding

# Of the teacher's predictions, so many classes are told apart.
TOP_K = 64
# Of fine-tuning; the teacher's own seed is the task's.
STUDENT_SEED = 1


def train_teacher(task: Task) -> None:
    """Trains the task's teacher, and lets it predict the training text."""
    if not task.teacher_path.exists():
        keras.utils.set_random_seed(task.seed)
        teacher = task.build(task.setting.shape.dropout, seed=task.seed)
        fit(
            teacher,
            task.batches("train", task.seed),
            task.batches("validation"),
            task.setting.teacher,
            backup_dir=task.folder / f"teacher_{task.seed}_backup",
            jit_compile=task.setting.jit_compile,
            verbose=2,
        )
        part = task.folder / "part_teacher.keras"
        teacher.save(part)
        part.replace(task.teacher_path)
    kde.cache_teacher(
        task.teacher(),
        task.batches("train", _data_seed(task)),
        _cache_folder(task),
        top_k=TOP_K,
    )


def _cache_folder(task: Task) -> Path:
    """Of the training batches, with what the teacher predicts of them."""
    return task.folder / f"predictions_{task.seed}"


def _data_seed(task: Task) -> int:
    return 100 + task.seed


class Results:
    """The rows of one task and seed, a file for each.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.folder = task.folder / f"rows_{task.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, row: Row, suffix: str) -> Path:
        return self.folder / f"{row.slug}{suffix}"

    def done(self, row: Row) -> bool:
        return self.path(row, ".json").exists()

    def read(self, row: Row, suffix: str = ".json") -> dict:
        """What is known of a row; nothing yet is an empty dictionary."""
        path = self.path(row, suffix)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}

    def finish(self, row: Row) -> None:
        """Trains and evaluates a row, unless another process has or does."""
        with _claimed(self.path(row, ".lock")) as free:
            if free and not self.done(row):
                print(f"{row.name}, {row.size:g}x", flush=True)
                result = self._measure(row)
                text = json.dumps(result, indent=1) + "\n"
                write_text(self.path(row, ".json"), text)

    def _measure(self, row: Row) -> dict:
        task, schedule = self.task, recipe(row, self.task)
        wall, cpu = time.perf_counter(), time.process_time()
        keras.utils.set_random_seed(task.seed)
        student = METHODS[row.method](task, row.size)
        result = {
            "task": task.name,
            "row": row.name,
            "size": row.size,
            "seed": task.seed,
            "recipe": asdict(schedule),
            "teacher": task.fingerprint,
            "environment": f"{environment()}; Keras on "
            f"{keras.backend.backend()}",
        }
        if student is None:
            return result | {"skipped": "nothing of this kind is so small"}
        history = self._train(student, schedule)
        result |= {
            "validation_nll": history.history["val_nll"],
            "table": _describe(student),
            "wall_s": round(time.perf_counter() - wall, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
        }
        student.save_weights(self.path(row, ".weights.h5"))
        self._translate(row, student, "float32")
        if _takes_int8(student):
            table_of(student).quantization = "int8"
            self._translate(row, student, "int8")
        return result

    def _train(
        self, student: keras.Model, schedule: Recipe
    ) -> keras.callbacks.History:
        task = self.task
        arguments = dict(
            validation=task.batches("validation"),
            schedule=schedule,
            jit_compile=task.setting.jit_compile,
            verbose=2,
        )
        keras.utils.set_random_seed(task.seed + STUDENT_SEED)
        if schedule.student_loss_weight == 1.0:
            batches = task.batches("train", _data_seed(task))
            return fit(student, batches, **arguments)
        cache = kde.TeacherCache(_cache_folder(task), _data_seed(task))
        return distil(task.teacher(), student, cache, **arguments)

    def _translate(self, row: Row, student: keras.Model, storage: str) -> None:
        path = self.path(row, f".{storage}.npz")
        _translate_to(path, student, self.task)

    def translate_teacher(self) -> None:
        """The teacher as it is, as a row without training."""
        path = self.folder / "teacher.float32.npz"
        if not path.exists():
            _translate_to(path, self.task.teacher(), self.task)


def _translate_to(path: Path, model: keras.Model, task: Task) -> None:
    """Keeps the ids of the test's translations."""
    ids = translate(model, task, "test")
    lengths = np.array([*map(len, ids)])
    np.savez_compressed(path, ids=np.concatenate(ids), lengths=lengths)


def table_of(student: keras.Model) -> keras.layers.Layer:
    """The layer that this benchmark is about."""
    return student.get_layer("token_embedding")


def _takes_int8(student: keras.Model) -> bool:
    """Whether the factors can be rounded after training."""
    table = table_of(student)
    if isinstance(table, DistilledEmbedding):
        return table.hidden_dim is None and table.quantization is None
    return isinstance(table, GroupedTable)


def _describe(student: keras.Model) -> dict:
    """What the table takes."""
    table = table_of(student)
    parameters = sum(int(np.prod(w.shape)) for w in table.weights)
    described = {"parameters": parameters, "bytes": 4 * parameters}
    for name in ("rank", "hidden_dim", "rounding"):
        if getattr(table, name, None) is not None:
            described[name] = getattr(table, name)
    if hasattr(table, "num_bytes"):
        described["bytes"] = table.num_bytes
    if isinstance(table, GroupedTable):
        described["bytes_int8"] = table.num_bytes_int8
    return described


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the file's lock; lost when it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
