"""Context managers that change how Keras behaves while they are entered."""

from __future__ import annotations

import contextlib
import contextvars
import copy
from collections.abc import Iterator
from typing import Any

import keras

_INCOMPLETE_CONFIGS = contextvars.ContextVar("incomplete", default=False)


@contextlib.contextmanager
def allow_incomplete_configs() -> Iterator[None]:
    """Lifts `refuse_incomplete_configs` while this package reads them."""
    token = _INCOMPLETE_CONFIGS.set(True)
    try:
        yield
    finally:
        _INCOMPLETE_CONFIGS.reset(token)


def are_incomplete_configs_allowed() -> bool:
    """Whether `allow_incomplete_configs` is entered."""
    return _INCOMPLETE_CONFIGS.get()


@contextlib.contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a class or module while it is entered."""
    originals = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def keep_policies() -> Iterator[None]:
    """Keeps the dtype policies that are in use when a map of them is saved.

    `DTypePolicyMap.get_config` removes the names of the policies in the map,
    which layers, or all of Keras, may use.
    """
    policy_map = keras.dtype_policies.DTypePolicyMap
    get_config = policy_map.get_config

    def get_config_of_copy(self: Any) -> dict[str, Any]:
        return get_config(copy.deepcopy(self))

    with patched(policy_map, get_config=get_config_of_copy):
        yield


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Starts new weights at zero, where they are about to be assigned.

    Random numbers for a large table take seconds and three times its memory.
    """
    add_weight = keras.layers.Layer.add_weight

    def add_zeros(
        self: keras.layers.Layer,
        shape: Any = None,
        initializer: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.Variable:
        return add_weight(self, shape, "zeros", *args, **kwargs)

    with patched(keras.layers.Layer, add_weight=add_zeros):
        yield
