"""Checks of arguments."""

from collections.abc import Callable

from keras_distilled_embedding._arguments import as_integer
from keras_distilled_embedding.factorization.activations import is_linear


def as_rank(rank, table_shape: tuple[int, int], function: Callable) -> int:
    """Refuses ranks above the one that can already be exact."""
    rank = as_integer("rank", rank)
    largest = min(table_shape) + (not is_linear(function))
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest} for a table of shape "
            f"{table_shape} and this activation. Received: rank={rank}"
        )
    return rank
