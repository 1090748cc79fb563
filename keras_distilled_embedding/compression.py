"""`compress(model)`: every embedding table replaced by its factors."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import _surgery
from keras_distilled_embedding._arguments import as_integer
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import as_metric
from keras_distilled_embedding.factorization import check_finite_rows
from keras_distilled_embedding.factorization import factorize
from keras_distilled_embedding.factorization import is_lifted
from keras_distilled_embedding.factorization import largest_useful_rank
from keras_distilled_embedding.factorization import rank_for_error
from keras_distilled_embedding.factorization import spread_ranks
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.layers.distilled_embedding import (
    embedding_tables,
)

Layer = keras.layers.Layer


def compress(
    model: keras.Model,
    compression: float | None = 8.0,
    *,
    rank: int | None = None,
    activation: str | Callable | None = "relu",
    hidden_dim: int | None = None,
    method: str = "exact",
    token_frequencies: Any = None,
    layers: Iterable[str] | Callable[[Layer], bool] | None = None,
    verbose: int = 1,
    max_bytes: int | None = None,
    max_error: float | None = None,
    hidden_covariances: Any = None,
    hidden_activation: str | Callable | None = "gelu",
) -> keras.Model:
    """Returns a copy of a model with its embedding tables factorised.

    Each `keras.layers.Embedding` or `keras.layers.ReversibleEmbedding`,
    KerasHub's included, becomes a `layers.DistilledEmbedding` of the same
    name, called where and as the table was called, `reverse=True` included.
    A table that is used several times stays one layer. All other weights are
    copied. The result is not compiled.

    At 8x most of a table's energy is gone: plan to fine-tune. What brought a
    translation model back best is a `Distiller` with `LogitsDistillation()`,
    `student_loss_weight=0.3` and `student_training=False` (no dropout), Adam
    at a peak learning rate of 2e-3, as high as a training from scratch takes,
    and a cosine to zero, for half as many epochs as its teacher was trained
    (`docs/distillation.md`).

    Args:
        model: A built Functional or Sequential model. It is left as it is,
            and the result shares no variable with it.
        compression: Float above 1, how many times fewer parameters each table
            has at least. The largest rank that gives it is taken.
        rank: Integer, the rank of every table, instead of `compression`.
            This, `max_bytes` and `max_error` exclude each other.
        activation: `f` in `E ~ f(U) W`. `None` is plain low rank.
        hidden_dim: Integer or `None`, width of the non-linear funnel, see
            `layers.DistilledEmbedding`.
        method: `"exact"` or `"learned"`, see `factorize`.
        token_frequencies: Array `(input_dim,)`, how often each token occurs
            where the model reads and predicts it, special tokens included,
            from `count_tokens`: the error of frequent rows then counts for
            more. A dictionary by layer name where tables differ.
        layers: Names of the layers to replace, or a function of a layer that
            tells. By default all, but for tables so small that no rank gives
            `compression`.
        verbose: 1 prints the `compression_report` and progress, 0 nothing.
        max_bytes: Integer, what the factors of all tables may take together,
            instead of `compression`. The budget is spread over them by their
            spectra: each unit of rank goes where it saves most of a table's
            energy for its bytes.
        max_error: Float in (0, 1), the share of its energy that each table
            may lose, instead of `compression`. The smallest rank is taken.
        hidden_covariances: Array `(output_dim, output_dim)`, the second
            moment of the hidden states that multiply the table, from
            `hidden_covariance`: the logits' error then counts, not the
            entries'. A dictionary by layer name where tables differ.
        hidden_activation: `g` of the funnel, see `layers.DistilledEmbedding`.

    Returns:
        A new, built model of the same class.

    Raises:
        TypeError: If `model` is not a Keras model, or if it feeds an
            embedding with ids that are not integers, as those of a
            `keras.Input` without `dtype="int32"` are.
        ValueError: If `model` is not built or of another kind, if it has no
            (chosen) embedding, if a size would not make a table smaller or is
            out of reach, if a table is not finite, or if `token_frequencies`
            or `hidden_covariances` do not fit.

    Example:

    ```python
    teacher = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    student = compress(teacher, compression=8.0)
    compression_report(student).to_dict()["rows"][0]["rank"]  # 15
    ```

    References:
    - [Lioutas et al., 2019](https://arxiv.org/abs/1910.06720)
    """
    _surgery.check_copyable(model)
    sizes = {"rank": rank, "max_bytes": max_bytes, "max_error": max_error}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if len(sizes) > 1:
        raise ValueError(
            "Give at most one of `rank`, `max_bytes` and `max_error`. "
            f"Received: {sizes}"
        )
    options = {
        "activation": activation,
        "hidden_dim": hidden_dim,
        "hidden_activation": hidden_activation,
    }
    embeddings = _choose_layers(model, layers)
    weights = _Weights(token_frequencies, hidden_covariances)
    if max_bytes is not None or max_error is not None:
        ranks = _plan_ranks(
            embeddings, weights, max_bytes, max_error, activation, hidden_dim
        )
        sizes = {layer: {"rank": rank} for layer, rank in ranks.items()}
    else:
        size = sizes or {"compression": compression}
        sizes = dict.fromkeys(embeddings, size)
    chosen = _build_replacements(sizes, options, optional=layers is None)
    weights.check(chosen)

    # Graphs first, factors later: what can fail fails before it costs time.
    (student,) = _surgery.copy_models([model], chosen)
    for layer in chosen:  # the last table, too, before the first is factorised
        _check_finite(layer)
    for old, new in chosen.items():
        if verbose:
            print(f"Factorising '{old.name}'")
        factors = [
            factorize(
                table,
                new.rank,
                method=method,
                verbose=verbose,
                **weights.of(old),
                **options,
            )
            for table in embedding_tables(old)
            if table is not None
        ]
        new.set_factors(*factors)
    if verbose:
        print(compression_report(student))
        left = [
            layer.name
            for layer in _surgery.iterate_layers(student)
            if isinstance(layer, keras.layers.Embedding)
        ]
        if left:
            print(f"Left as they are: {', '.join(left)}")
    return student


def _choose_layers(
    model: keras.Model,
    layers: Iterable[str] | Callable[[Layer], bool] | None,
) -> list[Layer]:
    embeddings = [
        layer
        for layer in _surgery.iterate_layers(model)
        if isinstance(layer, keras.layers.Embedding)
    ]
    if layers is not None:
        embeddings = _matching(embeddings, layers)
    if not embeddings:
        inner = [
            layer.name
            for layer in _surgery.iterate_layers(model)
            if isinstance(layer, keras.layers.Embedding)
        ]
        raise ValueError(
            "`model` has no embedding to compress: no layer of its graph is a "
            "`keras.layers.Embedding` or `keras.layers.ReversibleEmbedding`. "
            + (f"Layers inside other layers: {inner}. " if inner else "")
            + f"Received: model '{model.name}' with layers "
            f"{[layer.name for layer in model.layers]}"
        )
    return embeddings


def _build_replacements(
    sizes: dict[Layer, dict[str, Any]],
    options: dict[str, Any],
    optional: bool,
) -> dict[Layer, DistilledEmbedding]:
    """What will replace each layer, still random.

    A table of a few rows, segments say, may be left as it is; one that was
    asked for (not `optional`) may not.
    """
    chosen, refused = {}, None
    for layer, size in sizes.items():
        try:
            chosen[layer] = DistilledEmbedding.like(layer, **size, **options)
        except ValueError as error:
            refused = ValueError(f"Layer '{layer.name}': {error}")
            if not optional:
                raise refused from error
    if not chosen:
        raise refused
    return chosen


def _plan_ranks(
    embeddings: list[Layer],
    weights: _Weights,
    max_bytes: int | None,
    max_error: float | None,
    activation: str | Callable | None,
    hidden_dim: int | None,
) -> dict[Layer, int]:
    """Ranks from the spectra of the tables; small tables have none."""
    hidden_dim = as_integer("hidden_dim", hidden_dim, or_none=True)
    large_enough = [
        layer
        for layer in embeddings
        if largest_useful_rank(layer.input_dim, layer.output_dim, hidden_dim)
    ]
    weights.check(large_enough)
    for layer in large_enough:
        _check_finite(layer)
    groups = {
        layer: [
            Table.of(table, **weights.of(layer))
            for table in embedding_tables(layer)
            if table is not None
        ]
        for layer in large_enough
    }
    if not groups:
        raise ValueError(
            "No rank makes a table smaller. Received: tables of shapes "
            f"{[(e.input_dim, e.output_dim) for e in embeddings]}"
        )
    lifted = is_lifted(activation)
    if max_error is not None:
        return {
            layer: max(rank_for_error(t, max_error, lifted) for t in tables)
            for layer, tables in groups.items()
        }
    max_bytes = as_integer("max_bytes", max_bytes)
    # Of mixed dtypes the widest, so that the budget holds.
    itemsize = max(_dtype_bytes(layer.variable_dtype) for layer in groups)
    try:
        ranks = spread_ranks(
            list(groups.values()), max_bytes / itemsize, lifted, hidden_dim
        )
    except ValueError as error:
        raise ValueError(
            f"`max_bytes` is too small, at {itemsize} bytes a parameter: "
            f"{error}. Received: max_bytes={max_bytes}"
        ) from error
    return dict(zip(groups, ranks))


def _matching(
    embeddings: list[Layer], layers: Iterable[str] | Callable[[Layer], bool]
) -> list[Layer]:
    if callable(layers):
        return [layer for layer in embeddings if layers(layer)]
    names = [layers] if isinstance(layers, str) else list(layers)
    # Nested models may each have a layer of one name; all of them are meant.
    known = [layer.name for layer in embeddings]
    if not set(names) <= set(known):
        raise ValueError(
            f"`layers` must name embedding layers of the model's graph, of "
            f"{known}. Received: layers={names}"
        )
    return [layer for layer in embeddings if layer.name in names]


class _Weights:
    """The weights of rows and columns.

    Args:
        token_frequencies: As of `compress`.
        hidden_covariances: As of `compress`.
    """

    def __init__(self, token_frequencies: Any, hidden_covariances: Any) -> None:
        self._given = {
            "token_frequencies": token_frequencies,
            "hidden_covariances": hidden_covariances,
        }
        self._rows: dict[Layer, Any] = {}
        self._columns: dict[Layer, Any] = {}

    def check(self, layers: Iterable[Layer]) -> None:
        """Refuses what does not fit the layers to compress."""
        self._rows, self._columns = (
            _by_layer(layers, values, name)
            for name, values in self._given.items()
        )
        for layer, frequencies in self._rows.items():
            self._rows[layer] = _checked_frequencies(layer, frequencies)
        for layer, covariance in self._columns.items():
            _check_covariance(layer, covariance)

    def of(self, layer: Layer) -> dict[str, Any]:
        """Arguments of `factorize` and of `Table.of`."""
        return {
            "row_weights": self._rows.get(layer),
            "column_weights": self._columns.get(layer),
        }


def _by_layer(
    layers: Iterable[Layer], values: Any, name: str
) -> dict[Layer, Any]:
    """One value for all layers, or a dictionary by their names."""
    if values is None:
        return {}
    names = [layer.name for layer in layers]
    if not isinstance(values, Mapping):
        values = dict.fromkeys(names, values)
    if not set(values) <= set(names):
        raise ValueError(
            f"`{name}` must be by names of compressed layers, of {names}. "
            f"Received: {list(values)}"
        )
    return {
        layer: values[layer.name] for layer in layers if layer.name in values
    }


def _checked_frequencies(layer: Layer, frequencies: Any) -> np.ndarray:
    frequencies = np.asarray(frequencies)
    wanted = f"`token_frequencies` of layer '{layer.name}' must "
    if frequencies.shape != (layer.input_dim,):
        raise ValueError(
            f"{wanted}have shape ({layer.input_dim},), one number a token. "
            f"Received: shape {frequencies.shape}"
        )
    if frequencies.dtype.kind not in "iuf":
        raise ValueError(
            f"{wanted}be numbers. Received: dtype {frequencies.dtype}"
        )
    if not (np.isfinite(frequencies) & (frequencies >= 0)).all():
        raise ValueError(
            f"{wanted}be finite and not negative. Received: numbers from "
            f"{frequencies.min()} to {frequencies.max()}"
        )
    if not frequencies.any():
        raise ValueError(f"{wanted}not all be 0. Received: only zeros")
    return frequencies


def _check_covariance(layer: Layer, covariance: Any) -> None:
    try:
        as_metric(covariance, layer.output_dim)
    except ValueError as error:
        raise ValueError(
            f"`hidden_covariances` of layer '{layer.name}': {error}"
        ) from error


def _check_finite(layer: Layer) -> None:
    for table in embedding_tables(layer):
        if table is not None:
            try:
                check_finite_rows(table)
            except ValueError as error:
                raise ValueError(f"Layer '{layer.name}': {error}") from error


@dataclasses.dataclass(frozen=True)
class CompressedTable:
    """One row of a `CompressionReport`.

    Args:
        layer: Name of the layer.
        shape: `(input_dim, output_dim)` of the table.
        rank: Rank of the factors.
        parameters_before: Parameters of the table (of both, if untied).
        parameters_after: Parameters of the factors.
        bytes_before: Bytes of the table, in the layer's variable dtype.
        bytes_after: Bytes of the factors as they are stored.
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """How many times fewer parameters."""
        return self.parameters_before / self.parameters_after


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compress` did to a model; printable.

    Args:
        rows: A `CompressedTable` for each factorised table.
        model_parameters: Parameters of the whole compressed model.
    """

    rows: tuple[CompressedTable, ...]
    model_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain, JSON-serialisable Python values."""
        return {
            "rows": [
                {**dataclasses.asdict(row), "ratio": row.ratio}
                for row in self.rows
            ],
            "model_parameters": self.model_parameters,
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        saved = sum(
            row.parameters_before - row.parameters_after for row in self.rows
        )
        table = Table(
            caption=f"whole model: {self.model_parameters + saved:,} -> "
            f"{self.model_parameters:,} parameters"
        )
        table.add_column("layer")
        for heading in ("table", "rank", "parameters", "bytes", "ratio"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                row.layer,
                f"{row.shape[0]:,} x {row.shape[1]:,}",
                f"{row.rank:,}",
                f"{row.parameters_before:,} -> {row.parameters_after:,}",
                f"{row.bytes_before:,} -> {row.bytes_after:,}",
                f"{row.ratio:.2f}x",
            )
        # To a string: neither a terminal's colours nor a notebook's HTML.
        text = io.StringIO()
        Console(
            file=text,
            width=100,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,
        ).print(table)
        return text.getvalue().rstrip()


def compression_report(model: keras.Model) -> CompressionReport:
    """Reports what the tables of a compressed model were and are.

    Args:
        model: A model with `layers.DistilledEmbedding` layers, from
            `compress`, loaded, or built with them.

    Returns:
        A `CompressionReport`: printable, and with `to_dict()`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no such layer.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )
    rows = tuple(
        _report_row(layer)
        for layer in _surgery.iterate_layers(model)
        if isinstance(layer, DistilledEmbedding)
    )
    if not rows:
        raise ValueError(
            "`model` has no `DistilledEmbedding` layer: compress it first. "
            f"Received: model '{model.name}'"
        )
    return CompressionReport(rows, model.count_params())


def _report_row(layer: DistilledEmbedding) -> CompressedTable:
    tables = 1 if layer.tie_weights else 2
    before = tables * layer.input_dim * layer.output_dim
    itemsize = _dtype_bytes(layer.variable_dtype)
    return CompressedTable(
        layer=layer.name,
        shape=(layer.input_dim, layer.output_dim),
        rank=layer.rank,
        parameters_before=before,
        parameters_after=sum(int(np.prod(w.shape)) for w in layer.weights),
        bytes_before=before * itemsize,
        bytes_after=sum(
            int(np.prod(w.shape)) * _dtype_bytes(w.dtype) for w in layer.weights
        ),
    )


def _dtype_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
