"""Settings of the test session."""

import os

# Before TensorFlow is imported.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from one seed, whatever ran before it."""
    keras.utils.set_random_seed(0)
