"""Write a model as a LiteRT file that holds each table once."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.export.fidelity import measure_fidelity
from keras_distilled_embedding.export.flatbuffer import quantize_file
from keras_distilled_embedding.export.flatbuffer import stored_bytes
from keras_distilled_embedding.export.graph_table import GraphTable
from keras_distilled_embedding.export.report import ExportReport
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.targets import is_embedding

DEFAULT_SIGNATURE = "serving_default"
FLOAT32 = "float32"


def export_litert(
    model: keras.Model,
    filepath: str | os.PathLike,
    *,
    quantization: str | None = None,
    signatures: Mapping[str, keras.Model] | None = None,
    sequence_length: int | None = None,
    fidelity_inputs: Any = None,
    verbose: bool = True,
) -> ExportReport:
    """Exports a model to LiteRT (TFLite), with one copy of each table.

    The file needs LiteRT's built-in operators only, accepts batches of any
    size, sequences of any length if none is given, and is written whole or
    not at all. ReLU is applied to the codes before export, `U' = f(U)`:
    applied in the graph, it would make the converter store them twice. (With
    `hidden_dim` it cannot be applied before: a projection through such a
    layer still makes the converter store `[f(U), g(U A + b)]` for all tokens,
    beside `U`.)

    Args:
        model: A built model with symbolic inputs, compressed or not, that
            computes in float32: Functional, Sequential, or of a class made
            of such, as KerasHub's are.
        filepath: The file to write. An existing file is replaced, once the
            new one is complete.
        quantization: `"int8"` stores tables, with one scale each, and other
            matrices, with one a row, in 8 bits; `"int4"` the tables in 4
            bits, with one scale for 32 numbers, and the other matrices in 8;
            `"float32"` nothing. It needs no calibration. By default it is the
            `rounding` of the model's factorised tables, which are then stored
            as they were trained, and float32 where none has one.
        signatures: Models by signature name, to put into the file in the
            place of `model` as a whole: parts of it such as an encoder and a
            decoder, which share its layers and so their tables. The names of
            their inputs are the names of the signatures' inputs. Not
            `"serve"`, which is Keras's own.
        sequence_length: Integer, the one length that sequences have in the
            file. Some models, those with rotary positions among them, can be
            converted for a fixed length only.
        fidelity_inputs: What the file and the Keras model are compared on,
            batches as the model is called with them, in a list; by signature
            name where there are several. By default two random ones.
        verbose: Whether to print the report.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: If `model` or a signature is not a Keras model.
        ValueError: If `quantization` is not available, or not the one that a
            table was trained for, if tables were trained for different ones,
            if a model has no symbolic inputs or is of another dtype, if a
            signature is not part of `model`, or if the model needs operators
            that LiteRT has not.
        FileNotFoundError: If the folder of `filepath` does not exist.
        IsADirectoryError: If `filepath` is a folder.
        PermissionError: If its folder cannot be written to.
        OSError: If the disk is full.
        ImportError: If TensorFlow or ai-edge-litert is missing.
        RuntimeError: If the file would hold a table more than once.

    Example:

    ```python
    model = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        layers.DistilledEmbedding(10_000, 128, rank=15),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(2),
    ])
    report = export_litert(model, "model.tflite")
    report.overhead  # 1.0 and a little
    ```
    """
    filepath = Path(filepath)
    if quantization not in (None, FLOAT32, *FORMATS):
        raise ValueError(
            "`quantization` must be None or one of "
            f"{(FLOAT32, *FORMATS)}. Received: "
            f"quantization={quantization!r}"
        )
    check_destination("filepath", filepath)
    sequence_length = as_optional_integer("sequence_length", sequence_length)
    signatures = _check_signatures(model, signatures)
    _check_float32(model)
    quantization = _choose_quantization(signatures, quantization)
    _import_litert()

    stored: dict[keras.layers.Layer, GraphTable] = {}
    if quantization is None:
        parts = _with_activations_applied(signatures)
    else:
        stored = _stored_tables(signatures, quantization)
        copies = keras_internals.copy_models(list(signatures.values()), stored)
        parts = dict(zip(signatures, copies))
    content = convert(parts, sequence_length)
    if quantization is None:
        tables = _count_tables(content, model)
    else:
        replaced = {id(w) for layer in stored for w in layer.weights}
        content, tables = quantize_file(
            content,
            list(stored.values()),
            [tuple(w.shape) for w in model.weights if id(w) not in replaced],
        )
    repeated = {name: n for name, n in tables.items() if n > 1}
    if repeated:
        raise RuntimeError(
            "The converter stored tables more than once, so nothing was "
            f"written. Copies by layer: {repeated}"
        )
    fidelity = measure_fidelity(
        content, signatures, fidelity_inputs, sequence_length
    )
    write_atomically(filepath, lambda file: file.write(content))
    report = ExportReport(
        filepath=str(filepath),
        bytes=len(content),
        weights_bytes=stored_bytes(signatures.values(), stored),
        tables=tables,
        signatures=tuple(signatures),
        quantization=quantization,
        table_bytes={
            table.name: table.stored_bytes for table in stored.values()
        },
        fidelity=fidelity,
    )
    if verbose:
        print(report)
    return report


def _choose_quantization(
    signatures: Mapping[str, keras.Model], quantization: str | None
) -> str | None:
    """The integers to store, `None` for floats.

    Raises:
        ValueError: If layers were trained for others.
    """
    if quantization == FLOAT32:
        return None
    trained_as = {
        layer.name: layer.quantization
        for part in signatures.values()
        for layer in keras_internals.iterate_layers(part)
        if isinstance(layer, DistilledEmbedding)
        and layer.quantization is not None
    }
    roundings = set(trained_as.values())
    if len(roundings) > 1:
        raise ValueError(
            "`model` must have layers of one `rounding`, since a file has one "
            f"quantization. Received: {trained_as}"
        )
    if quantization is None:
        return next(iter(roundings), None)
    if not roundings <= {quantization}:
        name, rounding = next(iter(trained_as.items()))
        raise ValueError(
            f"`quantization` must be {rounding!r}, as layer '{name}' was "
            f"trained. Received: quantization={quantization!r}"
        )
    return quantization


def _stored_tables(
    signatures: Mapping[str, keras.Model], quantization: str
) -> dict[keras.layers.Layer, GraphTable]:
    """What stands for each table in the graph of a file of integers."""
    tables = {}
    for part in signatures.values():
        for layer in keras_internals.iterate_layers(part):
            is_factorized = isinstance(layer, DistilledEmbedding)
            if layer in tables or not (is_factorized or is_embedding(layer)):
                continue
            tables[layer] = GraphTable(layer, quantization)
    return tables


def _check_signatures(
    model: keras.Model, signatures: Mapping[str, keras.Model] | None
) -> dict[str, keras.Model]:
    keras_internals.check_symbolic(model)
    if signatures is None:
        return {DEFAULT_SIGNATURE: model}
    if not isinstance(signatures, Mapping) or not signatures:
        raise TypeError(
            "`signatures` must be a non-empty dictionary of models by name. "
            f"Received: signatures={signatures!r}"
        )
    if "serve" in signatures:
        raise ValueError(
            "`signatures` must not be named 'serve': the converter would "
            f"drop the others. Received: signatures named {list(signatures)}"
        )
    own = {id(variable) for variable in model.variables}
    for name, part in signatures.items():
        keras_internals.check_symbolic(part)
        foreign = [v.path for v in part.variables if id(v) not in own]
        if foreign:
            raise ValueError(
                f"`signatures` must be parts of `model`. Received: '{name}' "
                f"with variables that are not the model's, {foreign[:5]}"
            )
    return dict(signatures)


def _check_float32(model: keras.Model) -> None:
    """LiteRT's built-in operators do not multiply in half precision."""
    half = [
        layer.name
        for layer in keras_internals.iterate_layers(model)
        if layer.compute_dtype in ("float16", "bfloat16")
    ]
    if half:
        raise ValueError(
            "`model` must compute in float32: build it under the dtype policy "
            "'float32' and load its weights. Received: layers that compute in "
            f"half precision, {half[:5]}"
        )


