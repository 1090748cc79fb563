"""Token counts and second moments of hidden states, against NumPy."""

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
from keras_distilled_embedding import keras_internals
from tests.shared import affine_optimum
from tests.shared import classifier
from tests.shared import lost_share
from tests.shared import random_ids
from tests.shared import tied_model
from tests.shared import to_numpy

VOCABULARY, WIDTH = 31, 6
IDS = random_ids(VOCABULARY, (12, 7))


def make_model(mask_zero=False, projection="tied"):
    """States are a function of each token; what projects them differs."""
    ids = keras.Input((None,), dtype="int32")
    tokens = keras.layers.ReversibleEmbedding(
        VOCABULARY,
        WIDTH,
        mask_zero=mask_zero,
        tie_weights=projection != "untied",
        embeddings_initializer="normal",
        name="tokens",
    )
    states = keras.layers.Dense(WIDTH, "tanh", name="body")(tokens(ids))
    states = keras.layers.Dropout(0.5)(states)
    if projection == "dense":
        head = keras.layers.Dense(VOCABULARY, name="head")
        return keras.Model(ids, head(states))
    return keras.Model(ids, tokens(states, reverse=True))


def states_of(model, ids):
    """The hidden states that are projected, in NumPy."""
    table = to_numpy(model.get_layer("tokens").embeddings).astype("float64")
    kernel, bias = map(to_numpy, model.get_layer("body").weights)
    return np.tanh(table[ids] @ kernel + bias).reshape(-1, WIDTH)


def assert_statistics(found, model, ids=IDS, weights=None, moment_of="tokens"):
    """Both statistics, against NumPy."""
    weights = np.ones(ids.shape) if weights is None else weights
    weights = np.broadcast_to(weights, ids.shape).ravel().astype("float64")
    states = states_of(model, ids)
    counts = np.bincount(ids.ravel(), weights, minlength=VOCABULARY)
    np.testing.assert_allclose(found["tokens"].token_counts, counts, rtol=1e-6)
    moment = found[moment_of].second_moment
    expected = (states.T * weights) @ states / weights.sum()
    np.testing.assert_allclose(moment, expected, rtol=1e-5, atol=1e-7)
    assert moment.dtype == found["tokens"].token_counts.dtype == np.float64
    np.testing.assert_array_equal(moment, moment.T)


# What is counted


@pytest.mark.parametrize("projection", ["tied", "untied", "dense"])
def test_against_numpy(projection):
    model = make_model(projection=projection)
    batches = [IDS[:5], (IDS[5:9],), (IDS[9:], IDS[9:])]
    found = kde.calibrate(model, batches, verbose=0)
    is_dense = projection == "dense"
    assert found.keys() == ({"tokens", "head"} if is_dense else {"tokens"})
    assert_statistics(found, model, moment_of="head" if is_dense else "tokens")
    if is_dense:
        assert found["tokens"].second_moment is None
        assert found["head"].token_counts is None


@pytest.mark.parametrize("shape", [(12,), (12, 7)])
def test_sample_weights(shape):
    model = make_model()
    weights = np.random.default_rng(1).integers(0, 3, size=shape)
    data = [(IDS, IDS, weights.astype("float32"))]
    found = kde.calibrate(model, data, verbose=0)
    weights = weights.reshape(12, -1)
    assert_statistics(found, model, weights=weights)


@pytest.mark.parametrize("make", [make_model, classifier])
def test_padding_does_not_count(make):
    """Of layers that mask it; of others it is a token like any other."""
    ids = IDS.copy()
    ids[:, 4:] = 0
    for mask_zero in (True, False):
        if make is make_model:
            model = make(mask_zero=mask_zero)
        else:
            model = make(VOCABULARY, WIDTH)
            model.get_layer("tokens").mask_zero = mask_zero
        found = kde.calibrate(model, [ids], verbose=0)
        weights = ids != 0 if mask_zero else np.ones(ids.shape)
        if make is make_model:
            assert_statistics(found, model, ids, weights)
        counts = np.bincount(ids.ravel(), weights.ravel(), VOCABULARY)
        np.testing.assert_array_equal(found["tokens"].token_counts, counts)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return IDS[4 * index : 4 * index + 4], np.ones(4)


