"""`EmbeddingDistillation` against a reference in NumPy and float64.

Nothing here belongs to one backend: `KERAS_BACKEND=jax pytest` runs it too.
"""

import json
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_distilled_embedding.compression import compress
from keras_distilled_embedding.distillation import Distiller
from keras_distilled_embedding.distillation import EmbeddingDistillation
from keras_distilled_embedding.distillation.embedding_distillation import (
    paired_tables,
)
from tests.distillation_models import CLOSE
from tests.distillation_models import RANK
from tests.distillation_models import VOCABULARY
from tests.distillation_models import WIDTH
from tests.distillation_models import float64
from tests.distillation_models import losses_of
from tests.distillation_models import make_classifier
from tests.distillation_models import make_classifiers
from tests.distillation_models import make_data
from tests.distillation_models import make_distiller
from tests.distillation_models import make_factors
from tests.distillation_models import make_model
from tests.distillation_models import make_pair
from tests.distillation_models import make_table
from tests.distillation_models import row_distances
from tests.distillation_models import without_gradient

ROW_WEIGHTS = np.random.default_rng(4).exponential(size=VOCABULARY)
# Words that never occur.
ROW_WEIGHTS[5:9] = 0.0


def compute(loss, models):
    teacher, student = models
    value = loss.compute_loss(None, None, teacher=teacher, student=student)
    return float(value)


def distances_of(models, activation="relu"):
    """The distance of each row, for each of the tables."""
    old, new = (model.get_layer("tokens") for model in models)
    distances = [row_distances(old.embeddings, new, "", activation)]
    if not new.tie_weights:
        # The kernel of a projection is a table transposed.
        kernel = float64(old.reverse_embeddings).T
        distances.append(row_distances(kernel, new, "reverse_", activation))
    return distances


# The distance


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", None, "tanh"])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_distance_of_tables(tie_weights, activation, use_bias, row_weights):
    models = make_pair(
        tie_weights=tie_weights, activation=activation, use_bias=use_bias
    )
    expected = sum(
        np.average(distances, weights=row_weights)
        for distances in distances_of(models, activation)
    )
    actual = compute(EmbeddingDistillation(row_weights=row_weights), models)
    assert actual == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("quantization", ["int8", "int4", "int2"])
def test_distance_of_rounded_tables(quantization):
    """The student's rows are those that it computes with."""
    models = make_pair(quantization=quantization)
    teacher, student = models
    ids = np.arange(VOCABULARY)
    rows = float64(student.get_layer("tokens")(ids))
    table = float64(teacher.get_layer("tokens").embeddings)
    expected = np.square(table - rows).sum(axis=1).mean()
    actual = compute(EmbeddingDistillation(), models)
    assert actual == pytest.approx(expected, **CLOSE)
    student.get_layer("tokens").quantization = None
    unrounded = compute(EmbeddingDistillation(), models)
    assert abs(actual - unrounded) > 1e-4 * expected


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_only_proportions_of_row_weights_matter(scale):
    models = make_pair()
    loss, scaled = (
        compute(EmbeddingDistillation(row_weights=weights), models)
        for weights in (ROW_WEIGHTS, scale * ROW_WEIGHTS)
    )
    assert scaled == pytest.approx(loss, rel=1e-5)


def make_pair_of_two_tables():
    return tuple(
        make_model(make_layer(), seed, other=make_layer(name="other"))
        for seed, make_layer in enumerate((make_reversible, make_factors), 1)
    )


def make_reversible(name="tokens"):
    return keras.layers.ReversibleEmbedding(VOCABULARY, WIDTH, name=name)


