"""What takes knowledge of how Keras works inside.

Copying models with some of their layers swapped, above all. The only file
that relies on how Keras keeps layers, graphs, masks and states; everything
else goes through these functions. `ASSUMPTIONS` lists what it relies on.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import gc
import inspect
import itertools
import json
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import IO
from typing import Any

import keras
from keras import ops

TESTED_KERAS = ">=3.15,<3.16"

try:
    from keras.src.backend import get_keras_mask
    from keras.src.backend.common.masking import set_keras_mask
    from keras.src.models.functional import Functional
    from keras.src.ops.function import map_graph
    from keras.src.ops.node import KerasHistory
    from keras.src.saving import saving_lib
    from keras.src.saving.serialization_lib import ObjectSharingScope
    from keras.src.saving.serialization_lib import SafeModeScope
    from keras.src.utils.tracking import DotNotTrackScope
except ImportError as error:
    raise ImportError(
        "keras-distilled-embedding relies on parts of Keras that this version "
        f"does not have: it is tested with keras{TESTED_KERAS}. "
        f"Received: keras {keras.__version__} ({error})"
    ) from error


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


def hide(tensor: Any, mask: Any) -> None:
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


# Copying


def check_copyable(model: Any) -> None:
    """Refuses what `copy_models` cannot copy.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If it is not built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={model!r}"
        )
    if not model.built:
        raise ValueError(
            "`model` must be built: call it, or its `build()`, first. "
            f"Received: model={model!r}"
        )


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


