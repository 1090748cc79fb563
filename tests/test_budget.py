"""Ranks and bits together: budgets of stored bytes, and cheaper projections."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import ops

from keras_distilled_embedding import budget
from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding._weights import TableWeights
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.targets import Target
from tests.test_compression import make_model
from tests.test_compression import no_work  # noqa: F401
from tests.test_ranks import table_with_spectrum

QUANTIZATIONS = (None, "int8", "int4")
ROUNDING = pytest.mark.parametrize("rounding", QUANTIZATIONS)
LIFTED = pytest.mark.parametrize("activation", [None, "relu"])


def stored_bytes(rank, rows, columns, rounding):
    """The arrays that a file holds, one by one."""
    if rounding is None:
        arrays = [("f4", rows, rank), ("f4", rank, columns)]
    elif rounding == "int8":
        arrays = [("i1", rows, rank), ("f4", 1), ("i1", rank, columns)]
        arrays += [("f4", columns)]
    else:
        blocks = int(np.ceil(rank / 32))
        arrays = [("u1", rows, 16 * blocks), ("f2", rows, blocks)]
        arrays += [("i1", 32 * blocks, columns), ("f4", columns)]
    return sum(np.empty(shape, dtype).nbytes for dtype, *shape in arrays)


def multiplied_columns(rank, rounding):
    return int(np.ceil(rank / 32)) * 32 if rounding == "int4" else rank


def speedup(rank, rows, columns, rounding):
    cost = multiplied_columns(rank, rounding) * (rows + columns)
    return rows * columns / cost


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


def model_of(*layers):
    """ids -> the layers' projections of each other's rows, summed up."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Add()([x(ids) for x in layers]) if layers[1:] else None
    x = layers[0](ids) if x is None else x
    return keras.Model(ids, layers[0](x, reverse=True), name="model")


def planned(layers, optional=True, **request):
    targets = [Target(layer) for layer in layers]
    request = SizeRequest(**{"compression": None, **request})
    ranks, rounding = plan(targets, request, TableWeights(None, None), optional)
    return {target.name: rank for target, rank in ranks.items()}, rounding


def to_numpy(x):
    return ops.convert_to_numpy(x)


def lost_by(student, model, name="tokens", weights=None):
    """The share of a table's energy that the layer, as it computes, loses."""
    table = to_numpy(model.get_layer(name).embeddings)
    lost = table - to_numpy(student.get_layer(name).embeddings)
    weights = np.ones(len(table)) if weights is None else weights
    return (
        weights @ np.square(lost).sum(1) / (weights @ np.square(table).sum(1))
    )


# A budget in bytes


@ROUNDING
@LIFTED
def test_one_table_has_the_best_rank_there_is(rounding, activation):
    """Of all that fit, by the singular values."""
    rows, values = 150, np.geomspace(1, 0.05, 72)
    layer = embedding(rows, values)
    shape = (rows, len(values))
    energies = values**2 / np.square(values).sum()
    largest = (rows * 72 - 1) // (rows + 72)
    seen = set()
    for max_bytes in range(700, 30_000, 1_511):
        fitting = [
            rank
            for rank in range(1, largest + 1)
            if stored_bytes(rank, *shape, rounding) <= max_bytes
        ]
        arguments = dict(
            max_bytes=max_bytes, quantization=rounding, activation=activation
        )
        if not fitting:
            with pytest.raises(ValueError, match=f"max_bytes={max_bytes}"):
                planned([layer], **arguments)
            continue
        ranks, chosen = planned([layer], **arguments)
        assert chosen == rounding
        svd = {r: r - (activation == "relu") for r in fitting}
        best = min(energies[svd[r] :].sum() for r in fitting)
        assert energies[svd[ranks["tokens"]] :].sum() == best
        seen.add(ranks["tokens"])
    if rounding == "int4":
        assert seen == {32, largest}
    else:
        assert len(seen) > 5