@without_gradient
@pytest.mark.parametrize(
    "row_weights",
    [
        ROW_WEIGHTS,
        {"tokens": ROW_WEIGHTS},
        {"tokens": ROW_WEIGHTS, "other": 3 * ROW_WEIGHTS[::-1]},
        {},
    ],
    ids=["for both", "for one", "for each", "for none"],
)
def test_row_weights_by_layer(row_weights):
    teacher, student = make_pair_of_two_tables()
    by_name = row_weights
    if not isinstance(row_weights, dict):
        by_name = dict.fromkeys(("tokens", "other"), row_weights)
    expected = sum(
        np.average(
            row_distances(
                teacher.get_layer(name).embeddings, student.get_layer(name)
            ),
            weights=by_name.get(name),
        )
        for name in ("tokens", "other")
    )
    distiller = make_distiller(
        (teacher, student),
        EmbeddingDistillation(row_weights=row_weights),
        student_loss_weight=0.0,
        loss=None,
        run_eagerly=True,
    )
    logs = losses_of(distiller, make_data()[0])
    assert logs["loss"] == pytest.approx(expected, **CLOSE)


# Rows that are drawn


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_rows_are_those_that_the_seed_draws(tie_weights, row_weights):
    models = make_pair(tie_weights=tie_weights)
    weights = np.ones(VOCABULARY) if row_weights is None else row_weights
    weights = weights / weights.mean()
    loss = EmbeddingDistillation(6, seed=11, row_weights=row_weights)
    seed_generator = keras.random.SeedGenerator(11)
    for _ in range(3):
        expected = 0.0
        for distances in distances_of(models):
            ids = ops.convert_to_numpy(
                keras.random.randint((6,), 0, VOCABULARY, seed=seed_generator)
            )
            expected += (weights * distances)[ids].mean()
        assert compute(loss, models) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("row_weights", [None, ROW_WEIGHTS])
def test_drawn_rows_are_unbiased(row_weights):
    models = make_pair()
    loss = EmbeddingDistillation(num_rows=200, row_weights=row_weights)
    values = [compute(loss, models) for _ in range(60)]
    full = compute(EmbeddingDistillation(row_weights=row_weights), models)
    weights = np.ones(VOCABULARY) if row_weights is None else row_weights
    terms = weights / weights.mean() * distances_of(models)[0]
    # Of a mean over all rows that are drawn.
    spread = terms.std() / math.sqrt(200 * 60)
    assert terms.mean() == pytest.approx(full, **CLOSE)
    assert abs(np.mean(values) - full) < 4 * spread
    # Other rows each time, and not all rows.
    assert len(set(values)) > 50
    assert np.std(values) == pytest.approx(
        terms.std() / math.sqrt(200), rel=0.35
    )


@without_gradient
def test_drawn_rows_differ_at_every_step_of_a_graph():
    distiller = make_distiller(
        make_pair(),
        EmbeddingDistillation(num_rows=5, seed=3),
        student_loss_weight=0.0,
        loss=None,
    )
    history = distiller.fit(make_data()[0], epochs=4, verbose=0).history
    assert len(set(history["embedding_distillation_loss"])) == 4


# Pairs of tables


def test_tables_of_one_name_are_paired_in_order():
    inputs, outputs = [], []
    for i in range(3):
        ids = keras.Input((None,), dtype="int32")
        # The first is so small that `compress` leaves it.
        embedding = make_table(VOCABULARY if i else 2)
        inner = keras.Model(ids, embedding(ids), name=f"inner_{i}")
        inputs.append(keras.Input((None,), dtype="int32"))
        outputs.append(inner(inputs[-1]))
    teacher = keras.Model(inputs, outputs)
    student = compress(teacher, rank=RANK, quantization=None, verbose=0)
    pairs = list(paired_tables(teacher, student))
    assert len(pairs) == 2
    for i, pair in enumerate(pairs, start=1):
        for model, layer in zip((teacher, student), pair):
            inner = model.get_layer(f"inner_{i}")
            assert layer is inner.get_layer("tokens")


