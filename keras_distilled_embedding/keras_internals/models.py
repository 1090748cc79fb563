"""Questions about models: their layers, inputs, masks and calls."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

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
    """Returns the layer with a name, at any depth.

    As with `get_layer`, a layer directly in the model comes before layers
    inside other layers.

    Args:
        model: The model.
        name: The layer's name.
        argument: The name of the model in errors.

    Raises:
        ValueError: If no layer, or more than one, has this name.
    """
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
    """Returns the symbolic inputs of a Functional or Sequential model.

    They are a tensor, or a list or dictionary of tensors, as in a call.
    """
    # A Sequential model has no `input` before its first call.
    return (
        model.input
        if isinstance(model, private_keras.Functional)
        else model.inputs[0]
    )


def named_inputs(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """Returns the symbolic inputs by name, in the order Keras flattens them.

    The names are the keys of a dictionary of inputs, or else the tensors' own.
    """
    inputs = input_structure(model)
    tensors = keras.tree.flatten(inputs)
    if isinstance(inputs, dict):
        return dict(zip(sorted(inputs), tensors))
    return {tensor.name: tensor for tensor in tensors}


def before_last_layer(model: keras.Model) -> tuple[Any, Any]:
    """Returns the input of a model's last layer, and that layer.

    Returns:
        The symbolic tensor, and the layer or operation.

    Raises:
        ValueError: If the model has no symbolic inputs, or several outputs.
    """
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
    """Returns how each output of a model is activated last.

    Returns:
        For each output the name of an activation, `"linear"` for a layer
        without one, or `None` for what is not known to have one; `None` for a
        model without symbolic outputs.
    """
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return None
    return [_last_activation(output) for output in outputs]


def _last_activation(output: Any) -> str | None:
    history = output._keras_history
    operation = history.operation
    if isinstance(operation, keras.Model) and getattr(
        operation, "outputs", None
    ):
        return _last_activation(operation.outputs[history.tensor_index])
    if isinstance(operation, keras.layers.Softmax):
        return "softmax"
    if isinstance(operation, keras.layers.Activation | keras.layers.Dense):
        return operation.activation.__name__
    activation = getattr(operation, "activation", None)
    reverse = history.operation._inbound_nodes[history.node_index].arguments
    if "reverse" in reverse.kwargs:  # an embedding, which projects
        return "linear"
    return getattr(activation, "__name__", None)


def keras_mask(tensor: Any) -> Any:
    """Returns the mask that Keras attached to a tensor, or `None`."""
    return private_keras.get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Attaches a Keras mask: losses skip where it is false, as padding."""
    private_keras.set_keras_mask(tensor, mask)


def count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """Returns how many batches an optimizer has seen.

    Unlike the public `iterations`, which counts updates, this counts every
    batch of gradients that are accumulated.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return int(ops.convert_to_numpy(optimizer._iterations))


def make_variables_current(model: keras.Model) -> None:
    """Writes the state of a training in progress to the model's variables.

    On JAX, `fit` keeps the state to itself until an epoch ends.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def watch_calls(layer: keras.layers.Layer, keep: Callable[..., object]) -> None:
    """Reports each call of `layer` to a function, until `stop_watching`.

    Args:
        layer: The layer.
        keep: Called as `keep(outputs, *args, **kwargs)`, with the arguments
            of the layer's `call`.
    """
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
    """Refuses a model that is not built or has no symbolic inputs.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built, or has no symbolic inputs.
    """
    check_built_model("model", model)
    if not isinstance(model, private_keras.Functional | keras.Sequential):
        raise ValueError(
            "`model` must have symbolic inputs, as Functional and Sequential "
            "models have. Wrap it: `x = keras.Input(...); "
            "keras.Model(x, model(x))`. Received: model "
            f"'{model.name}' of class {type(model).__name__}"
        )
