"""Reading a LiteRT file, and storing its matrices as integers.

Tables are stored here, all other matrices by ai-edge-quantizer. It would
choose scales by operator, and store a table that is both looked up and
multiplied with twice. Its `DEQUANTIZED_WEIGHT_RECOVERY`, which keeps integers
that are already there, gave the same bytes as this module for tied, untied,
dense and several-signature files, in int8 with one scale and in int4 and int2
with one scale, one a row or one for 32, 64, 128 or 256 columns. But it guesses
scales from the smallest difference of two numbers: rows of eight integers in
four bits, or a table with numbers of several thousand, are refused. And other
sizes of blocks, such as one of 96 columns a row, are not offered.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from keras_distilled_embedding.export.graph_table import StoredTable
from keras_distilled_embedding.layers.conversion import to_numpy

_OPERATORS = schema.BuiltinOperator
_TYPES = schema.TensorType
_INTEGERS = {8: _TYPES.INT8, 4: _TYPES.INT4, 2: _TYPES.INT2}
# Bytes from which a matrix is worth storing in 8 bits.
_LARGE = 4_096
# Rows that are compared to tell whether matrices are proportional.
_SAMPLE = 1_000


class LiteRTFile:
    """A LiteRT file, taken apart.

    Args:
        content: Its bytes.
    """

    def __init__(self, content: bytes) -> None:
        view = memoryview(content)  # of which buffers are slices, not copies
        self._model = flatbuffer_utils.read_model_from_bytearray(view)
        self.graphs = self._model.subgraphs

    def to_bytes(self) -> bytes:
        """The file, in which equal scales and zero points are written once."""
        builder = _SharingBuilder(1 << 20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def operator(self, operator: Any) -> int:
        """The `BuiltinOperator` that an operator of a graph is."""
        return self._model.operatorCodes[operator.opcodeIndex].builtinCode

    def matrices(self) -> Iterator[tuple[Any, int, np.ndarray]]:
        """Every float matrix, with its graph and its index there."""
        for graph in self.graphs:
            for i, tensor in enumerate(graph.tensors):
                data = self._model.buffers[tensor.buffer].data
                if (
                    data is not None
                    and tensor.type == _TYPES.FLOAT32
                    and tensor.shape is not None
                    and len(tensor.shape) == 2
                ):
                    values = np.frombuffer(data, "float32")
                    yield graph, i, values.reshape(tensor.shape)

    def find(self, values: np.ndarray) -> list[tuple[Any, int]]:
        """The tensors that hold a matrix: their graphs, and indices there."""
        return [
            (graph, i)
            for graph, i, matrix in self.matrices()
            if np.array_equal(matrix, values)
        ]

    def count_copies(
        self, table: np.ndarray, weights: Iterable[np.ndarray]
    ) -> int:
        """How many times the file holds a float matrix.

        Also transposed, or multiplied with a number for each row or column,
        as the converter may have multiplied it. Where some of the model's
        weights are such multiples of each other, the copies are shared among
        them.

        Args:
            table: The matrix.
            weights: All matrices of the model, the table among them.
        """
        found = {
            graph.tensors[i].buffer
            for graph, i, matrix in self.matrices()
            if _is_multiple(matrix, table) or _is_multiple(matrix.T, table)
        }
        alike = sum(_is_multiple(weight, table) for weight in weights)
        return math.ceil(len(found) / max(alike, 1))

    def store(self, table: StoredTable) -> list[str]:
        """Puts the integers of a table in the place of its floats.

        Returns:
            Names of the products with it.
        """
        tensors = self.find(to_numpy(table.codes))
        for graph, i in tensors:
            buffer = self._model.buffers[graph.tensors[i].buffer]
            buffer.data = table.format.pack(table.integers)
        scales = None
        if table.format.block is not None:
            scales = self._add_buffer(table.scales.astype("float16"))
        products = []
        for graph, i in tensors:
            for operator in _readers(graph, i):
                if self.operator(operator) == _OPERATORS.GATHER:
                    # It takes rows of floats only.
                    operator.inputs = [operator.inputs[1], i]
                    operator.builtinOptions = None
                    operator.builtinOptionsType = schema.BuiltinOptions.NONE
                    operator.opcodeIndex = self._operator_code(
                        _OPERATORS.EMBEDDING_LOOKUP, 4
                    )
                elif self.operator(operator) == _OPERATORS.FULLY_CONNECTED:
                    output = graph.tensors[operator.outputs[0]]
                    products.append(output.name.decode())
                else:
                    raise RuntimeError(
                        "The converter made an operator of a table that does "
                        f"not take integers: {self.operator(operator)}"
                    )
            tensor = graph.tensors[i]
            tensor.type = _INTEGERS[table.format.bits]
            tensor.quantization = self._quantization(
                graph, tensor.name, table, scales
            )
        return products

    def _quantization(
        self, graph: Any, name: bytes, table: StoredTable, scales: int | None
    ) -> Any:
        """The scales of a table: one, one a row, or one a block of a row.

        Args:
            graph: The graph of the tensor.
            name: Its name.
            table: The table.
            scales: The buffer of the scales of blocks.
        """
        quantization = schema.QuantizationParametersT()
        if scales is None:
            quantization.scale = table.scales.reshape(-1)
            quantization.zeroPoint = np.zeros(table.scales.size, "int64")
            return quantization
        tensor = schema.TensorT()
        tensor.name = name + b"_scales"
        tensor.shape = list(table.scales.shape)
        tensor.type = _TYPES.FLOAT16
        tensor.buffer = scales
        graph.tensors.append(tensor)
        details = schema.BlockwiseQuantizationT()
        details.scales = len(graph.tensors) - 1
        details.zeroPoints = -1
        details.blockSize = table.integers.shape[1] // table.scales.shape[1]
        kinds = schema.QuantizationDetails
        quantization.detailsType = kinds.BlockwiseQuantization
        quantization.details = details
        return quantization

    def store_what_is_read_by_rows(self) -> None:
        """Stores tables of positions and the like in 8 bits.

        ai-edge-quantizer leaves them as floats, since nothing is multiplied
        with them: rows are taken of the integers, and made floats.
        """
        uses = [t.buffer for graph in self.graphs for t in graph.tensors]
        for graph, i, matrix in list(self.matrices()):
            readers = _readers(graph, i)
            if (
                matrix.nbytes >= _LARGE
                and readers
                and uses.count(graph.tensors[i].buffer) == 1
                and all(
                    self.operator(reader)
                    in (
                        _OPERATORS.GATHER,
                        _OPERATORS.SLICE,
                        _OPERATORS.STRIDED_SLICE,
                    )
                    for reader in readers
                )
            ):
                self._store_in_8_bits(graph, i, matrix, readers)

    def _store_in_8_bits(
        self, graph: Any, i: int, matrix: np.ndarray, readers: list[Any]
    ) -> None:
        scale = max(float(np.abs(matrix).max()) / 127.0, 1e-30)
        tensor = graph.tensors[i]
        tensor.type = _TYPES.INT8
        integers = np.round(matrix / scale).astype("int8")
        self._model.buffers[tensor.buffer].data = integers.view("uint8").ravel()
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = np.array([scale], "float32")
        tensor.quantization.zeroPoint = np.zeros(1, "int64")
        for reader in readers:
            code = self._model.operatorCodes[reader.opcodeIndex]
            code.version = max(code.version, 2)  # that of integers
            (output,) = reader.outputs
            rows = schema.TensorT()
            rows.shape = graph.tensors[output].shape
            rows.shapeSignature = graph.tensors[output].shapeSignature
            rows.type = _TYPES.INT8
            rows.quantization = tensor.quantization
            graph.tensors.append(rows)
            reader.outputs = [len(graph.tensors) - 1]
            dequantize = schema.OperatorT()
            dequantize.opcodeIndex = self._operator_code(
                _OPERATORS.DEQUANTIZE, 2
            )
            dequantize.inputs = reader.outputs
            dequantize.outputs = [output]
            place = [o is reader for o in graph.operators].index(True)
            graph.operators.insert(place + 1, dequantize)

    def clear_names(self) -> None:
        """Clears the names of internal tensors, to save bytes."""
        for graph in self.graphs:
            named = {*graph.inputs, *graph.outputs}
            for i, tensor in enumerate(graph.tensors):
                if i not in named:
                    tensor.name = b""

    def _operator_code(self, builtin: int, version: int) -> int:
        codes = self._model.operatorCodes
        for i, code in enumerate(codes):
            if code.builtinCode == builtin:
                return i
        code = schema.OperatorCodeT()
        code.builtinCode = builtin
        code.deprecatedBuiltinCode = min(builtin, 127)
        code.version = version
        codes.append(code)
        return len(codes) - 1

    def _add_buffer(self, values: np.ndarray) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), "uint8")
        self._model.buffers.append(buffer)
        return len(self._model.buffers) - 1


class _SharingBuilder(flatbuffers.Builder):
    """Writes equal vectors of scales and zero points once."""

    def __init__(self, initial_size: int) -> None:
        super().__init__(initial_size)
        self._written: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        if x.dtype == np.uint8:  # a buffer, which tensors share already
            return super().CreateNumpyVector(x)
        key = x.dtype.str, x.tobytes()
        if key not in self._written:
            self._written[key] = super().CreateNumpyVector(x)
        return self._written[key]


def quantize(file: LiteRTFile, tables: Iterable[StoredTable]) -> bytes:
    """Stores tables as their integers, and other matrices in 8 bits.

    Args:
        file: A file of floats, which is changed.
        tables: Its tables.

    Returns:
        The file of integers.
    """
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    products = [name for table in tables for name in file.store(table)]
    work = quantizer.Quantizer(file.to_bytes())
    operators = qtyping.TFLOperationName
    for operator in (operators.FULLY_CONNECTED, operators.BATCH_MATMUL):
        work.add_dynamic_config(".*", operator, num_bits=8)
    for name in products:
        work.update_quantization_recipe(
            f"^{re.escape(name)}",
            operators.FULLY_CONNECTED,
            algorithm_key=AlgorithmName.NO_QUANTIZE,
        )
    with warnings.catch_warnings():
        # That there are integers already: it leaves them as they are.
        warnings.simplefilter("ignore", UserWarning)
        result = work.quantize(
            enable_progress_bar=False, enable_progress_report=False
        )
    file = LiteRTFile(bytes(result.quantized_model))
    file.store_what_is_read_by_rows()
    file.clear_names()
    return file.to_bytes()


def _readers(graph: Any, tensor: int) -> list[Any]:
    return [o for o in graph.operators if tensor in o.inputs]


def _is_multiple(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether a matrix is another but for a factor a row, or a column."""
    if one.shape != other.shape:
        return False
    if np.array_equal(one, other):
        return True
    rows = np.linspace(0, len(one) - 1, min(len(one), _SAMPLE)).astype(int)
    one, other = one[rows], other[rows]
    return any(
        # A factor for a single number says nothing.
        len(a) > 1 and _has_columns_of(a, b) and _has_columns_of(b, a)
        for a, b in ((one, other), (one.T, other.T))
    )


def _has_columns_of(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the columns of a matrix are multiples of those of another."""
    squares = np.square(other).sum(0)
    factors = (one * other).sum(0) / np.where(squares > 0, squares, 1)
    return bool(
        np.allclose(one, other * factors, rtol=0, atol=1e-4 * np.abs(one).max())
    )