def test_every_kind_of_data():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices((IDS, IDS)).batch(5)
    model = make_model()
    for data in (Batches(), dataset, [IDS], ([x] for x in (IDS[:7], IDS[7:]))):
        assert_statistics(kde.calibrate(model, data, verbose=0), model)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow has them"
)
def test_ragged_ids():
    tf = pytest.importorskip("tensorflow")
    rows = [row[: i % 5] for i, row in enumerate(IDS.tolist())]
    ids = keras.Input((None,), dtype="int32", ragged=True)
    tokens = keras.layers.Embedding(VOCABULARY, WIDTH, name="tokens")
    model = keras.Model(ids, tokens(ids))
    data = [tf.ragged.constant(rows, dtype="int32", ragged_rank=1)]
    found = kde.calibrate(model, data, verbose=0)
    expected = np.bincount(np.concatenate(rows).astype(int), minlength=31)
    np.testing.assert_array_equal(found["tokens"].token_counts, expected)


def test_subclassed_and_compressed_models():
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
    assert_statistics(kde.calibrate(model, [IDS], verbose=0), functional)
    student = kde.compress(functional, rank=4, verbose=0)
    assert_statistics(kde.calibrate(student, [IDS], verbose=0), student)


def test_a_table_that_the_data_does_not_reach():
    layer = keras.layers.Embedding(VOCABULARY, WIDTH, name="unused")
    model = make_model()
    model.other = layer
    layer.build()
    found = kde.calibrate(model, [IDS], verbose=0)
    assert found["unused"].token_counts is None
    assert found["unused"].second_moment is None
    student = kde.compress(
        model, rank=3, calibration_data=[IDS], layers="tokens", verbose=0
    )
    assert student.get_layer("tokens").rank == 3


# Texts


def make_language_model():
    """GPT-2 with a byte-pair tokenizer of fifteen tokens."""
    hub = pytest.importorskip("keras_hub")
    space = "\u0120"
    tokens = ["<|endoftext|>", *"abcdefghij", space, "ab", "cd", f"{space}c"]
    tokenizer = hub.models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(tokens)},
        merges=["a b", "c d", f"{space} c"],
    )
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=len(tokens),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=9,
    )
    preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, 9)
    return hub.models.GPT2CausalLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def language_model():
    return make_language_model()


TEXTS = ["abc cd", "a", "jihg fed cba", "c c", "ab ab"] * 3


def test_texts(language_model):
    tf = pytest.importorskip("tensorflow")
    model = language_model
    x, _, weights = model.preprocessor(TEXTS)
    ids, weights = to_numpy(x["token_ids"]), to_numpy(weights).astype("float64")
    assert 0 < weights.mean() < 1  # texts of several lengths
    counts = np.bincount(ids.ravel(), weights.ravel(), minlength=15)
    states = to_numpy(model.backbone(x)).astype("float64").reshape(-1, 8)
    moment = (states.T * weights.ravel()) @ states / weights.sum()
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(4)
    for data in (TEXTS, tuple(TEXTS), dataset, [(TEXTS,)]):
        found = kde.calibrate(model, data, verbose=0)["token_embedding"]
        np.testing.assert_allclose(found.token_counts, counts, rtol=1e-6)
        np.testing.assert_allclose(found.second_moment, moment, rtol=1e-3)


def test_one_text_compresses(language_model):
    student = kde.compress(
        language_model, rank=2, calibration_data=TEXTS[0], verbose=0
    )
    found = kde.calibrate(student, TEXTS[0], verbose=0)["token_embedding"]
    assert found.second_moment.shape == (8, 8)


# What weighs


def test_rows_count_by_their_tokens():
    """Each one more than it occurs: the weighted affine optimum."""
    model = classifier(VOCABULARY, WIDTH)
    ids = (np.random.default_rng(0).beta(1, 5, (9, 50)) * 31).astype("int32")
    table = to_numpy(model.get_layer("tokens").embeddings)
    weights = 1 + np.bincount(ids.ravel(), minlength=VOCABULARY)
    roots = np.sqrt(weights)[:, np.newaxis]
    centered = table - weights @ table / weights.sum()
    best = np.square(np.linalg.svd(roots * centered)[1][3:]).sum()
    for activation in ("relu", None):
        student = kde.compress(
            model,
            rank=3,
            activation=activation,
            calibration_data=[ids],
            verbose=0,
        )
        made = to_numpy(student.get_layer("tokens").embeddings)
        lost = np.square(roots * (table - made)).sum()
        assert lost == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("projection", ["untied", "dense"])
def test_a_table_that_only_projects_keeps_the_best_logits(projection):
    """Eckart and Young, of the logits: hardly one of its rank has better ones.

    A small share of the plain metric is for states that were not seen.
    """
    model = make_model(projection=projection)
    states = states_of(model, IDS)
    name = {"untied": "tokens", "dense": "head"}[projection]

    def logits_error(**options):
        student = kde.compress(
            model,
            rank=3,
            heads="factorize" if name == "head" else None,
            verbose=0,
            **options,
        )
        old, new = (x.get_layer(name) for x in (model, student))
        if name == "head":
            table, made = old.kernel, new.embedding.embeddings
        else:
            table = old.reverse_embeddings
            made = new.reconstruct(reverse=True)
        table = to_numpy(table).T.astype("float64") @ states.T
        return lost_share(table, to_numpy(made) @ states.T), table

    error, logits = logits_error(calibration_data=[IDS])
    assert error == pytest.approx(affine_optimum(logits, 3), rel=0.03)
    assert error < logits_error()[0]


