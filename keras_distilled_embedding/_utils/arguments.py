"""Checks of arguments that several modules take."""

from __future__ import annotations

import numbers
from typing import Any

import keras


def as_integer(name: str, value: Any, minimum: int = 1) -> int:
    """Returns the argument `name` as an integer of at least `minimum`."""
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < minimum:
        expected = (
            "a positive integer"
            if minimum == 1
            else f"an integer of at least {minimum}"
        )
        raise ValueError(
            f"`{name}` must be {expected}. Received: {name}={value!r}"
        )
    return int(value)


def as_optional_integer(name: str, value: Any, minimum: int = 1) -> int | None:
    """Returns the argument as an integer, or `None` as it is."""
    return None if value is None else as_integer(name, value, minimum)


def as_positive_number(name: str, value: Any) -> float:
    """Returns the argument as a finite float above zero."""
    is_number = isinstance(value, numbers.Real)
    if not is_number or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(
            f"`{name}` must be a positive number. Received: {name}={value!r}"
        )
    return float(value)


def check_built_model(name: str, value: Any) -> None:
    """Refuses what is not a built Keras model."""
    if not isinstance(value, keras.Model):
        raise TypeError(
            f"`{name}` must be a `keras.Model`. Received: {name}={value!r}"
        )
    if not value.built:
        raise ValueError(
            f"`{name}` must be built: call it, or its `build()`, first. "
            f"Received: {name}={value!r}"
        )
