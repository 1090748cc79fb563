"""The package's own factors, and forms of them that are baselines.

`E ~ f(U) W + 1 c`: `f` and the offset `c` may be left out, rows and columns
weighted, codes rounded.
"""

from __future__ import annotations

from typing import Any

import keras

import keras_distilled_embedding as kde
from benchmarks.methods.base import Approximation
from benchmarks.methods.base import Method
from benchmarks.methods.base import Table
from benchmarks.methods.base import Task
from benchmarks.methods.storage import factor_bytes
from benchmarks.methods.storage import largest_rank
from benchmarks.methods.storage import table_layer
from keras_distilled_embedding.quantization import FORMATS


class Factors(Method):
    """Factors of the largest rank that the budget allows.

    Args:
        name: See `Method`.
        quantization: Name of the format of the codes, which the student is
            trained with; `None` for float32.
        weigh_rows: Whether rows count by how often their tokens occur.
        weigh_columns: Whether columns count by the hidden states that multiply
            them; then there is nothing of a table whose states are not known.
        **options: Further options of `kde.factorize`.
    """

    def __init__(
        self,
        name: str,
        quantization: str | None = None,
        weigh_rows: bool = False,
        weigh_columns: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name)
        self.quantization = quantization
        self.options = {"activation": "relu", "use_bias": True, **options}
        self._weigh_rows, self._weigh_columns = weigh_rows, weigh_columns

    def factorize(self, table: Table, budget: int) -> kde.Factorization | None:
        """Returns the factors; `None` where nothing is so small."""
        weights = {}
        if self._weigh_rows:
            weights["row_weights"] = table.weights
        if self._weigh_columns:
            if table.second_moment is None:
                return None
            weights["column_weights"] = table.second_moment
        rank = largest_rank(
            table.values.shape,
            budget,
            self.quantization,
            self.options["use_bias"],
        )
        if rank < 1:
            return None
        return kde.factorize(
            table.values,
            rank,
            quantization=self.quantization,
            **weights,
            **self.options,
        )

    def approximate(self, table: Table, budget: int) -> Approximation | None:
        factors = self.factorize(table, budget)
        if factors is None:
            return None
        rank = factors.codes.shape[1]
        return Approximation(
            factors.reconstruct(),
            factor_bytes(
                rank,
                table.values.shape,
                self.quantization,
                self.options["use_bias"],
            ),
            {"rank": rank},
        )

    def student(
        self, task: Task, budget: int, dropout: float = 0.0
    ) -> keras.Model | None:
        factors = self.factorize(task.table, budget)
        if factors is None:
            return None
        student = kde.compress(
            task.teacher(dropout),
            rank=factors.codes.shape[1],
            quantization=self.quantization,
            activation=self.options["activation"],
            use_bias=self.options["use_bias"],
            verbose=0,
        )
        # As this method fits them: with its weights, learned where it learns.
        layer = table_layer(student)
        layer.codes.assign(factors.codes)
        layer.basis.assign(factors.basis)
        if self.options["use_bias"]:
            layer.offset.assign(factors.offset)
        return student


OURS = "ours"
PAPER = "the paper's recipe"

Factors(OURS)
Factors("ours, no activation", activation=None)
Factors("ours, rows weighted", weigh_rows=True)
Factors("ours, rows and columns weighted", weigh_rows=True, weigh_columns=True)
for _name in FORMATS:
    Factors(f"ours, {_name}", quantization=_name)
# The published form: learned by gradient descent, no offset.
Factors(PAPER, use_bias=False, method="learned")
Factors("truncated SVD", activation=None, use_bias=False)
Factors("weighted SVD", activation=None, use_bias=False, weigh_rows=True)
