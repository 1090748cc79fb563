"""Ranks and bits together: budgets of stored bytes, and cheaper projections."""

import itertools
import re

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_distilled_embedding import budget
from keras_distilled_embedding import compress
from keras_distilled_embedding import compression_report
from keras_distilled_embedding import load_model
from keras_distilled_embedding import save_model
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import allocate_ranks
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import expected_error
from keras_distilled_embedding.factorization import spectrum_of
from keras_distilled_embedding.quantization import format_of
from keras_distilled_embedding.targets import Target
from tests import shared
from tests.shared import basis_and_offset
from tests.shared import rounded_features
from tests.shared import stored_bytes
from tests.shared import stored_columns
from tests.shared import tied_model
from tests.shared import to_numpy

QUANTIZATIONS = (None, "int8", "int4", "int2")
QUANTIZATION = pytest.mark.parametrize("quantization", QUANTIZATIONS)
FORMATS = [(None, True), *shared.FORMATS]
FORMAT = pytest.mark.parametrize(("quantization", "row_scales"), FORMATS)
FORM = pytest.mark.parametrize(
    ("activation", "use_bias"), [("relu", True), (None, True), ("relu", False)]
)


def speedup(rank, rows, columns, quantization, row_scales=True):
    rank = stored_columns(rank, quantization, row_scales)
    return rows * columns / (rank * (rows + columns))


def is_cheap(rank, *table):
    """Whether a projection is no dearer than with the table, within 5 %."""
    return rank == 1 or speedup(rank, *table) >= 1 / 1.05


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
    """Ranks by the names of layers, and the format, as in `FORMATS`."""
    targets = [Target(layer) for layer in layers]
    tables = {t: [Table.of(array) for array in t.tables()] for t in targets}
    ranks, kind, _ = plan(tables, SizeRequest(**request), optional)
    chosen = (None, True)
    if kind is not None:
        chosen = (kind.name, kind.has_row_scales)
    return {target.name: rank for target, rank in ranks.items()}, chosen


@pytest.fixture
def only(monkeypatch, quantization, row_scales):
    """Leaves one kind of scales to choose from."""
    if quantization is not None:
        kind = format_of(quantization, row_scales)
        monkeypatch.setattr(budget, "formats_of", lambda name: [kind])


def lost_by(student, model, weights=None):
    """The share of a table's energy that the layer, as it computes, loses."""
    table = to_numpy(model.get_layer("tokens").embeddings)
    lost = table - to_numpy(student.get_layer("tokens").embeddings)
    weights = np.ones(len(table)) if weights is None else weights
    return (
        weights @ np.square(lost).sum(1) / (weights @ np.square(table).sum(1))
    )


