"""Writing a model as a LiteRT file that holds each table once."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import as_optional_integer
from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding._utils.memory import release_memory
from keras_distilled_embedding._utils.packages import require_package
from keras_distilled_embedding.export.graph_table import GraphTable
from keras_distilled_embedding.export.graph_table import StoredTable
from keras_distilled_embedding.export.report import ExportReport
from keras_distilled_embedding.export.report import measure_fidelity
from keras_distilled_embedding.export.signatures import Signature
from keras_distilled_embedding.layers.conversion import to_numpy
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import matrix_bytes
from keras_distilled_embedding.targets import is_embedding

DEFAULT_SIGNATURE = "serving_default"
FLOAT32 = "float32"

Tables = dict[keras.layers.Layer, GraphTable]


def export_litert(
    model: keras.Model,
    filepath: str | os.PathLike,
    *,
    quantization: str | None = None,
    signatures: Mapping[str, keras.Model] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    fidelity_inputs: Any = None,
    verbose: bool = True,
) -> ExportReport:
    """Exports a model to LiteRT (TFLite), with one copy of each table.

    The file needs only LiteRT's built-in operators and is written whole or
    not at all. It takes batches of any size and sequences of any length,
    unless these are given.

    Args:
        model: A built model with symbolic inputs, compressed or not, that
            computes in float32: Functional, Sequential, or of a class made
            of such, as KerasHub's are.
        filepath: The file to write. An existing file is replaced once the
            new one is complete.
        quantization: How the file stores the model. `"int8"`: tables in 8
            bits with one scale each, and other matrices in 8 bits with one
            scale a row. `"int4"`, `"int2"`: tables in so many bits, with a
            scale a row unless they were made for one a column, and other
            matrices as with `"int8"`; tables that are not factorized get a
            basis of full rank, and small ones are stored in 8 bits.
            `"float32"`: everything in floats. No calibration is needed. By
            default, the `quantization` of the model's factorized tables,
            which are then stored as they were trained, and floats where none
            has one.
        signatures: Models by signature name, to put into the file instead of
            `model` as a whole: parts of it, such as an encoder and a decoder,
            that share its layers and so its tables. The names of their inputs
            are the names of the signatures' inputs. `"serve"` is not
            available, Keras uses it itself.
        batch_size: Integer, the one batch size that the file takes. Recurrent
            layers cannot be converted without, and LiteRT in a browser runs
            only files with fixed sizes.
        sequence_length: Integer, the one length that sequences have in the
            file. Some models, such as those with rotary positions, cannot be
            converted without.
        fidelity_inputs: Inputs on which the file and the Keras model are
            compared: a list of batches, as the model is called with them, or
            a dictionary of lists by signature name. By default two random
            batches.
        verbose: Whether to print the report.

    Returns:
        An `ExportReport`.

    Raises:
        TypeError: If `model` or a signature is not a Keras model, or a size
            is not an integer.
        ValueError: If `quantization` is not available, or not given for tables
            of different ones; if a model has no symbolic inputs or is of
            another dtype; if a signature is not part of `model`; or if the
            model needs operators that LiteRT does not have.
        OSError: If the file cannot be written: the folder does not exist, is
            protected or full, or `filepath` is a folder itself.
        ImportError: If TensorFlow or a package of LiteRT is missing.
        RuntimeError: If the file would hold a table more than once, or if
            Keras runs on another backend than TensorFlow.

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
    if quantization not in (None, FLOAT32, *QUANTIZATIONS):
        raise ValueError(
            "`quantization` must be None or one of "
            f"{(FLOAT32, *QUANTIZATIONS)}. "
            f"Received: quantization={quantization!r}"
        )
    check_destination("filepath", filepath)
    batch_size = as_optional_integer("batch_size", batch_size)
    sequence_length = as_optional_integer("sequence_length", sequence_length)
    models = _check_signatures(model, signatures)
    _check_float32(model)
    quantization = _choose_quantization(models.values(), quantization)
    check_environment(quantization)
    from keras_distilled_embedding.export import flatbuffer  # needs LiteRT's

    sizes = batch_size, sequence_length
    originals = {name: Signature(part, *sizes) for name, part in models.items()}

    tables = _graph_tables(models.values(), quantization)
    parts = [part for table in tables.values() for part in table.tables]
    stored = {f"stored_table_{i}": part for i, part in enumerate(parts)}
    copies = keras_internals.copy_models(list(models.values()), tables)
    parts_by_name = dict(zip(models, copies))
    del copies
    content = convert(parts_by_name, *sizes, tables=stored)
    file = flatbuffer.LiteRTFile(content)
    del content
    release_memory()
    counts = _count_copies(file, models.values(), tables)
    content = flatbuffer.store_tables(file, stored, quantization is not None)
    fidelity = measure_fidelity(content, originals, fidelity_inputs)
    write_atomically(filepath, lambda file: file.write(content))
    report = ExportReport(
        filepath=str(filepath),
        bytes=len(content),
        weights_bytes=_weights_bytes(models.values(), tables, quantization),
        tables=counts,
        signatures=tuple(models),
        quantization=quantization,
        table_bytes={t.name: t.stored_bytes for t in tables.values()},
        fidelity=fidelity,
    )
    if verbose:
        print(report)
    return report


