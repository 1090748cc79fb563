"""Functions and classes of the user's own, in configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals.scopes import is_from_keras
from keras_distilled_embedding.keras_internals.scopes import is_own_class
from keras_distilled_embedding.keras_internals.scopes import patched


@contextlib.contextmanager
def hand_over_own_objects() -> Iterator[None]:
    """Makes configurations refer to the very functions and classes in use.

    Keras records a function or a class by its name, which must be registered,
    and a lambda by its code, which loses the names that its module defines. A
    copy in the same process can use the object itself. Here each object gets a
    unique name by which Keras finds it.
    """
    objects: dict[str, Any] = {}
    get_registered_name = private_keras.object_registration.get_registered_name
    serialize = private_keras.serialization_lib.serialize_keras_object

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
        if is_own_function(item):
            return unique_name(item)
        name = get_registered_name(item)
        if not is_own_class(item):
            return name
        is_registered = keras.saving.get_registered_object(name) is item
        return name if is_registered else unique_name(item)

    def serialize_by_name(item: Any) -> Any:
        if not is_own_function(item):
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

    with contextlib.ExitStack() as scopes:
        for owner, attributes in (
            (
                private_keras.object_registration,
                {"get_registered_name": name_of},
            ),
            (
                private_keras.serialization_lib,
                {"serialize_keras_object": serialize_by_name},
            ),
            (
                private_keras.python_utils,  # the code of lambdas
                {
                    "func_dump": lambda item: (unique_name(item), None, None),
                    "func_load": load_function,
                },
            ),
        ):
            scopes.enter_context(patched(owner, **attributes))
        # Keras loads the code of a lambda in this mode only.
        scopes.enter_context(private_keras.SafeModeScope(False))
        yield


def is_own_function(item: Any) -> bool:
    """Whether an object is a function of the user's own, of any kind."""
    return (
        callable(item)
        and not isinstance(item, type)
        and not hasattr(item, "get_config")
        and not is_from_keras(item)
    )
