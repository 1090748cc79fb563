"""Compiling a copy of a model as the original is compiled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import keras

from keras_distilled_embedding.keras_internals.models import own_variables


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns the arguments a model was compiled with; empty if it was not."""
    if not model.compiled or not hasattr(model, "_compile_config"):
        return {}
    arguments = dict(model._compile_config.config)
    parameters = inspect.signature(type(model).compile).parameters
    if "sampler" in parameters and hasattr(model, "sampler"):
        arguments["sampler"] = model.sampler
    if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
        arguments = {k: v for k, v in arguments.items() if k in parameters}
    return arguments


def without_compiling(
    kind: type[keras.layers.Layer], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a configuration that makes a model without compiling it.

    KerasHub's tasks compile themselves, unless they are told not to.
    """
    return {**config, "compile": False} if _compiles(kind) else dict(config)


def _compiles(kind: type[keras.layers.Layer]) -> bool:
    """Whether the constructor of a class compiles, unless told not to."""
    constructors = [vars(base).get("__init__") for base in kind.__mro__]
    return any(
        "compile" in inspect.signature(constructor).parameters
        for constructor in constructors
        if constructor is not None
    )


def compile_alike(copy: keras.Model, model: keras.Model) -> None:
    """Compiles a copy as the original, with a new optimizer and new metrics."""

    def renew(value: Any) -> Any:
        # Losses have no state, and some have no complete configuration.
        is_loss = isinstance(value, keras.losses.Loss)
        if is_loss or not hasattr(value, "from_config"):
            return value
        return type(value).from_config(value.get_config())

    arguments = compile_arguments(model)
    if arguments:
        copy.compile(**keras.tree.map_structure(renew, arguments))
        exclude_from_weight_decay(copy, weight_decay_exclusions(model))
    elif _compiles(type(copy)):
        copy.optimizer = None  # code expects one of such a model


def weight_decay_exclusions(model: keras.Model) -> dict[str, Any] | None:
    """Returns what a model's optimizer excludes from weight decay.

    The configuration of an optimizer does not record it.
    """
    optimizer = _inner_optimizer(model)
    excluded = getattr(optimizer, "_exclude_from_weight_decay", ())
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    if not excluded and pattern is None:
        return None
    layers: dict[str, list[str]] = {}
    for layer in model._flatten_layers():
        for variable in own_variables(layer):
            matches = pattern and pattern.search(variable.name)
            if matches or optimizer._var_key(variable) in excluded:
                layers.setdefault(layer.name, []).append(variable.name)
    return {"pattern": pattern and pattern.pattern, "layers": layers}


def exclude_from_weight_decay(
    model: keras.Model, exclusions: Mapping[str, Any] | None
) -> None:
    """Excludes from weight decay what `weight_decay_exclusions` returned."""
    if exclusions is None:
        return
    variables = []
    for layer in model._flatten_layers():
        names = set(exclusions["layers"].get(layer.name, ()))
        own = own_variables(layer)
        is_replaced = bool(names - {variable.name for variable in own})
        variables += [v for v in own if is_replaced or v.name in names]
    pattern = exclusions["pattern"]
    _inner_optimizer(model).exclude_from_weight_decay(
        variables, [pattern] if pattern is not None else None
    )


def _inner_optimizer(model: keras.Model) -> Any:
    """Returns the optimizer, without the one that scales the loss for it."""
    optimizer = getattr(model, "optimizer", None)
    return getattr(optimizer, "inner_optimizer", optimizer)
