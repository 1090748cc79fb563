"""The rivals' tables as layers that are trained on, and nested ranks.

Each computes the whole table in every call. That is slower than it need be,
and the same table: these rows compare quality, not speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks.rivals import FLOAT
from benchmarks.rivals import Approximation
from keras_distilled_embedding.quantization import dequantize
from keras_distilled_embedding.quantization import integer_bytes
from keras_distilled_embedding.quantization import round_in_place
from keras_distilled_embedding.quantization import round_table


class ComputedTable(keras.layers.Layer):
    """An embedding, and its projection, of a table that is computed.

    Args:
        input_dim: Rows of the table.
        output_dim: Its columns.
        num_bytes: What must be stored of it.
    """

    def __init__(
        self, input_dim: int, output_dim: int, num_bytes: int, **kwargs: Any
    ) -> None:
        super().__init__(name="token_embedding", **kwargs)
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.num_bytes = num_bytes
        self.built = True

    def table(self) -> Any:
        """Float32 `(input_dim, output_dim)`."""
        raise NotImplementedError

    def call(self, inputs: Any, reverse: bool = False) -> Any:
        if reverse:
            return ops.matmul(inputs, ops.transpose(self.table()))
        return ops.take(self.table(), inputs, axis=0)

    def compute_output_spec(
        self, inputs: Any, reverse: bool = False
    ) -> keras.KerasTensor:
        shape = inputs.shape[:-1] if reverse else inputs.shape
        columns = self.input_dim if reverse else self.output_dim
        return keras.KerasTensor((*shape, columns), self.compute_dtype)

    def _trained(self, name: str, value: np.ndarray) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=value.shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(
                value, dtype
            ),
        )


class GroupedTable(ComputedTable):
    """GroupReduce: each group of tokens has factors of its own.

    `quantization="int8"` rounds the factors as ours are rounded.
    """

    rounding: str | None = None

    def __init__(self, shape: Sequence[int], made: Approximation) -> None:
        super().__init__(*shape, made.num_bytes)
        groups = made.parts["groups"]
        # From rows in the order of the groups to those of the vocabulary.
        order = np.argsort(groups, kind="stable")
        self._positions = np.argsort(order).astype("int32")
        self._factors = [
            (
                self._trained(f"codes_{g}", codes),
                self._trained(f"basis_{g}", basis),
            )
            for g, (codes, basis) in enumerate(
                zip(made.parts["codes"], made.parts["bases"])
            )
        ]

    def table(self) -> Any:
        parts = [
            ops.matmul(*_rounded(codes, basis, self.quantization))
            for codes, basis in self._factors
        ]
        return ops.take(ops.concatenate(parts), self._positions, axis=0)

    @property
    def num_bytes_int8(self) -> int:
        """A byte a number, a byte a token, an offset for each basis."""
        entries = sum(c.shape[0] * c.shape[1] for f in self._factors for c in f)
        offsets = FLOAT * self.output_dim * len(self._factors)
        return entries + self.input_dim + offsets


class TensorTrainTable(ComputedTable):
    """Tensor-Train: three cores."""

    def __init__(self, shape: Sequence[int], made: Approximation) -> None:
        super().__init__(*shape, made.num_bytes)
        self._dims = made.parts["dims"]
        self._cores = [
            self._trained(f"core_{i}", core)
            for i, core in enumerate(made.parts["cores"])
        ]

    def table(self) -> Any:
        first, second, third = self._cores
        rest = ops.reshape(ops.matmul(second, third), (first.shape[1], -1))
        tensor = ops.reshape(ops.matmul(first, rest), self._dims)
        tensor = ops.transpose(tensor, (0, 2, 4, 1, 3, 5))
        return ops.reshape(tensor, (-1, self.output_dim))[: self.input_dim]


class ProductQuantizedTable(ComputedTable):
    """Product quantisation: codes that stay, and codebooks that learn."""

    def __init__(self, shape: Sequence[int], made: Approximation) -> None:
        super().__init__(*shape, made.num_bytes)
        self._codes = [c.astype("int32") for c in made.parts["codes"]]
        self._codebooks = [
            self._trained(f"codebook_{i}", book)
            for i, book in enumerate(made.parts["codebooks"])
        ]

    def table(self) -> Any:
        parts = [
            ops.take(book, codes, axis=0)
            for book, codes in zip(self._codebooks, self._codes)
        ]
        return ops.concatenate(parts, axis=1)


class RoundedTable(ComputedTable):
    """A full table, rounded as `export_litert` stores it."""

    def __init__(self, table: np.ndarray, rounding: str) -> None:
        super().__init__(*table.shape, integer_bytes(*table.shape, rounding))
        self.quantization = rounding
        self._table = self._trained("table", table)

    def table(self) -> Any:
        table = ops.convert_to_tensor(self._table)
        rounded = dequantize(
            *round_table(ops.stop_gradient(table), self.quantization)
        )
        rounded = ops.stop_gradient(rounded)
        # Backwards, rounding is taken for the identity.
        return table + ops.stop_gradient(rounded - table)


class NestedTable(ComputedTable):
    """Nested ranks: more directions for the more frequent tokens.

    Levels of factors, each over the first tokens of the order only, added up.
    """

    def __init__(self, shape: Sequence[int], made: Approximation) -> None:
        super().__init__(*shape, made.num_bytes)
        self._positions = np.argsort(made.parts["order"]).astype("int32")
        self._levels = [
            (
                self._trained(f"codes_{i}", codes),
                self._trained(f"basis_{i}", basis),
            )
            for i, (codes, basis) in enumerate(
                zip(made.parts["codes"], made.parts["bases"])
            )
        ]

    def table(self) -> Any:
        table = 0.0
        for codes, basis in self._levels:
            level = ops.matmul(codes, basis)
            missing = self.input_dim - codes.shape[0]
            table = table + ops.pad(level, [[0, missing], [0, 0]])
        return ops.take(table, self._positions, axis=0)


def nested_ranks(
    table: np.ndarray, weights: np.ndarray, budget: int
) -> Approximation | None:
    """Two levels: a low rank for all tokens, more for the frequent ones.

    How many are frequent, and how the budget is parted, is what leaves the
    least weighted error among a few choices.
    """
    order = np.argsort(-weights, kind="stable")
    rows, weight = table[order].astype(np.float64), weights[order]
    num_rows, num_columns = table.shape
    numbers = budget // FLOAT
    best = None
    for frequent in (num_rows // 32, num_rows // 16, num_rows // 8):
        for share in (0.4, 0.5, 0.6, 0.7):
            low = int(share * numbers // (num_rows + num_columns))
            rest = numbers - low * (num_rows + num_columns)
            high = int(rest // (frequent + num_columns))
            high = min(high, num_columns - low, frequent)
            if low < 1 or high < 1:
                continue
            levels = _nested_levels(rows, weight, frequent, low, high)
            values = _sum_of(levels, num_rows)
            error = weight @ np.square(rows - values).sum(axis=1)
            if best is None or error < best[0]:
                best = error, levels, values, frequent, (low, high)
    if best is None:
        return None
    _, levels, values, frequent, ranks = best
    size = sum(factor.size for level in levels for factor in level)
    return Approximation(
        values[np.argsort(order)].astype(np.float32),
        FLOAT * size,
        {"frequent": frequent, "ranks": ranks},
        {
            "order": order,
            "codes": [codes.astype(np.float32) for codes, _ in levels],
            "bases": [basis.astype(np.float32) for _, basis in levels],
        },
    )


def _nested_levels(
    rows: np.ndarray,
    weight: np.ndarray,
    frequent: int,
    low: int,
    high: int,
    sweeps: int = 10,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Alternating: each level is the best for what the other leaves over."""
    top, top_weight = rows[:frequent], weight[:frequent]
    levels = [_weighted_factors(rows, weight, low)]
    for _ in range(sweeps):
        codes, basis = levels[0]
        left = top - codes[:frequent] @ basis
        second = _weighted_factors(left, top_weight, high)
        target = rows.copy()
        target[:frequent] -= second[0] @ second[1]
        levels = [_weighted_factors(target, weight, low), second]
    return levels


def _weighted_factors(
    rows: np.ndarray, weight: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    gram = (weight[:, np.newaxis] * rows).T @ rows
    basis = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    return rows @ basis, basis.T


def _sum_of(
    levels: list[tuple[np.ndarray, np.ndarray]], num_rows: int
) -> np.ndarray:
    values = np.zeros((num_rows, levels[0][1].shape[1]))
    for codes, basis in levels:
        values[: len(codes)] += codes @ basis
    return values


def _rounded(codes: Any, basis: Any, rounding: str | None) -> tuple[Any, Any]:
    """Factors as they are stored, both of them."""
    codes, basis = map(ops.convert_to_tensor, (codes, basis))
    if rounding is None:
        return codes, basis
    return round_in_place(codes, basis, rounding), basis
