"""Checks of arguments."""

import numbers
from collections.abc import Callable

from keras_distilled_embedding.factorization.activations import is_linear


def as_integer(name: str, value, minimum: int) -> int:
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < minimum:
        raise ValueError(
            f"{name} must be an integer of at least {minimum}. "
            f"Received: {name}={value!r}"
        )
    return int(value)


def as_rank(rank, table_shape: tuple[int, int], function: Callable) -> int:
    """Refuses ranks above the one that can already be exact."""
    rank = as_integer("rank", rank, minimum=1)
    largest = min(table_shape) + (not is_linear(function))
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest} for a table of shape "
            f"{table_shape} and this activation. Received: rank={rank}"
        )
    return rank
