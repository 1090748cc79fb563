"""A training that is interrupted ends like one that is not."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation
from tests.jax_settings import JAX_SETTINGS

# Keras's own, whenever it copies a variable to NumPy, as saving does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't:DeprecationWarning"
)

# Killed after this batch of this epoch, counted from zero.
EPOCHS, BATCHES, KILLED_EPOCH, KILLED_BATCH = 4, 5, 2, 2

SCRIPT = f"""
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

killed_once, *folders = map(Path, sys.argv[1:])
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Otherwise the order of sums depends on the threads.
    tf.config.experimental.enable_op_determinism()

from keras_distilled_embedding import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation import LogitsDistillation


class Kill(keras.callbacks.Callback):
    epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == ({KILLED_EPOCH}, {KILLED_BATCH}):
            if not killed_once.exists():
                killed_once.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def train(folder):
    keras.backend.clear_session()  # the same names
    keras.utils.set_random_seed(7)
    teacher = keras.Sequential([
        keras.Input((6,), dtype="int32"),
        keras.layers.Embedding(31, 8, name="tokens"),
        keras.layers.Dropout(0.4),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(5),
    ])
    student = compress(teacher, rank=3, verbose=0)
    distiller = Distiller(
        teacher,
        student,
        [EmbeddingDistillation(num_rows=5), LogitsDistillation()],
    )
    learning_rate = keras.optimizers.schedules.PolynomialDecay(0.02, 40, 0.001)
    optimizer = keras.optimizers.Adam(learning_rate)
    distiller.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )

    def set_weight(epoch, logs=None):
        distiller.student_loss_weight = 0.9 - 0.2 * epoch

    rng = np.random.default_rng(3)
    size = 4 * {BATCHES}
    history = distiller.fit(
        rng.integers(31, size=(size, 6)).astype("int32"),
        rng.integers(5, size=size),
        batch_size=4,
        epochs={EPOCHS},
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.BackupAndRestore(
                folder / "backup", save_freq="epoch"
            ),
            keras.callbacks.ModelCheckpoint(
                folder / "best.weights.h5",
                monitor="loss",
                save_best_only=True,
                save_weights_only=True,
            ),
            keras.callbacks.ModelCheckpoint(folder / "last.keras"),
            keras.callbacks.LambdaCallback(on_epoch_begin=set_weight),
            Kill(),
        ],
    ).history
    to_numpy = keras.ops.convert_to_numpy
    np.savez(
        folder / "end.npz",
        **{{f"student {{v.path}}": to_numpy(v) for v in student.variables}},
        **{{f"optimizer {{v.path}}": to_numpy(v) for v in optimizer.variables}},
        **{{f"last {{name}}": values[-1] for name, values in history.items()}},
        epochs=len(history["loss"]),
    )


for folder in folders:
    train(folder)
