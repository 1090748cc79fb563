"""The function f of `f(U) W`."""

from collections.abc import Callable

import keras
import numpy as np


def get_activation(
    activation: str | Callable | None, argument: str = "activation"
) -> Callable:
    try:
        return keras.activations.get(activation)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{argument} must be None, the name of a Keras activation or a "
            f"callable. Received: {argument}={activation!r}"
        ) from error


def is_linear(function: Callable) -> bool:
    return function is keras.activations.linear


def is_relu(function: Callable) -> bool:
    return function in (keras.activations.relu, keras.ops.relu)


def is_lifted(activation: str | Callable | None) -> bool:
    """Whether the form needs one rank more than the one without `f`."""
    return not is_linear(get_activation(activation))


def is_zero_below(function: Callable) -> bool:
    """Whether negative codes have no effect, and so no gradient."""
    return not activate(function, np.float32([[-4.0, -1.0, -0.1]])).any()


def activate(function: Callable, codes: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(function(keras.ops.array(codes)))
