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
from keras_distilled_embedding.factorization import check_finite_rows
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
    copied. The result is not compiled.

    At 8x most of a table's energy is gone: plan to fine-tune. What brought a
    translation model back best is a `Distiller` with `LogitsDistillation()`,
    `student_loss_weight=0.3` and `student_training=False` (no dropout), Adam
    at a peak learning rate of 2e-3, as high as a training from scratch takes,
    and a cosine to zero (`docs/distillation.md`).

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
        TypeError: If `model` is not a Keras model, or if it feeds an
            embedding with ids that are not integers, as those of a
            `keras.Input` without `dtype="int32"` are.
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
                row_weights=weights.get(old),
                verbose=verbose,
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
    # Nested models may each have a layer of one name; all of them are meant.
    known = [layer.name for layer in embeddings]
    if not set(names) <= set(known):
        raise ValueError(
            f"`layers` must name embedding layers of the model's graph, of "
            f"{known}. Received: layers={names}"
        )
    return [layer for layer in embeddings if layer.name in names]


def _row_weights(
    chosen: Iterable[Layer], token_frequencies: Any
) -> dict[Layer, np.ndarray]:
    """The frequencies by layer, checked."""
    if token_frequencies is None:
        return {}
    names = [layer.name for layer in chosen]
    if not isinstance(token_frequencies, Mapping):
        token_frequencies = dict.fromkeys(names, token_frequencies)
    if not set(token_frequencies) <= set(names):
        raise ValueError(
            "`token_frequencies` must be by names of compressed layers, "
            f"of {names}. Received: {list(token_frequencies)}"
        )
    return {
        layer: _checked_frequencies(layer, token_frequencies[layer.name])
        for layer in chosen
        if layer.name in token_frequencies
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