@pytest.mark.parametrize("kind", ["ReversibleEmbedding", "Embedding"])
@pytest.mark.parametrize("min_speedup", [None, 1.0])
def test_who_asks_for_speed_gets_no_slow_format(kind, min_speedup):
    """2 bits with a scale a column lose less at equal bytes.

    LiteRT has no fast product for them; a look-up needs none.
    """
    rows = 9_000
    layer = getattr(keras.layers, kind)(rows, 128, name="tokens")
    layer.build()
    layer.embeddings.assign(
        table_with_spectrum(rows, np.geomspace(1, 0.03, 128))
    )
    size = {"compression": 12.0, "min_speedup": min_speedup}
    _, found = planned([layer], quantization="int2", **size)
    is_felt = min_speedup is not None and kind == "ReversibleEmbedding"
    assert found == ("int2", is_felt)


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
    fitting, seen = {}, set()
    for max_bytes in range(700, 12_000, 777):
        for name, row_scales in FORMATS:
            # Two bits with a scale a row hold no offset in a column.
            refused = (activation, use_bias, name) == ("relu", False, "int2")
            if name == quantization and not (refused and row_scales):
                sizes = {
                    rank: stored_bytes(
                        rank, rows, len(values), name, use_bias, row_scales
                    )
                    for rank in range(1, len(values) + 1)
                }
                fitting[name, row_scales] = [
                    rank
                    for rank, size in sizes.items()
                    if size <= max_bytes
                    and size < 4 * rows * len(values)
                    and is_cheap(rank, rows, len(values), name, row_scales)
                ]
        arguments = dict(max_bytes=max_bytes, quantization=quantization, **form)
        if not any(fitting.values()):
            with pytest.raises(ValueError, match=f"max_bytes={max_bytes}"):
                planned([layer], **arguments)
            continue
        ranks, chosen = planned([layer], **arguments)
        best = min(
            energies[rank - (not use_bias) :].sum() for rank in fitting[chosen]
        )
        assert energies[ranks["tokens"] - (not use_bias) :].sum() == best
        seen.add((*chosen, ranks["tokens"]))
    assert len(seen) > 5
    assert {r for name, by_row, r in seen if (name, by_row) == FORMATS[2]} <= {
        32,
        64,
        72,
    }


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
        kind, by_row = stored
        return [
            rank
            for rank in range(1, d + 1)
            if stored_bytes(rank, v, d, kind, True, by_row) < 4 * v * d
            and speedup(rank, v, d, *stored) >= (min_speedup or 0)
            and is_cheap(rank, v, d, *stored)
        ]

    def total(ranks, stored):
        kind, by_row = stored
        return sum(
            copies[n] * stored_bytes(r, *shapes[n], kind, True, by_row)
            for n, r in ranks.items()
        )

    # Tables that are too small for any rank are left as they are.
    chosen = {
        stored: [n for n in "ab" if allowed(n, stored)]
        for stored in FORMATS
        if quantization in ("auto", stored[0])
    }
    able = {
        stored: names
        for stored, names in chosen.items()
        if names and total(dict.fromkeys(names, 1), stored) <= max_bytes
    }
    arguments = dict(
        max_bytes=max_bytes,
        quantization=quantization,
        min_speedup=min_speedup,
        activation=activation,
    )
    if not able:
        with pytest.raises(ValueError, match=r"max_bytes|min_speedup|No rank"):
            planned(layers, **arguments)
        return
    ranks, stored = planned(layers, **arguments)
    assert sorted(ranks) == able[stored]
    assert len(ranks) == max(map(len, able.values()))
    assert total(ranks, stored) <= max_bytes
    for name, rank in ranks.items():
        assert rank in allowed(name, stored)
        for larger in allowed(name, stored):
            if larger > rank:
                assert total({**ranks, name: larger}, stored) > max_bytes


@pytest.mark.parametrize("quantization", ["auto", "int8", "int4", "int2"])
@pytest.mark.parametrize("size", [{"compression": 1.5}, {"max_bytes": 60_000}])
def test_few_rows_never_multiply_more_than_their_table(quantization, size):
    """Where few bits leave room for all columns; a rank that is named stays."""
    layer = embedding(300, np.ones(96))
    ranks, stored = planned([layer], quantization=quantization, **size)
    assert is_cheap(ranks["tokens"], 300, 96, *stored)
    assert speedup(ranks["tokens"] + 4, 300, 96, *stored) < 1.1
    named, _ = planned([layer], quantization=quantization, rank=72)
    assert named == {"tokens": 72}
    # Of many rows the basis is a small part: all columns are kept.
    layer = embedding(4_000, np.ones(96))
    ranks, _ = planned([layer], quantization="int4", compression=1.5)
    assert ranks == {"tokens": 96}


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


def losses_of(model, options, weights=None):
    """What each format loses, as the layers compute with it."""
    return {
        name: lost_by(
            compress(model, quantization=name, **options), model, weights
        )
        for name in QUANTIZATIONS
    }


@pytest.mark.parametrize(
    ("size", "activation", "weighted"),
    [
        ("compression", "relu", False),
        ("compression", None, True),
        ("max_bytes", "relu", True),
    ],
)
def test_auto_takes_what_loses_least(size, activation, weighted):
    """Against the factors of all, as the layers compute with them."""
    rows, winners = 400, set()
    counts = np.geomspace(200, 1, rows).astype(int)
    options = {"activation": activation, "verbose": 0}
    if weighted:
        ids = np.repeat(np.arange(rows), counts - 1)
        options["calibration_data"] = [ids[np.newaxis]]
    weights = counts if weighted else None
    for decay, share, min_speedup in (
        (1.0, 0.12, None),  # all to keep: the most directions there can be
        (0.99, 0.17, None),  # much to keep: many directions, coarsely
        (0.8, 0.06, None),  # little to keep: few, finely
        (0.9, 0.3, 8.0),  # no more directions to be had: exactly
    ):
        model = model_of(embedding(rows, decay ** np.arange(128)))
        options[size] = 1 / share
        if size == "max_bytes":
            options[size] = int(share * 4 * rows * 128)
        options["min_speedup"] = min_speedup
        errors = losses_of(model, options, weights)
        student = compress(model, quantization="auto", **options)
        chosen = student.get_layer("tokens").quantization
        assert errors[chosen] <= 1.01 * min(errors.values()), errors
        # Singular values that are alike leave their directions open.
        lost = lost_by(student, model, weights)
        assert lost == pytest.approx(errors[chosen], rel=0.05)
        winners.add(chosen)
    assert winners == set(QUANTIZATIONS)


