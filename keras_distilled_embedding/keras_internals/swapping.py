"""Replaces layers wherever models keep them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals.models import own_variables


def swap_layers(
    roots: Sequence[keras.layers.Layer],
    swaps: Sequence[tuple[keras.layers.Layer, keras.layers.Layer]],
) -> None:
    """Replaces layers `old` by `new`, wherever models keep them, in place."""
    if not swaps:
        return
    for old, new in swaps:
        _move_nodes(old, new)
    by_id: dict[int, Any] = {id(old): new for old, new in swaps}
    for old, new in swaps:
        if type(old) is type(new):  # layers may keep its variables, too
            for variable, other in zip(own_variables(old), own_variables(new)):
                by_id[id(variable)] = other
    owners = {}
    for root in roots:
        for owner in root._flatten_layers():
            owners[id(owner)] = owner
            if isinstance(owner, keras.Sequential) and owner._functional:
                owners[id(owner._functional)] = owner._functional
    # The trackers are changed below: nothing is to be tracked a second time.
    with private_keras.DotNotTrackScope():
        for owner in owners.values():
            _swap_in_attributes(owner, by_id)
            if isinstance(owner, private_keras.Functional):
                # Its nodes are known by the ids of their operations.
                graph = private_keras.map_graph(owner._inputs, owner._outputs)
                owner._nodes, owner._nodes_by_depth = graph[:2]
                owner._operations, owner._operations_by_depth = graph[2:]


def _swap_in_attributes(
    owner: keras.layers.Layer, by_id: Mapping[int, Any]
) -> None:
    # TensorFlow's own record of layers; other backends have none.
    tracked = getattr(owner, "_self_unconditional_dependency_names", {})
    for name, value in list(tracked.items()):
        if id(value) in by_id:
            owner._track_trackable(by_id[id(value)], name, overwrite=True)
    for name, value in list(vars(owner).items()):
        swapped = _swap_in(value, by_id)
        if swapped is value:
            continue
        if _is_wrapped(value):  # TensorFlow wraps and tracks the new one, too
            setattr(owner, name, swapped)
        else:
            object.__setattr__(owner, name, swapped)
    for _, store in owner._tracker.config.values():
        _swap_in(store, by_id)  # a Sequential model makes these lists anew
    for ids in owner._tracker.stored_ids.values():
        for stray in ids & by_id.keys():
            ids.remove(stray)
            ids.add(id(by_id[stray]))


def _is_wrapped(value: Any) -> bool:
    """Whether a container is TensorFlow's wrapper, which reports changes."""
    return type(value).__module__.startswith("tensorflow.")


def _swap_in(value: Any, by_id: Mapping[int, Any]) -> Any:
    """Returns what replaces a value, or changes a container in place."""
    if id(value) in by_id:
        return by_id[id(value)]
    if isinstance(value, dict):
        items = list(itertools.chain(*value.items()))
    elif isinstance(value, list | tuple | set):
        items = list(value)
    else:
        return value
    swapped: Any = [_swap_in(item, by_id) for item in items]
    if all(new is old for new, old in zip(swapped, items)):
        return value
    if isinstance(value, dict):
        swapped = dict(zip(swapped[::2], swapped[1::2]))
    if _is_wrapped(value):
        return swapped
    # Built-in methods: those of Keras's containers track what is added.
    if isinstance(value, list):
        list.__setitem__(value, slice(None), swapped)
    elif isinstance(value, dict):
        dict.clear(value)
        dict.update(value, swapped)
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, swapped)
    elif hasattr(value, "_fields"):  # a named tuple
        value = type(value)(*swapped)
    else:
        value = type(value)(swapped)
    return value


def _move_nodes(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Makes the calls of a layer in graphs the calls of another layer."""
    for node in old._inbound_nodes:
        index = len(new._inbound_nodes)
        node.operation = new
        new._inbound_nodes.append(node)
        for i, tensor in enumerate(node.outputs):
            tensor._keras_history = private_keras.KerasHistory(new, index, i)
    new._outbound_nodes.extend(old._outbound_nodes)
