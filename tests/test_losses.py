"""ChunkedCrossEntropy against Keras's own loss of the projected states."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding as kde
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection

VOCABULARY, WIDTH = 37, 12
FORMS = {
    "tied": {},
    "plain": {"activation": None},
    "no offset": {"use_bias": False},
    "untied": {"tie_weights": False},
    "soft cap": {"logit_soft_cap": 0.5},
    "soft cap, no offset": {"logit_soft_cap": 0.5, "use_bias": False},
    "soft cap, untied": {"logit_soft_cap": 0.5, "tie_weights": False},
    "rounded": {"quantization": "int4"},
    "rounded, 8 bits": {"quantization": "int8"},
}


def language_model(bias=False, seed=0, **options):
    """Ends with logits `(batch, time, VOCABULARY)`."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    ids = keras.Input((None,), dtype="int32", name="ids")
    embedding = DistilledEmbedding(
        VOCABULARY,
        WIDTH,
        rank=4,
        name="tokens",
        embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
        **options,
    )
    hidden = keras.layers.Dense(WIDTH, activation="tanh")(embedding(ids))
    if not bias:
        model = keras.Model(ids, embedding(hidden, reverse=True))
    else:
        projection = VocabularyProjection(embedding, name="logits")
        model = keras.Model(ids, projection(hidden))
        projection.bias.assign(rng.normal(size=VOCABULARY))
    for weight in embedding.weights:
        if weight.name.endswith("offset"):
            weight.assign(rng.normal(size=WIDTH))
    return model


def batch(size=3, length=7, seed=0):
    ids = np.random.default_rng(seed).integers(VOCABULARY, size=(size, 8))
    ids[0, -3:] = 0  # padding, where a model masks it
    ids = ids[:, : length + 1].astype("int32")
    return ids[:, :-1], ids[:, 1:]


def one_step(model, loss, ids, labels, sample_weight=None, **options):
    """The loss before a step of gradient descent, and what the step changes."""
    model.compile(keras.optimizers.SGD(1.0), loss, **options)
    before = model.get_weights()
    value = model.train_on_batch(ids, labels, sample_weight)
    changes = [b - a for b, a in zip(before, model.get_weights())]
    return value, dict(zip([w.path for w in model.weights], changes))


def trunk_and_loss(model, **options):
    trunk = kde.without_projection(model)
    return trunk, kde.ChunkedCrossEntropy(trunk.projection, **options)


def assert_same_step(
    make, expected_loss, sample_weight=None, unseen=(), **options
):
    ids, labels = batch()
    keras.backend.clear_session()  # so that names repeat
    expected, changes = one_step(
        make(), expected_loss, ids, labels, sample_weight
    )
    keras.backend.clear_session()
    trunk, loss = trunk_and_loss(make(), **options)
    value, found = one_step(trunk, loss, ids, labels, sample_weight)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert found.keys() == changes.keys()
    for name, change in changes.items():
        # Everything is trained that changes the loss, but for the coordinates,
        # which stay.
        stays = name.endswith(("center", "rotation", *unseen))
        assert (np.abs(change).max() > 1e-4) != stays, name
        np.testing.assert_allclose(
            found[name], change, rtol=1e-5, atol=1e-6, err_msg=name
        )


def full(**options):
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, **options
    )


