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

ON_TORCH = keras.backend.backend() == "torch"
on_torch = pytest.mark.skipif(
    not ON_TORCH, reason="runs with KERAS_BACKEND=torch"
)
IDS = np.random.default_rng(0).integers(60, size=(3, 5))


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


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def language_model():
    keras.utils.set_random_seed(0)
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(60, 12, name="tokens")
    hidden = keras.layers.Dense(12, activation="gelu")(embedding(ids))
    return keras.Model(ids, embedding(hidden, reverse=True))


@on_torch
@pytest.mark.parametrize("hidden_dim", [None, 3])
def test_layer(hidden_dim):
    layer = DistilledEmbedding(
        60,
        12,
        rank=4,
        hidden_dim=hidden_dim,
        embeddings_initializer=keras.initializers.RandomNormal(seed=0),
    )
    layer.build()
    codes, basis = to_numpy(layer.codes), to_numpy(layer.basis)
    table = np.maximum(codes, 0) @ basis
    if hidden_dim:
        hidden = codes @ to_numpy(layer.hidden_kernel)
        hidden = hidden + to_numpy(layer.hidden_bias)
        function = layer.hidden_activation
        hidden = to_numpy(function(keras.ops.convert_to_tensor(hidden)))
        table = table + hidden @ to_numpy(layer.hidden_basis)
    np.testing.assert_allclose(to_numpy(layer(IDS)), table[IDS], atol=1e-6)
    states = np.random.default_rng(1).normal(size=(3, 12)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(layer(states, reverse=True)), states @ table.T, atol=1e-5
    )


@on_torch
@pytest.mark.parametrize(
    "options",
    [{}, {"activation": None}, {"method": "learned"}, {"hidden_dim": 3}],
    ids=["relu", "none", "learned", "funnel"],
)
def test_factorization_is_no_worse_than_its_bound(options):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 16)).astype("float32")
    values = np.linalg.svd(table, compute_uv=False)
    lost = np.sqrt((values[6:] ** 2).sum() / (values**2).sum())
    found = factorize(table, rank=6, verbose=0, **options)
    error = np.linalg.norm(found.reconstruct() - table) / np.linalg.norm(table)
    assert error < 1.1 * lost
    if "hidden_dim" not in options:
        assert error > 0.999 * lost


@on_torch
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_dim": 3}, {"quantization": "int8"}],
    ids=["relu", "funnel", "int8"],
)
def test_compression(options, tmp_path):
    teacher = language_model()
    student = kde.compress(teacher, rank=4, verbose=0, **options)
    dense = language_model()
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
