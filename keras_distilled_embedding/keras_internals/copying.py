"""Copies of models with some of their layers replaced."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_distilled_embedding.keras_internals.assumptions import (
    check_internals,
)
from keras_distilled_embedding.keras_internals.configs import configs_allowed
from keras_distilled_embedding.keras_internals.private_keras import Functional
from keras_distilled_embedding.keras_internals.private_keras import (
    SafeModeScope,
)
from keras_distilled_embedding.keras_internals.rebuilding import LayerTree
from keras_distilled_embedding.keras_internals.rebuilding import Rebuilder
from keras_distilled_embedding.keras_internals.rebuilding import (
    not_as_configured,
)
from keras_distilled_embedding.keras_internals.rebuilding import own_variables


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
    variables, copies = own_variables(old), own_variables(new)
    if [v.shape for v in variables] != [v.shape for v in copies]:
        raise not_as_configured(
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
