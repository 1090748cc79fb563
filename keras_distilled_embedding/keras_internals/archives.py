"""Files in Keras's own format."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from typing import IO
from typing import Any

import keras

from keras_distilled_embedding.keras_internals.configs import configs_allowed
from keras_distilled_embedding.keras_internals.private_keras import (
    ObjectSharingScope,
)
from keras_distilled_embedding.keras_internals.private_keras import saving_lib


def write_archive(model: keras.Model, saved: Any, file: IO[bytes]) -> None:
    """Writes a file in Keras's own format, whose loading follows a saved.

    Args:
        model: The model, whose state is written.
        saved: What Keras's loader makes the model from: of a registered
            class, with `get_config()`, its `from_config()` returns the model.
        file: Open for writing in binary.
    """
    with ObjectSharingScope(), configs_allowed():
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
    """Loads a file in Keras's own format, in safe mode."""
    return saving_lib.load_model(file, custom_objects, safe_mode=True)
