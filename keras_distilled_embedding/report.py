"""What a model's tables are, what can be saved, and what compression did."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable
from collections.abc import Sequence
from typing import TYPE_CHECKING
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.progress import make_progress
from keras_distilled_embedding.budget import Plan
from keras_distilled_embedding.budget import SizeRequest
from keras_distilled_embedding.budget import Tables
from keras_distilled_embedding.budget import expected_loss
from keras_distilled_embedding.budget import knows_logits
from keras_distilled_embedding.budget import plan
from keras_distilled_embedding.calibration import CALIBRATION_TOKENS
from keras_distilled_embedding.calibration import tables_of
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import lost_energy
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import matrix_bytes
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import share_of_products
from keras_distilled_embedding.targets import Target
from keras_distilled_embedding.targets import heads_of
from keras_distilled_embedding.targets import is_embedding
from keras_distilled_embedding.targets import named_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What `inspect_model` plans for: how many times fewer bytes.
SIZES = (4.0, 8.0, 16.0)


@dataclasses.dataclass(frozen=True)
class CompressedTable:
    """One row of a `CompressionReport`; an untied layer counts both tables."""

    layer: str
    shape: tuple[int, int]
    rank: int
    parameters_before: int
    parameters_after: int
    bytes_before: int  # in the layer's variable dtype
    bytes_after: int  # as stored: if quantized, in a file of `export_litert`
    ratio: float  # how many times fewer bytes than in float32
    # The share of the table's energy that the factors lose, rounding included,
    # `||E - E~||^2 / ||E||^2`, or `None` without an original to compare with.
    error: float | None
    quantization: str | None  # `None` for floats
    speedup: float  # how many times fewer multiplications a projection takes


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """What `compress` did to a model; printable.

    Args:
        rows: A `CompressedTable` for each factorized table.
        model_parameters: Parameters of the whole compressed model.
        model_bytes: Bytes of its weights, the factors' as they are stored.
    """

    rows: tuple[CompressedTable, ...]
    model_parameters: int
    model_bytes: int

    @property
    def model_parameters_before(self) -> int:
        """Parameters of the model with its tables."""
        return self.model_parameters + sum(
            row.parameters_before - row.parameters_after for row in self.rows
        )

    @property
    def model_bytes_before(self) -> int:
        """Bytes of the model with its tables."""
        return self.model_bytes + sum(
            row.bytes_before - row.bytes_after for row in self.rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values that can be written as JSON."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "model_parameters": self.model_parameters,
            "model_parameters_before": self.model_parameters_before,
            "model_bytes": self.model_bytes,
            "model_bytes_before": self.model_bytes_before,
        }

    def __str__(self) -> str:
        from rich.table import Table as TextTable

        table = TextTable(show_footer=True)
        table.add_column("layer", footer="whole model", overflow="fold")
        for heading, footer in (
            ("table", ""),
            ("rank", ""),
            (
                "parameters",
                f"{self.model_parameters_before:,} -> "
                f"{self.model_parameters:,}",
            ),
            ("bytes", f"{self.model_bytes_before:,} -> {self.model_bytes:,}"),
            ("ratio", f"{self.model_bytes_before / self.model_bytes:.2f}x"),
            ("error", ""),
            ("products", ""),
        ):
            table.add_column(heading, footer=footer, justify="right")
        table.add_column("stored as")
        for row in self.rows:
            table.add_row(
                row.layer,
                f"{row.shape[0]:,} x {row.shape[1]:,}",
                f"{row.rank:,}",
                f"{row.parameters_before:,} -> {row.parameters_after:,}",
                f"{row.bytes_before:,} -> {row.bytes_after:,}",
                f"{row.ratio:.2f}x",
                "" if row.error is None else f"{row.error:.3f}",
                f"{row.speedup:.1f}x fewer",
                row.quantization or "floats",
            )
        return _render(table)

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Draws the bytes of each table, and of the rest, before and after.

        Args:
            path: Where to save the picture, if anywhere: a name that ends in
                `.png`, `.svg` or another of Matplotlib's.

        Raises:
            ImportError: If Matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "The picture needs Matplotlib: "
                'pip install "keras-distilled-embedding[plots]"'
            ) from error
        tables = [
            (row.layer, row.bytes_before, row.bytes_after) for row in self.rows
        ]
        rest = self.model_bytes - sum(row.bytes_after for row in self.rows)
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(2)
        for name, *sizes in [("the rest", rest, rest), *tables]:
            widths = np.array(sizes) / 1e6
            axes.barh([0, 1], widths, left=left, label=name, height=0.6)
            left += widths
        axes.set_yticks([0, 1], ["before", "after"])
        axes.invert_yaxis()
        axes.set_xlabel("MB of weights")
        for y, total in enumerate(left):
            axes.annotate(
                f" {total:,.2f} MB", (total, y), va="center", fontsize=9
            )
        axes.margins(x=0.15)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


@dataclasses.dataclass(frozen=True)
class InspectedTable:
    """One table of an `Inspection`; an untied layer counts both tables."""

    layer: str
    kind: str  # name of the layer's class
    shape: tuple[int, int]
    parameters: int
    bytes: int
    rank: int | None  # of the factors, if it is factorized
    factorized: bool


@dataclasses.dataclass(frozen=True)
class PlannedSize:
    """What `compress` would make of a model: one size of an `Inspection`.

    Without any ranks the size is out of reach, and all stays as it is.
    """

    compression: float
    layers: tuple[str, ...]  # whose tables are replaced
    ranks: tuple[int, ...]  # of these
    quantization: str | None  # `None` for floats
    row_scales: bool  # whether each row of codes has a scale of its own
    table_bytes: int  # of all embeddings
    model_bytes: int  # of the whole model, its other weights as they are
    # The same, its other weights stored as in an int8 file of `export_litert`.
    int8_model_bytes: int
    error: float  # the share of the energy that is expected to be lost
    speedup: float  # how many times fewer multiplications a projection takes


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The tables of a model, and what could be saved; printable.

    Args:
        model: Name of the model.
        kind: Name of its class.
        parameters: Of the whole model.
        bytes: Of all its weights.
        tables: The tables.
        sizes: What `compress` would do; nothing where no table is left for it.
        of_logits: Whether the errors of `sizes` are shares of the logits'
            energy, as `calibration_data` tells, or of the tables' own.
    """

    model: str
    kind: str
    parameters: int
    bytes: int
    tables: tuple[InspectedTable, ...]
    sizes: tuple[PlannedSize, ...]
    of_logits: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns the inspection as plain values, as for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rich.table import Table as TextTable

        table = TextTable(
            title=f"{self.model} ({self.kind}): {self.parameters:,} "
            f"parameters, {self.bytes:,} bytes"
        )
        table.add_column("layer", overflow="fold")
        table.add_column("class")
        for heading in ("table", "parameters", "bytes", "of the model", "rank"):
            table.add_column(heading, justify="right")
        for row in self.tables:
            table.add_row(
                row.layer,
                row.kind,
                f"{row.shape[0]:,} x {row.shape[1]:,}",
                f"{row.parameters:,}",
                f"{row.bytes:,}",
                f"{row.bytes / self.bytes:.1%}",
                "-" if row.rank is None else f"{row.rank:,}",
            )
        shown = [_render(table)]
        if self.sizes:
            shown.append(_render(self._planned()))
        return "\n".join(shown)

    def _planned(self) -> Any:
        from rich.table import Table as TextTable

        table = TextTable(title="What `compress` would make of it, in bytes")
        table.add_column("size", justify="right")
        table.add_column("rank", justify="right")
        table.add_column("stored as")
        of_what = "logits" if self.of_logits else "tables"
        for heading in (
            "tables",
            "model",
            "rest in int8",
            f"{of_what} lost",
            "products",
        ):
            table.add_column(heading, justify="right")
        for row in self.sizes:
            size = f"{row.compression:g}x"
            if not row.ranks:
                table.add_row(size, "-", "out of reach")
                continue
            stored = "floats"
            if row.quantization is not None:
                by = "row" if row.row_scales else "column"
                stored = f"{row.quantization}, scales by {by}"
            table.add_row(
                size,
                ", ".join(f"{rank:,}" for rank in row.ranks),
                stored,
                f"{row.table_bytes:,}",
                f"{row.model_bytes:,}",
                f"{row.int8_model_bytes:,}",
                f"{row.error:.2%}",
                f"{row.speedup:.1f}x fewer",
            )
        return table


