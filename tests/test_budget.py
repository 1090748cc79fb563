"""Ranks and bits together: budgets of stored bytes, and cheaper projections."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import allocate_ranks
from keras_distilled_embedding.budget import expected_loss
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.targets import Target
from tests.shared import stored_bytes
from tests.shared import tied_model
from tests.shared import to_numpy

QUANTIZATIONS = (None, "int8", "int4")
QUANTIZATION = pytest.mark.parametrize("quantization", QUANTIZATIONS)
FORM = pytest.mark.parametrize(
    ("activation", "use_bias"), [("relu", True), (None, True), ("relu", False)]
)


def speedup(rank, rows, columns, quantization):
    if quantization == "int4":
        rank = int(np.ceil(rank / 32)) * 32
    return rows * columns / (rank * (rows + columns))


def table_with_spectrum(rows, values, seed=0):
    """A table around zero with these singular values."""
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(rows, len(values)))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return ((left * values) @ right).astype("float32")


def embedding(rows, values, name="tokens", seed=0, **options):
    """A built layer whose table has these singular values."""
    layer = keras.layers.ReversibleEmbedding(
        rows, len(values), name=name, **options
    )
    layer.build()
    for i, weight in enumerate(layer.weights):
        table = table_with_spectrum(rows, values, seed + 100 * i)
        weight.assign(table.T if i else table)
    return layer


def model_of(layer):
    """ids -> the mean of rows: look-ups, and no projection."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    return keras.Model(ids, keras.layers.GlobalAveragePooling1D()(layer(ids)))


def planned(layers, optional=True, **request):
    targets = [Target(layer) for layer in layers]
    tables = {t: [Table.of(array) for array in t.tables()] for t in targets}
    ranks, chosen = plan(tables, SizeRequest(**request), optional)
    return {target.name: rank for target, rank in ranks.items()}, chosen


def lost_by(student, model, weights=None):
    """The share of a table's energy that the layer, as it computes, loses."""
    table = to_numpy(model.get_layer("tokens").embeddings)
    lost = table - to_numpy(student.get_layer("tokens").embeddings)
    weights = np.ones(len(table)) if weights is None else weights
    return (
        weights @ np.square(lost).sum(1) / (weights @ np.square(table).sum(1))
    )


