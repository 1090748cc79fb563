"""Configurations and files of models whose layers were replaced."""

from __future__ import annotations

import functools
import json
import warnings
import zipfile
from collections.abc import Mapping
from typing import IO
from typing import Any

import keras

from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals import scopes
from keras_distilled_embedding.keras_internals.private_keras import saving_lib


def write_archive(model: keras.Model, saved: Any, file: IO[bytes]) -> None:
    """Writes a model's weights and assets in Keras's own format.

    The configuration is that of `saved`, whose `from_config` makes the model.
    """
    with private_keras.ObjectSharingScope(), scopes.read_configs():
        config = json.dumps(keras.saving.serialize_keras_object(saved))
    metadata = json.dumps({"keras_version": keras.__version__})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(saving_lib._METADATA_FILENAME, metadata)
        archive.writestr(saving_lib._CONFIG_FILENAME, config)
        weights = saving_lib.H5IOStore(
            saving_lib._VARS_FNAME_H5, archive=archive, mode="w"
        )
        assets = saving_lib.DiskIOStore(
            saving_lib._ASSETS_DIRNAME, archive=archive, mode="w"
        )
        try:
            saving_lib._save_state(model, weights, assets, "", set())
        finally:
            weights.close()
            assets.close()


def read_archive(
    file: IO[bytes], custom_objects: Mapping[str, Any] | None
) -> keras.Model:
    """Loads a file in Keras's own format, in Keras's safe mode."""
    with scopes.without_initial_values(), warnings.catch_warnings():
        # `Rebuilder` builds the layers that Keras warns that it cannot build.
        warnings.filterwarnings("ignore", "`build..` was called on layer")
        return saving_lib.load_model(file, custom_objects, safe_mode=True)


def refuse_incomplete_configs(
    model: keras.Model, kind: type[keras.layers.Layer], remedy: str
) -> None:
    """Makes layers refuse to save a configuration that omits a replacement.

    Replacements are of class `kind`; the error ends with `remedy`.
    """
    owners = {id(owner): owner for owner in model._flatten_layers()}
    incomplete = set()
    for owner in owners.values():
        names = {
            inner.name
            for inner in owner._flatten_layers(include_self=False)
            if isinstance(inner, kind)
        }
        if names and not names <= _names_in_config(owner, kind):
            incomplete.add(id(owner))
    for owner in owners.values():
        # The configuration of an outer layer contains the incomplete one.
        if incomplete & set(map(id, owner._flatten_layers())):
            _refuse_config(owner, remedy)


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

    with scopes.read_configs(), scopes.hand_over_own_objects():
        try:
            visit(keras.saving.serialize_keras_object(owner))
        except Exception:  # Keras cannot save such a layer, whatever is in it
            return set()
    return names


def _refuse_config(layer: keras.layers.Layer, remedy: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            f"The configuration of '{layer.name}' ({type(layer).__name__}) "
            "does not record which of its layers were replaced, so it would "
            f"load as another model. {remedy}"
        )

    # This also copies the mark by which Keras knows its own `get_config`.
    @functools.wraps(type(layer).get_config)
    def get_config() -> dict[str, Any]:
        if scopes.incomplete_configs_allowed.get():
            return type(layer).get_config(layer)
        return refuse()

    # `object.__setattr__` bypasses Keras, which would track the attribute.
    object.__setattr__(layer, "get_config", get_config)
    for name in ("save", "save_to_preset"):  # before they open a file
        if hasattr(layer, name):
            object.__setattr__(layer, name, refuse)
