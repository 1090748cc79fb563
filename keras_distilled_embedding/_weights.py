"""The tables of a model, with the weights of their rows and columns."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import as_metric
from keras_distilled_embedding.factorization import check_finite_rows
from keras_distilled_embedding.targets import Target


class TableWeights:
    """The weights of rows and columns.

    Args:
        token_frequencies: As of `compress`.
        hidden_covariances: As of `compress`.
    """

    def __init__(self, token_frequencies: Any, hidden_covariances: Any) -> None:
        self._given = {
            "token_frequencies": token_frequencies,
            "hidden_covariances": hidden_covariances,
        }
        self._rows: dict[Target, Any] = {}
        self._columns: dict[Target, Any] = {}

    def check(self, targets: Iterable[Target]) -> None:
        """Refuses what does not fit the layers to compress."""
        self._rows, self._columns = (
            _by_layer(targets, values, name)
            for name, values in self._given.items()
        )
        for target, frequencies in self._rows.items():
            self._rows[target] = _checked_frequencies(target, frequencies)
        for target, covariance in self._columns.items():
            _check_covariance(target, covariance)

    def tables(self, targets: Iterable[Target]) -> dict[Target, list[Table]]:
        """The checked tables of each target, not copied."""
        self.check(targets)
        for target in targets:
            check_finite(target)
        return {
            target: [
                Table.of(table, **self.of(target)) for table in target.tables()
            ]
            for target in targets
        }

    def of(self, target: Target) -> dict[str, Any]:
        """Arguments of `factorize` and of `Table.of`."""
        return {
            "row_weights": self._rows.get(target),
            "column_weights": self._columns.get(target),
        }


def _by_layer(
    targets: Iterable[Target], values: Any, name: str
) -> dict[Target, Any]:
    """One value for all targets, or a dictionary by their names."""
    if values is None:
        return {}
    names = [target.name for target in targets]
    if not isinstance(values, Mapping):
        values = dict.fromkeys(names, values)
    if not set(values) <= set(names):
        raise ValueError(
            f"`{name}` must be by names of compressed layers, of {names}. "
            f"Received: {list(values)}"
        )
    return {
        target: values[target.name]
        for target in targets
        if target.name in values
    }


def _checked_frequencies(target: Target, frequencies: Any) -> np.ndarray:
    frequencies = np.asarray(frequencies)
    wanted = f"`token_frequencies` of layer '{target.name}' must "
    if frequencies.shape != (target.input_dim,):
        raise ValueError(
            f"{wanted}have shape ({target.input_dim},), one number a token. "
            f"Received: shape {frequencies.shape}"
        )
    if frequencies.dtype.kind not in "iuf":
        raise ValueError(
            f"{wanted}be numbers. Received: dtype {frequencies.dtype}"
        )
    if not (np.isfinite(frequencies) & (frequencies >= 0)).all():
        raise ValueError(
            f"{wanted}be finite and not negative. Received: numbers from "
            f"{frequencies.min()} to {frequencies.max()}"
        )
    if not frequencies.any():
        raise ValueError(f"{wanted}not all be 0. Received: only zeros")
    return frequencies


def _check_covariance(target: Target, covariance: Any) -> None:
    try:
        as_metric(covariance, target.output_dim)
    except ValueError as error:
        raise ValueError(
            f"`hidden_covariances` of layer '{target.name}': {error}"
        ) from error


def check_finite(target: Target) -> None:
    """Refuses tables with numbers that are not finite, naming the layer."""
    for table in target.tables():
        try:
            check_finite_rows(table)
        except ValueError as error:
            raise ValueError(f"Layer '{target.name}': {error}") from error