# A budget for several tables


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    costs=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    skipped=st.integers(0, 1),
    share=st.floats(0, 1.1),
    block=st.sampled_from([1, 3]),
)
def test_ranks_against_every_choice(seed, costs, skipped, share, block):
    """The best there is, up to one last step that does not fit."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 8, size=len(costs))
    shares = [np.sort(rng.random(length))[::-1] for length in lengths]
    prices = []
    for length, cost in zip(lengths, costs):
        ranks = sorted({*range(block, length, block), int(length)})
        prices.append({r: cost * (3 + i) for i, r in enumerate(ranks)})
    budget = int(share * sum(max(p.values()) for p in prices))

    def spent(choice):
        return sum(price[rank] for price, rank in zip(prices, choice))

    def kept(choice):
        return sum(s[: r - skipped].sum() for s, r in zip(shares, choice))

    choices = list(itertools.product(*prices))
    if min(map(spent, choices)) > budget:
        with pytest.raises(ValueError, match=f"too small.*max_bytes={budget}"):
            allocate_ranks(shares, prices, budget, skipped)
        return
    found = allocate_ranks(shares, prices, budget, skipped)
    assert spent(found) <= budget
    step = 0 if len(set(costs)) == block == 1 else max(costs)
    bounds = [kept(c) for c in choices if spent(c) <= budget - step]
    assert kept(found) >= max(bounds, default=0) - 1e-9


@QUANTIZATION
@FORM
def test_one_table_has_the_best_rank_there_is(
    quantization, activation, use_bias
):
    """Of all that fit, by the singular values."""
    rows, values = 150, np.geomspace(1, 0.05, 72)
    layer = embedding(rows, values)
    form = {"activation": activation, "use_bias": use_bias}
    energies = values**2 / np.square(values).sum()
    sizes = {
        rank: stored_bytes(rank, rows, len(values), quantization, use_bias)
        for rank in range(1, len(values) + 1)
    }
    seen = set()
    for max_bytes in range(700, 30_000, 1_511):
        fitting = [
            rank
            for rank, size in sizes.items()
            if size <= max_bytes and size < 4 * rows * len(values)
        ]
        arguments = dict(max_bytes=max_bytes, quantization=quantization, **form)
        if not fitting:
            with pytest.raises(ValueError, match=f"max_bytes={max_bytes}"):
                planned([layer], **arguments)
            continue
        ranks, chosen = planned([layer], **arguments)
        assert chosen == quantization
        best = min(energies[rank - (not use_bias) :].sum() for rank in fitting)
        assert energies[ranks["tokens"] - (not use_bias) :].sum() == best
        seen.add(ranks["tokens"])
    if quantization == "int4":
        assert seen == {32, 64, 72}
    else:
        assert len(seen) > 5


@settings(max_examples=20, deadline=None)
@given(
    rows=st.tuples(st.integers(60, 400), st.integers(60, 400)),
    columns=st.tuples(st.integers(8, 100), st.integers(8, 100)),
    decays=st.tuples(st.floats(0.8, 1.0), st.floats(0.8, 1.0)),
    share=st.floats(0.01, 1.0),
    quantization=st.sampled_from([*QUANTIZATIONS, "auto"]),
    min_speedup=st.sampled_from([None, 1.0, 1.7, 4.0]),
    activation=st.sampled_from([None, "relu"]),
    untied=st.booleans(),
)
def test_the_budget_is_held(
    rows, columns, decays, share, quantization, min_speedup, activation, untied
):
    """And used: no table could take a larger rank with what is left."""
    layers = [
        embedding(
            rows[i],
            decays[i] ** np.arange(min(columns[i], rows[i] - 1)),
            name="ab"[i],
            seed=i,
            tie_weights=not (untied and i),
        )
        for i in range(2)
    ]
    shapes = {x.name: (x.input_dim, x.output_dim) for x in layers}
    copies = {"a": 1, "b": 2 if untied else 1}
    max_bytes = int(
        share * 4 * sum(copies[n] * np.prod(shapes[n]) for n in "ab")
    )

    def allowed(name, stored):
        v, d = shapes[name]
        return [
            rank
            for rank in range(1, d + 1)
            if stored_bytes(rank, v, d, stored) < 4 * v * d
            and speedup(rank, v, d, stored) >= (min_speedup or 0)
        ]

    def total(ranks, stored):
        return sum(
            copies[n] * stored_bytes(r, *shapes[n], stored)
            for n, r in ranks.items()
        )

    formats = QUANTIZATIONS if quantization == "auto" else (quantization,)
    # Tables that are too small for any rank are left as they are.
    chosen = [n for n in "ab" if any(allowed(n, f) for f in formats)]
    able = [f for f in formats if all(allowed(n, f) for n in chosen)]
    arguments = dict(
        max_bytes=max_bytes,
        quantization=quantization,
        min_speedup=min_speedup,
        activation=activation,
    )
    smallest = [total({n: 1 for n in chosen}, f) for f in able]
    if not chosen or max_bytes < min(smallest):
        with pytest.raises(ValueError, match=r"max_bytes|min_speedup|No rank"):
            planned(layers, **arguments)
        return
    ranks, stored = planned(layers, **arguments)
    assert sorted(ranks) == chosen and stored in able
    assert total(ranks, stored) <= max_bytes
    for name, rank in ranks.items():
        assert rank in allowed(name, stored)
        for larger in allowed(name, stored):
            if larger > rank:
                assert total({**ranks, name: larger}, stored) > max_bytes


def test_half_precision_is_planned_like_float32():
    """The file holds float32 for both."""
    ranks = [
        planned(
            [embedding(200, np.ones(64), dtype=dtype)],
            max_bytes=20_000,
            quantization=None,
        )[0]["tokens"]
        for dtype in ("bfloat16", "float32")
    ]
    assert ranks[0] == ranks[1]
    sizes = [stored_bytes(ranks[0] + i, 200, 64, None) for i in (0, 1)]
    assert sizes[0] <= 20_000 < sizes[1]


# Bits that are chosen


@pytest.mark.parametrize(
    ("size", "activation", "weighted"),
    [
        ("compression", "relu", False),
        ("compression", None, True),
        ("max_bytes", "relu", True),
    ],
)
def test_auto_takes_what_loses_least(size, activation, weighted):
    """Against the factors of all three, as the layers compute with them."""
    rows, winners = 400, set()
    counts = np.geomspace(200, 1, rows).astype(int)
    options = {"activation": activation, "verbose": 0}
    if weighted:
        ids = np.repeat(np.arange(rows), counts - 1)
        options["calibration_data"] = [ids[np.newaxis]]
    for decay, share, min_speedup in (
        (0.99, 0.17, None),  # much to keep: many directions, coarsely
        (0.8, 0.06, None),  # little to keep: few, finely
        (0.9, 0.3, 8.0),  # no more directions to be had: exactly
    ):
        model = model_of(embedding(rows, decay ** np.arange(128)))
        options[size] = 1 / share
        if size == "max_bytes":
            options[size] = int(share * 4 * rows * 128)
        options["min_speedup"] = min_speedup
        errors = {}
        for stored in QUANTIZATIONS:
            try:
                student = compress(model, quantization=stored, **options)
            except ValueError as error:
                assert "min_speedup" in str(error) and stored == "int4"
                continue
            errors[stored] = lost_by(
                student, model, counts if weighted else None
            )
        best = min(errors, key=errors.get)
        student = compress(model, quantization="auto", **options)
        assert student.get_layer("tokens").quantization == best, errors
        lost = lost_by(student, model, counts if weighted else None)
        assert lost == pytest.approx(errors[best], rel=1e-5)
        winners.add(best)
    assert winners == set(QUANTIZATIONS)


def test_auto_weighs_the_rows():
    """Where the frequent ones have few directions, exactly beats many."""
    layer = embedding(400, np.ones(128))
    table = to_numpy(layer.embeddings).copy()
    table[:80, 30:] = 0
    layer.embeddings.assign(table)
    model = model_of(layer)
    ids = np.repeat(np.arange(80), 5_000)[np.newaxis]
    weights = 1.0 + np.bincount(ids[0], minlength=400)
    options = dict(max_bytes=34_816, verbose=0)
    plain = compress(model, **options).get_layer("tokens")
    assert plain.quantization == "int4"
    options["calibration_data"] = [ids]
    weighted = compress(model, **options).get_layer("tokens")
    assert weighted.quantization == "int8"
    errors = {
        stored: lost_by(
            compress(model, quantization=stored, **options), model, weights
        )
        for stored in QUANTIZATIONS
    }
    assert min(errors, key=errors.get) == "int8"


@QUANTIZATION
@FORM
def test_what_is_expected_is_what_is_lost(quantization, activation, use_bias):
    """Before any training, of one table or of two that are not tied."""
    layer = embedding(500, np.geomspace(1, 0.1, 80), tie_weights=use_bias)
    model = model_of(layer)
    form = {"activation": activation, "use_bias": use_bias}
    options = dict(max_bytes=40_000, quantization=quantization, **form)
    student = compress(model, **options, verbose=0)
    factors = student.get_layer("tokens")
    expected = [
        expected_loss(
            Table.of(array), factors.rank, SizeRequest(**options), quantization
        )
        for array in Target(layer).tables()
    ]
    lost = [lost_by(student, model)]
    if not factors.tie_weights:
        table = to_numpy(layer.reverse_embeddings)
        found = to_numpy(factors.reverse_embeddings)
        lost.append(np.square(table - found).sum() / np.square(table).sum())
    np.testing.assert_allclose(lost, expected, rtol=1e-3)


# Cheaper projections


@QUANTIZATION
@pytest.mark.parametrize(
    "size",
    [{"compression": 1.5}, {"max_bytes": 10**6}, {"max_error": 0.02}],
    ids=["compression", "bytes", "error"],
)
def test_min_speedup_limits_every_size(size, quantization):
    layer = embedding(200, 0.9 ** np.arange(96))
    size = {**size, "quantization": quantization}
    without, _ = planned([layer], **size)
    for min_speedup in (1.0, 1.9, 2.0, 3.3, 7.0):
        fast = [
            rank
            for rank in range(1, 97)
            if speedup(rank, 200, 96, quantization) >= min_speedup
        ]
        if not fast:
            assert quantization == "int4"
            with pytest.raises(ValueError, match="at most 2.02 .*in int4"):
                planned([layer], **size, min_speedup=min_speedup)
            continue
        ranks, _ = planned([layer], **size, min_speedup=min_speedup)
        assert ranks["tokens"] == min(without["tokens"], max(fast))
    assert quantization == "int4" or ranks["tokens"] < without["tokens"]


@QUANTIZATION
def test_min_speedup_with_a_rank(quantization):
    layer = embedding(200, np.ones(96))
    arguments = dict(quantization=quantization, min_speedup=2.0)
    assert planned([layer], rank=32, **arguments)[0] == {"tokens": 32}
    with pytest.raises(
        ValueError,
        match="'tokens': `rank` must be at most 32 .*rank=33, min_speedup=2.0",
    ):
        planned([layer], rank=33, **arguments)


def test_tables_that_cannot_be_so_fast_are_left_or_refused():
    layers = [embedding(300, np.ones(64)), embedding(6, np.ones(5), "few")]
    request = dict(max_bytes=10**6, min_speedup=4.0, quantization=None)
    assert planned(layers, **request)[0] == {"tokens": 13}
    assert planned(layers, rank=2, min_speedup=4.0)[0] == {"tokens": 2}
    named = "'few': `min_speedup` must be at most 2.72 .*min_speedup=4.0"
    with pytest.raises(ValueError, match=named):
        planned(layers, optional=False, **request)
    with pytest.raises(ValueError, match=named):
        planned(layers[1:], **request)
    with pytest.raises(ValueError, match="'tokens': .*at most 1.64 .*in int4"):
        planned(layers[:1], **{**request, "quantization": "int4"})
    # Whole blocks are too slow here: int4 is out, and nothing else.
    request["quantization"] = "auto"
    assert planned(layers, **request) == ({"tokens": 13}, None)


# The model that comes out


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_compute_as_they_are_stored(quantization, tmp_path):
    """After saving and loading, too."""
    model = tied_model(300, 64)
    student = compress(
        model, max_bytes=9_000, quantization=quantization, verbose=0
    )
    layer = student.get_layer("tokens")
    assert layer.quantization == quantization
    assert stored_bytes(layer.rank, 300, 64, quantization) <= 9_000
    floats = compress(model, rank=layer.rank, verbose=0)
    rounded = floats.get_layer("tokens")
    assert rounded.quantization is None
    ids = np.arange(300)[np.newaxis]
    assert np.abs(to_numpy(student(ids)) - to_numpy(floats(ids))).max() > 0
    rounded.quantization = quantization
    np.testing.assert_allclose(
        to_numpy(student(ids)), to_numpy(floats(ids)), rtol=1e-6, atol=1e-6
    )
    save_model(student, tmp_path / "student.keras")
    loaded = load_model(tmp_path / "student.keras")
    assert loaded.get_layer("tokens").quantization == quantization
    np.testing.assert_array_equal(to_numpy(loaded(ids)), to_numpy(student(ids)))


def test_one_quantization_for_all_tables_and_heads():
    layers = [
        embedding(300, np.ones(64), "a"),
        embedding(200, np.ones(64), "b"),
    ]
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Add()([layer(ids) for layer in layers])
    model = keras.Model(ids, keras.layers.Dense(300, name="head")(x))
    student = compress(model, 4.0, heads="factorize", verbose=0)
    report = compression_report(student)
    assert [row.layer for row in report.rows] == ["a", "b", "head"]
    (quantization,) = {row.quantization for row in report.rows}
    assert quantization is not None


# What is refused


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"quantization": "int2"}, "'int8', 'int4'.* quantization='int2'"),
        ({"quantization": 8}, "quantization=8"),
        ({"min_speedup": 0.5}, "at least 1.* min_speedup=0.5"),
        ({"min_speedup": "2"}, "min_speedup='2'"),
        ({"min_speedup": True}, "min_speedup=True"),
        ({"min_speedup": float("nan")}, "min_speedup=nan"),
        ({"min_speedup": 100.0}, "at most 12.6.* min_speedup=100.0"),
        ({"min_speedup": 2, "rank": 7}, "at most 6 .* rank=7, min_speedup=2"),
        (
            {"quantization": "int8", "max_bytes": 144},
            "too small.* take 145 bytes.* max_bytes=144",
        ),
        (
            {"quantization": "int4", "max_bytes": 1_000},
            "take 1674 bytes.* max_bytes=1000",
        ),
        ({"max_bytes": 144}, "take 145 bytes.* max_bytes=144"),
        (
            {"quantization": "int4", "max_error": 1e-4},
            "lose so little in int4.* max_error=0.0001",
        ),
    ],
)
def test_bad_requests(size, message):
    with pytest.raises(ValueError, match=message):
        planned([embedding(61, np.ones(16))], **size)
