"""What a model's tables are, and what could be saved of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.factorization import rank_for_compression
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.report import render
from keras_distilled_embedding.report import weight_bytes
from keras_distilled_embedding.targets import Target
from keras_distilled_embedding.targets import heads_of
from keras_distilled_embedding.targets import is_embedding


@dataclasses.dataclass(frozen=True)
class InspectedTable:
    """One table of a model.

    Args:
        layer: Name of the layer.
        kind: Name of its class.
        shape: `(input_dim, output_dim)`.
        parameters: As stored; of both tables, if untied.
        bytes: As stored.
        rank: Of the factors, if it has been factorised; else the rank that
            the compression takes, `None` where none gives it.
        factorized: Whether it is stored as factors.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    parameters: int
    bytes: int
    rank: int | None
    factorized: bool


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The tables of a model; printable.

    Args:
        model: Name of the model.
        kind: Name of its class.
        parameters: Of the whole model.
        bytes: Of all its weights.
        compression: What `rank` of tables not factorised is for.
        tables: The tables.
    """

    model: str
    kind: str
    parameters: int
    bytes: int
    compression: float
    tables: tuple[InspectedTable, ...]

    def to_dict(self) -> dict[str, Any]:
        """The inspection as plain, JSON-serialisable Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(
            title=f"{self.model} ({self.kind}): {self.parameters:,} "
            f"parameters, {self.bytes:,} bytes"
        )
        table.add_column("layer")
        table.add_column("class")
        for heading in ("table", "parameters", "bytes", "of the model", "rank"):
            table.add_column(heading, justify="right")
        for row in self.tables:
            rank = "-" if row.rank is None else f"{row.rank:,}"
            if not row.factorized:
                rank = f"{rank} at {self.compression:g}x"
            table.add_row(
                row.layer,
                row.kind,
                f"{row.shape[0]:,} x {row.shape[1]:,}",
                f"{row.parameters:,}",
                f"{row.bytes:,}",
                f"{row.bytes / self.bytes:.1%}",
                rank,
            )
        return render(table)


def inspect_model(model: keras.Model, compression: float = 8.0) -> Inspection:
    """Lists what `compress` would replace, and what it has replaced.

    Args:
        model: A built model.
        compression: Float above 1, what the ranks are for.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: If `compression` is not above 1.
    """
    found = list(keras_internals.iterate_layers(model))
    targets = [Target(layer) for layer in found if is_embedding(layer)]
    factorized = [x for x in found if isinstance(x, DistilledEmbedding)]
    targets += [
        Target(head) for head in heads_of(model, [*targets, *factorized])
    ]
    rows = [
        _row(
            layer,
            (layer.input_dim, layer.output_dim),
            layer.rank,
            factorized=True,
        )
        for layer in factorized
    ]
    for target in targets:
        shape = (target.input_dim, target.output_dim)
        try:
            rank = rank_for_compression(*shape, compression)
        except ValueError:
            if not compression > 1:
                raise
            rank = None
        rows.append(_row(target.layer, shape, rank, factorized=False))
    return Inspection(
        model=model.name,
        kind=type(model).__name__,
        parameters=model.count_params(),
        bytes=sum(weight_bytes(weight) for weight in model.weights),
        compression=compression,
        tables=tuple(rows),
    )


def _row(
    layer: keras.layers.Layer,
    shape: tuple[int, int],
    rank: int | None,
    factorized: bool,
) -> InspectedTable:
    return InspectedTable(
        layer=layer.name,
        kind=type(layer).__name__,
        shape=shape,
        parameters=layer.count_params(),
        bytes=sum(weight_bytes(weight) for weight in layer.weights),
        rank=rank,
        factorized=factorized,
    )
