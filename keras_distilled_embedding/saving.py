"""Saving and loading models, those whose classes know nothing of a swap too."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pathlib import PurePosixPath
from typing import Any

import keras

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.layers.vocabulary_projection import (
    VocabularyProjection,
)
from keras_distilled_embedding.losses import ChunkedCrossEntropy

_FORMAT = 1
_INSTEAD = "Save it with `keras_distilled_embedding.save_model(model, path)`."


def save_model(model: keras.Model, path: str | os.PathLike) -> None:
    """Saves a compressed model, of whatever class, in one file.

    The file is in Keras's own format, a zip archive of a configuration, the
    weights (with the optimizer's state, if there is one) and assets such as
    vocabularies. Beside what Keras would write it records which layers were
    replaced and which are shared, so that models load as they were whose
    classes know nothing of it: KerasHub's tasks and backbones, subclassed
    models. It appears whole or not at all.

    `load_model` reads it; with a name that ends in `.keras`, and this package
    imported, `keras.saving.load_model` does, too.

    Args:
        model: A built model, compressed or not.
        path: The file to write. An existing file is replaced, once the new
            one is complete.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built, or holds a Python lambda: to load it
            would be to run code from the file.
        FileNotFoundError: If the folder of `path` does not exist.
        IsADirectoryError: If `path` is a folder.
        PermissionError: If its folder cannot be written to.

    Example:

    ```python
    model = keras.Sequential([
        keras.Input((None,), dtype="int32"),
        keras.layers.Embedding(10_000, 128),
        keras.layers.GlobalAveragePooling1D(),
    ])
    student = compress(model, verbose=0)
    save_model(student, "student.keras")
    loaded = load_model("student.keras")
    ```
    """
    path = Path(path)
    keras_internals.check_copyable(model)
    check_destination("path", path)
    keras_internals.check_internals()
    saved = SavedModel(model)
    write_atomically(
        path, lambda file: keras_internals.write_archive(model, saved, file)
    )


def load_model(
    path: str | os.PathLike,
    custom_objects: Mapping[str, Any] | None = None,
) -> keras.Model:
    """Loads a model that `save_model`, or `model.save()` of Keras, has saved.

    Nothing in the file is run: it holds numbers and configurations, and the
    classes that these name must be Keras's, KerasHub's (imported if need be),
    registered or given.

    Args:
        path: The file.
        custom_objects: Classes and functions by name, those that the model
            uses and that are not registered with
            `keras.saving.register_keras_serializable`.

    Returns:
        The model, compiled as it was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or not a model's, or if it needs
            what is not there.

    Example:

    ```python
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    save_model(model, "dense.keras")
    load_model("dense.keras").count_params()  # 9
    ```
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a file. Received: path={str(path)!r}"
        )
    keras_internals.check_internals()
    with open(path, "rb") as file:
        _check_archive(path, file)
        try:
            with keras_internals.without_initial_values():
                model = keras_internals.read_archive(file, custom_objects)
        except Exception as error:
            raise ValueError(
                f"The model in {str(path)!r} cannot be loaded: "
                f"{_first_cause(error)}"
            ) from error
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{str(path)!r} is not a saved model: it holds a "
            f"{type(model).__name__}."
        )
    return model


