"""A float LiteRT file made one of integers, each table still stored once."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding.export.graph_table import GraphTable
from keras_distilled_embedding.export.graph_table import TablePart
from keras_distilled_embedding.quantization import FORMATS

# Bytes from which a matrix is worth storing in 8 bits.
_LARGE = 4_096


def quantize_file(
    content: bytes,
    tables: Iterable[GraphTable],
    other_shapes: Sequence[tuple[int, ...]] = (),
) -> tuple[bytes, dict[str, int]]:
    """Stores tables as their integers, and other matrices in 8 bits.

    The converter and ai-edge-quantizer choose scales by operator: a table
    that is both looked up and multiplied with gets two kinds, and is stored
    twice. So the tables are written here, with the integers that they are
    already rounded to; ai-edge-quantizer does the rest.

    Args:
        content: A float file, in whose graph the tables' `values` are.
        tables: The layers that stand for them.
        other_shapes: Those of the model's other weights.

    Returns:
        The file, and how many buffers hold each table, by layer name.
    """
    parts = [(table, part) for table in tables for part in table.parts]
    model = _Model(content)
    names = [name for _, part in parts for name in model.readers(part)]
    model = _Model(_quantize_the_rest(content, names))
    for table, part in parts:
        model.store(part, table.quantization)
    model.store_what_is_read_by_rows()
    model.drop_names()
    counts: dict[str, int] = {}
    for table, part in parts:
        # Whatever is as large, so that no copy goes unseen that the converter
        # has put a factor into; other weights of that shape have one each.
        shape = part.values.shape
        shapes = [p.values.shape for _, p in parts] + list(other_shapes)
        alike = sum(s in (shape, shape[::-1]) for s in shapes)
        copies = math.ceil(model.count(shape) / alike)
        counts[table.name] = max(counts.get(table.name, 0), copies)
    return model.pack(), counts


def stored_bytes(
    models: Iterable[keras.Model],
    stored: Mapping[keras.layers.Layer, GraphTable],
) -> int:
    """Bytes of the models' weights, each counted once.

    Args:
        models: The Keras models of a file.
        stored: Their tables as integers; none if the file is of floats.
    """
    weights = {id(w): w for model in models for w in model.weights}
    if not stored:
        return sum(w.numpy().nbytes for w in weights.values())
    total = sum(table.stored_bytes for table in stored.values())
    for layer in stored:
        for weight in layer.weights:
            weights.pop(id(weight), None)
    for weight in weights.values():
        size = int(np.prod(weight.shape))
        total += size if len(weight.shape) > 1 else 4 * size
    return total


def _quantize_the_rest(content: bytes, names: list[str]) -> bytes:
    """Dynamic-range int8 of all matrices but those of the operators named."""
    try:
        from ai_edge_quantizer import qtyping
        from ai_edge_quantizer import quantizer
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
    except ImportError as error:
        raise ImportError(
            f"Quantized export needs `{error.name}`: "
            'pip install "keras-distilled-embedding[litert]"'
        ) from error
    work = quantizer.Quantizer(content)
    operators = qtyping.TFLOperationName
    for operator in (operators.FULLY_CONNECTED, operators.BATCH_MATMUL):
        work.add_dynamic_config(".*", operator, num_bits=8)
    for name in names:
        work.update_quantization_recipe(
            f"^{re.escape(name)}",
            operators.FULLY_CONNECTED,
            algorithm_key=AlgorithmName.NO_QUANTIZE,
        )
    result = work.quantize(
        enable_progress_bar=False, enable_progress_report=False
    )
    return bytes(result.quantized_model)


class _Model:
    """A LiteRT file, taken apart."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema = schema
        self._model = schema.ModelT.InitFromPackedBuf(content, 0)
        for buffer in self._model.buffers:
            if buffer.offset > 1:  # kept behind the flatbuffer
                end = buffer.offset + buffer.size
                data = content[buffer.offset : end]
                buffer.data = np.frombuffer(data, "uint8")
                buffer.offset = buffer.size = 0

    def readers(self, part: TablePart) -> list[str]:
        """Outputs of the operators that multiply with a table."""
        found = []
        for graph, tensor in self._tensors_of(part):
            for operator in graph.operators:
                if tensor in list(operator.inputs):
                    found += [
                        graph.tensors[output].name.decode()
                        for output in operator.outputs
                    ]
        return found

    def count(self, shape: tuple[int, int]) -> int:
        """How many buffers hold a matrix of a shape, or transposed."""
        return len(
            {
                tensor.buffer
                for graph in self._model.subgraphs
                for tensor in graph.tensors
                if tensor.shape is not None
                and tuple(tensor.shape) in (shape, shape[::-1])
                and self._model.buffers[tensor.buffer].data is not None
            }
        )

    def store_what_is_read_by_rows(self) -> None:
        """Stores tables of positions and the like in 8 bits.

        ai-edge-quantizer leaves them, since nothing multiplies with them:
        rows are taken of the integers, and made floats.
        """
        for graph in self._model.subgraphs:
            for i in range(len(graph.tensors)):
                readers = [o for o in graph.operators if i in list(o.inputs)]
                if self._is_read_by_rows(graph.tensors[i], readers):
                    self._store_in_8_bits(graph, i, readers)

    def _is_read_by_rows(self, tensor: Any, readers: list[Any]) -> bool:
        data = self._model.buffers[tensor.buffer].data
        builtin = self._schema.BuiltinOperator
        return (
            tensor.type == self._schema.TensorType.FLOAT32
            and data is not None
            and len(data) >= _LARGE
            and tensor.shape is not None
            and len(tensor.shape) == 2
            and bool(readers)
            and all(
                self._model.operatorCodes[reader.opcodeIndex].builtinCode
                in (builtin.GATHER, builtin.SLICE, builtin.STRIDED_SLICE)
                for reader in readers
            )
            # Not what another graph reads otherwise.
            and sum(
                other.buffer == tensor.buffer
                for graph in self._model.subgraphs
                for other in graph.tensors
            )
            == 1
        )

    def _store_in_8_bits(self, graph: Any, i: int, readers: list[Any]) -> None:
        tensor = graph.tensors[i]
        buffer = self._model.buffers[tensor.buffer]
        values = np.asarray(buffer.data, "uint8").view("float32")
        scale = max(float(np.abs(values).max()) / 127.0, 1e-30)
        integers = np.round(values / scale).astype("int8")
        buffer.data = integers.view("uint8")
        quantization = self._schema.QuantizationParametersT()
        quantization.scale = np.array([scale], "float32")
        quantization.zeroPoint = np.zeros(1, "int64")
        tensor.type = self._schema.TensorType.INT8
        tensor.quantization = quantization
        codes = self._model.operatorCodes
        for reader in readers:
            code = codes[reader.opcodeIndex]
            code.version = max(code.version, 2)  # that of integers
            (output,) = reader.outputs
            rows = copy.copy(graph.tensors[output])
            rows.type = self._schema.TensorType.INT8
            rows.quantization = quantization
            rows.buffer = 0
            graph.tensors.append(rows)
            reader.outputs = np.array([len(graph.tensors) - 1], "int32")
            dequantize = self._schema.OperatorT()
            dequantize.opcodeIndex = self._operator_code(
                self._schema.BuiltinOperator.DEQUANTIZE, 2
            )
            dequantize.inputs = reader.outputs
            dequantize.outputs = np.array([output], "int32")
            place = next(
                k for k, o in enumerate(graph.operators) if o is reader
            )
            graph.operators.insert(place + 1, dequantize)

    def drop_names(self) -> None:
        """Of tensors that no signature names: of no use, and not small."""
        for graph in self._model.subgraphs:
            named = {int(i) for i in (*graph.inputs, *graph.outputs)}
            for i, tensor in enumerate(graph.tensors):
                if i not in named:
                    tensor.name = b""

    def store(self, part: TablePart, rounding: str) -> None:
        """Puts integers in the place of a table."""
        tensors = list(self._tensors_of(part))
        buffers = {graph.tensors[i].buffer for graph, i in tensors}
        for buffer in buffers:
            self._model.buffers[buffer].data = part.packed(rounding)
        kind = self._schema.TensorType
        scales = None
        for graph, i in tensors:
            for operator in graph.operators:
                if i in list(operator.inputs):
                    self._take_rows(graph, operator, i)
            tensor = graph.tensors[i]
            tensor.type = kind.INT8 if rounding == "int8" else kind.INT4
            tensor.quantization = self._schema.QuantizationParametersT()
            if rounding == "int8":
                tensor.quantization.scale = part.scales.reshape(-1)
                tensor.quantization.zeroPoint = np.zeros(1, "int64")
                continue
            if scales is None:
                scales = self._add_buffer(part.scales.astype("float16"))
            details = self._schema.BlockwiseQuantizationT()
            details.scales = self._add_tensor(
                graph, tensor.name + b"_scales", part.scales.shape, scales
            )
            details.zeroPoints = -1
            details.blockSize = FORMATS[quantization].block
            options = self._schema.QuantizationDetails
            tensor.quantization.detailsType = options.BlockwiseQuantization
            tensor.quantization.details = details

    def pack(self) -> bytes:
        """The file."""
        import flatbuffers

        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _tensors_of(self, part: TablePart) -> Iterable[tuple[Any, int]]:
        """Every tensor, with its graph, that is this table."""
        wanted = part.values.tobytes()
        same = {
            i
            for i, buffer in enumerate(self._model.buffers)
            if buffer.data is not None
            and len(buffer.data) == len(wanted)
            and np.asarray(buffer.data, "uint8").tobytes() == wanted
        }
        for graph in self._model.subgraphs:
            for i, tensor in enumerate(graph.tensors):
                if tensor.buffer in same:
                    yield graph, i

    def _take_rows(self, graph: Any, operator: Any, table: int) -> None:
        """`GATHER` reads floats row by row; `EMBEDDING_LOOKUP` integers too."""
        codes = self._model.operatorCodes
        builtin = self._schema.BuiltinOperator
        code = codes[operator.opcodeIndex]
        if code.builtinCode != builtin.GATHER:
            return
        ids = operator.inputs[1]
        if len(graph.tensors[ids].shape) != 1:
            raise RuntimeError("A table is looked up with ids that are not 1-D")
        operator.inputs = np.array([ids, table], "int32")
        operator.builtinOptions = None
        operator.builtinOptionsType = self._schema.BuiltinOptions.NONE
        operator.opcodeIndex = self._operator_code(builtin.EMBEDDING_LOOKUP, 4)

    def _operator_code(self, builtin: int, version: int) -> int:
        codes = self._model.operatorCodes
        for i, code in enumerate(codes):
            if code.builtinCode == builtin:
                return i
        code = self._schema.OperatorCodeT()
        code.builtinCode = builtin
        code.deprecatedBuiltinCode = min(builtin, 127)
        code.version = version
        codes.append(code)
        return len(codes) - 1

    def _add_buffer(self, values: np.ndarray) -> int:
        buffer = self._schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), "uint8")
        self._model.buffers.append(buffer)
        return len(self._model.buffers) - 1

    def _add_tensor(
        self, graph: Any, name: bytes, shape: tuple[int, ...], buffer: int
    ) -> int:
        tensor = self._schema.TensorT()
        tensor.name = name
        tensor.shape = np.array(shape, "int32")
        tensor.type = self._schema.TensorType.FLOAT16
        tensor.buffer = buffer
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1
