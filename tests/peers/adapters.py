"""This package's classes, to be called as Keras's tests call Keras's."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_distilled_embedding.layers import DistilledEmbedding


class _FullRank(DistilledEmbedding):
    """At full rank the factors hold any table, in closed form.

    `relu(E - c) I + 1 c` is `E` if the offset `c` is below each column.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        rank: int | None = None,
        weights: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_dim, output_dim, rank or output_dim, **kwargs)
        if weights is not None:
            self.build()
            self.assign_embeddings(
                weights[0] if isinstance(weights, list) else weights
            )

    def assign_embeddings(self, table: np.ndarray) -> None:
        offset = table.min(axis=0)
        self.codes.assign(table - offset)
        self.basis.assign(np.eye(self.output_dim))
        self.offset.assign(offset)


@keras.saving.register_keras_serializable(package="peers")
class Embedding(_FullRank):
    """In the place of `keras.layers.Embedding`."""


@keras.saving.register_keras_serializable(package="peers")
class ReversibleEmbedding(_FullRank):
    """In the place of `keras.layers.ReversibleEmbedding`."""


def keras_logs(logs: dict[str, list[float]]) -> dict[str, list[float]]:
    """The logs of this package's Distiller under Keras's names."""
    return {_keras_log(name): values for name, values in logs.items()}


def _keras_log(name: str) -> str:
    prefix = "val_" if name.startswith("val_") else ""
    name = name.removeprefix(prefix)
    if name.endswith("distillation_loss"):  # one for each kind of loss
        name = "distillation_loss"
    names = {"loss": "total_loss", "task_loss": "student_loss"}
    return prefix + names.get(name, name)