"""


def run_script(script, flag, folders, backend):
    for folder in folders:
        folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, (script, flag, *folders))],
        env=os.environ
        | (JAX_SETTINGS if backend == "jax" else {})
        | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="starts the backends itself, from the tests on TensorFlow",
)
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_killed_training_ends_as_one_that_was_not(tmp_path, backend):
    """Bit for bit: weights, moments, and the states of all random draws."""
    pytest.importorskip(backend)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    flag = tmp_path / "killed_once"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    first = run_script(script, flag, [killed], backend)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert flag.exists()
    assert not (killed / "end.npz").exists()
    # One process for both: to start one takes the most time.
    done = run_script(script, flag, [killed, whole], backend)
    assert done.returncode == 0, done.stderr
    actual, expected = (
        dict(np.load(folder / "end.npz")) for folder in (killed, whole)
    )
    # It went on from the last epoch's end, not from the start.
    assert actual.pop("epochs") == EPOCHS - KILLED_EPOCH
    assert expected.pop("epochs") == EPOCHS
    assert actual.keys() == expected.keys()
    assert any("seed_generator" in name for name in expected)
    assert expected["optimizer adam/iteration"] == EPOCHS * BATCHES
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


# In this process


def make_distiller(**options):
    """With random draws of every kind."""
    teacher = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(31, 8, name="tokens"),
            keras.layers.Dropout(0.4, seed=1),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(5),
        ]
    )
    rng = np.random.default_rng(1)
    for variable in teacher.weights:
        variable.assign(rng.normal(size=variable.shape, scale=0.7))
    distiller = Distiller(
        teacher,
        compress(teacher, rank=3, verbose=0),
        [EmbeddingDistillation(num_rows=5, **options), LogitsDistillation(2.0)],
    )
    learning_rate = keras.optimizers.schedules.ExponentialDecay(0.02, 5, 0.8)
    distiller.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return distiller


def make_data():
    rng = np.random.default_rng(3)
    ids = rng.integers(31, size=(20, 6)).astype("int32")
    return ids, rng.integers(5, size=20)


def fit(distiller, epochs=2, **options):
    return distiller.fit(
        *make_data(),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        **options,
    ).history


def evaluate(distiller):
    return distiller.evaluate(
        *make_data(), batch_size=20, verbose=0, return_dict=True
    )


def task_of(logs):
    """Of the logs, those that draw no rows."""
    return {k: logs[k] for k in ("task_loss", "logits_distillation_loss")}


def state_of(distiller):
    """Everything that a step of training may depend on, by what holds it."""
    variables = [
        *distiller.student.variables,
        *distiller.optimizer.variables,
        distiller.distillation_losses[0].seed_generator.state,
    ]
    return [ops.convert_to_numpy(variable).copy() for variable in variables]


def assert_same_training(a, b):
    """Both go on alike, dropout and drawn rows included."""
    histories = fit(a), fit(b)
    # Another draw would change these by a tenth and more.
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, rel=1e-5), name
    for x, y in zip(state_of(a), state_of(b)):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_saved_distiller_trains_on_as_if_never_saved(tmp_path):
    distiller = make_distiller(
        seed=9, row_weights=np.linspace(0, 2, 31).tolist()
    )
    fit(distiller)
    distiller.student_loss_weight = 0.2
    distiller.distillation_loss_weights = [0.5, 1.5]
    path = tmp_path / "distiller.keras"
    distiller.save(path)
    restored = keras.saving.load_model(path)
    assert restored.student_loss_weight == 0.2
    assert restored.distillation_loss_weights == [0.5, 1.5]
    for x, y in zip(state_of(distiller), state_of(restored)):
        np.testing.assert_array_equal(x, y)
    assert_same_training(distiller, restored)


def test_saved_weights_train_on_as_if_never_saved(tmp_path):
    distiller = make_distiller()
    fit(distiller)
    path = tmp_path / "distiller.weights.h5"
    distiller.save_weights(path)
    restored = make_distiller()
    restored.optimizer.build(restored.trainable_variables)
    restored.load_weights(path)
    for x, y in zip(state_of(distiller), state_of(restored)):
        np.testing.assert_array_equal(x, y)
    assert_same_training(distiller, restored)


def test_without_the_random_states_training_would_differ(tmp_path):
    """What the two tests above would not notice if it were small."""
    losses = []
    for moved in (False, True):
        distiller = make_distiller()
        if moved:
            distiller.distillation_losses[0].seed_generator.next()
        losses.append(fit(distiller, 1)["embedding_distillation_loss"][0])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("save_best_only", [False, True])
@pytest.mark.parametrize("save_weights_only", [False, True])
def test_checkpoints_load(tmp_path, save_weights_only, save_best_only):
    """The best, by validation, or the last; the weights, or all of it."""
    distiller = make_distiller()
    name = "model.weights.h5" if save_weights_only else "model.keras"
    path = tmp_path / name
    checkpoint = keras.callbacks.ModelCheckpoint(
        path,
        # By the largest loss, so that the best epoch is not the last.
        monitor="val_task_loss",
        mode="max",
        save_best_only=save_best_only,
        save_weights_only=save_weights_only,
    )
    history = fit(
        distiller,
        4,
        validation_data=make_data(),
        callbacks=[checkpoint],
    )
    best = int(np.argmax(history["val_task_loss"]))
    assert best < 3
    if save_weights_only:
        restored = make_distiller()
        restored.optimizer.build(restored.trainable_variables)
        restored.load_weights(path)
    else:
        restored = keras.saving.load_model(path)
    epoch = best if save_best_only else 3
    expected = {
        name: history[f"val_{name}"][epoch]
        for name in ("task_loss", "logits_distillation_loss")
    }
    assert task_of(evaluate(restored)) == pytest.approx(expected, rel=1e-5)
    iterations = int(ops.convert_to_numpy(restored.optimizer.iterations))
    assert iterations == 5 * (epoch + 1)
    fit(restored, 1)


def test_a_backup_keeps_the_weights_that_a_callback_sets(tmp_path):
    """Also for a training that goes on without it."""
    distiller = make_distiller()
    backup = keras.callbacks.BackupAndRestore(
        tmp_path / "backup", delete_checkpoint=False
    )

    def set_weights(epoch, logs):
        distiller.student_loss_weight = 9 / 20
        distiller.distillation_loss_weights = [0.5, 2.0]

    setter = keras.callbacks.LambdaCallback(on_epoch_begin=set_weights)
    fit(distiller, callbacks=[backup, setter])
    assert distiller.student_loss_weight == 9 / 20
    resumed = make_distiller()
    history = fit(resumed, 3, callbacks=[backup])
    assert len(history["loss"]) == 1
    assert resumed.student_loss_weight == 9 / 20
    assert resumed.distillation_loss_weights == [0.5, 2.0]
    parts = (
        0.5 * history["embedding_distillation_loss"][0]
        + 2.0 * history["logits_distillation_loss"][0]
    )
    assert history["loss"][0] == pytest.approx(
        9 / 20 * history["task_loss"][0] + 11 / 20 * parts, rel=1e-5
    )
