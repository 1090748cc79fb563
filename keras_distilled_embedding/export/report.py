"""What an export has written."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far a file's outputs are from those of the Keras model.

    Args:
        relative_rms_error: `||file - Keras|| / ||Keras||`, over the entries
            of the outputs, of all signatures.
        top1_agreement: Share of the places at which the largest of the last
            axis is the same.
        num_inputs: How many inputs were compared.
    """

    relative_rms_error: float
    top1_agreement: float
    num_inputs: int


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_litert` wrote; printable.

    Args:
        filepath: The file.
        bytes: Its size.
        weights_bytes: Bytes of the model's weights as they are stored, each
            counted once: 4, 1 or half a byte for an entry of a table, 4 or 1
            for another matrix, 4 for any other number.
        tables: How many copies the file holds of each embedding table (of
            each code matrix where the table is factorised), by layer name.
        signatures: Names of the signatures.
        quantization: `None`, `"int8"` or `"int4"`.
        table_bytes: Bytes of each layer's table, scales and basis included,
            by layer name.
        fidelity: Compared with Keras, or `None` where it was not measured.
    """

    filepath: str
    bytes: int
    weights_bytes: int
    tables: dict[str, int]
    signatures: tuple[str, ...]
    quantization: str | None = None
    table_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    fidelity: Fidelity | None = None

    @property
    def overhead(self) -> float:
        """Bytes of the file divided by bytes of the weights."""
        return self.bytes / self.weights_bytes

    def to_dict(self) -> dict[str, Any]:
        """The report as plain, JSON-serialisable Python values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        tables = ", ".join(
            f"{name} ({count} {'copy' if count == 1 else 'copies'}"
            + (
                f", {self.table_bytes[name]:,} bytes"
                if name in self.table_bytes
                else ""
            )
            + ")"
            for name, count in self.tables.items()
        )
        lines = [
            f"{self.filepath}: {self.bytes:,} bytes, {self.overhead:.3f} x "
            f"the weights' {self.weights_bytes:,}; "
            f"{self.quantization or 'float32'}; tables: {tables or 'none'}; "
            f"signatures: {', '.join(self.signatures)}"
        ]
        if self.fidelity is not None:
            lines.append(
                "against Keras: relative RMS error "
                f"{self.fidelity.relative_rms_error:.2%}, top-1 agreement "
                f"{self.fidelity.top1_agreement:.2%} "
                f"({self.fidelity.num_inputs} inputs)"
            )
        return "\n".join(lines)