def compression_report(
    model: keras.Model, original: keras.Model | None = None
) -> CompressionReport:
    """Reports what the tables of a compressed model were and are.

    Args:
        model: A model with `layers.DistilledEmbedding` layers, from
            `compress`, loaded, or built with them.
        original: The model that was compressed. If it is given, the report
            tells how much of its tables the factors lose, as they are now.

    Raises:
        TypeError: If `model` or `original` is not a Keras model.
        ValueError: If the model has no such layer, or if `original` has not
            the tables that they stand for.

    Example:

    ```python
    model = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
    ])
    student = compress(model, verbose=0)
    report = compression_report(student, model)
    report.rows[0].ratio  # 8.42
    ```
    """
    check_built_model("model", model)
    if original is not None:
        check_built_model("original", original)
    layers = {
        key: target.layer
        for key, target in named_tables(model)
        if target.is_factorized
    }
    if not layers:
        raise ValueError(
            "`model` has no `DistilledEmbedding` layer: compress it first. "
            f"Received: model '{model.name}'"
        )
    originals = {} if original is None else dict(named_tables(original))
    rows = []
    for key, layer in layers.items():
        lost = None if original is None else _lost(layer, originals.get(key))
        rows.append(_report_row(layer, lost))
    factors = [weight for layer in layers.values() for weight in layer.weights]
    return CompressionReport(
        rows=tuple(rows),
        model_parameters=model.count_params(),
        model_bytes=_bytes_of(model.weights)
        - _bytes_of(factors)
        + sum(row.bytes_after for row in rows),
    )