@pytest.mark.parametrize(
    "form, chunk_size",
    [
        # Of 21 tokens: chunks that divide them and chunks that do not.
        *[("tied", size) for size in (1, 4, 7, 21, 100)],
        *[(form, 4) for form in FORMS if form != "tied"],
    ],
)
def test_step_is_that_of_the_full_loss(form, chunk_size):
    assert_same_step(
        lambda: language_model(**FORMS[form]),
        full(),
        unseen={
            # It adds the same number to all logits.
            "untied": ("reverse_offset",),
            "rounded, 8 bits": ("scales",),
        }.get(form, ()),
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("form", ["tied", "soft cap"])
def test_bias_of_a_vocabulary_projection(form):
    assert_same_step(
        lambda: language_model(bias=True, **FORMS[form]), full(), chunk_size=4
    )


def test_untied_vocabulary_projection_is_owned():
    """Its embedding is nowhere else in the trunk."""

    def make():
        keras.utils.set_random_seed(0)
        ids = keras.Input((None,), dtype="int32")
        hidden = keras.layers.Embedding(VOCABULARY, WIDTH, name="in")(ids)
        table = DistilledEmbedding(
            VOCABULARY, WIDTH, 4, embeddings_initializer="normal", name="out"
        )
        return keras.Model(ids, VocabularyProjection(table)(hidden))

    assert_same_step(make, full(), unseen=("out/offset",), chunk_size=4)


def test_sample_weights_and_ignored_labels():
    weights = np.random.default_rng(1).uniform(size=(3, 7)).astype("float32")
    assert_same_step(language_model, full(), weights, chunk_size=4)
    assert_same_step(
        language_model,
        full(ignore_class=batch()[1][0, 0]),
        chunk_size=4,
        ignore_class=batch()[1][0, 0],
    )


def test_masked_tokens_do_not_count():
    def make():
        return language_model(mask_zero=True)

    assert_same_step(make, full(), chunk_size=4)


def test_label_smoothing():
    """Of the dense loss, which Keras has for one-hot labels only."""

    class Smoothed(keras.losses.Loss):
        def call(self, y_true, y_pred):
            hot = ops.one_hot(ops.cast(y_true, "int32"), VOCABULARY)
            return keras.losses.categorical_crossentropy(
                hot, y_pred, from_logits=True, label_smoothing=0.1
            )

    assert_same_step(
        language_model, Smoothed(), chunk_size=4, label_smoothing=0.1
    )


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("size, length", [(1, 1), (3, 7)])
def test_fit_of_any_shape_compiled_or_not(jit_compile, size, length):
    """Batch and time are unknown where the step is traced."""
    ids, labels = batch(size, length)
    expected = full()(labels, language_model()(ids))
    trunk, loss = trunk_and_loss(language_model(), chunk_size=4)
    trunk.compile("sgd", loss, jit_compile=jit_compile)
    history = trunk.fit(ids, labels, verbose=0)
    np.testing.assert_allclose(
        history.history["loss"][0], float(expected), rtol=1e-5
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """Half-precision products, softmax and sums in float32."""
    ids, labels = batch()
    model = language_model(dtype=policy)
    expected = full()(labels, ops.cast(model(ids), "float32"))
    trunk, loss = trunk_and_loss(model, chunk_size=4)
    found = loss(labels, trunk(ids))
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-2)
    assert ops.is_tensor(found)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


def test_distiller_trains_a_trunk():
    """With the distance of the tables, no logits are made anywhere."""
    ids = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(40, WIDTH, name="tokens")
    teacher = keras.Model(ids, embedding(embedding(ids), reverse=True))
    student = kde.compress(teacher, rank=3, verbose=0)
    trunk, loss = trunk_and_loss(student, chunk_size=4)
    distiller = kde.Distiller(
        teacher, trunk, [kde.EmbeddingDistillation(num_rows=8)]
    )
    distiller.compile(keras.optimizers.Adam(0.05), loss)
    trained = student.trainable_variables
    before = [ops.convert_to_numpy(variable) for variable in trained]
    x, y = batch()
    history = distiller.fit(x, y, epochs=5, verbose=0)
    assert history.history["task_loss"][-1] < history.history["task_loss"][0]
    assert all(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(before, map(ops.convert_to_numpy, trained))
    )


def test_saved_with_its_model_and_trained_on(tmp_path):
    ids, labels = batch()
    trunk, loss = trunk_and_loss(language_model(), chunk_size=4)
    trunk.compile("sgd", loss)
    kde.save_model(trunk, tmp_path / "trunk.keras")
    loaded = kde.load_model(tmp_path / "trunk.keras")
    assert loaded.loss.chunk_size == 4
    assert loaded.loss.projection is loaded.get_layer("tokens")
    expected = trunk.train_on_batch(ids, labels)
    np.testing.assert_allclose(
        loaded.train_on_batch(ids, labels), expected, rtol=1e-6
    )


def test_loss_of_a_config_says_that_it_has_no_layer():
    _, loss = trunk_and_loss(language_model())
    alone = kde.ChunkedCrossEntropy.from_config(loss.get_config())
    with pytest.raises(ValueError, match=r"bind\(model\)"):
        alone(np.zeros((1, 2)), np.zeros((1, 2, WIDTH)))
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="one layer 'tokens'"):
        alone.bind(other)


def test_bad_arguments():
    layer = DistilledEmbedding(VOCABULARY, WIDTH, 4)
    with pytest.raises(ValueError, match="must be built"):
        kde.ChunkedCrossEntropy(layer)
    layer.build()
    with pytest.raises(TypeError, match="`projection`"):
        kde.ChunkedCrossEntropy(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="`chunk_size`"):
        kde.ChunkedCrossEntropy(layer, chunk_size=0)
    with pytest.raises(ValueError, match="`label_smoothing`"):
        kde.ChunkedCrossEntropy(layer, label_smoothing=1.0)
    projection = VocabularyProjection(layer, activation="relu")
    projection.build()
    with pytest.raises(ValueError, match="softmax"):
        kde.ChunkedCrossEntropy(projection)


def test_models_without_a_projection_are_refused():
    dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="must end with"):
        kde.without_projection(dense)
    ids = keras.Input((None,), dtype="int32")
    look_up = keras.Model(ids, DistilledEmbedding(9, 4, 2)(ids))
    with pytest.raises(ValueError, match="must end with"):
        kde.without_projection(look_up)
    with pytest.raises(TypeError, match="`model`"):
        kde.without_projection("model")
    x = keras.Input((2,))
    several = keras.Model(x, [keras.layers.Dense(3)(x), x])
    with pytest.raises(ValueError, match="one output"):
        kde.without_projection(several)
