"""Configurations that do not record a swap."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras

_CONFIGS_ALLOWED = contextvars.ContextVar("configs_allowed", default=False)


@contextlib.contextmanager
def configs_allowed() -> Iterator[None]:
    """Lets layers tell configurations that do not record their swaps."""
    token = _CONFIGS_ALLOWED.set(True)
    try:
        yield
    finally:
        _CONFIGS_ALLOWED.reset(token)


def refuse_unrecorded_configs(
    model: keras.Model, kind: type[keras.layers.Layer], instead: str
) -> None:
    """Has layers refuse to tell a configuration that has forgotten a swap.

    What they would save would load into something else.

    Args:
        model: A model. Its layers are changed in place.
        kind: The class of layers that were swapped in.
        instead: What to do instead, a sentence for the error.
    """
    owners = {id(owner): owner for owner in model._flatten_layers()}
    forgetful = set()
    for owner in owners.values():
        names = {
            inner.name
            for inner in owner._flatten_layers(include_self=False)
            if isinstance(inner, kind)
        }
        if names and not names <= _names_in_config(owner, kind):
            forgetful.add(id(owner))
    for owner in owners.values():
        # One that holds such a layer would be refused its configuration.
        if forgetful & set(map(id, owner._flatten_layers())):
            _refuse_config(owner, instead)


def _names_in_config(
    owner: keras.layers.Layer, kind: type[keras.layers.Layer]
) -> set[str]:
    registered = keras.saving.get_registered_name(kind)
    names = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("registered_name") == registered:
                names.add(value["config"]["name"])
            value = value.values()
        elif not isinstance(value, list | tuple):
            return
        for item in value:
            visit(item)

    with configs_allowed():
        visit(keras.saving.serialize_keras_object(owner))
    return names


def _refuse_config(layer: keras.layers.Layer, instead: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            f"The configuration of '{layer.name}' "
            f"({type(layer).__name__}) does not record the layers that were "
            f"replaced in it: what is saved would load as another model. "
            f"{instead}"
        )

    def get_config() -> dict[str, Any]:
        if _CONFIGS_ALLOWED.get():
            return type(layer).get_config(layer)
        return refuse()

    # Past Keras, which would track attributes.
    object.__setattr__(layer, "get_config", get_config)
    for name in ("save", "save_to_preset"):  # before they open a file
        if hasattr(layer, name):
            object.__setattr__(layer, name, refuse)
