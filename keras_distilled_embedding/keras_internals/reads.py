"""Which variables a model reads when it is called."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras

from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals.models import input_structure
from keras_distilled_embedding.keras_internals.models import iterate_layers
from keras_distilled_embedding.keras_internals.scopes import is_own_class
from keras_distilled_embedding.keras_internals.scopes import patched


def refuse_reads(
    model: keras.Model, variables: Iterable[keras.Variable]
) -> None:
    """Refuses a model that reads some of `variables` which are not its own.

    It is traced, which computes nothing; what cannot be traced is let pass.
    """
    layers = [model, *iterate_layers(model)]
    if not any(
        is_own_class(type(layer)) or isinstance(layer, keras.layers.Lambda)
        for layer in layers
    ):
        return  # layers of Keras read their own variables only
    own = {id(variable) for variable in model.variables}
    refused = {id(variable) for variable in variables} - own
    found: list[tuple[keras.layers.Layer, keras.Variable]] = []
    scope = private_keras.StatelessScope
    get_current_value = scope.get_current_value

    def record(scope: Any, variable: keras.Variable) -> Any:
        if id(variable) in refused:
            found.append((_called_layer(layers), variable))
        return get_current_value(scope, variable)

    with patched(scope, get_current_value=record):
        _trace(model)
    for layer, variable in found:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) uses the variable "
            f"'{variable.path}' of another model, from which it was copied: a "
            "function that it calls refers to it. Make the layer of that "
            "variable an attribute of this layer, recorded in "
            "`get_config()`. To project to the vocabulary, call a "
            "`keras.layers.ReversibleEmbedding` with `reverse=True`."
        )


def _called_layer(layers: list[keras.layers.Layer]) -> keras.layers.Layer:
    """Returns the innermost of a model's layers that are being called."""
    known = {id(layer): layer for layer in layers}
    scopes = private_keras.global_state.get_global_attribute("name_scope_stack")
    callers = [known.get(id(scope.caller)) for scope in scopes or ()]
    return ([layers[0]] + [caller for caller in callers if caller])[-1]


def _trace(model: keras.Model) -> None:
    for inputs in _possible_inputs(model):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                private_keras.compute_output_spec(model, inputs)
            return
        except Exception:  # other inputs may do
            continue
        finally:
            model._clear_losses()


def _possible_inputs(model: keras.Model) -> Iterator[Any]:
    if isinstance(model, private_keras.Functional | keras.Sequential):
        yield input_structure(model)
        return
    shapes = list((model._build_shapes_dict or {}).values())
    if len(shapes) == 1:
        yield _tensors(shapes[0], "int32")
        yield _tensors(shapes[0], "float32")


def _tensors(shape: Any, dtype: str) -> Any:
    """Returns symbolic tensors for a shape, or a structure of shapes."""
    if isinstance(shape, dict):
        return {name: _tensors(item, dtype) for name, item in shape.items()}
    if any(isinstance(item, list | tuple) for item in shape):
        return [_tensors(item, dtype) for item in shape]
    return keras.KerasTensor(shape, dtype)
