"""How far a file's outputs are from those of the Keras model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.export.report import Fidelity

_RANDOM_BATCHES, _BATCH, _LENGTH = 2, 4, 8


def measure_fidelity(
    content: bytes,
    signatures: Mapping[str, keras.Model],
    inputs: Any,
    sequence_length: int | None,
) -> Fidelity | None:
    """Runs both on the same inputs.

    Args:
        content: The file.
        signatures: The Keras models, by signature name.
        inputs: As `fidelity_inputs` of `export_litert`.
        sequence_length: As of `export_litert`.

    Returns:
        A `Fidelity`, or `None` where random inputs do not fit the model.
    """
    from ai_edge_litert.interpreter import Interpreter

    given = inputs is not None
    if not given:
        inputs = {
            name: _random_inputs(model, sequence_length)
            for name, model in signatures.items()
        }
    elif not isinstance(inputs, Mapping) or set(inputs) - set(signatures):
        inputs = dict.fromkeys(signatures, inputs)
    error = energy = same = places = count = 0
    interpreter = Interpreter(model_content=content)
    for name, batches in inputs.items():
        model = signatures[name]
        runner = interpreter.get_signature_runner(name)
        for batch in batches:
            try:
                found = runner(**_by_name(model, batch))
                expected = _outputs(model, batch)
            except Exception:
                if given:
                    raise
                return None  # positions out of range, shapes that must agree
            count += 1
            for key, wanted in expected.items():
                if wanted.dtype.kind != "f" or wanted.shape != found[key].shape:
                    continue
                error += np.square(found[key] - wanted).sum(dtype=float)
                energy += np.square(wanted).sum(dtype=float)
                agrees = found[key].argmax(-1) == wanted.argmax(-1)
                same += agrees.sum()
                places += agrees.size
    if not places:
        return None
    return Fidelity(
        relative_rms_error=float(np.sqrt(error / energy)) if energy else 0.0,
        top1_agreement=float(same / places),
        num_inputs=count,
    )


def _random_inputs(
    model: keras.Model, sequence_length: int | None
) -> list[dict[str, np.ndarray]]:
    """Ids that are in all tables, masks of ones, and normal numbers."""
    rng = np.random.default_rng(0)
    rows = [
        layer.input_dim
        for layer in keras_internals.iterate_layers(model)
        if hasattr(layer, "input_dim") and hasattr(layer, "output_dim")
    ]
    batches = []
    for _ in range(_RANDOM_BATCHES):
        batch = {}
        for name, tensor in keras_internals.named_inputs(model).items():
            shape = [
                (sequence_length or _LENGTH) if size is None else size
                for size in tensor.shape
            ]
            if tensor.shape and tensor.shape[0] is None:
                shape[0] = _BATCH
            if "mask" in name or tensor.dtype == "bool":
                values = np.ones(shape)
            elif len(tensor.shape) < 2:  # where something is, not what
                values = np.zeros(shape)
            elif keras.backend.is_int_dtype(tensor.dtype):
                values = rng.integers(min(rows, default=2), size=shape)
            else:
                values = rng.normal(size=shape)
            batch[name] = values.astype(tensor.dtype)
        batches.append(batch)
    return batches


def _by_name(model: keras.Model, batch: Any) -> dict[str, np.ndarray]:
    if isinstance(batch, Mapping):
        return {name: np.asarray(value) for name, value in batch.items()}
    names = list(keras_internals.named_inputs(model))
    return dict(zip(names, map(np.asarray, keras.tree.flatten(batch))))


def _outputs(model: keras.Model, batch: Any) -> dict[str, np.ndarray]:
    """As the endpoint of the file names them."""
    inputs = keras_internals.input_structure(model)
    named = _by_name(model, batch)
    values = keras.tree.pack_sequence_as(
        inputs, [named[name] for name in keras_internals.named_inputs(model)]
    )
    outputs = model(values, training=False)
    if not isinstance(outputs, dict):
        flat = keras.tree.flatten(outputs)
        outputs = {f"output_{i}": output for i, output in enumerate(flat)}
    return {
        name: keras.ops.convert_to_numpy(value)
        for name, value in outputs.items()
    }