@settings(max_examples=30, deadline=None)
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
            decays[i] ** np.arange(min(columns[i], rows[i])),
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

    def allowed(name, rounding):
        v, d = shapes[name]
        return [
            rank
            for rank in range(1, d + 1)
            if rank * (v + d) < v * d
            and speedup(rank, v, d, rounding) >= (min_speedup or 0)
        ]

    def total(ranks, rounding):
        return sum(
            copies[n] * stored_bytes(r, *shapes[n], rounding)
            for n, r in ranks.items()
        )

    roundings = QUANTIZATIONS if quantization == "auto" else (quantization,)
    # Tables that are too small for any rank are left as they are.
    chosen = [n for n in "ab" if any(allowed(n, r) for r in roundings)]
    able = [r for r in roundings if all(allowed(n, r) for n in chosen)]
    arguments = dict(
        max_bytes=max_bytes,
        quantization=quantization,
        min_speedup=min_speedup,
        activation=activation,
    )
    smallest = [total({n: 1 for n in chosen}, r) for r in able]
    if not chosen or max_bytes < min(smallest):
        with pytest.raises(ValueError, match=r"max_bytes|min_speedup|No rank"):
            planned(layers, **arguments)
        return
    ranks, rounding = planned(layers, **arguments)
    assert sorted(ranks) == chosen and rounding in able
    spent = total(ranks, rounding)
    assert spent <= max_bytes
    for name, rank in ranks.items():
        assert rank in allowed(name, rounding)
        for larger in allowed(name, rounding):
            if larger > rank:
                assert total({**ranks, name: larger}, rounding) > max_bytes