def _first_cause(error: BaseException) -> str:
    """What went wrong, without the configuration in which it did."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    message = str(error).split("Full object config")[0].strip()
    if isinstance(error, LookupError):  # whose message is a key alone
        message = f"{type(error).__name__}: {message}"
    if "Could not locate" in message:
        message += " Or give them as `custom_objects`."
    return message


def _check_archive(path: Path, file: Any) -> None:
    """Refuses, before anything is made of it, what is not a whole model."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # No file of ours or of Keras is compressed; one that is could
            # take any amount of memory.
            packed = [m.filename for m in members if m.compress_type]
            outside = [
                m.filename
                for m in members
                if PurePosixPath(m.filename).is_absolute()
                or ".." in PurePosixPath(m.filename).parts
                or "\\" in m.filename
            ]
            names = {m.filename for m in members}
            damaged = None
            if not packed:
                damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a saved model, or not all of one: {error}"
        ) from error
    wanted = {"config.json", "metadata.json", "model.weights.h5"}
    if not wanted <= names:
        raise ValueError(
            f"{str(path)!r} is not a saved model: it has no "
            f"{', '.join(sorted(wanted - names))}."
        )
    if packed or outside or damaged:
        raise ValueError(
            f"{str(path)!r} is damaged, or not written by Keras: its member "
            f"{(packed or outside or [damaged])[0]!r} is not as it should be."
        )


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class SavedModel:
    """How to make a model: what a saved file's configuration is of.

    Keras's own loader calls `from_config`, and gets the model.

    Args:
        model: The model that is saved.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def get_config(self) -> dict[str, Any]:
        numbers: dict[int, int] = {}
        tree = keras_internals.LayerTree.of(self.model, numbers)
        config = keras.saving.serialize_keras_object(self.model)
        config.pop("compile_config", None)
        if _has_lambda(config):
            raise ValueError(
                "`model` must not hold a Python lambda: to load it would be "
                "to run code from the file. Use a registered function or "
                f"layer. Received: model '{self.model.name}'"
            )
        return {
            "format": _FORMAT,
            "model": config,
            "layers": tree.to_dict(),
            "replaced": {
                str(numbers[id(layer)]): keras.saving.serialize_keras_object(
                    layer
                )
                for layer in keras_internals.iterate_layers(self.model)
                if isinstance(layer, DistilledEmbedding | VocabularyProjection)
            },
            "compile": self._compile_config(),
        }

    def _compile_config(self) -> dict[str, Any] | None:
        arguments = keras_internals.compile_arguments(self.model)
        if not arguments:
            return None
        config = keras.saving.serialize_keras_object(arguments)
        if _has_lambda(config):
            warnings.warn(
                "The model is saved without its compile settings, which hold "
                "a Python lambda: compile it again after loading.",
                stacklevel=2,
            )
            return None
        optimizer = getattr(self.model, "optimizer", None)
        return {
            "arguments": config,
            "optimizer_built": bool(optimizer is not None and optimizer.built),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Model:
        if config["format"] != _FORMAT:
            raise ValueError(
                f"the file is of format {config['format']}; this version of "
                f"the package reads {_FORMAT}"
            )
        deserialize = keras.saving.deserialize_keras_object
        model = deserialize(config["model"])
        replaced = {
            int(number): deserialize(layer)
            for number, layer in config["replaced"].items()
        }
        tree = keras_internals.LayerTree.from_dict(config["layers"])
        rebuilder = keras_internals.Rebuilder(replaced)
        rebuilder.match(tree, model)
        for number in replaced:
            layer = rebuilder.layers[number]
            if not layer.built:
                layer.build()
        # Not checked: Keras itself keeps what it makes until it is done, and
        # `compress` has refused what would fail.
        rebuilder.swap([model])
        refuse_to_forget(model)
        if config["compile"] is not None:
            _compile(model, config["compile"])
        return model


def refuse_to_forget(model: keras.Model) -> None:
    """Has a model refuse `save()` where that would forget its factors."""
    keras_internals.refuse_unrecorded_configs(
        model, DistilledEmbedding, _INSTEAD
    )


def _compile(model: keras.Model, config: dict[str, Any]) -> None:
    try:
        arguments = keras.saving.deserialize_keras_object(config["arguments"])
        for loss in keras.tree.flatten(arguments.get("loss")):
            if isinstance(loss, ChunkedCrossEntropy):
                loss.bind(model)
        model.compile(**arguments)
    except Exception as error:
        warnings.warn(
            "The model is loaded without its compile settings, which need "
            f"what is not there: {error}",
            stacklevel=2,
        )
        return
    if config["optimizer_built"]:
        model.optimizer.build(model.trainable_variables)


def _has_lambda(config: Any) -> bool:
    return '"class_name": "__lambda__"' in json.dumps(config)
