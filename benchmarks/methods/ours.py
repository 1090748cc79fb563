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
from benchmarks.methods.storage import table_layer
from keras_distilled_embedding.layers.conversion import assign_factors
from keras_distilled_embedding.quantization import FORMATS
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import largest_rank


class Factors(Method):
    """Factors of the largest rank that the budget allows.

    Args:
        name: See `Method`.
        quantization: Name of the format of the codes, which the student is
            trained with; `None` for float32; `"auto"` for what loses least.
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
        self._formats = [quantization]
        if quantization == "auto":
            self._formats = [None, *FORMATS]
        self._options = {"activation": "relu", "use_bias": True, **options}
        self._weigh_rows, self._weigh_columns = weigh_rows, weigh_columns

    def factorize(self, table: Table, budget: int) -> kde.Factorization | None:
        """Returns the factors; `None` where nothing is so small."""
        weights = {}
        if self._weigh_rows:
            weights["row_weights"] = table.weights
        if self._weigh_columns:
            weights["column_weights"] = table.second_moment
            if table.second_moment is None:
                return None
        bias = self._options["use_bias"]
        found = []
        for quantization in self._formats:
            rank = largest_rank(*table.values.shape, budget, quantization, bias)
            if rank:
                found.append(
                    kde.factorize(
                        table.values,
                        rank,
                        quantization=quantization,
                        **weights,
                        **self._options,
                    )
                )
        return min(found, key=lambda f: f.relative_error, default=None)

    def approximate(self, table: Table, budget: int) -> Approximation | None:
        factors = self.factorize(table, budget)
        return factors and Approximation(
            factors.reconstruct(),
            factor_bytes(
                factors.rank,
                *table.values.shape,
                factors.quantization,
                self._options["use_bias"],
            ),
            {"rank": factors.rank, "quantization": factors.quantization},
        )

    def student(
        self, task: Any, budget: int, dropout: float = 0.0
    ) -> keras.Model | None:
        factors = self.factorize(task.table, budget)
        if factors is None:
            return None
        student = kde.compress(
            task.teacher(dropout),
            rank=factors.rank,
            quantization=factors.quantization,
            activation=self._options["activation"],
            use_bias=self._options["use_bias"],
            verbose=0,
        )
        # As this method fits them: with its weights, learned where it learns.
        assign_factors(table_layer(student), factors)
        return student


OURS = "ours"
PAPER = "the paper's recipe"

Factors(OURS)
Factors("ours, no activation", activation=None)
Factors("ours, rows weighted", weigh_rows=True)
Factors("ours, rows and columns weighted", weigh_rows=True, weigh_columns=True)
for _name in (*FORMATS, "auto"):
    Factors(f"ours, {_name}", quantization=_name)
# The published form: learned by gradient descent, no offset.
Factors(PAPER, use_bias=False, method="learned")
Factors("truncated SVD", activation=None, use_bias=False)
Factors("weighted SVD", activation=None, use_bias=False, weigh_rows=True)