def _choose_quantization(
    models: Iterable[keras.Model], quantization: str | None
) -> str | None:
    """The format of the file, `None` for floats.

    Raises:
        ValueError: If none is asked for, and tables have different ones.
    """
    if quantization is not None:
        return None if quantization == FLOAT32 else quantization
    formats = {
        layer.name: layer.quantization
        for layer in _layers(models)
        if isinstance(layer, DistilledEmbedding)
        and layer.quantization is not None
    }
    if len(set(formats.values())) > 1:
        raise ValueError(
            "`quantization` must be given for a `model` whose tables have "
            f"different ones, since a file has one. Received: tables {formats}"
        )
    return next(iter(formats.values()), None)


def _graph_tables(
    models: Iterable[keras.Model], quantization: str | None
) -> Tables:
    """What stands for each embedding in the exported graph."""
    return {
        layer: GraphTable(layer, quantization)
        for layer in _layers(models)
        if isinstance(layer, DistilledEmbedding) or is_embedding(layer)
    }


def _layers(models: Iterable[keras.Model]) -> list[keras.layers.Layer]:
    """All layers of some models, each once."""
    return list(
        dict.fromkeys(
            layer
            for model in models
            for layer in keras_internals.iterate_layers(model)
        )
    )


def _count_copies(
    file: Any, models: Iterable[keras.Model], tables: Tables
) -> dict[str, int]:
    """How often a file will hold each table, by layer name.

    Args:
        file: The `LiteRTFile` of the converted models, still without the
            tables in `tables`.
        models: The models that it was made of.
        tables: What stands for their embeddings, and will be stored once. An
            embedding with a `call` of its own is left to the converter.

    Raises:
        RuntimeError: If a table is held more than once.
    """
    counts = {table.name: 1 for table in tables.values()}
    for layer in _layers(models):
        if isinstance(layer, keras.layers.Embedding) and layer not in tables:
            counts[layer.name] = file.count_copies(to_numpy(layer.embeddings))
    repeated = {name: count for name, count in counts.items() if count > 1}
    if repeated:
        raise RuntimeError(
            "The converter stored tables more than once, so nothing was "
            "written. Use `keras.layers.ReversibleEmbedding` instead of a "
            "subclass of `Embedding` with a `call` of its own. "
            f"Copies by layer: {repeated}"
        )
    return counts


