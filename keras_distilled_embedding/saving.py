"""Saves and loads models, also those whose layers `compress` replaced."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pathlib import PurePosixPath
from typing import IO
from typing import Any

import keras

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding._utils.files import check_destination
from keras_distilled_embedding._utils.files import write_atomically
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers import VocabularyProjection
from keras_distilled_embedding.losses import ChunkedCrossEntropy

_FORMAT = 1
_MEMBERS = {"config.json", "metadata.json", "model.weights.h5"}


def save_model(model: keras.Model, path: str | os.PathLike) -> None:
    """Saves a compressed model of any class in one file.

    The file is in Keras's own format: a zip archive of a configuration, the
    weights (with the state of the optimizer, if there is one) and assets such
    as vocabularies. It also records which layers were replaced and which are
    shared, so that models load whose own configuration does not record this,
    such as KerasHub's tasks and backbones and subclassed models. The file
    appears complete or not at all.

    `load_model` reads the file. If its name ends in `.keras` and this package
    is imported, `keras.saving.load_model` reads it, too.

    Args:
        model: A built model, compressed or not.
        path: The file to write. An existing file is replaced once the new one
            is complete.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built, or contains a Python lambda, which
            cannot be loaded without running code from the file.
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
    check_built_model("model", model)
    check_destination("path", path)
    saved = SavedModel(model)
    write_atomically(
        path, lambda file: keras_internals.write_archive(model, saved, file)
    )


def load_model(
    path: str | os.PathLike,
    custom_objects: Mapping[str, Any] | None = None,
) -> keras.Model:
    """Loads a model saved by `save_model`, or by Keras's `model.save()`.

    No code in the file is run. The file holds numbers and configurations, and
    the classes that these name must belong to Keras or KerasHub (imported if
    needed), be registered with Keras, or be given.

    Args:
        path: The file.
        custom_objects: The model's classes and functions, by name, that are
            not registered with `keras.saving.register_keras_serializable`.

    Returns:
        The model, compiled as it was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or does not hold a model, or if a
            class or function of the model is not found.

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
    with open(path, "rb") as file:
        _check_archive(path, file)
        try:
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
    """Returns the message of the first error, without configurations."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    message = str(error).split("Full object config")[0].strip()
    if isinstance(error, LookupError):  # its message is only a key
        message = f"{type(error).__name__}: {message}"
    if "Could not locate" in message:
        message += " Or pass it in `custom_objects`."
    return message


def _check_archive(path: Path, file: IO[bytes]) -> None:
    """Refuses a file that is not a complete model, before it is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            problems = {m.filename: _problem(m) for m in archive.infolist()}
            damaged = None if any(problems.values()) else archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a saved model, or is incomplete: {error}"
        ) from error
    missing = _MEMBERS - problems.keys()
    if missing:
        raise ValueError(
            f"{str(path)!r} is not a file written by `save_model` or by Keras: "
            f"it has no {', '.join(sorted(missing))}."
        )
    if damaged:
        problems[damaged] = "has a wrong checksum"
    for name, problem in problems.items():
        if problem:
            raise ValueError(
                f"{str(path)!r} is damaged, or was not written by `save_model` "
                f"or by Keras: its member {name!r} {problem}."
            )


def _problem(member: zipfile.ZipInfo) -> str | None:
    parts = PurePosixPath(member.filename)
    if parts.is_absolute() or ".." in parts.parts or "\\" in member.filename:
        return "leads outside the archive"
    if member.compress_type:
        return "is compressed, so it could expand to any size"
    return None


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class SavedModel:
    """The object whose configuration is written to a file.

    Keras's loader calls `from_config`, which returns the model itself.
    """

    def __init__(self, model: keras.Model) -> None:
        self.model = model

    def get_config(self) -> dict[str, Any]:
        numbers: dict[int, int] = {}
        tree = keras_internals.LayerTree.of(self.model, numbers)
        config = keras.saving.serialize_keras_object(self.model)
        config.pop("compile_config", None)
        config["config"] = keras_internals.without_compiling(
            type(self.model), config["config"]
        )
        if _has_lambda(config):
            raise ValueError(
                "`model` must not contain a Python lambda, which cannot be "
                "loaded without running code from the file. Use a registered "
                f"function or layer. Received: model '{self.model.name}'"
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
                "The model is saved without its compile settings, which "
                "contain a Python lambda. Compile it again after loading.",
                stacklevel=2,
            )
            return None
        optimizer = getattr(self.model, "optimizer", None)
        return {
            "arguments": config,
            "excluded": keras_internals.weight_decay_exclusions(self.model),
            "optimizer_built": optimizer is not None and optimizer.built,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Model:
        if config["format"] != _FORMAT:
            raise ValueError(
                f"the file has format {config['format']}, but this version of "
                f"keras-distilled-embedding reads format {_FORMAT}"
            )
        deserialize = keras.saving.deserialize_keras_object
        model = deserialize(config["model"])
        replaced = {
            int(number): deserialize(layer)
            for number, layer in config["replaced"].items()
        }
        rebuilder = keras_internals.Rebuilder(replaced)
        rebuilder.match(
            keras_internals.LayerTree.from_dict(config["layers"]), model
        )
        for number in replaced:
            layer = rebuilder.layers[number]
            if not layer.built:
                layer.build()
        # `check_swapped` is of no use: Keras keeps the layers it makes until
        # loading ends, and `compress` has refused what the check would find.
        rebuilder.swap([model])
        refuse_to_forget(model)
        if config["compile"] is not None:
            _compile(model, config["compile"])
        return model


def refuse_to_forget(model: keras.Model) -> None:
    """Makes `model.save()` refuse to write a file without the factors."""
    keras_internals.refuse_incomplete_configs(
        model,
        DistilledEmbedding,
        "Save it with `keras_distilled_embedding.save_model(model, path)`.",
    )


def _compile(model: keras.Model, config: dict[str, Any]) -> None:
    try:
        arguments = keras.saving.deserialize_keras_object(config["arguments"])
        for loss in keras.tree.flatten(arguments.get("loss")):
            if isinstance(loss, ChunkedCrossEntropy):
                loss.bind(model)
        model.compile(**arguments)
        keras_internals.exclude_from_weight_decay(model, config["excluded"])
    except Exception as error:
        warnings.warn(
            "The model is loaded without its compile settings, which cannot "
            f"be restored: {error}",
            stacklevel=2,
        )
        return
    if config["optimizer_built"]:
        model.optimizer.build(model.trainable_variables)


def _has_lambda(config: Any) -> bool:
    return '"class_name": "__lambda__"' in json.dumps(config)
