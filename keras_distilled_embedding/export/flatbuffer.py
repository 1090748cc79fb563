"""Reading a LiteRT file, and storing its matrices.

Tables are stored here, other matrices by ai-edge-quantizer, which would store
a table twice that is both looked up and multiplied with: it chooses scales by
operator. Its `DEQUANTIZED_WEIGHT_RECOVERY` stores integers that are already
there, but has to guess their scale from the floats, and so refuses tables of
large numbers and rows of few, and it knows blocks of 32, 64, 128 and 256
numbers only (docs/on-device.md).
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from keras_distilled_embedding.export.graph_table import StoredTable
from keras_distilled_embedding.quantization import SMALLEST_ROUNDED

_OPERATORS = schema.BuiltinOperator
_TYPES = schema.TensorType
_INTEGERS = {8: _TYPES.INT8, 4: _TYPES.INT4, 2: _TYPES.INT2}
_READ_ROWS = (_OPERATORS.GATHER, _OPERATORS.SLICE, _OPERATORS.STRIDED_SLICE)
# Rows that are compared to tell whether a matrix is made of a table.
_SAMPLE = 1_000
# Bytes from which a matrix is worth storing in 8 bits.
_LARGE = 4_096


class LiteRTFile:
    """A LiteRT file, taken apart.

    Args:
        content: Its bytes.
    """

    def __init__(self, content: bytes) -> None:
        self._model = flatbuffer_utils.read_model_from_bytearray(content)
        for buffer in self._model.buffers:
            if buffer.data is not None:
                buffer.data = np.frombuffer(buffer.data, "uint8")

    def to_bytes(self) -> bytes:
        """Puts the file together.

        Raises:
            ValueError: If it is larger than files can be.
        """
        buffers = [b.data for b in self._model.buffers if b.data is not None]
        size = sum(data.size for data in buffers)
        if size >= 2**31 - 2**20:
            raise ValueError(
                "A LiteRT file holds 2 GB at most. Choose a `quantization` "
                f"of fewer bits. Received: a model of {size:,} bytes"
            )
        builder = _Builder(size + 2**20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        # Not `Output`, which copies it once more.
        return bytes(memoryview(builder.Bytes)[builder.Head() :])

    def clear_names(self) -> None:
        """Clears the names of internal tensors, to save bytes."""
        for graph in self._model.subgraphs:
            named = {*graph.inputs, *graph.outputs}
            for i, tensor in enumerate(graph.tensors):
                if i not in named:
                    tensor.name = b""

    def count_copies(self, table: np.ndarray) -> int:
        """How many float matrices of the file are a table, or made of it."""
        return len(
            {
                graph.tensors[i].buffer
                for graph, i, matrix in self._float_matrices()
                if _is_made_of(matrix, table) or _is_made_of(matrix.T, table)
            }
        )

    def store(self, input_name: str, table: StoredTable) -> list[str]:
        """Puts the codes of a table in the place of the input for them.

        Args:
            input_name: Name of that input, in all signatures.
            table: The table.

        Returns:
            Names of the products with it.
        """
        data = self._add_buffer(table.data)
        scales = None
        if table.format is not None and table.format.scale_bytes == 2:
            scales = self._add_buffer(table.scales.astype("float16"))
        products = []
        for signature in self._model.signatureDefs:
            graph = self._model.subgraphs[signature.subgraphIndex]
            names = [entry.name.decode() for entry in signature.inputs]
            i = signature.inputs.pop(names.index(input_name)).tensorIndex
            graph.inputs.remove(i)
            tensor = graph.tensors[i]
            tensor.buffer = data
            if table.format is not None:
                tensor.type = _INTEGERS[table.format.bits]
                tensor.quantization = _one_scale_or_one_a_row(table.scales)
                if scales is not None:
                    self._use_one_block_a_row(graph, tensor, table, scales)
            for operator in _readers(graph, i):
                if self._kind(operator) == _OPERATORS.FULLY_CONNECTED:
                    output = graph.tensors[operator.outputs[0]]
                    products.append(output.name.decode())
                elif self._kind(operator) != _OPERATORS.GATHER:
                    raise ValueError(
                        f"Table '{table.name}' cannot be stored: it is used "
                        "inside a loop of the graph. Unroll the loop, or use "
                        "the embedding outside."
                    )
                elif table.format is not None:
                    # GATHER takes rows of floats only.
                    operator.inputs = [operator.inputs[1], i]
                    operator.builtinOptions = None
                    operator.builtinOptionsType = schema.BuiltinOptions.NONE
                    operator.opcodeIndex = self._operator_code(
                        _OPERATORS.EMBEDDING_LOOKUP, 4
                    )
        return products

    def store_what_is_read_by_rows(self) -> None:
        """Stores tables of positions and the like in 8 bits.

        ai-edge-quantizer leaves them as floats, since nothing is multiplied
        with them: rows are taken of the integers, and made floats.
        """
        graphs = self._model.subgraphs
        uses = [tensor.buffer for g in graphs for tensor in g.tensors]
        for graph, i, matrix in list(self._float_matrices()):
            readers = _readers(graph, i)
            if (
                matrix.nbytes < _LARGE
                or not readers
                or any(self._kind(o) not in _READ_ROWS for o in readers)
                or uses.count(graph.tensors[i].buffer) > 1
            ):
                continue
            scale = np.maximum(np.abs(matrix).max() / 127, 1e-30)
            integers = np.round(matrix / scale).astype("int8")
            tensor = graph.tensors[i]
            tensor.type = _TYPES.INT8
            tensor.quantization = _one_scale_or_one_a_row(scale)
            self._model.buffers[tensor.buffer].data = _bytes(integers)
            for reader in readers:
                self._dequantize_output(graph, reader, tensor.quantization)

    def _float_matrices(self) -> Iterator[tuple[Any, int, np.ndarray]]:
        """Yields them with their graph, and their index there."""
        for graph in self._model.subgraphs:
            for i, tensor in enumerate(graph.tensors):
                data = self._model.buffers[tensor.buffer].data
                if (
                    data is not None
                    and tensor.type == _TYPES.FLOAT32
                    and tensor.shape is not None
                    and len(tensor.shape) == 2
                ):
                    yield graph, i, data.view("float32").reshape(tensor.shape)

    def _use_one_block_a_row(
        self, graph: Any, tensor: Any, table: StoredTable, scales: int
    ) -> None:
        """Gives a tensor a scale of two bytes for each row."""
        of_blocks = schema.TensorT()
        of_blocks.name = tensor.name + b"_scales"
        of_blocks.shape = list(table.scales.shape)
        of_blocks.type = _TYPES.FLOAT16
        of_blocks.buffer = scales
        graph.tensors.append(of_blocks)
        details = schema.BlockwiseQuantizationT()
        details.scales = len(graph.tensors) - 1
        details.zeroPoints = -1
        details.blockSize = table.codes.shape[1]
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.details = details
        tensor.quantization.detailsType = (
            schema.QuantizationDetails.BlockwiseQuantization
        )

    def _dequantize_output(
        self, graph: Any, reader: Any, quantization: Any
    ) -> None:
        """Makes an operator return integers, and adds one that makes floats."""
        code = self._model.operatorCodes[reader.opcodeIndex]
        code.version = max(code.version, 2)  # that of integers
        (output,) = reader.outputs
        rows = schema.TensorT()
        rows.shape = graph.tensors[output].shape
        rows.shapeSignature = graph.tensors[output].shapeSignature
        rows.type = _TYPES.INT8
        rows.quantization = quantization
        graph.tensors.append(rows)
        reader.outputs = [len(graph.tensors) - 1]
        dequantize = schema.OperatorT()
        dequantize.opcodeIndex = self._operator_code(_OPERATORS.DEQUANTIZE, 2)
        dequantize.inputs = reader.outputs
        dequantize.outputs = [output]
        place = [operator is reader for operator in graph.operators].index(True)
        graph.operators.insert(place + 1, dequantize)

    def _kind(self, operator: Any) -> int:
        return self._model.operatorCodes[operator.opcodeIndex].builtinCode

    def _operator_code(self, kind: int, version: int) -> int:
        codes = self._model.operatorCodes
        for i, code in enumerate(codes):
            if code.builtinCode == kind:
                return i
        code = schema.OperatorCodeT()
        code.builtinCode = kind
        code.deprecatedBuiltinCode = min(kind, 127)
        code.version = version
        codes.append(code)
        return len(codes) - 1

    def _add_buffer(self, values: np.ndarray) -> int:
        buffer = schema.BufferT()
        buffer.data = _bytes(values)
        self._model.buffers.append(buffer)
        return len(self._model.buffers) - 1


class _Builder(flatbuffers.Builder):
    """Aligns buffers, and writes equal vectors of scales once."""

    def __init__(self, initial_size: int) -> None:
        super().__init__(initial_size)
        self._written: dict[tuple[str, bytes], int] = {}

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:
        # The schema asks for 16 bytes, which its Python code forgets.
        alignment = 16 if elemSize == 1 else alignment
        return super().StartVector(elemSize, numElems, alignment)

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        if x.dtype == np.uint8:  # a buffer, which tensors share already
            return super().CreateNumpyVector(x)
        key = x.dtype.str, x.tobytes()
        if key not in self._written:
            self._written[key] = super().CreateNumpyVector(x)
        return self._written[key]


def store_tables(
    file: LiteRTFile, tables: Mapping[str, StoredTable], in_integers: bool
) -> bytes:
    """Completes a converted file.

    Args:
        file: The file, whose graphs have inputs for the codes of tables.
        tables: Its tables by the names of these inputs.
        in_integers: Whether to store other matrices in 8 bits.

    Returns:
        The complete file.
    """
    products = [
        product
        for name, table in tables.items()
        for product in file.store(name, table)
    ]
    if in_integers:
        file = LiteRTFile(_quantize_the_rest(file.to_bytes(), products))
        file.store_what_is_read_by_rows()
    file.clear_names()
    return file.to_bytes()


def _quantize_the_rest(content: bytes, products: Iterable[str]) -> bytes:
    """Dynamic-range int8 of the other matrices, if they are not small."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer import quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    work = quantizer.Quantizer(content)
    operators = qtyping.TFLOperationName
    dynamic_range = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(
            num_bits=8, granularity=qtyping.QuantGranularity.CHANNELWISE
        ),
        compute_precision=qtyping.ComputePrecision.INTEGER,
        min_weight_elements=SMALLEST_ROUNDED,
    )
    for operator in (operators.FULLY_CONNECTED, operators.BATCH_MATMUL):
        work.update_quantization_recipe(".*", operator, dynamic_range)
    for name in products:
        work.update_quantization_recipe(
            f"^{re.escape(name)}",
            operators.FULLY_CONNECTED,
            algorithm_key=AlgorithmName.NO_QUANTIZE,
        )
    # It warns that there are integers already, which it leaves as they are,
    # and shows a progress bar for larger models even if told not to.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", UserWarning)
        result = work.quantize(
            enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(result.quantized_model)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view("uint8")


def _readers(graph: Any, tensor: int) -> list[Any]:
    return [o for o in graph.operators if tensor in o.inputs]


def _one_scale_or_one_a_row(scales: np.ndarray) -> Any:
    quantization = schema.QuantizationParametersT()
    quantization.scale = scales.reshape(-1).astype("float32")
    quantization.zeroPoint = np.zeros(scales.size, "int64")
    quantization.quantizedDimension = 0
    return quantization


def _is_made_of(matrix: np.ndarray, table: np.ndarray) -> bool:
    """Whether it is a table multiplied by a factor a row, or a column.

    As the converter multiplies a copy of a table with the constants that
    stand before and after a product with it.
    """
    if matrix.shape != table.shape:
        return False
    rows = np.linspace(0, len(table) - 1, min(len(table), _SAMPLE)).astype(int)
    matrix, table = matrix[rows], table[rows]
    zeros = table == 0
    if zeros.all() or not np.array_equal(zeros, matrix == 0):
        return np.array_equal(matrix, table)
    factors = np.ma.masked_array(matrix, zeros) / np.where(zeros, 1, table)
    return any(
        size > 1 and np.ptp(factors, axis).max() <= 1e-3 * abs(factors).max()
        for axis, size in enumerate(table.shape)
    )
