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
from keras_distilled_embedding.factorization import learned
from tests.jax_settings import JAX_SETTINGS
from tests.shared import random_ids
from tests.shared import tied_model
from tests.shared import to_numpy

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


def load_and_save(folder: Path) -> None:
    """What the other backend does with the files in a folder."""
    for form in FORMS:
        model = kde.load_model(folder / f"{form}.keras")
        np.save(folder / f"{form}.npy", to_numpy(model(IDS)))
        kde.save_model(model, folder / f"{form}_back.keras")


@pytest.mark.slow
@pytest.mark.parametrize("other", BACKENDS)
def test_there_and_back(other, tmp_path, monkeypatch):
    """One process for all forms: to start one takes the most time."""
    if other == keras.backend.backend():
        pytest.skip("is the backend that the file comes from")
    monkeypatch.setattr(learned, "EPOCHS", 2)  # as good as any other numbers
    expected = {}
    for form, options in FORMS.items():
        student = kde.compress(tied_model(60, 12), rank=4, verbose=0, **options)
        student.compile("adam", "sparse_categorical_crossentropy")
        student.fit(IDS, IDS, verbose=0)
        kde.save_model(student, tmp_path / f"{form}.keras")
        expected[form] = to_numpy(student(IDS))
    settings = JAX_SETTINGS if other == "jax" else {"KERAS_BACKEND": other}
    subprocess.run(
        [sys.executable, "-m", "tests.test_backends", str(tmp_path)],
        env=os.environ | settings,
        check=True,
    )
    for form, outputs in expected.items():
        back = kde.load_model(tmp_path / f"{form}_back.keras")
        for found in (
            np.load(tmp_path / f"{form}.npy"),
            to_numpy(back(IDS)),
        ):
            np.testing.assert_allclose(
                found, outputs, rtol=1e-5, atol=1e-6, err_msg=form
            )


if __name__ == "__main__":
    load_and_save(Path(sys.argv[1]))
