"""The non-linear funnel against NumPy, and against what no plain form can."""

import sys

import keras
import numpy as np
import pytest
import rich
from scipy.special import erf

from keras_distilled_embedding import factorize
from keras_distilled_embedding.factorization import funnel
from keras_distilled_embedding.factorization import learned
from keras_distilled_embedding.factorization.training import RowBatches
from keras_distilled_embedding.layers import DistilledEmbedding


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(funnel, "EPOCHS", 3)
    monkeypatch.setattr(funnel, "STEPS_PER_EPOCH", 5)


def curved_table(num_rows=400, num_columns=24, rank=3, hidden=12, seed=0):
    """Rows on a curved surface of few dimensions: no low rank fits them."""
    random = np.random.default_rng(seed)
    codes = random.normal(size=(num_rows, rank))
    kernel = 2 * random.normal(size=(rank, hidden))
    hidden_states = np.tanh(codes @ kernel + random.normal(size=hidden))
    return hidden_states @ random.normal(size=(hidden, num_columns))


def svd_error(table, rank, weights=1.0):
    roots = np.sqrt(np.broadcast_to(weights, len(table)))[:, None]
    energies = np.linalg.svd(roots * table, compute_uv=False) ** 2
    return energies[rank:].sum() / energies.sum()


def reference(result, function, hidden_function):
    hidden = hidden_function(
        result.codes.astype("float64") @ result.hidden_kernel
        + result.hidden_bias
    )
    return (
        function(result.codes.astype("float64")) @ result.basis
        + hidden @ result.hidden_basis
    )


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


FUNCTIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": gelu,
}


