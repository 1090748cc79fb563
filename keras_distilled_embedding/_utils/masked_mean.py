"""Means over the tokens that count."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distilled_embedding import keras_internals


class _Mean(keras.losses.Loss):
    """Averages values by their weights; of several replicas, each its share."""

    def __init__(self) -> None:
        super().__init__("mean", reduction="mean_with_sample_weight")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


_mean = _Mean()


def mean(values: Any, weights: Any = None) -> Any:
    """Averages `values` as Keras averages the values of a loss.

    Args:
        values: Floats of any shape.
        weights: Floats of the same shape: the mean is
            `sum(weights * values) / sum(weights)`, 0 where all of them are.

    Returns:
        A float32 scalar.
    """
    return _mean(values, values, sample_weight=weights)


def mean_over_tokens(values: Any, sample_weight: Any, outputs: Any) -> Any:
    """Averages `values`, one a token, by the weights of samples or tokens.

    What a whole sequence was given counts for each of its tokens; a value of
    a whole sequence counts as much as its heaviest token.

    Args:
        values: Floats `(batch, ...)`.
        sample_weight: Floats `(batch,)` or `(batch, ...)`, or `None`.
        outputs: What the values were computed from: tokens that its Keras
            mask hides are left out.

    Returns:
        A float32 scalar.
    """
    return mean(values, weights_of_tokens(values, sample_weight, outputs))


def weights_of_tokens(values: Any, sample_weight: Any, outputs: Any) -> Any:
    """The weights of `mean_over_tokens`.

    Args:
        values: As of `mean_over_tokens`.
        sample_weight: As of `mean_over_tokens`.
        outputs: As of `mean_over_tokens`.

    Returns:
        Float32 of the shape of `values`, or `None`: all count alike.
    """
    weights = None
    for given in (sample_weight, keras_internals.keras_mask(outputs)):
        if given is None:
            continue
        given = ops.cast(given, "float32")
        while len(given.shape) > len(values.shape):
            given = ops.max(given, axis=-1)
        while len(given.shape) < len(values.shape):
            given = ops.expand_dims(given, -1)
        weights = given if weights is None else weights * given
    if weights is not None:
        weights = weights * ops.ones_like(values)
    return weights


def weights_by_output(sample_weight: Any, outputs: Any) -> list[Any]:
    """One sample weight, or `None`, for each of the flattened outputs."""
    if isinstance(sample_weight, dict):
        return keras.tree.flatten(
            {name: sample_weight.get(name) for name in outputs}
        )
    if isinstance(sample_weight, list | tuple):
        return list(sample_weight)
    return [sample_weight] * len(keras.tree.flatten(outputs))
