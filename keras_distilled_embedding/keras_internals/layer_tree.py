"""What a model's layers are, beyond what its configuration records."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import weakref
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals import scopes
from keras_distilled_embedding.keras_internals.models import own_variables


@dataclasses.dataclass(frozen=True)
class LayerTree:
    """The layers of a model, and which of them are the same layer.

    It has what a configuration may not record.
    """

    number: int  # trees with the same number describe the same layer
    name: str
    kind: str  # the name of its class
    build_config: dict[str, Any] | None
    trainable: bool  # its own flag
    variables_trainable: tuple[bool, ...]  # the flags of its own variables
    # A configuration may omit it or merge it into a map; `None` if it is a map.
    dtype_policy: Any
    settings: dict[str, Any]  # attributes that its configuration may omit
    children: tuple[LayerTree, ...]

    @classmethod
    def of(
        cls, layer: keras.layers.Layer, numbers: dict[int, int]
    ) -> LayerTree:
        """Returns the tree of a layer, and adds to `numbers`, by `id`."""
        return cls(
            number=numbers.setdefault(id(layer), len(numbers)),
            name=layer.name,
            kind=type(layer).__name__,
            build_config=layer.get_build_config() if layer.built else None,
            trainable=layer._trainable,
            variables_trainable=tuple(
                v.trainable for v in own_variables(layer)
            ),
            dtype_policy=own_policy(layer),
            settings=_settings(layer),
            children=tuple(cls.of(child, numbers) for child in layer._layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the tree as plain values that can be written as JSON."""
        return keras.saving.serialize_keras_object(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerTree:
        """Returns the tree that `to_dict` made the values of."""
        # Not the whole tree at once: a name could be that of a custom object.
        objects = {
            key: keras.saving.deserialize_keras_object(values[key])
            for key in ("build_config", "dtype_policy")
        }
        children = tuple(map(cls.from_dict, values["children"]))
        return cls(**{**values, **objects, "children": children})


class Rebuilder:
    """Turns new layers into what `LayerTree`s describe.

    `replacements` are by the numbers of the layers that they replace.
    """

    def __init__(self, replacements: Mapping[int, keras.layers.Layer]) -> None:
        self.layers: dict[int, keras.layers.Layer] = {}  # by number
        self._replacements = replacements
        self._matched: set[tuple[int, int]] = set()
        self._to_swap: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []
        self._variables_left_behind: list[weakref.ref] = []

    def match(self, tree: LayerTree, layer: keras.layers.Layer) -> None:
        """Finds the layers of a tree in a new layer, and builds them."""
        if (tree.number, id(layer)) in self._matched:
            return
        self._matched.add((tree.number, id(layer)))
        replacement = self._replacements.get(tree.number)
        if replacement is None and type(layer).__name__ != tree.kind:
            raise not_as_configured(layer, f"is not a {tree.kind}")
        if type(layer) is type(replacement):  # recorded by the configuration
            replacement = None
        known = self.layers.setdefault(tree.number, replacement or layer)
        layer.name = tree.name  # without one in the configuration, numbered
        if tree.dtype_policy is not None and replacement is None:
            # `layer.dtype_policy = ...` would nest it in a map, or quantize.
            layer._dtype_policy = tree.dtype_policy
        for name, value in tree.settings.items():
            if replacement is None and name in vars(layer):
                object.__setattr__(layer, name, value)
        if known is not layer:
            self._to_swap.append((layer, known))
        built_by_parts = private_keras.python_utils.is_default(layer.build)
        if tree.build_config and not layer.built and not built_by_parts:
            layer.build_from_config(tree.build_config)
        if replacement is not None:
            if type(replacement).__name__ != tree.kind:
                return
            layer = replacement  # the layers inside may be shared
        # A layer that cannot be built from its configuration, such as a
        # preprocessor, builds itself at its first call, and adds layers then.
        unfinished = not layer.built and not tree.build_config
        if len(layer._layers) != len(tree.children) and not unfinished:
            raise not_as_configured(
                layer,
                f"has {len(layer._layers)} layers inside, not "
                f"{len(tree.children)}",
            )
        children = _in_order(layer._layers, tree.children)
        for child_tree, child in zip(tree.children, children):
            self.match(child_tree, child)
        if tree.build_config and built_by_parts:
            layer.built = True
            layer._build_shapes_dict = tree.build_config.get(
                "shapes_dict", dict(tree.build_config)
            )
        # `layer.trainable = ...` would also set the layers inside.
        layer._trainable = tree.trainable
        variables = own_variables(layer)
        if len(variables) == len(tree.variables_trainable):
            for variable, flag in zip(variables, tree.variables_trainable):
                variable.trainable = flag

    def swap(self, roots: Sequence[keras.layers.Layer]) -> None:
        """Puts replacements and shared layers in place throughout `roots`."""
        _swap_layers(roots, self._to_swap)

    def check_swapped(self, roots: Sequence[keras.layers.Layer]) -> None:
        """Refuses to continue if a layer that was swapped out is still used."""
        strays = [weakref.ref(stray) for stray, _ in self._to_swap]
        self._variables_left_behind = [
            weakref.ref(variable)
            for stray, _ in self._to_swap
            for variable in own_variables(stray)
        ]
        self._to_swap.clear()
        if any(stray() is not None for stray in strays):
            gc.collect()
        for stray in filter(None, (stray() for stray in strays)):
            raise ValueError(
                f"Layer '{stray.name}' cannot be replaced: something that is "
                "neither a layer nor an attribute of a layer uses it, such as "
                "a function defined where the layer was made. Keep the layer "
                "as an attribute, and call that attribute."
            )
        left_behind = {id(v): v for v in self.variables_left_behind()}
        for root in roots:
            for layer in root._flatten_layers():
                for variable in own_variables(layer):
                    if id(variable) in left_behind:
                        raise ValueError(
                            f"Layer '{layer.name}' ({type(layer).__name__}) "
                            f"keeps the variable '{variable.path}', so the "
                            "layer of that variable cannot be replaced. Keep "
                            "the layer, and read its variable in `call`."
                        )

    def variables_left_behind(self) -> list[keras.Variable]:
        """Returns the variables of swapped layers that are still in use."""
        found = (variable() for variable in self._variables_left_behind)
        return [variable for variable in found if variable is not None]


def not_as_configured(layer: keras.layers.Layer, how: str) -> ValueError:
    """Returns the error for a layer that its configuration does not make."""
    return ValueError(
        f"Layer '{layer.name}' ({type(layer).__name__}) cannot be copied or "
        "loaded: what its `from_config(get_config())` makes "
        f"{how}. Make `get_config()` record all arguments of the constructor, "
        "in its class or in the class whose constructor makes it."
    )


def own_policy(layer: keras.layers.Layer) -> Any:
    """Returns a copy of a layer's dtype policy, or `None` for a map."""
    policy = layer._dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return None
    return copy.deepcopy(policy)


@functools.cache
def _attributes_of_keras() -> set[str]:
    """Returns the names of attributes that all layers or all models have."""
    bare = keras.layers.Layer(name="bare"), keras.Sequential(name="bare")
    return {name for layer in bare for name in vars(layer)}


def _settings(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns attributes that the configuration of a layer may omit.

    These are some of KerasHub's preprocessors, and of the user's own models.
    """
    kind = type(layer)
    is_default_config = scopes.has_default_config(kind)
    is_hub = kind.__module__.startswith("keras_hub")
    if not is_default_config and (not is_hub or layer.weights):
        return {}
    return {
        name: value
        for name, value in vars(layer).items()
        if type(value) in (bool, int, float, str)
        and name not in _attributes_of_keras()
    }


def _in_order(
    layers: Sequence[keras.layers.Layer], trees: Sequence[LayerTree]
) -> Sequence[keras.layers.Layer]:
    """Layers in the order of their trees.

    A layer that was set as an attribute after its model was made, such as a
    preprocessor, comes earlier where a constructor sets it.
    """
    if [type(layer).__name__ for layer in layers] == [t.kind for t in trees]:
        return layers  # their names may have been numbered anew
    by_name = {layer.name: layer for layer in layers}
    if set(by_name) != {tree.name for tree in trees}:
        return layers
    return [by_name[tree.name] for tree in trees]


def _swap_layers(
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