def inspect_model(
    model: keras.Model,
    compression: float | Sequence[float] = SIZES,
    *,
    calibration_data: Any = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    verbose: int = 1,
) -> Inspection:
    """Tells what a model's tables are, and what `compress` would save.

    Takes seconds: for each size it makes the plan that `compress` would make,
    and factorizes nothing.

    Args:
        model: A built model.
        compression: Float above 1, or several: the sizes to plan for, as of
            `compress`.
        calibration_data: As of `compress`: with it the plans go by what the
            logits lose.
        calibration_tokens: As of `compress`.
        verbose: Whether to show progress bars, on a terminal.

    Returns:
        An `Inspection`.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built, `compression` is not above 1, a table
            is not finite, or `calibration_data` does not fit.

    Example:

    ```python
    model = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128, name="tokens"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    inspection = inspect_model(model)
    [size.table_bytes for size in inspection.sizes]  # 4, 8, 16 times fewer
    ```
    """
    check_built_model("model", model)
    asked: Any = [compression] if np.ndim(compression) == 0 else compression
    requests = [SizeRequest(size) for size in asked]
    limit = as_integer("calibration_tokens", calibration_tokens)
    found = list(keras_internals.iterate_layers(model))
    targets = [Target(x) for x in found if isinstance(x, DistilledEmbedding)]
    open_ones = [Target(layer) for layer in found if is_embedding(layer)]
    targets += open_ones
    targets += [Target(head) for head in heads_of(model, targets)]
    tables: dict[Target, list[Table]] = {}
    if open_ones:
        tables = tables_of(model, open_ones, calibration_data, limit, verbose)
    with make_progress(verbose and bool(tables)) as progress:
        sizes = [
            _planned(model, tables, request)
            for request in progress.track(requests, description="Planning")
            if tables
        ]
    return Inspection(
        model=model.name,
        kind=type(model).__name__,
        parameters=model.count_params(),
        bytes=_bytes_of(model.weights),
        tables=tuple(map(_inspected, targets)),
        sizes=tuple(sizes),
        of_logits=knows_logits(tables),
    )


def _inspected(target: Target) -> InspectedTable:
    return InspectedTable(
        layer=target.name,
        kind=type(target.layer).__name__,
        shape=target.shape,
        parameters=target.layer.count_params(),
        bytes=_bytes_of(target.layer.weights),
        rank=target.layer.rank if target.is_factorized else None,
        factorized=target.is_factorized,
    )


