"""Compiling a copy of a model as the original is compiled."""

from __future__ import annotations

import inspect
from typing import Any

import keras


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments a model was compiled with; empty if it was not.

    They include the sampler of a KerasHub task.
    """
    if not model.compiled or not hasattr(model, "_compile_config"):
        return {}
    arguments = dict(model._compile_config.config)
    parameters = inspect.signature(type(model).compile).parameters
    if "sampler" in parameters and hasattr(model, "sampler"):
        arguments["sampler"] = model.sampler
    if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    return arguments


def compile_alike(copy: keras.Model, model: keras.Model) -> None:
    """Compiles a copy as the original, with a new optimizer and new metrics."""

    def renew(value: Any) -> Any:
        # Losses have no state, and some have no complete configuration.
        if isinstance(value, keras.losses.Loss):
            return value
        if isinstance(value, list | tuple):
            items = [renew(item) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {key: renew(item) for key, item in value.items()}
        if hasattr(value, "get_config") and hasattr(value, "from_config"):
            return type(value).from_config(value.get_config())
        return value

    arguments = compile_arguments(model)
    if arguments:
        copy.compile(**renew(arguments))