@ROUNDING
def test_two_tables_share_a_budget_as_well_as_they_can(rounding):
    """Against every pair of ranks, up to the last step that does not fit."""
    spectra = {
        "a": np.geomspace(1, 0.2, 96),
        "b": np.geomspace(1, 0.2, 80),
    }
    rows = {"a": 900, "b": 150}
    layers = [
        embedding(rows[n], values, name=n) for n, values in spectra.items()
    ]
    shares = {n: v**2 / np.square(v).sum() for n, v in spectra.items()}
    options = {
        n: range(1, rows[n] * len(v) // (rows[n] + len(v)))
        for n, v in spectra.items()
    }

    def cost(pair):
        return sum(
            stored_bytes(r, rows[n], len(spectra[n]), rounding)
            for n, r in zip("ab", pair)
        )

    def error(pair):
        return sum(shares[n][r - 1 :].sum() for n, r in zip("ab", pair))

    pairs = [(cost(p), error(p)) for p in itertools.product(*options.values())]
    step = max(cost((33, 1)), cost((1, 33))) - cost((1, 1))
    if rounding != "int4":
        step = max(cost((2, 1)), cost((1, 2))) - cost((1, 1))
    largest = max(c for c, _ in pairs)
    for max_bytes in range(cost((1, 1)), largest, largest // 13):
        ranks, _ = planned(layers, max_bytes=max_bytes, quantization=rounding)
        pair = ranks["a"], ranks["b"]
        assert cost(pair) <= max_bytes
        within = [e for c, e in pairs if c <= max_bytes - step]
        assert error(pair) <= min(within, default=np.inf) + 1e-9


def test_floats_count_as_the_dtype_of_each_table():
    layers = [
        embedding(200, np.ones(64), name="a", dtype="bfloat16"),
        embedding(200, 0.9 ** np.arange(64), name="b"),
    ]
    ranks, _ = planned(layers, max_bytes=20_000)
    spent = sum(
        itemsize * ranks[name] * 264 for name, itemsize in (("a", 2), ("b", 4))
    )
    assert 20_000 - 4 * 264 < spent <= 20_000


# Bits that are chosen


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_auto_takes_what_loses_least(activation, weighted):
    """Against the factors of all three, as the layers compute with them."""
    rows, winners = 400, set()
    frequencies = np.geomspace(1, 0.01, rows) if weighted else None
    for decay, share, min_speedup in (
        (0.99, 0.17, None),  # much to keep: many directions, coarsely
        (0.8, 0.06, None),  # little to keep: few, finely
        (0.9, 0.3, 8.0),  # no more directions to be had: exactly
    ):
        layer = embedding(rows, decay ** np.arange(128))
        model = model_of(layer)
        options = dict(
            max_bytes=int(share * 4 * rows * 128),
            min_speedup=min_speedup,
            activation=activation,
            token_frequencies=frequencies,
            verbose=0,
        )
        errors = {}
        for rounding in QUANTIZATIONS:
            try:
                student = compress(model, quantization=rounding, **options)
            except ValueError as error:
                assert "min_speedup" in str(error) and rounding == "int4"
                continue
            errors[rounding] = lost_by(student, model, weights=frequencies)
        best = min(errors, key=errors.get)
        student = compress(model, quantization="auto", **options)
        assert student.get_layer("tokens").quantization == best, errors
        assert lost_by(student, model, weights=frequencies) == pytest.approx(
            errors[best], rel=1e-5
        )
        winners.add(best)
    assert winners == set(QUANTIZATIONS)


def test_auto_weighs_the_rows():
    """Where the frequent ones have few directions, exactly beats many."""
    layer = embedding(400, np.ones(128))
    table = to_numpy(layer.embeddings)
    table[:80, 30:] = 0
    layer.embeddings.assign(table)
    model = model_of(layer)
    frequencies = np.where(np.arange(400) < 80, 1.0, 1e-5)
    options = dict(max_bytes=34_816, quantization="auto", verbose=0)
    plain = compress(model, **options).get_layer("tokens")
    weighted = compress(model, token_frequencies=frequencies, **options)
    assert plain.quantization == "int4"
    assert weighted.get_layer("tokens").quantization == "int8"
    errors = {
        rounding: lost_by(
            compress(
                model,
                token_frequencies=frequencies,
                **{**options, "quantization": rounding},
            ),
            model,
            weights=frequencies,
        )
        for rounding in QUANTIZATIONS
    }
    assert min(errors, key=errors.get) == "int8"


@ROUNDING
@LIFTED
def test_what_is_expected_is_what_is_lost(rounding, activation):
    """Before any training, of one table or of two that are not tied."""
    layer = embedding(
        500, np.geomspace(1, 0.1, 80), tie_weights=activation is None
    )
    model = model_of(layer)
    student = compress(
        model,
        max_bytes=40_000,
        quantization=rounding,
        activation=activation,
        verbose=0,
    )
    factors = student.get_layer("tokens")
    tables = TableWeights(None, None).tables([Target(layer)])
    expected = [
        budget.expected_loss(
            table, factors.rank, activation == "relu", rounding
        )
        for table in next(iter(tables.values()))
    ]
    lost = [lost_by(student, model)]
    if not factors.tie_weights:
        table = to_numpy(layer.reverse_embeddings)
        found = to_numpy(factors.reverse_embeddings)
        lost.append(np.square(table - found).sum() / np.square(table).sum())
    # The sweeps lower it a little.
    np.testing.assert_allclose(lost, expected, rtol=0.05)


# Cheaper projections


@ROUNDING
@pytest.mark.parametrize(
    "size",
    [{"compression": 1.5}, {"max_bytes": 10**6}, {"max_error": 1e-3}],
    ids=["compression", "bytes", "error"],
)
def test_min_speedup_limits_every_size(size, rounding):
    layer = embedding(200, 0.9 ** np.arange(96))
    without, _ = planned([layer], quantization=rounding, **size)
    for min_speedup in (1.0, 1.9, 2.0, 3.3):
        arguments = dict(quantization=rounding, min_speedup=min_speedup, **size)
        fast = [
            rank
            for rank in range(1, 96)
            if speedup(rank, 200, 96, rounding) >= min_speedup
        ]
        if rounding == "int4" and min_speedup == 3.3:
            assert not fast
            with pytest.raises(ValueError, match="min_speedup=3.3 is out of"):
                planned([layer], **arguments)
            continue
        ranks, _ = planned([layer], **arguments)
        assert ranks["tokens"] == min(without["tokens"], max(fast))
    assert ranks["tokens"] < without["tokens"]


@ROUNDING
def test_min_speedup_with_a_rank(rounding):
    layer = embedding(200, np.ones(96))
    arguments = dict(quantization=rounding, min_speedup=2.0)
    assert planned([layer], rank=32, **arguments)[0] == {"tokens": 32}
    with pytest.raises(
        ValueError,
        match="'tokens': `rank` must be at most 32 .*rank=33, min_speedup=2.0",
    ):
        planned([layer], rank=33, **arguments)


def test_tables_that_cannot_be_so_fast_are_left_or_refused():
    layers = [embedding(300, np.ones(64)), embedding(5, np.ones(5), "few")]
    request = dict(max_bytes=10**6, min_speedup=4.0)
    assert planned(layers, **request)[0] == {"tokens": 13}
    assert planned(layers, rank=3, min_speedup=4.0)[0] == {"tokens": 3}
    named = "'few': min_speedup=4.0 is out of reach .*rank 1 takes 2.5 times"
    with pytest.raises(ValueError, match=named):
        planned(layers, optional=False, **request)
    with pytest.raises(ValueError, match=named):
        planned(layers[1:], **request)
    with pytest.raises(ValueError, match="which int4 stores as 32, takes 1.6"):
        planned(layers[:1], quantization="int4", **request)
    # Whole blocks are too slow here: int4 is out, and nothing else.
    assert planned(layers, quantization="auto", **request)[1] is None
    assert planned(layers, quantization="int8", **request)[1] == "int8"


# The model that comes out


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_layers_compute_as_they_are_stored(quantization, tmp_path):
    """After saving and loading, too."""
    model = model_of(embedding(300, np.geomspace(1, 0.1, 64)))
    student = compress(
        model, max_bytes=9_000, quantization=quantization, verbose=0
    )
    layer = student.get_layer("tokens")
    assert layer.quantization == quantization
    shape = (layer.rank, layer.input_dim, layer.output_dim)
    assert stored_bytes(*shape, quantization) <= 9_000
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
    head = keras.layers.Dense(300, name="head")
    model = keras.Model(ids, head(x))
    student = compress(
        model, 4.0, quantization="int8", heads="factorize", verbose=0
    )
    report = compression_report(student)
    assert [row.layer for row in report.rows] == ["a", "b", "head"]
    assert {row.quantization for row in report.rows} == {"int8"}


# What is refused, before any work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int2"}, "'int4', 'auto'.* quantization='int2'"),
        ({"quantization": 8}, "quantization=8"),
        ({"quantization": "auto"}, "needs `max_bytes`.* max_bytes=None"),
        ({"quantization": "auto", "rank": 3}, "needs `max_bytes`"),
        (
            {"quantization": "int8", "hidden_dim": 4},
            "`quantization` .* with `hidden_dim`.*'int8', hidden_dim=4",
        ),
        (
            {"min_speedup": 2.0, "hidden_dim": 4},
            "`min_speedup` .* with `hidden_dim`.* min_speedup=2.0",
        ),
        ({"min_speedup": 0.5}, "at least 1.* min_speedup=0.5"),
        ({"min_speedup": "2"}, "min_speedup='2'"),
        ({"min_speedup": True}, "min_speedup=True"),
        ({"min_speedup": float("nan")}, "min_speedup=nan"),
        ({"min_speedup": 100.0}, "min_speedup=100.0 is out of reach.*12.67"),
        ({"min_speedup": 2, "rank": 7}, "at most 6 .* rank=7, min_speedup=2"),
        (
            {"quantization": "int8", "max_bytes": 144},
            "too small.* take 145 bytes as int8.* max_bytes=144",
        ),
        (
            {"quantization": "int4", "max_bytes": 1_000},
            "take 1674 bytes as int4.* max_bytes=1000",
        ),
        (
            {"quantization": "auto", "max_bytes": 144},
            "take 145 bytes as int8.* max_bytes=144",
        ),
    ],
)
def test_bad_options(options, message, no_work):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        compress(make_model(), verbose=0, **options)