def _planned(
    model: keras.Model, tables: Tables, request: SizeRequest
) -> PlannedSize:
    """What `compress` would make of some tables of a model."""
    try:
        found = plan(tables, request, optional=True)
        error = expected_loss(tables, request, found)
    except ValueError:  # out of reach
        found, error = Plan({}, None), 0.0
    kind = found.kind
    planned = {
        target: _planned_bytes(target, rank, kind)
        for target, rank in found.ranks.items()
    }
    replaced = [weight for t in planned for weight in t.layer.weights]
    of_replaced = {id(weight) for weight in replaced}
    rest = [w for w in model.weights if id(w) not in of_replaced]
    embeddings = [weight for t in tables for weight in t.layer.weights]
    factors = sum(planned.values())
    before = sum(t.parameters for t in planned)
    after = sum(
        t.parameters * share_of_products(rank, *t.shape, kind)
        for t, rank in found.ranks.items()
    )
    return PlannedSize(
        compression=float(request.compression or 0.0),
        layers=tuple(target.name for target in planned),
        ranks=tuple(found.ranks.values()),
        quantization=None if kind is None else kind.name,
        row_scales=kind is not None and kind.has_row_scales,
        table_bytes=factors + _bytes_of(embeddings) - _bytes_of(replaced),
        model_bytes=factors + _bytes_of(rest),
        int8_model_bytes=factors + sum(map(_int8_bytes, rest)),
        error=error,
        speedup=before / after if after else 1.0,
    )


def _planned_bytes(target: Target, rank: int, kind: Format | None) -> int:
    size = target.num_tables * factor_bytes(rank, *target.shape, kind)
    if kind is None:  # floats of the layer's own precision
        return size * _dtype_bytes(target.layer.variable_dtype) // 4
    return size


def _int8_bytes(weight: keras.Variable) -> int:
    """Bytes of a weight beside the tables in an int8 file."""
    size = int(np.prod(weight.shape))
    return matrix_bytes(size) if len(weight.shape) > 1 else 4 * size


def _lost(layer: DistilledEmbedding, target: Target | None) -> float:
    shape = (layer.input_dim, layer.output_dim)
    if target is None or target.shape != shape:
        raise ValueError(
            f"`original` must have a layer '{layer.name}' with a table of "
            f"shape {shape}. Received: {target and target.layer}"
        )
    lost, energy = 0.0, 0.0
    for i, array in enumerate(target.tables()):

        def reconstruct(rows: slice, reverse: bool = i > 0) -> np.ndarray:
            ids = np.arange(rows.start, rows.stop)
            values = layer.reconstruct(ids, reverse=reverse)
            return keras.ops.convert_to_numpy(keras.ops.cast(values, "float32"))

        measured = lost_energy(Table.of(array), reconstruct)
        own = float(np.square(array, dtype=np.float64).sum())
        lost += measured.relative * own
        energy += own
    return lost / energy if energy else 0.0


def _report_row(
    layer: DistilledEmbedding, error: float | None
) -> CompressedTable:
    target = Target(layer)
    return CompressedTable(
        layer=layer.name,
        shape=target.shape,
        rank=layer.rank,
        parameters_before=target.parameters,
        parameters_after=layer.count_params(),
        bytes_before=target.parameters * _dtype_bytes(layer.variable_dtype),
        bytes_after=_stored_bytes(target),
        ratio=layer.compression_ratio,
        error=error,
        quantization=layer.quantization,
        speedup=1 / share_of_products(layer.rank, *target.shape, layer.format),
    )


def _stored_bytes(target: Target) -> int:
    layer = target.layer
    if layer.quantization is None:
        # A file multiplies the center into the offset.
        names = layer._factor_shapes()
        return _bytes_of(getattr(layer, name) for name in names)
    return target.num_tables * factor_bytes(
        layer.rank, *target.shape, layer.format, layer.use_bias
    )


def _bytes_of(weights: Iterable[keras.Variable]) -> int:
    return sum(
        int(np.prod(weight.shape)) * _dtype_bytes(weight.dtype)
        for weight in weights
    )


def _dtype_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _render(table: Any) -> str:
    """A table as plain text: no terminal's colors, no notebook's HTML."""
    from rich.console import Console

    text = io.StringIO()
    Console(
        file=text,
        width=110,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    ).print(table)
    return text.getvalue().rstrip()