@pytest.mark.parametrize("quantization", ["int4", "int2"])
def test_the_better_scales_are_taken(quantization, monkeypatch):
    """A scale a row where rows differ in size, if its bytes are worth it."""
    layer = embedding(600, np.ones(64))
    even = to_numpy(layer.embeddings)
    sizes = np.geomspace(0.1, 10, 600)[:, np.newaxis]
    chosen = set()
    for table in (even, sizes * even):
        layer.embeddings.assign(table)
        model = model_of(layer)
        options = dict(compression=9.0, quantization=quantization, verbose=0)
        student = compress(model, **options)
        errors = {}
        for row_scales in (True, False):
            kind = format_of(quantization, row_scales)
            with monkeypatch.context() as patch:
                patch.setattr(budget, "formats_of", {quantization: [kind]}.get)
                one = compress(model, **options)
            assert one.get_layer("tokens").row_scales == row_scales
            errors[row_scales] = lost_by(one, model)
        found = student.get_layer("tokens").row_scales
        assert errors[found] == min(errors.values()), errors
        assert lost_by(student, model) == pytest.approx(errors[found], rel=0.05)
        chosen.add(found)
    assert quantization == "int4" or chosen == {True, False}


def test_auto_weighs_the_rows():
    """Where the frequent ones have few directions, exactly beats many."""
    layer = embedding(400, np.ones(128))
    table = to_numpy(layer.embeddings).copy()
    table[:80, 30:] = 0
    layer.embeddings.assign(table)
    model = model_of(layer)
    ids = np.repeat(np.arange(80), 5_000)[np.newaxis]
    weights = 1.0 + np.bincount(ids[0], minlength=400)
    options = dict(max_bytes=20_480, verbose=0)
    plain = compress(model, **options).get_layer("tokens")
    assert plain.quantization == "int2"
    options["calibration_data"] = [ids]
    weighted = compress(model, **options).get_layer("tokens")
    assert weighted.quantization == "int8"
    errors = losses_of(model, options, weights)
    assert min(errors, key=errors.get) == "int8"


def test_auto_says_why(capsys):
    """In a line: what is taken loses, and others lose at least."""
    model = model_of(embedding(400, 0.99 ** np.arange(128)))
    options = dict(compression=10.0)
    student = compress(model, **options)
    line = capsys.readouterr().out.splitlines()[0]
    layer = student.get_layer("tokens")
    assert line.startswith(f"{layer.quantization} at rank {layer.rank} ")
    assert " of the tables' energy; " in line
    (loses,) = re.findall(r"expected to lose ([\d.e-]+) of", line)
    others = line.split("others lose at least: ")[1].split(", ")
    others = {
        None if name == "floats" else name: float(share)
        for name, share in (other.split(" ") for other in others)
    }
    errors = losses_of(model, {**options, "verbose": 0})
    assert {layer.quantization, *others} == set(QUANTIZATIONS)
    assert float(loses) == pytest.approx(errors[layer.quantization], rel=0.25)
    for name, share in others.items():
        assert float(loses) <= share <= 1.25 * errors[name]
    # Where it is one that was asked for, nothing was chosen.
    compress(model, **options, quantization="int8")
    assert "expected" not in capsys.readouterr().out
    model = tied_model()
    compress(model, calibration_data=[np.arange(300)[np.newaxis]])
    assert "of the logits' energy" in capsys.readouterr().out


@QUANTIZATION
@FORM
def test_what_is_expected_is_what_is_lost(quantization, activation, use_bias):
    """Before any training, of one table or of two that are not tied."""
    layer = embedding(500, np.geomspace(1, 0.1, 80), tie_weights=use_bias)
    model = model_of(layer)
    form = {"activation": activation, "use_bias": use_bias}
    student = compress(
        model, max_bytes=40_000, quantization=quantization, verbose=0, **form
    )
    factors = student.get_layer("tokens")
    uses_relu = activation == "relu"
    expected = []
    for array in Target(layer).tables():
        table = Table.of(array)
        if quantization is None:
            spectrum = spectrum_of(table, 1, use_bias or uses_relu)
            components = factors.rank - (uses_relu and not use_bias)
            expected.append(spectrum.error(components))
        else:
            expected.append(
                expected_error(
                    table, factors.rank, factors.format, uses_relu, use_bias
                )
            )
    lost = [lost_by(student, model)]
    if not factors.tie_weights:
        table = to_numpy(layer.reverse_embeddings)
        found = to_numpy(factors.reverse_embeddings)
        lost.append(np.square(table - found).sum() / np.square(table).sum())
    # Estimated before basis and offset are fitted to what was rounded.
    tolerance = 1e-3 if quantization is None else 0.25
    np.testing.assert_allclose(lost, expected, rtol=tolerance)


