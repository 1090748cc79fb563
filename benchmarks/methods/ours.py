"""The package's own factors, and forms of them that are baselines.

`E ~ f(U) W + 1 c`: `f` and the offset `c` may be left out, rows and columns
weighted, codes rounded.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import keras

import keras_distilled_embedding as kde
from benchmarks.methods.base import Approximation
from benchmarks.methods.base import Method
from benchmarks.methods.base import Table
from benchmarks.methods.storage import NAME
from benchmarks.methods.storage import table_layer
from keras_distilled_embedding.layers.conversion import assign_factors
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import formats_of
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
        calibrated: Whether `compress` is given data: rows and columns are
            weighted then, as they are for the plan of rank and format.
        fixed_size: See `Method`.
        **options: Further options of `kde.factorize`.
    """

    def __init__(
        self,
        name: str,
        quantization: str | None = None,
        weigh_rows: bool = False,
        weigh_columns: bool = False,
        calibrated: bool = False,
        fixed_size: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name, fixed_size)
        self._quantization = quantization
        self._formats: list[Format | None] = [None]
        if quantization == "auto":
            self._formats += chain(*map(formats_of, QUANTIZATIONS))
        elif quantization is not None:
            self._formats = [*formats_of(quantization)]
        self._options = {"activation": "relu", "use_bias": True, **options}
        self._calibrated = calibrated
        self._weigh_rows = weigh_rows or calibrated
        self._weigh_columns = weigh_columns or calibrated

    def approximate(self, table: Table, budget: int) -> Approximation | None:
        best, least = None, math.inf
        for kind, rank in self._candidates(table, budget):
            factors = self._factorize(table, rank, kind)
            if factors.relative_error < least:
                least = factors.relative_error
                best = Approximation(
                    factors.reconstruct(),
                    factor_bytes(
                        rank,
                        *table.values.shape,
                        kind,
                        self._options["use_bias"],
                    ),
                    {
                        "rank": rank,
                        "quantization": kind and kind.name,
                        "row_scales": bool(kind and kind.has_row_scales),
                    },
                )
        return best

    def _candidates(
        self, table: Table, budget: int
    ) -> list[tuple[Format | None, int]]:
        """The formats that are so small at some rank, and the largest rank."""
        if self._weigh_columns and table.second_moment is None:
            return []
        bias = self._options["use_bias"]
        ranks = [
            (kind, largest_rank(*table.values.shape, budget, kind, bias))
            for kind in self._formats
        ]
        return [(kind, rank) for kind, rank in ranks if rank]

    def _factorize(
        self, table: Table, rank: int, kind: Format | None
    ) -> kde.Factorization:
        weights = {}
        if self._weigh_rows:
            weights["row_weights"] = table.weights
        if self._weigh_columns:
            weights["column_weights"] = table.second_moment
        return kde.factorize(
            table.values,
            rank,
            quantization=kind and kind.name,
            row_scales=bool(kind and kind.has_row_scales),
            **weights,
            **self._options,
        )

    def student(
        self, task: Any, budget: int, dropout: float = 0.0
    ) -> keras.Model | None:
        if not self._candidates(task.table, budget):
            return None
        size = {"max_bytes": budget}
        if self.fixed_size:
            size = {"rank": task.table.values.shape[1]}
        data = task.calibration_data if self._calibrated else None
        student = kde.compress(
            task.teacher(dropout),
            **size,
            quantization=self._quantization,
            activation=self._options["activation"],
            use_bias=self._options["use_bias"],
            layers=[NAME],
            calibration_data=data,
            verbose=0,
        )
        if self._calibrated:
            return student
        layer = table_layer(student)
        # As this method fits them: with its weights, learned where it learns.
        assign_factors(
            layer, self._factorize(task.table, layer.rank, layer.format)
        )
        return student


OURS = "ours"
PAPER = "the paper's recipe"

Factors(OURS)
Factors("ours, no activation", activation=None)
Factors("ours, rows weighted", weigh_rows=True)
Factors("ours, rows and columns weighted", weigh_rows=True, weigh_columns=True)
for _name in (*QUANTIZATIONS, "auto"):
    Factors(f"ours, {_name}", quantization=_name)
    Factors(f"ours, {_name}, calibrated", quantization=_name, calibrated=True)
# The published form: learned by gradient descent, no offset.
Factors(PAPER, use_bias=False, method="learned")
Factors("truncated SVD", activation=None, use_bias=False)
Factors("weighted SVD", activation=None, use_bias=False, weigh_rows=True)
