"""What an export has written, and how far it is from the Keras model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.export.signatures import Signature

# Random inputs, where none are given.
_BATCHES, _BATCH_SIZE, _LENGTH = 2, 4, 8
# From so many rows on, logits of more than one example take too much memory.
_MANY_ROWS = 100_000


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far a file's outputs are from those of the Keras model.

    Args:
        relative_rms_error: `||file - Keras|| / ||Keras||`, over the entries
            of the outputs of all signatures.
        top1_agreement: Share of the positions at which the largest entry
            along the last axis is the same.
        num_inputs: How many batches were compared.
        divergence: The mean Kullback-Leibler divergence of what the file
            predicts from what Keras does, in nats, or `None` where outputs
            need not be logits.
    """

    relative_rms_error: float
    top1_agreement: float
    num_inputs: int
    divergence: float | None = None


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_litert` wrote; printable.

    Args:
        filepath: The file.
        bytes: Its size.
        weights_bytes: Bytes of the model's weights as the file stores them,
            each counted once: 4, 1 or half a byte for an entry of a table, 4
            or 1 for an entry of another matrix, 4 for any other number.
        tables: How many copies of each embedding table (of its codes, where
            it is factorized) the file holds, by layer name.
        signatures: Names of the signatures.
        quantization: Name of the storage format, or `None` for floats.
        table_bytes: Bytes of each layer's table, by layer name: of its codes,
            scales, basis and offset.
        fidelity: The comparison with Keras, or `None` where none was made.
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
        """The report as plain Python values, which JSON can hold."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        table_bytes = self.table_bytes
        tables = ", ".join(
            f"{name} ({count} {'copy' if count == 1 else 'copies'}"
            + (f", {table_bytes[name]:,} bytes" if name in table_bytes else "")
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
            divergence = ""
            if self.fidelity.divergence is not None:
                divergence = f", KL {self.fidelity.divergence:.2g} nats"
            lines.append(
                "against Keras: relative RMS error "
                f"{self.fidelity.relative_rms_error:.2%}, top-1 agreement "
                f"{self.fidelity.top1_agreement:.2%}{divergence} "
                f"({self.fidelity.num_inputs} inputs)"
            )
        return "\n".join(lines)


def measure_fidelity(
    content: bytes, signatures: Mapping[str, Signature], inputs: Any
) -> Fidelity | None:
    """Runs the file and the Keras models on the same inputs.

    Returns `None` where the model does not take random inputs.
    """
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    given = inputs is not None
    if not given:
        inputs = {
            name: _random_batches(signature)
            for name, signature in signatures.items()
        }
    elif not isinstance(inputs, Mapping) or set(inputs) - set(signatures):
        inputs = dict.fromkeys(signatures, inputs)
    error = energy = same = positions = count = 0
    interpreter = Interpreter(model_content=content)
    for name, batches in inputs.items():
        runner = interpreter.get_signature_runner(name)
        # In a graph, which does not transpose a whole table to multiply it.
        in_keras = tf.function(signatures[name].call)
        for batch in batches:
            try:
                arrays = signatures[name].by_name(batch)
                found = runner(**arrays)
                tensors = {k: tf.constant(array) for k, array in arrays.items()}
                # Not called itself: it would warn that shapes differ.
                expected = in_keras.get_concrete_function(tensors)(tensors)
            except Exception:
                if given:
                    raise
                return None  # positions out of range, shapes that must agree
            count += 1
            for key, tensor in expected.items():
                wanted = keras.ops.convert_to_numpy(tensor)
                if wanted.dtype.kind != "f" or wanted.shape != found[key].shape:
                    continue
                error += np.square(found[key] - wanted).sum(dtype=float)
                energy += np.square(wanted).sum(dtype=float)
                agrees = found[key].argmax(-1) == wanted.argmax(-1)
                same += agrees.sum()
                positions += agrees.size
    if not positions:
        return None
    return Fidelity(
        relative_rms_error=float(np.sqrt(error / energy)) if energy else 0.0,
        top1_agreement=float(same / positions),
        num_inputs=count,
    )


def _random_batches(signature: Signature) -> list[dict[str, np.ndarray]]:
    """Ids that are in all tables, masks of ones, and normal numbers."""
    rng = np.random.default_rng(0)
    rows = [
        layer.input_dim
        for layer in keras_internals.iterate_layers(signature.model)
        if hasattr(layer, "input_dim") and hasattr(layer, "output_dim")
    ]
    if any(tensor.dtype == "string" for tensor in signature.inputs.values()):
        return []
    batch_size = 1 if max(rows, default=0) > _MANY_ROWS else _BATCH_SIZE
    batches = []
    for _ in range(_BATCHES):
        batch = {}
        for name, tensor in signature.inputs.items():
            shape = [
                size or (_LENGTH if axis else batch_size)
                for axis, size in enumerate(tensor.shape)
            ]
            values: np.ndarray
            if "mask" in name or tensor.dtype == "bool":
                values = np.ones(shape)
            elif len(shape) < 2:  # a position, or one id an example
                values = np.zeros(shape)
            elif keras.backend.is_int_dtype(tensor.dtype):
                values = rng.integers(min(rows, default=2), size=shape)
            else:
                values = rng.normal(size=shape)
            batch[name] = values.astype(tensor.dtype)
        batches.append(batch)
    return batches