# Cheaper projections


@FORMAT
@pytest.mark.parametrize(
    "size",
    [{"compression": 1.5}, {"max_bytes": 10**6}, {"max_error": 0.02}],
    ids=["compression", "bytes", "error"],
)
@pytest.mark.usefixtures("only")
def test_min_speedup_limits_every_size(size, quantization, row_scales):
    layer = embedding(200, 0.9 ** np.arange(96))
    size = {**size, "quantization": quantization}
    if quantization == "int2" and "max_error" in size:
        size["max_error"] = 0.2
    without, _ = planned([layer], **size)
    for min_speedup in (1.0, 1.9, 2.0, 3.3, 7.0):
        fast = [
            rank
            for rank in range(1, 97)
            if speedup(rank, 200, 96, quantization, row_scales) >= min_speedup
        ]
        if not fast:
            assert (quantization, row_scales) == ("int4", True)
            with pytest.raises(ValueError, match="at most 2.02 .*in int4"):
                planned([layer], **size, min_speedup=min_speedup)
            continue
        ranks, _ = planned([layer], **size, min_speedup=min_speedup)
        assert ranks["tokens"] == min(without["tokens"], max(fast))
    if (quantization, row_scales) != ("int4", True):
        assert ranks["tokens"] < without["tokens"]


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
    # Rows of 32 codes are too slow here: only scales of columns are left.
    request["quantization"] = "int4"
    assert planned(layers, **request) == ({"tokens": 12}, ("int4", False))
    request["min_speedup"] = 30.0
    with pytest.raises(ValueError, match="'tokens': .*at most 26.37 .*in int4"):
        planned(layers[:1], **request)
    # Or no few bits at all.
    request["quantization"] = "auto"
    ranks, chosen = planned(layers, **request)
    assert ranks == {"tokens": 1} and chosen[0] in (None, "int8")


# The model that comes out


@FORMAT
@pytest.mark.usefixtures("only")
def test_layers_compute_as_they_are_stored(quantization, row_scales, tmp_path):
    """Against NumPy; after saving and loading, too."""
    model = tied_model(300, 64)
    student = compress(
        model, max_bytes=9_000, quantization=quantization, verbose=0
    )
    layer, body = student.get_layer("tokens"), student.get_layer("body")
    assert layer.quantization == quantization
    stored = stored_bytes(layer.rank, 300, 64, quantization, True, row_scales)
    assert stored <= 9_000
    assert layer.compression_ratio == pytest.approx(4 * 300 * 64 / stored)
    # Where they are not on the levels already.
    noise = np.random.default_rng(0).normal(size=layer.codes.shape)
    layer.codes.assign(to_numpy(layer.codes) + 0.05 * noise)
    features = np.maximum(to_numpy(layer.codes), 0)
    if quantization is not None:
        assert (layer.scales.shape[0] == 300) == row_scales
        features = rounded_features(layer)
    basis, offset = basis_and_offset(layer)
    table = features @ basis + offset
    kernel, bias = map(to_numpy, body.weights)
    ids = np.arange(300)[np.newaxis]
    np.testing.assert_allclose(
        to_numpy(student(ids)),
        np.tanh(table @ kernel + bias)[np.newaxis] @ table.T,
        rtol=1e-4,
        atol=1e-5,
    )
    save_model(student, tmp_path / "student.keras")
    loaded = load_model(tmp_path / "student.keras")
    assert loaded.get_layer("tokens").format is layer.format
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
        (
            {"quantization": "int3"},
            "'int8', 'int4', 'int2'.* quantization='int3'",
        ),
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
            {"quantization": "int4", "max_bytes": 160},
            "take 161 bytes.* max_bytes=160",
        ),
        (
            {"quantization": "int2", "max_bytes": 192},
            "take 193 bytes.* max_bytes=192",
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
