"""Marian's translators in Keras, against NumPy."""

import struct

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde
from benchmarks.tasks import marian
from benchmarks.tasks import marian_file
from benchmarks.tasks.marian_layers import SSRU

WIDTH, HEADS, INNER, VOCABULARY = 16, 2, 24, 40
SETTINGS = """dim-emb: 16
enc-depth: 2
dec-depth: 2
transformer-heads: 2
transformer-dim-ffn: 24
"""
SOURCES = [[5, 9, 3, 17, 0], [8, 2, 0]]
TARGETS = [[4, 7, 0], [31, 6, 6, 12, 1, 0]]


def random_weights(seed=0):
    random = np.random.default_rng(seed)

    def block(name, matrices, norm):
        for letter, shape in matrices.items():
            kernel = random.normal(size=shape) / np.sqrt(shape[0])
            found[f"{name}_W{letter}"] = kernel
            if (name[-3:], letter) != ("rnn", ""):
                bias = random.normal(size=(1, shape[1]))
                found[f"{name}_b{letter}"] = 0.3 * bias
        found[f"{norm}_ln_scale"] = random.uniform(0.5, 1.5, (1, WIDTH))
        found[f"{norm}_ln_bias"] = 0.2 * random.normal(size=(1, WIDTH))

    square, found = (WIDTH, WIDTH), {}
    ffn = {"1": (WIDTH, INNER), "2": (INNER, WIDTH)}
    for i in (1, 2):
        for name in (f"encoder_l{i}_self", f"decoder_l{i}_context"):
            block(name, dict.fromkeys("qkvo", square), f"{name}_Wo")
        rnn = f"decoder_l{i}_rnn"
        block(rnn, {"": square, "f": square}, f"{rnn}_ffn")
        for name in (f"encoder_l{i}_ffn", f"decoder_l{i}_ffn"):
            block(name, ffn, f"{name}_ffn")
    found["Wemb"] = random.normal(size=(VOCABULARY, WIDTH)) / 4
    found["decoder_ff_logit_out_b"] = random.normal(size=(1, VOCABULARY))
    return {name: value.astype("float32") for name, value in found.items()}


def write_file(path, weights, settings=SETTINGS):
    """Writes matrices in 8 bits; returns the weights as they are stored."""
    tensors, stored = [], {}
    for name, value in weights.items():
        is_matrix = value.shape[0] > 1
        scale = np.float32(127 / np.abs(value).max())
        integers = np.round(value * scale).astype("int8")
        stored[name] = integers.astype("float32") / scale
        data = integers if name == "Wemb" else integers.T
        data = data.tobytes() + struct.pack("<f", scale)
        if not is_matrix:
            stored[name], data = value, value.tobytes()
        kind = marian_file.INTEGERS if is_matrix else marian_file.FLOAT32
        data += bytes(-len(data) % 256)
        tensors.append((name, kind, value.shape, data))
    one = np.ones(1, "<f4").tobytes()
    tensors.insert(1, ("Wemb_QuantMultA", marian_file.FLOAT32, (1, 1), one))
    data = settings.encode() + b"\0"
    tensors.append(("special:model.yml", 0x101, (len(data),), data))
    content = struct.pack("<2Q", 1, len(tensors))
    for name, kind, shape, data in tensors:
        sizes = len(name) + 1, kind, len(shape), len(data)
        content += struct.pack("<4Q", *sizes)
    content += b"".join(name.encode() + b"\0" for name, *_ in tensors)
    for _, _, shape, _ in tensors:
        content += struct.pack(f"<{len(shape)}i", *shape)
    gap = -(len(content) + 8) % 256
    content += struct.pack("<Q", gap) + bytes(gap)
    path.write_bytes(content + b"".join(data for *_, data in tensors))
    return stored


