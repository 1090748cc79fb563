"""Questions about models: their layers, inputs, masks and calls."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding.keras_internals import private_keras


def iterate_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields every layer inside `model`, at any depth, each once."""
    seen = set()
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the variables of a layer without those of the layers inside."""
    return layer._trainable_variables + layer._non_trainable_variables


def find_layer(
    model: keras.Model, name: str, argument: str
) -> keras.layers.Layer:
    """Returns the layer with a name; one directly in the model comes first."""
    for layers in (model.layers, iterate_layers(model)):
        found = [layer for layer in layers if layer.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"`{argument}` must have only one layer with the name "
                f"'{name}'. Received: {len(found)} layers with this name"
            )
    raise ValueError(
        f"`{argument}` has no layer '{name}'. Received: {argument} with "
        f"layers {[layer.name for layer in model.layers]}"
    )


def input_structure(model: keras.Model) -> Any:
    """Returns the symbolic inputs of a model, nested as in a call."""
    if isinstance(model, keras.Sequential):
        # It has no `input` before its first call.
        return model.inputs[0]
    return model.input


def before_last_layer(model: keras.Model) -> tuple[Any, Any]:
    """Returns the input of a symbolic model's last layer, and that layer."""
    check_symbolic(model)
    if len(model.outputs) != 1:
        raise ValueError(
            "`model` must have one output. Received: model "
            f"'{model.name}' with {len(model.outputs)}"
        )
    history = model.outputs[0]._keras_history
    node = history.operation._inbound_nodes[history.node_index]
    return node.input_tensors[0], history.operation


def last_activations(model: keras.Model) -> list[str | None] | None:
    """Returns the name of each output's last activation, where it is known.

    A model without symbolic outputs gives `None`.
    """
    outputs = getattr(model, "outputs", None)
    return [_last_activation(output) for output in outputs] if outputs else None


def _last_activation(output: Any) -> str | None:
    history = output._keras_history
    operation = history.operation
    outputs = getattr(operation, "outputs", None)
    if isinstance(operation, keras.Model) and outputs:
        return _last_activation(outputs[history.tensor_index])
    if isinstance(operation, keras.layers.Softmax):
        return "softmax"
    call = operation._inbound_nodes[history.node_index].arguments
    if "reverse" in call.kwargs:  # an embedding, which projects
        return "linear"
    activation = getattr(operation, "activation", None)
    return getattr(activation, "__name__", None)


def make_variables_current(model: keras.Model) -> None:
    """Writes the state that JAX's `fit` keeps to itself to the variables."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def watch_calls(layer: keras.layers.Layer, keep: Callable[..., object]) -> None:
    """Calls `keep(outputs, *args, **kwargs)` after each call of a layer."""
    call = layer.call

    def watched_call(*args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        keep(outputs, *args, **kwargs)
        return outputs

    # `object.__setattr__` bypasses Keras, which would track the attribute.
    object.__setattr__(layer, "call", watched_call)


def stop_watching(layer: keras.layers.Layer) -> None:
    """Undoes `watch_calls`."""
    vars(layer).pop("call", None)


def check_symbolic(model: Any) -> None:
    """Refuses a model that is not built or has no symbolic inputs."""
    check_built_model("model", model)
    if not isinstance(model, private_keras.Functional | keras.Sequential):
        raise ValueError(
            "`model` must have symbolic inputs, as Functional and Sequential "
            "models have. Wrap it: `x = keras.Input(...); "
            "keras.Model(x, model(x))`. Received: model "
            f"'{model.name}' of class {type(model).__name__}"
        )