def _other_weights(
    models: Iterable[keras.Model], tables: Tables
) -> list[keras.Variable]:
    """The weights of some models, but for those of replaced embeddings."""
    weights = {id(w): w for model in models for w in model.weights}
    for layer in tables:
        for weight in layer.weights:
            weights.pop(id(weight), None)
    return list(weights.values())


def _weights_bytes(
    models: Iterable[keras.Model], tables: Tables, quantization: str | None
) -> int:
    """Bytes of the models' weights as they are stored, each counted once."""
    total = sum(table.stored_bytes for table in tables.values())
    for weight in _other_weights(models, tables):
        size = math.prod(weight.shape)
        in_8_bits = quantization is not None and len(weight.shape) > 1
        total += matrix_bytes(size) if in_8_bits else 4 * size
    return total


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


def check_environment(quantization: str | None) -> None:
    """Refuses to start without what the export needs."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "Export needs Keras's TensorFlow backend: save the model, set "
            "KERAS_BACKEND=tensorflow, and load it in a new process. "
            f"Received: backend {keras.backend.backend()!r}"
        )
    packages = ["tensorflow", "ai_edge_litert.schema_py_generated"]
    if quantization is not None:
        packages.append("ai_edge_quantizer.quantizer")
    for package in packages:
        require_package(package, "litert")


def convert(
    signatures: dict[str, keras.Model],
    batch_size: int | None = None,
    sequence_length: int | None = None,
    *,
    tables: Mapping[str, StoredTable] | None = None,
    optimizations: Sequence[Any] = (),
) -> bytes:
    """The LiteRT file that TensorFlow's converter makes, as bytes.

    Args:
        signatures: Models by signature name. It is emptied, so that models
            that were made for it take no memory while they are converted.
        tables: Those in the models, by the name of the input that the file
            gets for their codes.
        batch_size: As of `export_litert`.
        sequence_length: As of `export_litert`.
        optimizations: The converter's own, of `tf.lite.Optimize`.

    Raises:
        ValueError: If the models need operators that LiteRT does not have.
    """
    import tensorflow as tf

    tables = tables or {}
    archive = keras.export.ExportArchive()
    for key, model in signatures.items():
        archive.track(model)
        signature = Signature(model, batch_size, sequence_length)
        tensors = signature.inputs | {
            name: keras.KerasTensor(table.codes.shape)
            for name, table in tables.items()
        }
        specifications = {
            name: tf.TensorSpec(tensor.shape, tensor.dtype, name)
            for name, tensor in tensors.items()
        }
        archive.add_endpoint(
            key, _with_tables(signature, tables), [specifications]
        )
    with tempfile.TemporaryDirectory() as folder:
        logger = tf.get_logger()
        level = logger.level
        logger.setLevel("WARNING")  # where assets are is no news to a user
        try:
            archive.write_out(folder, verbose=False)
        except tf.errors.OpError as error:  # TensorFlow's form of it
            raise OSError(
                "The model cannot be written to a temporary folder, as its "
                f"conversion needs: {str(error)[:500]}"
            ) from error
        finally:
            logger.setLevel(level)
        names = list(signatures)
        signatures.clear()
        del archive, model, signature
        release_memory()
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=names
        )
        release_memory()
        # Fails here rather than on the device, where Flex operators would.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.optimizations = list(optimizations)
        # Nobody reads them; they are hashed in Python, weight by weight.
        converter.exclude_conversion_metadata = True
        try:
            return converter.convert()
        except Exception as error:
            raise ValueError(
                "`model` cannot be converted with LiteRT's built-in operators "
                "alone. A `sequence_length` may help, or a `batch_size` if it "
                "has recurrent layers. "
                f"The converter says: {str(error)[:500]}"
            ) from error


def _with_tables(
    signature: Signature, tables: Mapping[str, StoredTable]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def endpoint(inputs: dict[str, Any]) -> dict[str, Any]:
        for name, table in tables.items():
            table.graph_codes = inputs[name]
        return signature.call(inputs)

    return endpoint
