"""Context managers that change how Keras behaves while they are entered."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding.keras_internals import private_keras

# Weights of so many numbers do not start at zero.
_LARGE = 2**20
# Whether `read_configs` is entered.
incomplete_configs_allowed = contextvars.ContextVar("allowed", default=False)


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
        if has_default_config(type(self)):
            parameters = inspect.signature(type(self).__init__).parameters
            kinds = {parameter.kind for parameter in parameters.values()}
            if inspect.Parameter.VAR_KEYWORD not in kinds:
                config = {k: v for k, v in config.items() if k in parameters}
        return config

    def get_map_config(self: Any) -> dict[str, Any]:
        return map_config(copy.deepcopy(self))

    token = incomplete_configs_allowed.set(True)
    try:
        with (
            patched(layer, get_config=get_config),
            patched(policy_map, get_config=get_map_config),
        ):
            yield
    finally:
        incomplete_configs_allowed.reset(token)


@contextlib.contextmanager
def hand_over_own_objects() -> Iterator[None]:
    """Makes configurations refer to the very functions and classes in use.

    Each gets a unique name by which Keras finds it, registered or not.
    """
    objects: dict[str, Any] = {}
    registration = private_keras.object_registration
    serialization = private_keras.serialization_lib
    get_registered_name = registration.get_registered_name
    serialize = serialization.serialize_keras_object

    def unique_name(item: Any) -> str:
        for name, known in objects.items():
            if known is item:
                return name
        name = f"{getattr(item, '__name__', 'function')}#{len(objects)}"
        objects[name] = item
        # All of them: a scope hides the one around it.
        scopes.enter_context(keras.saving.CustomObjectScope(objects))
        return name

    def name_of(item: Any) -> str:
        if _is_own_function(item):
            return unique_name(item)
        name = get_registered_name(item)
        if not is_own_class(item):
            return name
        is_registered = keras.saving.get_registered_object(name) is item
        return name if is_registered else unique_name(item)

    def serialize_by_name(item: Any) -> Any:
        if not _is_own_function(item):
            return serialize(item)
        name = unique_name(item)
        return {
            "module": None,
            "class_name": "function",
            "config": name,
            "registered_name": name,
        }

    def load_function(code: Any, *_: Any, **__: Any) -> Any:
        return objects[code[0] if isinstance(code, list | tuple) else code]

    def dump_function(item: Any) -> tuple[str, None, None]:
        return unique_name(item), None, None

    with (
        patched(registration, get_registered_name=name_of),
        patched(serialization, serialize_keras_object=serialize_by_name),
        # The code of lambdas, which Keras does not load in safe mode.
        patched(
            private_keras.python_utils,
            func_dump=dump_function,
            func_load=load_function,
        ),
        private_keras.SafeModeScope(False),
        contextlib.ExitStack() as scopes,
    ):
        yield


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
    A large one starts as memory that TensorFlow has not written to, and that
    takes no room until then.
    """
    add_weight = keras.layers.Layer.add_weight

    def add_zeros(
        self: keras.layers.Layer,
        shape: Any = None,
        initializer: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.Variable:
        return add_weight(self, shape, _no_values, *args, **kwargs)

    with patched(keras.layers.Layer, add_weight=add_zeros):
        yield


def _no_values(shape: Any, dtype: Any = None) -> Any:
    is_large = math.prod(shape) >= _LARGE
    if not is_large or keras.backend.backend() != "tensorflow":
        return ops.zeros(shape, dtype)
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=list(shape), dtype=dtype, init=False)


def _is_own_function(item: Any) -> bool:
    """Whether an object is a function of the user's own, of any kind."""
    return (
        callable(item)
        and not isinstance(item, type)
        and not hasattr(item, "get_config")
        and not is_from_keras(item)
    )


def has_default_config(kind: Any) -> bool:
    """Whether a class of the user's own does not define `get_config`."""
    return is_own_class(kind) and is_from_keras(kind.get_config)


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
