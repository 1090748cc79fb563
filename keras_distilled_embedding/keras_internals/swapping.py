"""Other layers in the place of some, wherever models keep them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_distilled_embedding.keras_internals.private_keras import (
    DotNotTrackScope,
)
from keras_distilled_embedding.keras_internals.private_keras import Functional
from keras_distilled_embedding.keras_internals.private_keras import KerasHistory
from keras_distilled_embedding.keras_internals.private_keras import map_graph


def swap_layers(
    roots: Sequence[keras.layers.Layer],
    swaps: Sequence[tuple[keras.layers.Layer, keras.layers.Layer]],
) -> None:
    """Puts other layers in the place of some, wherever models keep them.

    In the graphs of Functional models, as attributes of layers, in lists,
    tuples, sets and dictionaries of such. The models are changed in place.

    Args:
        roots: The models.
        swaps: Pairs `(old, new)`. `new` takes the calls of `old`.
    """
    if not swaps:
        return
    for old, new in swaps:
        _move_nodes(old, new)
    by_id = {id(old): new for old, new in swaps}
    owners = {}
    for root in roots:
        for owner in root._flatten_layers():
            owners[id(owner)] = owner
            if isinstance(owner, keras.Sequential) and owner._functional:
                owners[id(owner._functional)] = owner._functional
    # What is new is known to the trackers under the old one's number, below.
    with DotNotTrackScope():
        for owner in owners.values():
            _swap_in_attributes(owner, by_id)
            if isinstance(owner, Functional):
                # It knows its nodes by their operations' ids.
                graph = map_graph(owner._inputs, owner._outputs)
                owner._nodes, owner._nodes_by_depth = graph[:2]
                owner._operations, owner._operations_by_depth = graph[2:]


def _swap_in_attributes(
    owner: keras.layers.Layer, by_id: Mapping[int, keras.layers.Layer]
) -> None:
    # What TensorFlow's own tracking knows of layers; nothing elsewhere.
    tracked = getattr(owner, "_self_unconditional_dependency_names", {})
    for name, value in list(tracked.items()):
        if id(value) in by_id:
            owner._track_trackable(by_id[id(value)], name, overwrite=True)
    for name, value in list(vars(owner).items()):
        swapped = _swap_in(value, by_id)
        if swapped is value:
            continue
        if _is_wrapped(value):  # TensorFlow wraps, and tracks, the new one too
            setattr(owner, name, swapped)
        else:
            object.__setattr__(owner, name, swapped)
    for _, store in owner._tracker.config.values():
        _swap_in(store, by_id)  # a Sequential model lists its layers anew
    for ids in owner._tracker.stored_ids.values():
        for stray in ids & by_id.keys():
            ids.remove(stray)
            ids.add(id(by_id[stray]))


def _is_wrapped(value: Any) -> bool:
    """Whether TensorFlow has wrapped a container, to be told of changes."""
    return type(value).__module__.startswith("tensorflow.")


def _swap_in(value: Any, by_id: Mapping[int, keras.layers.Layer]) -> Any:
    """What takes the place of an attribute's value, or of a part of it.

    A container is changed in place, since others may hold it, too; but for
    those that cannot be.
    """
    if id(value) in by_id:
        return by_id[id(value)]
    if not isinstance(value, list | tuple | dict | set):
        return value
    is_dict = isinstance(value, dict)
    items = list(itertools.chain(*value.items())) if is_dict else list(value)
    swapped = [_swap_in(item, by_id) for item in items]
    if all(new is old for new, old in zip(swapped, items)):
        return value
    if is_dict:
        swapped = dict(zip(swapped[::2], swapped[1::2]))
    if _is_wrapped(value):
        return swapped
    # The plain methods: Keras's own would track what is put in.
    if isinstance(value, list):
        list.__setitem__(value, slice(None), swapped)
    elif isinstance(value, dict | set):
        plain = dict if is_dict else set
        plain.clear(value)
        plain.update(value, swapped)
    elif hasattr(value, "_fields"):  # a named tuple
        value = type(value)(*swapped)
    else:
        value = type(value)(swapped)
    return value


def _move_nodes(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Makes the calls of a layer in graphs the calls of another."""
    for node in old._inbound_nodes:
        index = len(new._inbound_nodes)
        node.operation = new
        new._inbound_nodes.append(node)
        for i, tensor in enumerate(node.outputs):
            tensor._keras_history = KerasHistory(new, index, i)
    new._outbound_nodes.extend(old._outbound_nodes)
