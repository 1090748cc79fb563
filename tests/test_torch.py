"""The layer, factorization and compression on Keras's torch backend.

    KERAS_BACKEND=torch python -m pytest tests/test_torch.py

checks them in this process, against NumPy; on another backend one test runs
that in a process of its own, where PyTorch is installed.
"""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.layers import DistilledEmbedding
from tests.shared import affine_optimum
from tests.shared import lost_share
from tests.shared import random_ids
from tests.shared import random_table
from tests.shared import tied_model
from tests.shared import to_numpy

ON_TORCH = keras.backend.backend() == "torch"
on_torch = pytest.mark.skipif(
    not ON_TORCH, reason="runs with KERAS_BACKEND=torch"
)
IDS = random_ids(60, (3, 5))


@pytest.mark.skipif(ON_TORCH, reason="is what runs the others")
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is missing"
)
@pytest.mark.slow
def test_on_torch():
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__],
        env=os.environ | {"KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout


@on_torch
@pytest.mark.parametrize("use_bias", [True, False])
def test_layer(use_bias):
    layer = DistilledEmbedding(60, 12, rank=4, use_bias=use_bias)
    layer.build()
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    codes, basis, *offset = map(to_numpy, layer.weights)
    table = np.maximum(codes, 0) @ basis + sum(offset)
    np.testing.assert_allclose(to_numpy(layer(IDS)), table[IDS], atol=1e-5)
    states = rng.normal(size=(3, 12)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(layer(states, reverse=True)), states @ table.T, atol=1e-4
    )


@on_torch
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": None}, {"method": "learned"}],
    ids=["relu", "none", "learned"],
)
def test_factorization_is_no_worse_than_its_bound(options):
    table = random_table(200, 16)
    best = affine_optimum(table, 6)
    found = factorize(table, rank=6, verbose=0, **options)
    error = lost_share(table, found.reconstruct())
    assert 0.999 * best < error < 1.2 * best


@on_torch
@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"quantization": "int8"}],
    ids=["relu", "no offset", "int8"],
)
def test_compression(options, tmp_path):
    teacher = tied_model(60, 12)
    student = kde.compress(teacher, rank=4, verbose=0, **options)
    dense = tied_model(60, 12)
    dense.set_weights(teacher.get_weights())
    layer = student.get_layer("tokens")
    rows = to_numpy(layer(np.arange(60)))
    dense.get_layer("tokens").embeddings.assign(rows)
    expected = to_numpy(dense(IDS))
    np.testing.assert_allclose(to_numpy(student(IDS)), expected, atol=1e-4)

    distiller = kde.Distiller(
        teacher,
        student,
        [kde.EmbeddingDistillation(), kde.LogitsDistillation()],
    )
    distiller.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # which would take a minute
    )
    losses = distiller.fit(IDS, IDS, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]

    kde.save_model(student, tmp_path / "model.keras")
    loaded = kde.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        to_numpy(loaded(IDS)), to_numpy(student(IDS)), atol=1e-6
    )
