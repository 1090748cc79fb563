"""Looking at models: their layers, inputs, masks and calls."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding._utils.arguments import check_built_model
from keras_distilled_embedding.keras_internals.private_keras import Functional
from keras_distilled_embedding.keras_internals.private_keras import (
    get_keras_mask,
)
from keras_distilled_embedding.keras_internals.private_keras import (
    set_keras_mask,
)


def iterate_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields every layer inside `model`, at any depth, each once."""
    seen = set()
    for layer in model._flatten_layers(include_self=False):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer


def find_layer(
    model: keras.Model, name: str, argument: str
) -> keras.layers.Layer:
    """The one layer of that name, at any depth.

    Those next to the model's surface first, as `get_layer` finds them.

    Args:
        model: The model.
        name: The layer's name.
        argument: What the model is called in errors.

    Raises:
        ValueError: If no layer, or more than one, has this name.
    """
    for layers in (model.layers, iterate_layers(model)):
        found = [layer for layer in layers if layer.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"`{argument}` must have one layer of a name that is asked "
                f"for. Received: {len(found)} layers named '{name}'"
            )
    raise ValueError(
        f"`{argument}` has no layer '{name}'. Received: {argument} with "
        f"layers {[layer.name for layer in model.layers]}"
    )


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs of a Functional or Sequential model, as it is called.

    A tensor, or a list or dictionary of tensors.
    """
    # A Sequential model has no `input` before it is called.
    return model.input if isinstance(model, Functional) else model.inputs[0]


def named_inputs(model: keras.Model) -> dict[str, keras.KerasTensor]:
    """The symbolic inputs by name, in the order in which Keras flattens them.

    Those of a dictionary by its keys.
    """
    inputs = input_structure(model)
    tensors = keras.tree.flatten(inputs)
    if isinstance(inputs, dict):
        return dict(zip(sorted(inputs), tensors))
    return {tensor.name: tensor for tensor in tensors}


def before_last_layer(model: keras.Model) -> tuple[Any, Any]:
    """What the last layer of a model with one output is called with.

    Returns:
        The symbolic tensor, and the layer (or operation).

    Raises:
        ValueError: If the model is not symbolic, or has several outputs.
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


def keras_mask(tensor: Any) -> Any:
    """The mask that Keras has attached to a layer's output, or `None`."""
    return get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Has Keras leave out where `mask` is false, as it leaves out padding."""
    set_keras_mask(tensor, mask)


def count_steps(optimizer: keras.optimizers.Optimizer) -> int:
    """The batches an optimizer has seen, accumulated ones included."""
    # The public `iterations` counts updates, and rounds down.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return int(ops.convert_to_numpy(optimizer._iterations))


def make_variables_current(model: keras.Model) -> None:
    """Has a training in progress read its state from the variables again.

    On JAX `fit` keeps the state of the model to itself until an epoch ends.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def watch_calls(layer: keras.layers.Layer, keep: Callable[..., object]) -> None:
    """Watches what `layer` is called with and returns, until told to stop.

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

    # Past Keras, which would track an attribute: its layers look `call` up
    # on themselves each time they are called.
    object.__setattr__(layer, "call", watched_call)


def stop_watching(layer: keras.layers.Layer) -> None:
    """Undoes `watch_calls`."""
    vars(layer).pop("call", None)


def check_copyable(model: Any) -> None:
    """Refuses what `copy_models` cannot copy.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built.
    """
    check_built_model("model", model)


def check_symbolic(model: Any) -> None:
    """Refuses a model whose inputs are not known, beside `check_copyable`.

    Raises:
        TypeError: As `check_copyable`.
        ValueError: As `check_copyable`, or if it has no symbolic inputs.
    """
    check_copyable(model)
    if not isinstance(model, Functional | keras.Sequential):
        raise ValueError(
            "`model` must have symbolic inputs, as Functional and Sequential "
            "models have. Wrap it: `x = keras.Input(...); "
            "keras.Model(x, model(x))`. Received: model "
            f"'{model.name}' of class {type(model).__name__}"
        )
