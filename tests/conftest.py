"""Settings of the test session."""

import gc
import itertools
import os
import random
import warnings

from tests.jax_settings import JAX_SETTINGS

# Tests run side by side: threads of NumPy and scikit-learn wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before TensorFlow and JAX are imported.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ["KERAS_BACKEND"] == "jax":
    for name, value in JAX_SETTINGS.items():
        os.environ.setdefault(name, value)
# Programs run a few times: to compile them fast is to run them fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)

import keras
import numpy as np
import pytest
from tensorflow.python.eager import context

from tests.shared import made_once


def _set_tensorflow_seed(self, seed):
    """As TensorFlow does, but keeps its compiled kernels.

    It clears them to restart random kernels, which Keras does not use, and
    compiling all others again takes a fifth of the time of the tests.
    """
    self._seed, self._rng = seed, random.Random(seed)


pytest.MonkeyPatch().setattr(
    context.Context, "_set_global_seed", _set_tensorflow_seed
)


def _look_for_no_garbage_in_what_is_here():
    """What is there by now stays: no use in looking for garbage in it.

    Exports and TensorFlow's converter do so several times a file, and took
    most of the time of the tests once a process held a few gigabytes.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    _look_for_no_garbage_in_what_is_here()


def pytest_runtest_logfinish():
    if keras.backend.backend() == "tensorflow":
        _look_for_no_garbage_in_what_is_here()


# What a call of this package must leave alone, in a whole process.
_GLOBAL_SETTINGS = {
    "backend": keras.config.backend,
    "dtype policy": lambda: keras.config.dtype_policy().name,
    "epsilon": keras.config.epsilon,
    "floatx": keras.config.floatx,
    "image data format": keras.config.image_data_format,
    "traceback filtering": keras.config.is_traceback_filtering_enabled,
    "interactive logging": keras.config.is_interactive_logging_enabled,
    "unsafe deserialization": lambda: (
        keras.src.saving.serialization_lib.in_safe_mode()
    ),
    "adding of weights": lambda: keras.layers.Layer.add_weight,
    "NumPy's errors": np.geterr,
}


def _global_state():
    return {name: read() for name, read in _GLOBAL_SETTINGS.items()}


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The folder of a run of the main job, for whoever does not change it."""
    from examples.nmt import __main__ as main_job

    def make(folder):
        arguments = ["--quick", "--work-dir", str(folder)]
        with warnings.catch_warnings():
            # TensorFlow's converter, when it reads a SavedModel.
            warnings.filterwarnings("ignore", ".*tf.lite.Interpreter")
            assert main_job.main(arguments) == 0

    return made_once(tmp_path_factory, "quick_run", make)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed, whatever ran before it."""
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def unchanged_global_state():
    """No call changes Keras for the rest of the process."""
    before = _global_state()
    classes = set(keras.saving.get_custom_objects())
    yield
    assert _global_state() == before
    # Classes that a test registers itself are its own business.
    added = set(keras.saving.get_custom_objects()) - classes
    assert not [name for name in added if name.startswith("keras_distilled")]


@pytest.fixture
def interrupted(monkeypatch):
    """Presses Ctrl-C after some steps of the runner."""
    import keras_distilled_embedding_runner as runner

    step, calls = runner._State.step, itertools.count()

    def interrupt(after):
        def counted(*arguments):
            if next(calls) >= after:
                raise KeyboardInterrupt
            return step(*arguments)

        monkeypatch.setattr(runner._State, "step", counted)

    return interrupt