@dataclasses.dataclass(frozen=True)
class LayerTree:
    """What a model's layers are, and which of them are one and the same.

    A configuration tells how to make a model. It does not tell which of the
    layers it makes are shared, what has been swapped since, or with what
    shapes the parts of a subclassed model were built.

    Args:
        number: Of the layer. Layers of one number are one layer.
        name: Of the layer.
        kind: Name of its class.
        build_config: What `build_from_config` takes, or `None`.
        trainable: Its own flag.
        variables_trainable: The flags of its own variables.
        dtype_policy: Of a model, whose configuration can leave it out.
        children: Trees of the layers that it keeps.
    """

    number: int
    name: str
    kind: str
    build_config: dict[str, Any] | None
    trainable: bool
    variables_trainable: tuple[bool, ...]
    dtype_policy: Any
    children: tuple[LayerTree, ...]

    @classmethod
    def of(
        cls, layer: keras.layers.Layer, numbers: dict[int, int]
    ) -> LayerTree:
        """The tree of a layer or model.

        Args:
            layer: The root.
            numbers: Numbers of layers by their `id`; new ones are added.
        """
        return cls(
            number=numbers.setdefault(id(layer), len(numbers)),
            name=layer.name,
            kind=type(layer).__name__,
            build_config=layer.get_build_config() if layer.built else None,
            trainable=layer._trainable,
            variables_trainable=tuple(
                variable.trainable for variable in _own_variables(layer)
            ),
            dtype_policy=(
                layer.dtype_policy if isinstance(layer, keras.Model) else None
            ),
            children=tuple(cls.of(child, numbers) for child in layer._layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain, JSON-serialisable Python values."""
        return {
            "number": self.number,
            "name": self.name,
            "kind": self.kind,
            "build_config": keras.saving.serialize_keras_object(
                self.build_config
            ),
            "trainable": self.trainable,
            "variables_trainable": list(self.variables_trainable),
            "dtype_policy": keras.saving.serialize_keras_object(
                self.dtype_policy
            ),
            "children": [child.to_dict() for child in self.children],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerTree:
        """The inverse of `to_dict`."""
        return cls(
            number=values["number"],
            name=values["name"],
            kind=values["kind"],
            build_config=keras.saving.deserialize_keras_object(
                values["build_config"]
            ),
            trainable=values["trainable"],
            variables_trainable=tuple(values["variables_trainable"]),
            dtype_policy=keras.saving.deserialize_keras_object(
                values["dtype_policy"]
            ),
            children=tuple(map(cls.from_dict, values["children"])),
        )


class Rebuilder:
    """Makes what configurations make into what `LayerTree`s describe.

    Args:
        replacements: What stands in for the layer of which number.
    """

    def __init__(
        self, replacements: Mapping[int, keras.layers.Layer] | None = None
    ) -> None:
        self.layers: dict[int, keras.layers.Layer] = {}  # by number
        self._replacements = dict(replacements or {})
        self._matched: set[tuple[int, int]] = set()
        self._to_swap: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def match(self, tree: LayerTree, layer: keras.layers.Layer) -> None:
        """Finds the layers of a tree in a layer, and builds those unbuilt.

        Raises:
            ValueError: If the layer's parts are others than the tree's.
        """
        if (tree.number, id(layer)) in self._matched:
            return
        self._matched.add((tree.number, id(layer)))
        replacement = self._replacements.get(tree.number)
        if replacement is None and type(layer).__name__ != tree.kind:
            raise _not_as_configured(layer, f"is not a {tree.kind}")
        if type(layer) is type(replacement):  # recorded by the configuration
            replacement = None
        known = self.layers.setdefault(tree.number, replacement or layer)
        layer.name = tree.name  # a configuration may leave names to be numbered
        if known is not layer:
            self._to_swap.append((layer, known))
        by_parts = _is_default(layer.build)
        if tree.build_config and not layer.built and not by_parts:
            layer.build_from_config(tree.build_config)
        if replacement is not None:
            if type(replacement).__name__ != tree.kind:
                return
            layer = replacement  # what it keeps inside may be shared
        # One that nothing tells how to build, such as a preprocessor, builds
        # itself when it is called, and may make more layers then.
        unfinished = not layer.built and not tree.build_config
        if len(layer._layers) != len(tree.children) and not unfinished:
            raise _not_as_configured(
                layer,
                f"has {len(layer._layers)} layers inside, not "
                f"{len(tree.children)}",
            )
        for child_tree, child in zip(tree.children, layer._layers):
            self.match(child_tree, child)
        if tree.build_config and by_parts:
            layer.built = True
            layer._build_shapes_dict = _shapes(tree.build_config)
        self._set_flags(tree, layer)

    def _set_flags(self, tree: LayerTree, layer: keras.layers.Layer) -> None:
        # Not `trainable`, which sets that of the layers inside as well.
        layer._trainable = tree.trainable
        variables = _own_variables(layer)
        if len(variables) == len(tree.variables_trainable):
            for variable, flag in zip(variables, tree.variables_trainable):
                variable.trainable = flag
        if tree.dtype_policy is not None:
            layer.dtype_policy = tree.dtype_policy

    def swap(self, roots: Sequence[keras.layers.Layer]) -> None:
        """Puts replacements and shared layers wherever `roots` keep others."""
        swap_layers(roots, self._to_swap)

    def check_swapped(self) -> None:
        """Refuses to go on where something else keeps what was swapped out.

        Raises:
            ValueError: Naming the layer.
        """
        strays = [weakref.ref(stray) for stray, _ in self._to_swap]
        self._to_swap.clear()
        if any(stray() is not None for stray in strays):
            gc.collect()
        for stray in filter(None, (stray() for stray in strays)):
            raise ValueError(
                f"Layer '{stray.name}' cannot be replaced: something that is "
                "neither a layer nor an attribute of one calls it, such as a "
                "function that was defined where the layer was made. Keep it "
                "as an attribute, and call that."
            )


def _not_as_configured(layer: keras.layers.Layer, how: str) -> ValueError:
    return ValueError(
        "A layer must be what its `get_config()` tells, or it cannot be "
        f"copied or loaded: '{layer.name}' ({type(layer).__name__}), made "
        f"anew by `from_config`, {how}."
    )


def _is_default(method: Callable) -> bool:
    return getattr(method, "_is_default", False)


def _shapes(build_config: Mapping[str, Any]) -> dict[str, Any]:
    return build_config.get("shapes_dict", dict(build_config))


def copy_models(
    models: Sequence[keras.Model],
    replacements: Mapping[keras.layers.Layer, keras.layers.Layer],
) -> list[keras.Model]:
    """Copies models, with other layers in the place of some.

    Functional and Sequential models are copied as the graphs they are, others
    as their configuration tells. A layer that is used several times, at any
    depth or by several of the models, is copied once: what was shared stays
    shared. The copies have the classes and names of the originals, start with
    the same weights and share no variable with them. They are not compiled,
    unless their class compiles itself.

    Args:
        models: Built models.
        replacements: What stands in for which layer. A replacement is called
            with the arguments of the layer that it replaces.

    Returns:
        The copies, in the order of `models`.

    Raises:
        ValueError: If a layer is not what its configuration tells, or if
            something that is not a layer keeps one to be replaced.
    """
    check_internals()
    copier = _Copier(replacements)
    # What the layers hold is code of this process: a `Lambda` may be copied.
    with (
        SafeModeScope(False),
        _known_classes(models),
        configs_allowed(),
        without_initial_values(),
    ):
        # Layers with layers inside first: what they keep may be used outside.
        for model in models:
            for layer in _composites(model):
                copier.copy_by_config(layer)
        copies = [copier.copy(model) for model in models]
        copier.finish(copies)
    return copies


class _Copier:
    def __init__(
        self, replacements: Mapping[keras.layers.Layer, keras.layers.Layer]
    ) -> None:
        self._numbers: dict[int, int] = {}
        self._originals: dict[int, keras.layers.Layer] = {}
        self._operations: dict[int, Any] = {}  # that are not layers
        self._replaced = {self._number(layer) for layer in replacements}
        self._rebuilder = Rebuilder(
            {self._number(old): new for old, new in replacements.items()}
        )
        # A graph takes them at once.
        for old, new in replacements.items():
            self._rebuilder.layers[self._number(old)] = new

    def _number(self, layer: keras.layers.Layer) -> int:
        self._originals[id(layer)] = layer  # so that the id stays its own
        return self._numbers.setdefault(id(layer), len(self._numbers))

    def copy(self, layer: Any) -> Any:
        """The copy of a layer, a model or a bare operation."""
        if not isinstance(layer, keras.layers.Layer):
            if id(layer) not in self._operations:
                copy = type(layer).from_config(layer.get_config())
                self._operations[id(layer)] = copy
            return self._operations[id(layer)]
        number = self._number(layer)
        if number not in self._rebuilder.layers:
            if _is_graph(layer):
                self._rebuilder.layers[number] = self._copy_graph(layer)
            else:
                self.copy_by_config(layer)
        return self._rebuilder.layers[number]

    def copy_by_config(self, layer: keras.layers.Layer) -> None:
        """Copies a layer, and all that it keeps inside."""
        for inner in layer._flatten_layers():
            self._number(inner)
        try:
            copy = type(layer).from_config(layer.get_config())
        except Exception as error:
            raise ValueError(
                f"`model` has a layer that cannot be copied, '{layer.name}' "
                f"of class {type(layer).__name__}: `from_config(get_config())` "
                f"must make it anew. It says: {error}"
            ) from error
        self._rebuilder.match(LayerTree.of(layer, self._numbers), copy)
        for inner in layer._flatten_layers():
            # One that the copy has not made yet is made when it is called.
            made = self._rebuilder.layers.get(self._numbers[id(inner)])
            if made is not None:
                _copy_assets(inner, made)

    # Not `keras.models.clone_model`, which compiles the copy of a compiled
    # model, optimizer state and all, and drops the model's dtype policy.
    def _copy_graph(self, model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            # Unlike `layers`, `_layers` has the input layer.
            layers = [self.copy(layer) for layer in model._layers]
            return keras.Sequential(layers, name=model.name)
        inputs = keras.tree.map_structure(
            lambda x: self.copy(x._keras_history.operation).output, model.input
        )
        outputs = model._run_through_graph(inputs, operation_fn=self.copy)
        return Functional(inputs, outputs, name=model.name)

    def finish(self, copies: Sequence[keras.Model]) -> None:
        """What can be done once all layers are there."""
        self._rebuilder.swap(copies)
        self._rebuilder.check_swapped()
        for original in list(self._originals.values()):
            number = self._numbers[id(original)]
            copy = self._rebuilder.layers.get(number)
            if copy is not None and number not in self._replaced:
                _copy_state(original, copy)


def _copy_state(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """What a layer itself holds, beside the layers in it."""
    if isinstance(old, keras.Model):  # of other layers, configurations tell
        new.dtype_policy = old.dtype_policy
    # Not `trainable`, which sets that of the layers inside as well.
    new._trainable = old._trainable
    variables, copies = _own_variables(old), _own_variables(new)
    if [v.shape for v in variables] != [v.shape for v in copies]:
        raise _not_as_configured(
            new,
            f"has weights of shapes {[v.shape for v in copies]}, not "
            f"{[v.shape for v in variables]}",
        )
    for variable, copy in zip(variables, copies):
        # On JAX what is assigned is kept, and a step may give it away.
        copy.assign(ops.copy(variable))
        copy.trainable = variable.trainable
    if variables and hasattr(new, "finalize_state"):
        # One that was adapted computes from copies of its weights.
        new.finalize_state()


def _copy_assets(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Vocabularies, which configurations leave out, and calls need."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        # What belongs to a vocabulary, such as its weights, goes first.
        own: dict[str, Any] = {}
        old.save_own_variables(own)
        new.load_own_variables(own)
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    return layer._trainable_variables + layer._non_trainable_variables


def _is_graph(layer: Any) -> bool:
    # The very classes: a subclass has a constructor of its own.
    return type(layer) in (keras.Sequential, Functional)


def _composites(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """The outermost layers with layers inside that are not graphs."""
    if not _is_graph(model):
        yield model
        return
    for layer in model._layers:
        if isinstance(layer, keras.layers.Layer) and layer._layers:
            yield from _composites(layer)


@contextlib.contextmanager
def without_initial_values() -> Iterator[None]:
    """Has new weights start at zero, where they are about to be assigned.

    Random numbers for a large table take seconds, and three times its memory.
    """
    add_weight = keras.layers.Layer.add_weight

    def add_zeros(
        self: keras.layers.Layer,
        shape: Any = None,
        initializer: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> keras.Variable:
        return add_weight(self, shape, "zeros", *args, **kwargs)

    keras.layers.Layer.add_weight = add_zeros
    try:
        yield
    finally:
        keras.layers.Layer.add_weight = add_weight


def _known_classes(
    models: Iterable[keras.Model],
) -> contextlib.AbstractContextManager:
    """Lets configurations name the classes of this process's layers."""
    classes = {
        type(layer).__name__: type(layer)
        for model in models
        for layer in model._flatten_layers()
        if type(layer).__module__.split(".")[0] not in ("keras", "keras_hub")
    }
    return keras.saving.CustomObjectScope(classes)


# Swapping


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


# Compiling


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What a model was compiled with; empty if it was not.

    Of a KerasHub task its sampler, too.
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
    """Compiles a copy as the original, with fresh optimizer and metrics."""

    def renew(value: Any) -> Any:
        # Losses have no state, and not all of them a full configuration.
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


# Files


def write_archive(model: keras.Model, recipe: Any, file: IO[bytes]) -> None:
    """Writes a file in Keras's own format, whose loading follows a recipe.

    Args:
        model: The model, whose state is written.
        recipe: What Keras's loader makes the model from: of a registered
            class, with `get_config()`, its `from_config()` returns the model.
        file: Open for writing in binary.
    """
    with ObjectSharingScope(), configs_allowed():
        config = json.dumps(keras.saving.serialize_keras_object(recipe))
    metadata = json.dumps({"keras_version": keras.__version__})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(saving_lib._METADATA_FILENAME, metadata)
        archive.writestr(saving_lib._CONFIG_FILENAME, config)
        weights = saving_lib.H5IOStore(
            saving_lib._VARS_FNAME_H5, archive=archive, mode="w"
        )
        assets = saving_lib.DiskIOStore(
            saving_lib._ASSETS_DIRNAME, archive=archive, mode="w"
        )
        try:
            saving_lib._save_state(model, weights, assets, "", set())
        finally:
            weights.close()
            assets.close()


def read_archive(
    file: IO[bytes], custom_objects: Mapping[str, Any] | None
) -> keras.Model:
    """Loads a file in Keras's own format, in safe mode."""
    return saving_lib.load_model(file, custom_objects, safe_mode=True)


# Configurations that do not record a swap

_CONFIGS_ALLOWED = contextvars.ContextVar("configs_allowed", default=False)


@contextlib.contextmanager
def configs_allowed() -> Iterator[None]:
    """Lets layers tell configurations that do not record their swaps."""
    token = _CONFIGS_ALLOWED.set(True)
    try:
        yield
    finally:
        _CONFIGS_ALLOWED.reset(token)


def refuse_unrecorded_configs(
    model: keras.Model, kind: type[keras.layers.Layer], instead: str
) -> None:
    """Has layers refuse to tell a configuration that has forgotten a swap.

    What they would save would load into something else.

    Args:
        model: A model. Its layers are changed in place.
        kind: The class of layers that were swapped in.
        instead: What to do instead, a sentence for the error.
    """
    owners = {id(owner): owner for owner in model._flatten_layers()}
    forgetful = set()
    for owner in owners.values():
        names = {
            inner.name
            for inner in owner._flatten_layers(include_self=False)
            if isinstance(inner, kind)
        }
        if names and not names <= _names_in_config(owner, kind):
            forgetful.add(id(owner))
    for owner in owners.values():
        # One that holds such a layer would be refused its configuration.
        if forgetful & set(map(id, owner._flatten_layers())):
            _refuse_config(owner, instead)


def _names_in_config(
    owner: keras.layers.Layer, kind: type[keras.layers.Layer]
) -> set[str]:
    registered = keras.saving.get_registered_name(kind)
    names = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("registered_name") == registered:
                names.add(value["config"]["name"])
            value = value.values()
        elif not isinstance(value, list | tuple):
            return
        for item in value:
            visit(item)

    with configs_allowed():
        visit(keras.saving.serialize_keras_object(owner))
    return names


def _refuse_config(layer: keras.layers.Layer, instead: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            f"The configuration of '{layer.name}' "
            f"({type(layer).__name__}) does not record the layers that were "
            f"replaced in it: what is saved would load as another model. "
            f"{instead}"
        )

    def get_config() -> dict[str, Any]:
        if _CONFIGS_ALLOWED.get():
            return type(layer).get_config(layer)
        return refuse()

    # Past Keras, which would track attributes.
    object.__setattr__(layer, "get_config", get_config)
    for name in ("save", "save_to_preset"):  # before they open a file
        if hasattr(layer, name):
            object.__setattr__(layer, name, refuse)


# What this file relies on


def _assumptions() -> dict[str, Callable[[], bool]]:
    """Of a tiny model, each of them true in the versions tested."""

    @functools.cache
    def tiny() -> Any:
        # Named, so that no name of the user's own layers gets a number.
        ids = keras.Input((None,), dtype="int32", name="ids")
        table = keras.layers.Embedding(3, 2, name="table")
        dense = keras.layers.Dense(2, name="dense")
        return table, dense, keras.Model(ids, dense(table(ids)), name="tiny")

    def table() -> Any:
        return tiny()[0]

    def model() -> Any:
        return tiny()[2]

    def node() -> Any:
        return table()._inbound_nodes[0]

    return {
        "layers keep the layers inside them in `_layers`": lambda: any(
            layer is table() for layer in model()._layers
        ),
        "`_flatten_layers()` is all of them, and the layer": lambda: (
            {id(model()), *map(id, model().layers)}
            == set(map(id, model()._flatten_layers()))
        ),
        "layers keep variables in `_trainable_variables`": lambda: (
            [v.path for v in table()._trainable_variables]
            == [v.path for v in table().weights]
            and not table()._non_trainable_variables
        ),
        "a tracker keeps ids of layers in `stored_ids`": lambda: (
            id(table()) in model()._tracker.stored_ids["layers"]
        ),
        "a node is a call of its `operation`": lambda: (
            node().operation is table()
        ),
        "a tensor's history is operation, node and number": lambda: (
            node().outputs[0]._keras_history == KerasHistory(table(), 0, 0)
        ),
        "`_outbound_nodes` are the calls of a layer's outputs": lambda: (
            table()._outbound_nodes[0] is tiny()[1]._inbound_nodes[0]
        ),
        "a Functional model runs through its graph": lambda: (
            model()
            ._run_through_graph(model().input, operation_fn=lambda op: op)
            .shape
            == model().output.shape
        ),
        "`map_graph` finds the nodes that a Functional model knows": lambda: (
            map_graph(model()._inputs, model()._outputs)[0] == model()._nodes
        ),
        "a tracker's `config` has the lists that it fills": lambda: (
            model()._tracker.config["layers"][1] is model()._layers
        ),
        "a file is written by stores and `_save_state`": lambda: (
            list(inspect.signature(saving_lib._save_state).parameters)
            == [
                "saveable",
                "weights_store",
                "assets_store",
                "inner_path",
                "visited_saveables",
            ]
        ),
        "a default `build` is marked": lambda: (
            _is_default(keras.layers.Layer.build)
            and not _is_default(keras.layers.Dense.build)
        ),
        "`_build_shapes_dict` is what a layer was built with": lambda: (
            list(tiny()[1]._build_shapes_dict.values()) == [(None, None, 2)]
        ),
        "`_trainable` is a layer's own flag": lambda: table()._trainable,
        "a model's compile arguments are kept": lambda: (
            _compiled(model())._compile_config.config["loss"] == "mse"
        ),
        "`get_config` is looked up on the layer itself": lambda: (
            _config_with(table(), {"name": "own"}) == {"name": "own"}
        ),
    }


def _compiled(model: keras.Model) -> keras.Model:
    model.compile(loss="mse")
    return model


def _config_with(layer: keras.layers.Layer, config: dict[str, Any]) -> Any:
    object.__setattr__(layer, "get_config", lambda: config)
    try:
        return keras.saving.serialize_keras_object(layer)["config"]
    finally:
        vars(layer).pop("get_config")


ASSUMPTIONS = _assumptions()


@functools.cache
def check_internals() -> None:
    """Refuses a Keras that works otherwise than this file relies on.

    Raises:
        RuntimeError: Naming what is different, and the versions tested.
    """
    for assumption, holds in ASSUMPTIONS.items():
        try:
            different = not holds()
        except Exception as error:
            different = f"{type(error).__name__}: {error}"
        if different:
            raise RuntimeError(
                "Swapping layers relies on how Keras works inside, and is "
                f"tested with keras{TESTED_KERAS}. In keras "
                f"{keras.__version__} this does not hold: {assumption}"
                + (f" ({different})" if different is not True else "")
            )