@pytest.mark.parametrize("limit", [1, 40, 41, 10**6])
def test_stops_after_enough_tokens(limit):
    """At the end of the batch that reaches it."""
    model = tied_model(VOCABULARY, WIDTH)
    batches = [np.full((4, 10), i + 1) for i in range(5)]
    found = kde.calibrate(model, batches, calibration_tokens=limit, verbose=0)[
        "tokens"
    ]
    read = {1: 1, 40: 1, 41: 2, 10**6: 5}[limit]
    assert found.token_counts.sum() == 40 * read
    assert list(np.flatnonzero(found.token_counts)) == [*range(1, read + 1)]
    for bad in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="`calibration_tokens`"):
            kde.calibrate(model, batches, calibration_tokens=bad)
        with pytest.raises(ValueError, match="`calibration_tokens`"):
            kde.compress(
                model, calibration_data=batches, calibration_tokens=bad
            )


def test_a_tied_table_keeps_better_logits():
    """Where hidden states live in few directions."""
    model = tied_model(VOCABULARY, WIDTH)
    body = model.get_layer("body")
    kernel = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    kernel[:, 2:] *= 0.01
    body.set_weights([30 * kernel, np.zeros(WIDTH)])
    logits = to_numpy(model(IDS))
    errors = [
        lost_share(
            logits,
            states_of(model, IDS).reshape(*IDS.shape, WIDTH)
            @ to_numpy(student.get_layer("tokens").embeddings).T,
        )
        for student in (
            kde.compress(model, rank=2, verbose=0, **options)
            for options in ({}, {"calibration_data": [IDS]})
        )
    ]
    assert errors[1] < 0.5 * errors[0]


# What is refused, and what stays


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken):
    model = make_model()
    if broken:
        body = model.get_layer("body")
        body.set_weights([np.nan * x for x in body.get_weights()])
    before = [to_numpy(v).copy() for v in model.variables]  # seeds, too
    losses = len(model.losses)
    if broken:
        with pytest.raises(ValueError, match="NaN or infinity, .* 'tokens'"):
            kde.calibrate(model, [IDS], verbose=0)
    else:
        kde.calibrate(model, [IDS], verbose=0)
    for layer in keras_internals.iterate_layers(model):
        assert "call" not in vars(layer)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, to_numpy(new))
    assert len(model.losses) == losses


def test_what_has_no_weight_may_be_anything():
    model = make_model()
    table = model.get_layer("tokens").embeddings
    values = to_numpy(table).copy()
    values[IDS[0, 0]] = np.nan
    table.assign(values)
    weights = (IDS[0, 0] != IDS).astype("float32")
    found = kde.calibrate(model, [(IDS, IDS, weights)], verbose=0)["tokens"]
    assert np.isfinite(found.second_moment).all()
    nothing = [(IDS, IDS, np.zeros(12))]
    found = kde.calibrate(model, nothing, verbose=0)["tokens"]
    assert (found.token_counts, found.second_moment) == (None, None)


def infinite():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensors(IDS).repeat()


@pytest.mark.parametrize(
    ("make_data", "match"),
    [
        (lambda: [], "must have at least one batch. Received: none"),
        (lambda: iter([]), "must have at least one batch. Received: none"),
        (infinite, "must be finite"),
        (lambda: 3, "must be an iterable of batches. Received: 3"),
        (lambda: IDS, "single batch into a list. Received: ndarray"),
        (lambda: {"ids": IDS}, "single batch into a list. Received: dict"),
        (lambda: ["a text"], "has a `preprocessor`.* for model 'functional"),
        (lambda: "a text", "has a `preprocessor`"),
    ],
)
def test_what_is_no_calibration_data(make_data, match):
    model = make_model()
    match = f"`calibration_data` .*{match}"
    with pytest.raises(ValueError, match=match):
        kde.calibrate(model, make_data(), verbose=0)
    with pytest.raises(ValueError, match=match):
        kde.compress(model, calibration_data=make_data(), verbose=0)
    assert "call" not in vars(model.get_layer("tokens"))


def test_not_a_model():
    with pytest.raises(TypeError, match="`model` must be a `keras.Model`"):
        kde.calibrate(None, [IDS])
