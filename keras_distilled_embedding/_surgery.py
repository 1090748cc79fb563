"""What takes knowledge of how Keras works inside.

Copying models with some of their layers swapped, above all. The only file
that relies on how Keras keeps layers, graphs, masks and states; everything
else goes through these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask
from keras.src.models.functional import Functional
from keras.src.saving.serialization_lib import SafeModeScope


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


def graph_layers(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields the layers `copy_models` can swap, each once.

    These are the layers of a Functional or Sequential model, and of such
    models nested in it, but not what other layers keep inside them.
    """
    seen = set()
    for layer in model.layers:
        inner = graph_layers(layer) if _is_graph(layer) else (layer,)
        for found in inner:
            if id(found) not in seen:
                seen.add(id(found))
                yield found


def input_structure(model: keras.Model) -> Any:
    """The symbolic inputs of a Functional or Sequential model, as it is called.

    A tensor, or a list or dictionary of tensors.
    """
    # A Sequential model has no `input` before it is called.
    return model.input if isinstance(model, Functional) else model.inputs[0]


def keras_mask(tensor: Any) -> Any:
    """The mask that Keras has attached to a layer's output, or `None`."""
    return get_keras_mask(tensor)


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


def check_copyable(model: keras.Model) -> None:
    """Refuses what `copy_models` cannot copy.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not Functional or Sequential, or is not built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )
    if not _is_graph(model):
        raise ValueError(
            "`model` must be a Functional or Sequential model, and so "
            "must the models in it. For another model replace its layers "
            "where it makes them, with "
            "`layers.DistilledEmbedding.from_embedding`. Received: "
            f"model '{model.name}' of class {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "`model` must be built: call it, or its `build()`, first. "
            f"Received: model={model!r}"
        )
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            check_copyable(layer)


def copy_models(
    models: Sequence[keras.Model],
    replacements: Mapping[keras.layers.Layer, keras.layers.Layer],
) -> list[keras.Model]:
    """Copies models, with other layers in the place of some.

    A layer that is called several times, or by several of the models, is
    copied once: what was shared stays shared. The copies share no variable
    with the originals, start with the same weights, and are not compiled.

    Args:
        models: Functional or Sequential models.
        replacements: What stands in for which layer. A replacement is called
            with the arguments of the layer that it replaces.

    Returns:
        The copies, in the order of `models`.

    Raises:
        ValueError: If a layer to be replaced is kept inside another layer.
    """
    for model in models:
        _check_not_held_inside(model, replacements)
    copies = {id(old): new for old, new in replacements.items()}
    copied = []

    def copy_layer(layer: keras.layers.Layer) -> keras.layers.Layer:
        if id(layer) not in copies:
            if _is_graph(layer):
                copies[id(layer)] = copy_graph(layer)
            else:
                copies[id(layer)] = type(layer).from_config(layer.get_config())
                copied.append(layer)
        return copies[id(layer)]

    # Not `keras.models.clone_model`, which compiles the copy of a compiled
    # model, optimizer state and all, and drops the model's dtype policy.
    def copy_graph(model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            # Unlike `layers`, `_layers` has the input layer.
            layers = [copy_layer(layer) for layer in model._layers]
            copy = keras.Sequential(layers, name=model.name)
        else:
            inputs = keras.tree.map_structure(
                lambda x: copy_layer(x._keras_history.operation).output,
                model.input,
            )
            outputs = model._run_through_graph(inputs, operation_fn=copy_layer)
            copy = Functional(inputs, outputs, name=model.name)
        copy.dtype_policy = model.dtype_policy
        # Of the model alone: its layers have brought their own.
        copy._trainable = model.trainable
        return copy

    # What the layers hold is code of this process: a `Lambda` may be copied.
    with SafeModeScope(False):
        new_models = [copy_graph(model) for model in models]
    for layer in copied:
        if isinstance(layer, keras.layers.Layer):  # not a bare operation
            copy = copies[id(layer)]
            copy.set_weights(layer.get_weights())
            for old, new in zip(
                layer._flatten_layers(), copy._flatten_layers()
            ):
                new.trainable = old.trainable
    return new_models


def _check_not_held_inside(
    model: keras.Model,
    replacements: Mapping[keras.layers.Layer, keras.layers.Layer],
) -> None:
    """A copy of a composite layer would hold a table of its own."""
    replaced = {id(layer): layer for layer in replacements}
    for layer in graph_layers(model):
        if not isinstance(layer, keras.layers.Layer):  # a bare operation
            continue
        for inner in layer._flatten_layers(include_self=False):
            if id(inner) in replaced:
                raise ValueError(
                    f"Layer '{inner.name}' cannot be replaced: layer "
                    f"'{layer.name}' ({type(layer).__name__}) keeps it inside."
                )


def _is_graph(layer: keras.layers.Layer) -> bool:
    # The very classes: a subclass has a constructor of its own.
    return type(layer) in (keras.Sequential, Functional)
