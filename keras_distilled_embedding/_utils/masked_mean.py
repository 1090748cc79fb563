"""Means over tokens, weighted by sample weights and Keras masks."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_distilled_embedding import keras_internals


class _Mean(keras.losses.Loss):
    """Averages its second argument as Keras averages the values of a loss.

    Under `tf.distribute` each replica then contributes its share.
    """

    def __init__(self) -> None:
        super().__init__("mean", reduction="mean_with_sample_weight")

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


_mean = _Mean()


def mean(values: Any, weights: Any = None) -> Any:
    """Averages `values`, by `weights` of their shape, to a float32 scalar.

    The mean is 0 if all weights are.
    """
    return _mean(values, values, sample_weight=weights)


def mean_over_tokens(values: Any, sample_weight: Any, outputs: Any) -> Any:
    """Averages `values`, one for each token, with `weights_of_tokens`."""
    return mean(values, weights_of_tokens(values, sample_weight, outputs))


def weights_of_tokens(values: Any, sample_weight: Any, outputs: Any) -> Any:
    """Returns the weights of `values`, one a token, or `None` if all are 1.

    A sequence's weight counts for each of its tokens, a token's maximum for a
    value of the sequence; tokens masked in `outputs` get weight 0.
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
    """Returns a sample weight, or `None`, for each of the flattened outputs."""
    if isinstance(sample_weight, dict):
        return keras.tree.flatten(
            {name: sample_weight.get(name) for name in outputs}
        )
    if isinstance(sample_weight, list | tuple):
        return list(sample_weight)
    return [sample_weight] * len(keras.tree.flatten(outputs))