def test_tables_of_dense_layers_are_paired_too():
    """`compress` factorizes projections to the vocabulary as well."""
    ids = keras.Input((None,), dtype="int32")
    x = make_table()(ids)
    teacher = keras.Model(ids, keras.layers.Dense(VOCABULARY, name="head")(x))
    student = compress(
        teacher, rank=RANK, heads="factorize", quantization=None, verbose=0
    )
    pairs = dict(paired_tables(teacher, student))
    assert list(pairs) == [teacher.get_layer(x) for x in ("tokens", "head")]
    tables = [
        teacher.layers[1].embeddings,
        ops.transpose(teacher.layers[2].kernel),
    ]
    expected = sum(
        row_distances(table, layer).mean()
        for table, layer in zip(tables, pairs.values())
    )
    actual = compute(EmbeddingDistillation(), (teacher, student))
    assert actual == pytest.approx(expected, **CLOSE)


def test_student_without_factors():
    with pytest.raises(
        ValueError, match=r"no `DistilledEmbedding` .* `compress\(teacher\)`"
    ):
        Distiller(
            make_classifier(make_table(), 1), make_classifier(make_table(), 2)
        )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (make_table(name="other"), r"no embedding named 'tokens'.*\['other'\]"),
        (
            make_table(53),
            rf"\(53, {WIDTH}\) in the teacher, \({VOCABULARY}, {WIDTH}\) in",
        ),
    ],
)
def test_teacher_without_the_table(table, message):
    with pytest.raises(ValueError, match=message):
        Distiller(make_classifier(table, 1), make_classifier(make_factors(), 2))


def test_quantized_teacher():
    teacher, student = make_classifiers()
    teacher.get_layer("tokens").quantize("int8")
    with pytest.raises(ValueError, match="'tokens' with .*mode='int8'"):
        Distiller(teacher, student)


# Configuration and errors


@pytest.mark.parametrize(
    "loss",
    [
        EmbeddingDistillation(),
        EmbeddingDistillation(num_rows=7, seed=3),
        EmbeddingDistillation(row_weights=np.arange(3.0)),
        EmbeddingDistillation(row_weights={"tokens": np.arange(3.0)}),
    ],
)
def test_serialization(loss):
    config = keras.saving.serialize_keras_object(loss)
    config = json.loads(json.dumps(config))
    restored = keras.saving.deserialize_keras_object(config)
    assert type(restored) is EmbeddingDistillation
    assert restored.get_config() == loss.get_config()


@pytest.mark.parametrize("num_rows", [0, -1, 2.0, True, "3"])
def test_bad_num_rows(num_rows):
    with pytest.raises(ValueError, match=f"num_rows={num_rows!r}"):
        EmbeddingDistillation(num_rows=num_rows)


@pytest.mark.parametrize(
    ("row_weights", "message"),
    [
        ([1.0, -1.0], r"shape=\(2,\), from -1.0 to 1.0"),
        ([1.0, np.nan], r"shape=\(2,\)"),
        ([1.0, np.inf], "from 1.0 to inf"),
        ([0.0, 0.0], "not all zero.*from 0.0 to 0.0"),
        ([[1.0], [2.0]], r"shape=\(2, 1\), from 1.0 to 2.0"),
        ([], r"shape=\(0,\), from inf to -inf"),
    ],
)
def test_bad_row_weights(row_weights, message):
    for given in (row_weights, {"tokens": row_weights}):
        with pytest.raises(ValueError, match=message):
            EmbeddingDistillation(row_weights=given)


@pytest.mark.parametrize(
    ("row_weights", "message"),
    [
        (ROW_WEIGHTS[1:], f"'tokens', {VOCABULARY}.* {VOCABULARY - 1} numbers"),
        (
            {"other": ROW_WEIGHTS[1:]},
            f"'other', {VOCABULARY}.* {VOCABULARY - 1} numbers",
        ),
        (
            {"tokens": ROW_WEIGHTS, "words": ROW_WEIGHTS},
            r"\['other', 'tokens'\].*Received: \['words'\]",
        ),
    ],
)
def test_row_weights_must_fit_the_tables(row_weights, message):
    teacher, student = make_pair_of_two_tables()
    loss = EmbeddingDistillation(row_weights=row_weights)
    with pytest.raises(ValueError, match=message):
        Distiller(teacher, student, loss)
