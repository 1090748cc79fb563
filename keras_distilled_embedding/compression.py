"""`compress(model)`: every embedding table replaced by its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import _surgery
from keras_distilled_embedding.factorization import factorize
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
) -> keras.Model:
    """Returns a copy of a model with its embedding tables factorised.

    Each `keras.layers.Embedding` or `keras.layers.ReversibleEmbedding`,
    KerasHub's included, becomes a `layers.DistilledEmbedding` of the same
    name, called where and as the table was called, `reverse=True` included.
    A table that is used several times stays one layer. All other weights are
    copied. The result is not compiled; it is usually worth fine-tuning, see
    `Distiller`.

    Args:
        model: A built Functional or Sequential model. It is left as it is,
            and the result shares no variable with it.
        compression: Float above 1, how many times fewer parameters each table
            has at least. The largest rank that gives it is taken.
        rank: Integer, the rank of every table, instead of `compression`.
        activation: `f` in `E ~ f(U) W`. `None` is plain low rank.
        hidden_dim: Integer or `None`, width of the non-linear funnel, see
            `layers.DistilledEmbedding`.
        method: `"exact"` or `"learned"`, see `factorize`.
        token_frequencies: Array `(input_dim,)`, how often each token occurs
            where the model reads and predicts it, special tokens included:
            the error of frequent rows then counts for more. A dictionary by
            layer name where tables differ.
        layers: Names of the layers to replace, or a function of a layer that
            tells. By default all, but for tables so small that no rank gives
            `compression`.
        verbose: 1 prints the `compression_report` and progress, 0 nothing.

    Returns:
        A new, built model of the same class.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If `model` is not built or of another kind, if it has no
            (chosen) embedding, if `rank` or `compression` would not make a
            table smaller, if a table is not finite, or if
            `token_frequencies` do not fit.

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
    if rank is not None:
        compression = None
    sizes = {"rank": rank, "compression": compression}
    options = {"activation": activation, "hidden_dim": hidden_dim}
    chosen = _choose_layers(model, layers, sizes, options)
    weights = _row_weights(chosen, token_frequencies)

    # Graphs first, factors later: what can fail fails before it costs time.
    (student,) = _surgery.copy_models([model], chosen)
    for old, new in chosen.items():
        if verbose:
            print(f"Factorising {old.name!r}")
        table, reverse_table = embedding_tables(old)

        def factors(table: np.ndarray, layer: DistilledEmbedding = new) -> Any:
            return factorize(
                table,
                layer.rank,
                method=method,
                row_weights=weights.get(layer.name),
                verbose=verbose,
                **options,
            )

        new.set_factors(
            factors(table),
            None if reverse_table is None else factors(reverse_table),
        )
    if verbose:
        print(compression_report(student))
    return student


def _choose_layers(
    model: keras.Model,
    layers: Iterable[str] | Callable[[Layer], bool] | None,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> dict[Layer, DistilledEmbedding]:
    """The layers to replace, and what will replace each, still random."""
    embeddings = [
        layer
        for layer in _surgery.graph_layers(model)
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
    chosen, refused = {}, None
    for layer in embeddings:
        try:
            chosen[layer] = DistilledEmbedding.like(layer, **sizes, **options)
        except ValueError as error:
            # A table of a few rows, segments say, may be left as it is; one
            # that was asked for may not.
            refused = ValueError(f"Layer '{layer.name}': {error}")
            if layers is not None:
                raise refused from error
    if not chosen:
        raise refused
    return chosen


def _matching(
    embeddings: list[Layer], layers: Iterable[str] | Callable[[Layer], bool]
) -> list[Layer]:
    if callable(layers):
        return [layer for layer in embeddings if layers(layer)]
    names = [layers] if isinstance(layers, str) else list(layers)
    known = {layer.name: layer for layer in embeddings}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"`layers` must name embedding layers of the model's graph, of "
            f"{list(known)}. Received: layers={names}"
        )
    return [known[name] for name in names]


def _row_weights(
    chosen: Mapping[Layer, DistilledEmbedding], token_frequencies: Any
) -> dict[str, np.ndarray]:
    """The frequencies by layer name, of the right length each."""
    if token_frequencies is None:
        return {}
    if not isinstance(token_frequencies, Mapping):
        token_frequencies = {layer.name: token_frequencies for layer in chosen}
    sizes = {layer.name: layer.input_dim for layer in chosen}
    weights = {}
    for name, frequencies in token_frequencies.items():
        if name not in sizes:
            raise ValueError(
                "`token_frequencies` must be by names of compressed layers, "
                f"of {list(sizes)}. Received: '{name}'"
            )
        weights[name] = np.asarray(frequencies)
        if weights[name].shape != (sizes[name],):
            raise ValueError(
                f"`token_frequencies` of layer '{name}' must have shape "
                f"({sizes[name]},), one number a token. "
                f"Received: shape {weights[name].shape}"
            )
    return weights


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
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def compression_report(model: keras.Model) -> CompressionReport:
    """Reports what the tables of a compressed model were and are.

    Args:
        model: A model with `layers.DistilledEmbedding` layers, from
            `compress`, loaded, or built with them.

    Returns:
        A `CompressionReport`: printable, and with `to_dict()`.

    Raises:
        ValueError: If the model has no such layer.
    """
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
