"""Token counts and hidden covariances, against NumPy."""

import gzip

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde

VOCABULARY, WIDTH = 31, 6
IDS = np.random.default_rng(0).integers(0, VOCABULARY, size=(12, 7))
COUNTS = np.bincount(IDS.ravel(), minlength=VOCABULARY)


def count(dataset, **options):
    return kde.count_tokens(dataset, VOCABULARY, verbose=0, **options)


# Tokens


def test_counts_every_integer_of_a_batch():
    batches = [
        ({"a": IDS[:4], "b": IDS[4:6]}, IDS[6:8], np.ones((2, 7), "float32")),
        ({"a": IDS[8:10], "b": IDS[10:]}, None),
    ]
    np.testing.assert_array_equal(count(batches), COUNTS)


def test_counts_an_array_a_tensor_and_a_dataset():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(IDS).batch(5)
    for given in (IDS, [ops.convert_to_tensor(IDS)], dataset, iter(IDS)):
        counts = count(given)
        np.testing.assert_array_equal(counts, COUNTS)
        assert counts.dtype == np.int64


def test_counts_ragged_tensors():
    tf = pytest.importorskip("tensorflow")
    rows = [row[: i % 5] for i, row in enumerate(IDS.tolist())]
    ragged = tf.ragged.constant(rows, dtype="int64", ragged_rank=1)
    expected = np.bincount(np.concatenate(rows).astype(int), minlength=31)
    np.testing.assert_array_equal(count([(ragged,)]), expected)


def test_counts_a_sequence_without_iter():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return IDS[4 * index : 4 * index + 4], np.ones(4)

    np.testing.assert_array_equal(count(Batches()), COUNTS)


def test_select_and_padding():
    batches = [(IDS, np.full(12, 10**6))]
    counts = count(batches, select=lambda x, y: x, padding_id=3)
    expected = COUNTS.copy()
    expected[3] = 0
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".npy"])
@pytest.mark.parametrize("as_string", [True, False])
def test_counts_a_file(tmp_path, monkeypatch, suffix, as_string):
    monkeypatch.setattr(kde.calibration, "LINES_AT_A_TIME", 5)
    monkeypatch.setattr(kde.calibration, "ENTRIES_AT_A_TIME", 11)
    path = tmp_path / f"ids{suffix}"
    if suffix == ".npy":
        np.save(path, IDS.astype("uint16"))
    else:
        text = "\n".join(" ".join(map(str, row)) for row in IDS) + "\n\n"
        opened = gzip.open if suffix.endswith("gz") else open
        with opened(path, "wt") as file:
            file.write(text)
    given = str(path) if as_string else path
    np.testing.assert_array_equal(count(given), COUNTS)


@pytest.mark.parametrize(
    ("dataset", "options", "match"),
    [
        ([IDS + 1], {}, "from 1 to 31.*pass `select`"),
        ([IDS - 1], {}, "from -1 to 29"),
        ([np.ones(3)], {}, "no token to count"),
        ([np.zeros(3, int)], {"padding_id": 0}, "no token to count"),
        ([], {}, "no token to count"),
        (3, {}, "iterable of batches"),
        ([IDS], {"padding_id": -1}, "`padding_id` must be .* at least 0"),
    ],
)
def test_what_cannot_be_counted(dataset, options, match):
    with pytest.raises(ValueError, match=match):
        count(dataset, **options)


def test_an_infinite_dataset_is_refused():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensors(IDS).repeat()
    with pytest.raises(ValueError, match="finite"):
        count(dataset)


def test_files_that_hold_no_ids(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt', which is no"):
        count(tmp_path / "nothing.txt")
    text = tmp_path / "words.txt"
    text.write_text("1 2\n3 a b\n")
    with pytest.raises(ValueError, match=r"words\.txt' with line 2: '3 a b'"):
        count(text)
    array = tmp_path / "floats.npy"
    np.save(array, np.ones(3))
    with pytest.raises(ValueError, match="dtype float64"):
        count(array)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects\.npy'; NumPy says"):
        count(objects)


# Hidden states


def make_model(mask_zero=False, head="tied"):
    """The states are a fixed function of two tokens, that NumPy knows."""
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, mask_zero=mask_zero, name="tokens"
    )
    states = keras.layers.Dense(WIDTH, "tanh", name="body")(embedding(ids))
    states = keras.layers.Dropout(0.5)(states)
    if head == "tied":
        return keras.Model(ids, embedding(states, reverse=True))
    return keras.Model(ids, keras.layers.Dense(3, name="classes")(states))


def numpy_states(model, ids):
    kernel, bias = model.get_layer("body").get_weights()
    table = np.asarray(model.get_layer("tokens").embeddings, "float64")
    return np.tanh(table[ids] @ kernel + bias).reshape(-1, WIDTH)


def numpy_covariance(states, weights=None):
    weights = np.ones(len(states)) if weights is None else weights.ravel()
    return (states.T * weights) @ states / weights.sum()


