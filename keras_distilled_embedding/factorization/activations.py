"""The function f of `f(U) W`."""

from collections.abc import Callable

import keras
import numpy as np


def get_activation(activation: str | Callable | None) -> Callable:
    """The function that a Keras activation identifier stands for.

    Raises:
        ValueError: If it stands for none.
    """
    try:
        return keras.activations.get(activation)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`activation` must be None, the name of a Keras activation or a "
            f"callable. Received: activation={activation!r}"
        ) from error


def is_linear(function: Callable) -> bool:
    """Whether it is the activation `None`."""
    return function is keras.activations.linear


def is_relu(function: Callable) -> bool:
    """Whether it is ReLU."""
    return function in (keras.activations.relu, keras.ops.relu)


def is_zero_below(function: Callable) -> bool:
    """Whether negative codes have no effect, and so no gradient."""
    return not activate(
        function, np.array([[-4.0, -1.0, -0.1]], np.float32)
    ).any()


def activate(function: Callable, codes: np.ndarray) -> np.ndarray:
    """`f(U)` as a NumPy array."""
    return keras.ops.convert_to_numpy(function(keras.ops.array(codes)))