def _import_litert() -> Any:
    """The modules conversion needs, or word of what to install."""
    try:
        import ai_edge_litert.schema_py_generated as schema
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            f"Export needs `{error.name}`: "
            'pip install "keras-distilled-embedding[litert]"'
        ) from error
    return tf, schema


def _with_activations_applied(
    signatures: Mapping[str, keras.Model],
) -> dict[str, keras.Model]:
    """Copies whose factorised tables hold `f(U)` and apply nothing."""
    parts = list(signatures.values())
    applied = {
        layer: layer.with_activation_applied()
        for part in parts
        for layer in keras_internals.iterate_layers(part)
        if isinstance(layer, DistilledEmbedding)
    }
    return dict(zip(signatures, keras_internals.copy_models(parts, applied)))


def convert(
    signatures: Mapping[str, keras.Model],
    sequence_length: int | None = None,
    optimizations: Sequence[Any] = (),
) -> bytes:
    """The LiteRT file that TensorFlow's converter makes, as bytes.

    Args:
        signatures: Models by signature name.
        sequence_length: As of `export_litert`.
        optimizations: The converter's own, of `tf.lite.Optimize`.

    Raises:
        ValueError: If the models need operators that LiteRT has not.
    """
    tf, _ = _import_litert()
    archive = keras.export.ExportArchive()
    for name, part in signatures.items():
        archive.track(part)
        archive.add_endpoint(name, *_endpoint(tf, part, sequence_length))
    with tempfile.TemporaryDirectory() as folder:
        try:
            archive.write_out(folder, verbose=False)
        except tf.errors.OpError as error:  # TensorFlow's form of it
            raise OSError(
                "The model cannot be written to a temporary folder, as its "
                f"conversion needs: {str(error)[:500]}"
            ) from error
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=list(signatures)
        )
        # Fails here rather than on the device, where Flex operators would.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.optimizations = list(optimizations)
        try:
            return converter.convert()
        except Exception as error:
            raise ValueError(
                "`model` cannot be converted with LiteRT's built-in operators "
                "alone. "
                + ("" if sequence_length else "A `sequence_length` may help. ")
                + f"The converter says: {str(error)[:500]}"
            ) from error


