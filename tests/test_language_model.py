"""What few bits cost a language model, untrained and trained as stored.

A small one with a tied table, trained here on Python's own manual.
"""

import collections
import re
from pydoc_data.topics import topics

import keras
import numpy as np
import pytest

from keras_distilled_embedding import Distiller
from keras_distilled_embedding import LogitsDistillation
from keras_distilled_embedding import compress
from keras_distilled_embedding import export_litert

pytest.importorskip("tensorflow")
pytestmark = pytest.mark.slow

WORDS, WIDTH, LENGTH, BATCH = 2_000, 96, 32, 32
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_data():
    """Windows of word ids: for training, and a tenth of them for the test."""
    text = " ".join(topics[name] for name in sorted(topics)).lower()
    words = re.findall(r"\w+|[^\w\s]", text)
    common = collections.Counter(words).most_common(WORDS - 1)
    ids = {word: i + 1 for i, (word, _) in enumerate(common)}
    numbers = np.array([ids.get(word, 0) for word in words], "int32")
    count = len(numbers) // (LENGTH + 1)
    windows = numbers[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)
    windows = windows[np.random.default_rng(0).permutation(count)]
    return windows[count // 10 :], windows[: count // 10]


def make_model():
    keras.utils.set_random_seed(0)
    tokens = keras.layers.ReversibleEmbedding(
        WORDS,
        WIDTH,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.1),
        name="tokens",
    )
    ids = keras.Input((LENGTH,), dtype="int32", name="ids")
    x = tokens(ids)
    attended = keras.layers.MultiHeadAttention(4, WIDTH // 4)(
        x, x, use_causal_mask=True
    )
    x = keras.layers.LayerNormalization()(x + attended)
    inner = keras.layers.Dense(4 * WIDTH, activation="gelu")(x)
    x = keras.layers.LayerNormalization()(x + keras.layers.Dense(WIDTH)(inner))
    return keras.Model(ids, tokens(x, reverse=True))


def fit(model, windows, rate, steps):
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), LOSS, jit_compile=True)
    epochs = -(-steps * BATCH // len(windows))
    windows = windows[: steps * BATCH // epochs]
    model.fit(
        windows[:, :-1],
        windows[:, 1:],
        batch_size=BATCH,
        epochs=epochs,
        verbose=0,
    )


@pytest.fixture(scope="module")
def trained():
    """The teacher, windows of text, and the teacher's perplexity."""
    train, test = make_data()
    teacher = make_model()
    fit(teacher, train, 3e-3, 380)
    return teacher, train, test, perplexity(teacher, test)


def perplexity(model, test):
    """Not by `evaluate`: to compile it takes longer than to run it once."""
    parts = np.array_split(test, 4)
    nats = [float(LOSS(ids[:, 1:], model(ids[:, :-1]))) for ids in parts]
    return np.exp(np.average(nats, weights=[*map(len, parts)]))


def compressed(trained, quantization, calibrated=True):
    teacher, train, _, _ = trained
    batches = [train[i : i + 32, :-1] for i in range(0, 256, 32)]
    return compress(
        teacher,
        rank=WIDTH,
        quantization=quantization,
        calibration_data=batches if calibrated else None,
        verbose=0,
    )


def test_few_bits_without_training(trained):
    """Few of the perplexity, and fewer where the hidden states are known."""
    full = trained[-1]
    assert full < 60  # it has learned
    for quantization, most in (("int8", 0.001), ("int4", 0.02), ("int2", 0.12)):
        with_data, without = (
            perplexity(compressed(trained, quantization, known), trained[2])
            for known in (True, False)
        )
        assert with_data < (1 + most) * full
        if quantization != "int8":
            assert with_data - full < 0.6 * (without - full)


def test_two_bits_after_200_steps_of_distillation(trained, tmp_path):
    teacher, train, test, full = trained
    student = compressed(trained, "int2")
    before = perplexity(student, test)
    distiller = Distiller(
        teacher, student, LogitsDistillation(), student_loss_weight=0.0
    )
    fit(distiller, train, 1e-3, 200)
    after = perplexity(student, test)
    assert after < 1.05 * full
    assert after - full < 0.75 * (before - full)
    # The file holds what was trained.
    report = export_litert(
        student, tmp_path / "model.tflite", batch_size=4, verbose=False
    )
    assert report.quantization == "int2"
    assert report.fidelity.relative_rms_error < 0.03