def test_covariance_of_a_tied_projection():
    model = make_model()
    expected = numpy_covariance(numpy_states(model, IDS))
    batches = [IDS[:5], (IDS[5:9],), (IDS[9:], IDS[9:])]
    covariance = kde.second_moment(model, batches, verbose=0)
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-7)
    assert covariance.dtype == np.float64
    np.testing.assert_array_equal(covariance, covariance.T)


def test_covariance_of_a_named_layer():
    model = make_model(head="dense")
    covariance = kde.second_moment(model, [IDS], "classes", verbose=0)
    expected = numpy_covariance(numpy_states(model, IDS))
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("per_token", [True, False])
def test_covariance_is_weighted(per_token):
    model = make_model()
    random = np.random.default_rng(1)
    shape = (12, 7) if per_token else (12,)
    weights = random.integers(0, 3, size=shape).astype("float32")
    covariance = kde.second_moment(model, [(IDS, IDS, weights)], verbose=0)
    if not per_token:
        weights = np.repeat(weights, 7)
    expected = numpy_covariance(numpy_states(model, IDS), weights)
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-7)


def test_covariance_leaves_out_what_a_mask_hides():
    model = make_model(mask_zero=True)
    ids = IDS.copy()
    ids[:, 4:] = 0
    covariance = kde.second_moment(model, [ids], verbose=0)
    expected = numpy_covariance(
        numpy_states(model, ids), (ids != 0).astype("float64")
    )
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-7)


def test_covariance_of_a_subclassed_and_of_a_compressed_model():
    class Tied(keras.Model):
        def __init__(self, functional):
            super().__init__()
            self.embedding = functional.get_layer("tokens")
            self.body = functional.get_layer("body")

        def call(self, ids):
            return self.embedding(self.body(self.embedding(ids)), reverse=True)

    functional = make_model()
    model = Tied(functional)
    model(IDS)
    expected = kde.second_moment(functional, [IDS], verbose=0)
    np.testing.assert_allclose(
        kde.second_moment(model, [IDS], verbose=0), expected, rtol=1e-6
    )
    student = kde.compress(functional, rank=4, verbose=0)
    covariance = kde.second_moment(student, [IDS], verbose=0)
    assert covariance.shape == (WIDTH, WIDTH)


def test_the_model_is_left_as_it_was():
    model = make_model()
    before = model.get_weights()
    kde.second_moment(model, [IDS], verbose=0)
    assert "call" not in vars(model.get_layer("tokens"))
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def make_broken():
    model = make_model()
    kernel, bias = model.get_layer("body").get_weights()
    model.get_layer("body").set_weights([kernel * np.nan, bias])
    return model


@pytest.mark.parametrize(
    ("make", "dataset", "layer", "match"),
    [
        (lambda: make_model(head="dense"), [IDS], None, "a model without any"),
        (make_model, [], None, "or no batch"),
        (make_model, [IDS], "nothing", "no layer 'nothing'.*'body'"),
        (
            lambda: make_model(head="dense"),
            [IDS],
            "tokens",
            "layer='tokens', which was not",
        ),
        (make_model, [(IDS, IDS, np.zeros(12))], None, "positive weight"),
        (make_broken, [IDS], None, "NaN or infinity"),
    ],
)
def test_what_has_no_covariance(make, dataset, layer, match):
    model = make()
    with pytest.raises(ValueError, match=match):
        kde.second_moment(model, dataset, layer, verbose=0)
    assert "call" not in vars(model.get_layer("tokens"))


def test_two_projections_must_be_told_apart():
    ids = keras.Input((None,), dtype="int32")
    layers = [
        keras.layers.ReversibleEmbedding(VOCABULARY, WIDTH, name=name)
        for name in "ab"
    ]
    outputs = [layer(layer(ids), reverse=True) for layer in layers]
    model = keras.Model(ids, outputs)
    with pytest.raises(ValueError, match=r"several: \['a', 'b'\]"):
        kde.second_moment(model, [IDS], verbose=0)
    table = np.asarray(layers[1].embeddings)
    np.testing.assert_allclose(
        kde.second_moment(model, [IDS], "b", verbose=0),
        numpy_covariance(table[IDS.ravel()]),
        rtol=1e-4,
        atol=1e-8,
    )


def test_not_a_model():
    with pytest.raises(TypeError, match="`model` must be a `keras.Model`"):
        kde.second_moment(None, [IDS])


def test_covariance_makes_the_best_logits():
    """What it is for, from the data to the compressed model."""
    model = make_model()
    covariance = kde.second_moment(model, [IDS], verbose=0)
    states = numpy_states(model, IDS)
    table = np.asarray(model.get_layer("tokens").embeddings, "float64")
    student = kde.compress(
        model,
        rank=2,
        activation=None,
        hidden_covariances=covariance,
        verbose=0,
    )
    made = np.asarray(student.get_layer("tokens").embeddings)
    # Eckart and Young, of the logits: no table of rank 2 has better ones.
    values = np.linalg.svd(states @ table.T, compute_uv=False)
    assert np.square(states @ (table - made).T).sum() == pytest.approx(
        np.square(values[2:]).sum(), rel=1e-3
    )