@pytest.mark.parametrize(
    ("activation", "hidden_activation", "method"),
    [
        ("relu", "gelu", "exact"),
        (None, "gelu", "exact"),
        (None, "tanh", "exact"),
        ("relu", "relu", "learned"),
        ("tanh", "gelu", "learned"),
    ],
)
def test_reconstructs_its_formula(
    short_training, activation, hidden_activation, method
):
    table = curved_table()
    weights = np.random.default_rng(1).uniform(size=400)
    result = factorize(
        table,
        3,
        hidden_dim=7,
        activation=activation,
        hidden_activation=hidden_activation,
        method=method,
        row_weights=weights,
    )
    shapes = [
        (name, getattr(result, name).shape, getattr(result, name).dtype)
        for name in (
            "codes",
            "basis",
            "hidden_kernel",
            "hidden_bias",
            "hidden_basis",
        )
    ]
    assert [shape for _, shape, _ in shapes] == [
        (400, 3),
        (3, 24),
        (3, 7),
        (7,),
        (7, 24),
    ]
    assert {str(dtype) for *_, dtype in shapes} == {"float32"}
    assert result.num_parameters == 400 * 3 + 3 * 24 + 3 * 7 + 7 + 7 * 24
    expected = reference(
        result, FUNCTIONS[activation], FUNCTIONS[hidden_activation]
    )
    np.testing.assert_allclose(result.reconstruct(), expected, atol=1e-4)
    np.testing.assert_allclose(
        result.reconstruct(slice(3, 9)), expected[3:9], atol=1e-4
    )
    lost = weights @ np.square(table - expected).sum(axis=1)
    energy = weights @ np.square(table).sum(axis=1)
    assert result.relative_error == pytest.approx(lost / energy, rel=1e-3)
    assert "hidden_kernel=(3, 7)" in repr(result)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_beats_the_svd_of_equal_size(monkeypatch, activation):
    monkeypatch.setattr(funnel, "EPOCHS", 40)
    table = curved_table()
    result = factorize(table, 4, hidden_dim=16, activation=activation)
    equal_rank = -(-result.num_parameters // (400 + 24))
    assert result.relative_error < 0.5 * svd_error(table, equal_rank)


def test_weighs_rows_and_columns(monkeypatch):
    monkeypatch.setattr(funnel, "EPOCHS", 15)
    monkeypatch.setattr(funnel, "STEPS_PER_EPOCH", 30)
    table = np.random.default_rng(0).normal(size=(300, 16))
    weights = np.where(np.arange(300) < 30, 1.0, 1e-3)
    plain = factorize(table, 4, hidden_dim=16)
    weighted = factorize(table, 4, hidden_dim=16, row_weights=weights)

    def error(result):
        residual = table - result.reconstruct()
        return weights @ np.square(residual).sum(axis=1)

    assert error(weighted) < 0.8 * error(plain)
    assert weighted.unweighted_error > plain.unweighted_error
    moment = np.diag([1.0] * 4 + [1e-3] * 12)
    weighted = factorize(table, 4, hidden_dim=16, column_weights=moment)
    columns = [
        np.square(table - r.reconstruct())[:, :4].sum()
        for r in (weighted, plain)
    ]
    assert columns[0] < 0.8 * columns[1]


def test_never_worse_than_its_start(monkeypatch):
    """A learning rate at which training diverges."""
    monkeypatch.setattr(funnel, "LEARNING_RATE", 5.0)
    monkeypatch.setattr(funnel, "EPOCHS", 4)
    table = curved_table()
    result = factorize(table, 4, hidden_dim=8, activation=None)
    assert result.relative_error < 1.02 * svd_error(table, 4)


def test_goes_back_to_the_best_epoch_and_stops_in_time():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    callback = funnel._KeepBest(0.5)
    callback.set_model(model)
    model.stop_training = False
    model.set_weights([np.full(w.shape, -1.0) for w in model.weights])
    callback.on_train_begin()

    def end_epoch(epoch, loss):
        model.set_weights([np.full(w.shape, epoch) for w in model.weights])
        callback.on_epoch_end(epoch, {"loss": loss})

    def weights_after_training():
        callback.on_train_end()
        return {float(w.reshape(())) for w in model.get_weights()}

    end_epoch(0, 0.6)
    assert weights_after_training() == {-1.0}  # worse than the start
    end_epoch(1, 0.4)
    assert weights_after_training() == {1.0}
    for epoch in range(2, 1 + funnel.PATIENCE):
        assert not model.stop_training
        end_epoch(epoch, 0.4)
    # A little lower is better, but not enough to go on for.
    assert not model.stop_training
    end_epoch(99, 0.4 * (1 - 0.9 * funnel.MIN_IMPROVEMENT))
    assert model.stop_training
    assert weights_after_training() == {99.0}


def test_gains_that_are_large_enough_go_on():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    callback = funnel._KeepBest(0.5)
    callback.set_model(model)
    model.stop_training = False
    callback.on_train_begin()
    for epoch in range(3 * funnel.PATIENCE):
        loss = 0.5 * (1 - 1.1 * funnel.MIN_IMPROVEMENT) ** epoch
        callback.on_epoch_end(epoch, {"loss": loss})
    assert not model.stop_training


def test_a_table_of_zeros_is_met_at_once(monkeypatch):
    monkeypatch.setattr(funnel, "PATIENCE", 2)
    epochs = []
    on_epoch_end = funnel._KeepBest.on_epoch_end

    def spy(self, epoch, logs=None):
        epochs.append(epoch)
        on_epoch_end(self, epoch, logs)

    monkeypatch.setattr(funnel._KeepBest, "on_epoch_end", spy)
    zeros = factorize(np.zeros((50, 6)), 2, hidden_dim=3)
    assert len(epochs) < 10
    assert zeros.relative_error == 0


@pytest.mark.parametrize(
    ("activation", "method"),
    [(None, "exact"), ("relu", "exact"), ("tanh", "learned")],
)
def test_training_starts_from_the_plain_form(monkeypatch, activation, method):
    """And a hidden layer that says next to nothing."""
    monkeypatch.setattr(learned, "MAX_EPOCHS", 4)
    monkeypatch.setattr(funnel, "EPOCHS", 1)
    monkeypatch.setattr(funnel, "LEARNING_RATE", 0.0)
    options = {"activation": activation, "method": method}
    plain = factorize(curved_table(), 4, **options)
    start = factorize(curved_table(), 4, hidden_dim=8, **options)
    assert start.relative_error == pytest.approx(plain.relative_error, abs=0.01)
    if activation != "tanh":  # whose codes cannot be scaled
        scales = np.sqrt(np.square(start.codes).mean(axis=0))
        np.testing.assert_allclose(scales, 1.0, rtol=1e-5)


@pytest.mark.parametrize("num_rows", [200, 7])
def test_an_epoch_is_one_pass_in_so_many_steps(
    short_training, monkeypatch, num_rows
):
    """Or as many, where there are fewer rows."""
    made = []

    def spy(*arguments):
        made.append(RowBatches(*arguments))
        return made[-1]

    monkeypatch.setattr(funnel, "RowBatches", spy)
    monkeypatch.setattr(funnel, "STEPS_PER_EPOCH", 10)
    factorize(curved_table()[:num_rows], 3, hidden_dim=7)
    (batches,) = made
    assert len(batches) == 10
    assert batches.batch_size == max(1, num_rows // 10)


def test_is_determined_by_its_seed(short_training):
    table = curved_table()
    results = [
        factorize(table, 3, hidden_dim=7, seed=seed) for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(results[0].codes, results[1].codes)
    np.testing.assert_array_equal(
        results[0].hidden_basis, results[1].hidden_basis
    )
    assert not np.array_equal(results[0].codes, results[2].codes)


def test_ignores_the_global_dtype_policy(short_training):
    full = factorize(curved_table(), 3, hidden_dim=7)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        low = factorize(curved_table(), 3, hidden_dim=7)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_array_equal(low.codes, full.codes)


@pytest.mark.parametrize("shape", [(1, 5), (7, 30), (200, 6)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_shapes_and_scales(short_training, shape, scale):
    table = scale * np.random.default_rng(0).normal(size=shape)
    result = factorize(table, min(2, *shape), hidden_dim=3)
    assert np.isfinite(result.reconstruct()).all()
    assert (
        result.relative_error
        <= 1.05 * svd_error(table, max(0, result.rank - 1)) + 1e-6
    )


def test_memory_map(short_training, tmp_path):
    table = curved_table().astype("float16")
    np.save(tmp_path / "table.npy", table)
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        factorize(mapped, 3, hidden_dim=7).codes,
        factorize(table, 3, hidden_dim=7).codes,
    )


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("verbose", [0, 1])
def test_progress_only_on_a_terminal(
    short_training, monkeypatch, capsys, terminal, verbose
):
    rich.get_console()  # made while the output is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")  # rich draws no bar on a dumb one
    factorize(curved_table(), 3, hidden_dim=7, verbose=verbose)
    out = capsys.readouterr().out
    assert ("relative error" in out) == bool(verbose)
    assert ("Learning" in out) == (terminal and bool(verbose))


@pytest.mark.parametrize("tie_weights", [True, False])
def test_layer_of_the_factors_is_the_dense_layer(short_training, tie_weights):
    table = curved_table().astype("float32")
    layer = DistilledEmbedding.from_embedding(
        table,
        compression=4.0,
        hidden_dim=7,
        hidden_activation="tanh",
        activation=None,
        tie_weights=tie_weights,
    )
    assert layer.compression_ratio >= 4
    factors = factorize(
        table,
        layer.rank,
        hidden_dim=7,
        hidden_activation="tanh",
        activation=None,
    )
    dense = factors.reconstruct()
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(layer(np.arange(400))), dense, atol=1e-4
    )
    states = np.random.default_rng(0).normal(size=(5, 24)).astype("float32")
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(layer(states, reverse=True)),
        states @ dense.T,
        rtol=1e-4,
        atol=1e-3,
    )
