"""Files are of no backend: what one saves, the other loads, and back."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
from tests.shared import random_ids
from tests.shared import tied_model

BACKENDS = [
    "jax",
    "tensorflow",
    pytest.param(
        "torch",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("torch") is None,
            reason="PyTorch is missing",
        ),
    ),
]
IDS = random_ids(60, (3, 5))


FORMS = {
    "relu": {},
    "published": {"use_bias": False, "method": "learned"},
    "int8": {"quantization": "int8"},
}


def load_and_save(source: Path, target: Path) -> None:
    """What the other backend does with a file."""
    model = kde.load_model(source)
    np.save(target.with_suffix(".npy"), model.predict(IDS, verbose=0))
    kde.save_model(model, target)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", BACKENDS)
def test_there_and_back(other, form, tmp_path):
    if other == keras.backend.backend():
        pytest.skip("is the backend that the file comes from")
    student = kde.compress(tied_model(60, 12), rank=4, verbose=0, **FORMS[form])
    student.compile("adam", "sparse_categorical_crossentropy")
    student.fit(IDS, IDS, verbose=0)
    there, back = tmp_path / "there.keras", tmp_path / "back.keras"
    kde.save_model(student, there)
    subprocess.run(
        [sys.executable, "-m", "tests.test_backends", str(there), str(back)],
        env=os.environ | {"KERAS_BACKEND": other},
        check=True,
    )
    expected = student.predict(IDS, verbose=0)
    there_outputs = np.load(back.with_suffix(".npy"))
    back_outputs = kde.load_model(back).predict(IDS, verbose=0)
    np.testing.assert_allclose(there_outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back_outputs, expected, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    load_and_save(*map(Path, sys.argv[1:]))