def _endpoint(
    tf: Any, model: keras.Model, sequence_length: int | None
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], list[Any]]:
    """A function of the model's inputs by name, and its input signature."""
    inputs = keras_internals.input_structure(model)
    tensors = keras_internals.named_inputs(model)
    signature = {
        name: tf.TensorSpec(
            [
                sequence_length if size is None and axis > 0 else size
                for axis, size in enumerate(tensor.shape)
            ],
            tensor.dtype,
            name,
        )
        for name, tensor in tensors.items()
    }

    def endpoint(arguments: dict[str, Any]) -> dict[str, Any]:
        values = keras.tree.pack_sequence_as(
            inputs, [arguments[name] for name in tensors]
        )
        outputs = model(values, training=False)
        if isinstance(outputs, dict):
            return outputs
        return {
            f"output_{i}": output
            for i, output in enumerate(keras.tree.flatten(outputs))
        }

    return endpoint, [signature]


def _count_tables(content: bytes, model: keras.Model) -> dict[str, int]:
    """How many copies of each table there are in a file, by layer name.

    Of the layers of one name (in nested models) the largest number.
    """
    tables = [
        (layer.name, _stored_forms(layer))
        for layer in keras_internals.iterate_layers(model)
        if isinstance(layer, keras.layers.Embedding | DistilledEmbedding)
    ]
    counts: dict[str, int] = {}
    for name, forms in tables:
        copies = sum(_count_copies(content, form) for form in forms)
        # Layers may hold equal tables, of zeros say: each has one copy.
        equal = sum(np.array_equal(forms[0], other[0]) for _, other in tables)
        counts[name] = max(counts.get(name, 0), math.ceil(copies / equal))
    return counts


def _stored_forms(layer: keras.layers.Layer) -> list[np.ndarray]:
    """The largest array that an embedding layer can leave in a file.

    Of a factorised table the codes, with and without their activation.
    """
    if not isinstance(layer, DistilledEmbedding):
        return [keras.ops.convert_to_numpy(layer.embeddings)]
    forms = [layer.with_activation_applied(), layer]
    codes = [keras.ops.convert_to_numpy(form.codes) for form in forms]
    return codes[:1] if np.array_equal(*codes) else codes


def _count_copies(content: bytes, table: np.ndarray) -> int:
    """How many buffers of the file hold exactly this table."""
    _, schema = _import_litert()
    model = schema.Model.GetRootAs(content, 0)
    count = 0
    for array in (table, table.T):
        wanted = np.ascontiguousarray(array).tobytes()
        for i in range(model.BuffersLength()):
            buffer = model.Buffers(i)
            if buffer.DataLength() == len(wanted):
                count += buffer.DataAsNumpy().tobytes() == wanted
    return count
