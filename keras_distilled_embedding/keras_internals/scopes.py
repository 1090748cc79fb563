"""Context managers that change how Keras behaves while they are entered."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import keras

_INCOMPLETE_CONFIGS = contextvars.ContextVar("incomplete", default=False)


@contextlib.contextmanager
def read_configs() -> Iterator[None]:
    """Makes configurations ready for a copy or a file.

    - `refuse_incomplete_configs` is lifted.
    - `Layer.get_config` leaves out `name`, `trainable` and `dtype` where a
      constructor does not take them.
    - `DTypePolicyMap.get_config` leaves alone the policies in the map, whose
      names it would remove, although layers, or all of Keras, use them.
    """
    layer, policy_map = keras.layers.Layer, keras.dtype_policies.DTypePolicyMap
    layer_config, map_config = layer.get_config, policy_map.get_config

    @functools.wraps(layer_config)
    def get_config(self: keras.layers.Layer) -> dict[str, Any]:
        config = layer_config(self)
        if is_own_class(type(self)) and is_from_keras(type(self).get_config):
            parameters = inspect.signature(type(self).__init__).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                config = {k: v for k, v in config.items() if k in parameters}
        return config

    def get_map_config(self: Any) -> dict[str, Any]:
        return map_config(copy.deepcopy(self))

    token = _INCOMPLETE_CONFIGS.set(True)
    try:
        with (
            patched(layer, get_config=get_config),
            patched(policy_map, get_config=get_map_config),
        ):
            yield
    finally:
        _INCOMPLETE_CONFIGS.reset(token)


def are_incomplete_configs_allowed() -> bool:
    """Whether `read_configs` is entered."""
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


def is_own_class(item: Any) -> bool:
    """Whether a class is not of Python, Keras, KerasHub or this package."""
    return not is_from_keras(item) and item.__module__ != "builtins"


def is_from_keras(item: Any) -> bool:
    """Whether a class or function is of Keras, KerasHub or this package."""
    module = getattr(item, "__module__", None) or ""
    return module.split(".")[0] in (
        "keras",
        "keras_hub",
        "keras_nlp",
        "keras_distilled_embedding",
    )
