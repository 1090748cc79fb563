"""What a method is given, what it makes, and the registry."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import keras
import numpy as np

METHODS: dict[str, Method] = {}


@dataclass(frozen=True, eq=False)
class Table:
    """A trained table, with what is known of its use.

    Args:
        values: Float32 `(input_dim, output_dim)`.
        counts: How often each token occurs, int64 `(input_dim,)`.
        second_moment: Of the hidden states that multiply the table,
            `(output_dim, output_dim)`, where it is tied and they are known.
    """

    values: np.ndarray
    counts: np.ndarray
    second_moment: np.ndarray | None = None

    @property
    def weights(self) -> np.ndarray:
        """Weights of the rows: the counts plus one, so that none is free."""
        return self.counts + 1.0


@dataclass(frozen=True, eq=False)
class Approximation:
    """What a method makes of a table.

    Args:
        values: Float32, of the table's shape.
        num_bytes: What must be stored.
        details: Sizes, for the results.
    """

    values: np.ndarray
    num_bytes: int
    details: dict[str, object] = field(default_factory=dict)


class Method(abc.ABC):
    """A way to make a table smaller.

    Args:
        name: Its name in tables and on the command line. The method is
            registered by it.
        fixed_size: Whether there is only one size of it, whatever the budget.
    """

    def __init__(self, name: str, fixed_size: bool = False) -> None:
        if name in METHODS:
            raise ValueError(f"`name` is already registered: {name!r}")
        self.name = name
        self.fixed_size = fixed_size
        METHODS[name] = self

    @abc.abstractmethod
    def approximate(self, table: Table, budget: int) -> Approximation | None:
        """Approximates a table.

        Args:
            table: The table.
            budget: Bytes that may be stored.

        Returns:
            The best within the budget; `None` where nothing is so small.
        """

    @abc.abstractmethod
    def student(
        self, task: Any, budget: int, dropout: float = 0.0
    ) -> keras.Model | None:
        """Returns a task's model with such a table, ready to be trained.

        Args:
            task: One of `benchmarks.tasks`, with its `table`, its `teacher`,
                `with_table`, the teacher with another layer for it, and, where
                the states that multiply the table are known,
                `calibration_data`, the batches that tell.
            budget: As of `approximate`.
            dropout: Of the model.
        """