class Reference:
    """The same translator in NumPy, a sentence and a token at a time."""

    def __init__(self, weights):
        self.w = {k: v.astype("float64") for k, v in weights.items()}

    def linear(self, x, name, letter):
        bias = self.w.get(f"{name}_b{letter}", 0.0)
        return x @ self.w[f"{name}_W{letter}"] + bias

    def position(self, index):
        steps = np.arange(WIDTH // 2) / (WIDTH // 2 - 1)
        angles = index * 10_000.0**-steps
        return np.concatenate([np.sin(angles), np.cos(angles)])

    def embedded(self, token, index):
        return np.sqrt(WIDTH) * self.w["Wemb"][token] + self.position(index)

    def normalized(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return x * self.w[f"{name}_ln_scale"] + self.w[f"{name}_ln_bias"]

    def attended(self, x, memory, name):
        heads = []
        for columns in np.split(np.arange(WIDTH), HEADS):
            query, keys, values = (
                self.linear(y, name, letter)[:, columns]
                for y, letter in ((x, "q"), (memory, "k"), (memory, "v"))
            )
            odds = np.exp(query @ keys.T / np.sqrt(len(columns)))
            heads.append(odds / odds.sum(-1, keepdims=True) @ values)
        found = self.linear(np.concatenate(heads, -1), name, "o")
        return self.normalized(x + found, f"{name}_Wo")

    def fed_forward(self, x, name):
        y = self.linear(np.maximum(self.linear(x, name, "1"), 0), name, "2")
        return self.normalized(x + y, f"{name}_ffn")

    def logits(self, source, target):
        x = np.stack([self.embedded(t, i) for i, t in enumerate(source)])
        for i in (1, 2):
            x = self.attended(x, x, f"encoder_l{i}_self")
            x = self.fed_forward(x, f"encoder_l{i}_ffn")
        memory, cells, found = x, {1: 0.0, 2: 0.0}, []
        for index in range(len(target)):
            y = self.position(0)
            if index > 0:
                y = self.embedded(target[index - 1], index)
            y = y[None]
            for i in (1, 2):
                name = f"decoder_l{i}_rnn"
                f = 1 / (1 + np.exp(-self.linear(y, name, "f")))
                x = self.linear(y, name, "")
                cells[i] = f * cells[i] + (1 - f) * x
                y = y + np.maximum(cells[i], 0)
                y = self.normalized(y, f"{name}_ffn")
                y = self.attended(y, memory, f"decoder_l{i}_context")
                y = self.fed_forward(y, f"decoder_l{i}_ffn")
            found.append(y @ self.w["Wemb"].T)
        return np.concatenate(found) + self.w["decoder_ff_logit_out_b"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("marian") / "model.bin"
    return path, write_file(path, random_weights())


@pytest.fixture(scope="module")
def translator(stored):
    return marian.Translator.of_file(stored[0])


@pytest.fixture(scope="module")
def inputs():
    given = [[marian.EOS, *target[:-1]] for target in TARGETS]
    return {"source": marian.filled(SOURCES), "target": marian.filled(given)}


def test_a_file_is_read_as_it_was_written(stored):
    path, expected = stored
    settings, weights = marian_file.read_file(path)
    assert settings["transformer-dim-ffn"] == "24"
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=1e-6)


def test_logits_are_numpys(stored, translator, inputs):
    reference = Reference(stored[1])
    found = ops.convert_to_numpy(translator.model(inputs))
    for i, (source, target) in enumerate(zip(SOURCES, TARGETS)):
        expected = reference.logits(source, target)
        np.testing.assert_allclose(
            found[i, : len(target)], expected, atol=1e-4, rtol=1e-4
        )


def test_weights_that_are_missing_are_named(tmp_path):
    weights = random_weights()
    del weights["decoder_l2_rnn_W"]
    write_file(tmp_path / "model.bin", weights)
    with pytest.raises(ValueError, match="decoder_l2_rnn_W"):
        marian.Translator.of_file(tmp_path / "model.bin")


@pytest.mark.parametrize("length", [1, 5, None])
def test_the_recurrence_is_a_loop(length):
    random = np.random.default_rng(1)
    x, state = random.normal(size=(2, 5, 3)), random.normal(size=(2, 3))
    kept = random.uniform(size=(2, 5, 3))
    given = [keras.Input((length, 3)) for _ in range(2)] + [keras.Input((3,))]
    model = keras.Model(given, SSRU()(*given))
    end = length or 5
    found = model([x[:, :end], kept[:, :end], state])
    for t in range(end):
        state = kept[:, t] * state + (1 - kept[:, t]) * x[:, t]
        np.testing.assert_allclose(found[:, t], state, rtol=1e-5, atol=1e-6)


def steps(translator, inputs):
    """The logits of known targets, a token at a time."""
    parts = translator.signatures()
    seen = parts["encode"].predict_on_batch({"source": inputs["source"]})
    found, pasts = [], {f"past_{i}": np.zeros((2, WIDTH)) for i in (1, 2)}
    for t, token in enumerate(inputs["target"].T):
        where = {"token": token[:, None], "position": np.array([t], "int32")}
        pasts = dict(
            parts["decode"].predict_on_batch({**seen, **pasts, **where})
        )
        found.append(pasts.pop("logits"))
    return np.stack(found, axis=1)


def test_a_step_is_the_whole_pass(translator, inputs):
    whole = ops.convert_to_numpy(translator.model(inputs))
    np.testing.assert_allclose(steps(translator, inputs), whole, atol=1e-4)


def test_a_compressed_copy_reads_and_searches(translator, inputs):
    student = kde.compress(
        translator.model,
        rank=WIDTH,
        quantization="int8",
        calibration_data=[inputs],
        verbose=0,
    )
    whole = ops.convert_to_numpy(student(inputs))
    full = ops.convert_to_numpy(translator.model(inputs))
    assert 0 < np.abs(whole - full).max() < 0.3
    copy = marian.Translator(translator.sizes, student)
    np.testing.assert_allclose(steps(copy, inputs), whole, atol=1e-4)


def test_search_takes_the_likeliest(stored, translator):
    found = translator.translate(SOURCES)
    reference = Reference(stored[1])
    for source, ids in zip(SOURCES, found):
        is_cut = len(ids) == 2 * len(source) + 8
        ended = ids if is_cut else [*ids, marian.EOS]
        logits = reference.logits(source, ended)
        assert logits.argmax(-1).tolist() == ended
