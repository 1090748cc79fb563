"""Copies of models with some of their layers replaced."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding.keras_internals import layer_tree
from keras_distilled_embedding.keras_internals import private_keras
from keras_distilled_embedding.keras_internals import scopes
from keras_distilled_embedding.keras_internals.compiling import (
    without_compiling,
)
from keras_distilled_embedding.keras_internals.models import input_structure
from keras_distilled_embedding.keras_internals.models import iterate_layers
from keras_distilled_embedding.keras_internals.models import own_variables


def copy_models(
    models: Sequence[keras.Model],
    replacements: Mapping[keras.layers.Layer, keras.layers.Layer],
) -> list[keras.Model]:
    """Copies models, with replacements called in the place of some layers.

    Layers that the models share stay shared. The copies are not compiled and
    share no variable with the originals.
    """
    copier = _Copier(replacements)
    with (
        scopes.hand_over_own_objects(),
        scopes.read_configs(),
        scopes.without_initial_values(),
    ):
        # First the layers with layers inside, which others may share.
        for model in models:
            for layer in _outermost_composites(model):
                copier.copy(layer)
        copies = [copier.copy(model) for model in models]
        copier.finish(copies)
    for copy in copies:
        refuse_reads(copy, copier.variables_left_behind())
    return copies


class _Copier:
    def __init__(
        self, replacements: Mapping[keras.layers.Layer, keras.layers.Layer]
    ) -> None:
        self._numbers: dict[int, int] = {}
        self._originals: dict[int, keras.layers.Layer] = {}
        self._operations: dict[int, Any] = {}  # those that are not layers
        self._variables: dict[int, tuple[keras.layers.Layer, int]] = {}
        self._replaced = {
            self._number(old): new for old, new in replacements.items()
        }
        self._rebuilder = layer_tree.Rebuilder(self._replaced)
        # In a graph, replacements are called at once.
        self._rebuilder.layers.update(self._replaced)

    def _number(self, layer: keras.layers.Layer) -> int:
        if id(layer) not in self._originals:
            self._originals[id(layer)] = layer  # its id is not to be reused
            for index, variable in enumerate(own_variables(layer)):
                self._variables[id(variable)] = layer, index
        return self._numbers.setdefault(id(layer), len(self._numbers))

    def copy(self, layer: Any) -> Any:
        """Returns the copy of a layer, a model or another operation."""
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
        """Copies a layer, and all layers inside it."""
        for inner in layer._flatten_layers():
            self._number(inner)
        try:
            copy = _from_config(layer)
        except NotImplementedError as error:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) cannot be "
                "copied: Keras does not record the arguments of its "
                "constructor. Define `get_config()` to return them, and "
                "`from_config()` if they contain layers."
            ) from error
        except Exception as error:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) cannot be "
                "copied: `from_config(get_config())` must make it again, but "
                f"raises: {error}"
            ) from error
        self._rebuilder.match(
            layer_tree.LayerTree.of(layer, self._numbers), copy
        )
        for inner in layer._flatten_layers():
            # A layer may make other layers only when it is called.
            made = self._rebuilder.layers.get(self._numbers[id(inner)])
            if made is not None:
                _copy_assets(inner, made)

    # `keras.models.clone_model` is of no use here: it compiles the copy of a
    # compiled model, optimizer state included, and drops the dtype policy.
    def _copy_graph(self, model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            # Unlike `layers`, `_layers` contains the input layer.
            layers = [self.copy(layer) for layer in model._layers]
            return keras.Sequential(layers, name=model.name)
        inputs = keras.tree.map_structure(
            lambda x: self.copy(x._keras_history.operation).output, model.input
        )
        for layer in model._flatten_layers():
            self._number(layer)
        outputs = model._run_through_graph(inputs, operation_fn=self._call_of)
        return private_keras.Functional(inputs, outputs, name=model.name)

    def _call_of(self, operation: Any) -> Callable[..., Any]:
        """Returns the call of an operation's copy in a graph."""
        copy = self.copy(operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = keras.tree.map_structure(
                lambda value: self._copy_argument(value, operation.name),
                (args, kwargs),
            )
            return copy(*args, **kwargs)

        return call

    def _copy_argument(self, value: Any, operation: str) -> Any:
        """Returns the argument of a call, for a variable that of the copy."""
        layer, index = self._variables.get(id(value), (None, 0))
        if layer is None and ops.is_tensor(value):
            layer = self._replaced_layer_with_values(value)
        if layer is None:
            return value
        if self._number(layer) in self._replaced:
            raise ValueError(
                f"Layer '{layer.name}' cannot be replaced: the operation "
                f"'{operation}' uses its table without calling it. Call the "
                "layer instead: a `keras.layers.ReversibleEmbedding` projects "
                "to the vocabulary when called with `reverse=True`."
            )
        copy = self.copy(layer)
        if not copy.built:
            copy.build_from_config(layer.get_build_config())
        return own_variables(copy)[index]

    def _replaced_layer_with_values(
        self, constant: Any
    ) -> keras.layers.Layer | None:
        """Returns the layer of which a constant is the table, or transposed."""
        for layer in self._originals.values():
            if self._numbers[id(layer)] not in self._replaced:
                continue
            for variable in own_variables(layer):
                if sorted(variable.shape) == sorted(constant.shape):
                    values = ops.convert_to_numpy(constant)
                    table = ops.convert_to_numpy(variable)
                    if any(np.array_equal(values, t) for t in (table, table.T)):
                        return layer
        return None

    def variables_left_behind(self) -> list[keras.Variable]:
        """Returns the variables that no copy may use."""
        originals = map(own_variables, self._originals.values())
        strays = self._rebuilder.variables_left_behind()
        return [*itertools.chain(*originals), *strays]

    def finish(self, copies: Sequence[keras.Model]) -> None:
        """Replaces layers and copies weights, once all layers are made."""
        self._rebuilder.swap(copies)
        self._rebuilder.check_swapped(copies)
        for original in list(self._originals.values()):
            number = self._numbers[id(original)]
            copy = self._rebuilder.layers.get(number)
            if copy is not None and number not in self._replaced:
                _copy_state(original, copy)


def _from_config(layer: keras.layers.Layer) -> keras.layers.Layer:
    kind = type(layer)
    try:
        return kind.from_config(without_compiling(kind, layer.get_config()))
    except Exception as error:
        # Some layers expect what Keras does to a configuration in a file.
        try:
            config = keras.saving.serialize_keras_object(layer.get_config())
            return kind.from_config(without_compiling(kind, config))
        except Exception:
            raise error from None


def _copy_state(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies what a layer itself holds, without the layers inside it."""
    policy = layer_tree.own_policy(old)
    if policy is not None:
        new._dtype_policy = policy
    # `new.trainable = ...` would also set the layers inside.
    new._trainable = old._trainable
    if getattr(old, "lora_enabled", False) and not new.lora_enabled:
        _merge_lora(old, new)
        return
    variables, copies = own_variables(old), own_variables(new)
    if [v.shape for v in variables] != [v.shape for v in copies]:
        raise layer_tree.not_as_configured(
            new,
            f"has weights of shapes {[tuple(v.shape) for v in copies]}, not "
            f"{[tuple(v.shape) for v in variables]}",
        )
    for variable, copy in zip(variables, copies):
        # JAX keeps the assigned array itself, and a step may donate it.
        copy.assign(ops.copy(variable))
        copy.trainable = variable.trainable
    if variables and hasattr(new, "finalize_state"):
        # An adapted layer computes from copies of its weights.
        new.finalize_state()


def _merge_lora(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies the weights of a layer with its adapters added, as a file does."""
    merged: dict[str, Any] = {}
    old.save_own_variables(merged)
    new.load_own_variables({k: ops.copy(v) for k, v in merged.items()})
    flags = {v.name: v.trainable for v in own_variables(old)}
    for variable in own_variables(new):
        # Adapters freeze what they are added to.
        adapted = f"lora_{variable.name}_a" in flags
        variable.trainable = adapted or flags.get(variable.name, True)


def _copy_assets(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies vocabularies, which configurations omit and calls need."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets"):
        # The variables of a vocabulary, such as its weights, come first.
        own: dict[str, Any] = {}
        old.save_own_variables(own)
        new.load_own_variables(own)
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _is_graph(layer: Any) -> bool:
    # A subclass has its own constructor, which its configuration is for.
    return type(layer) in (keras.Sequential, private_keras.Functional)


def _outermost_composites(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields the outermost layers with layers inside that are not graphs."""
    if not _is_graph(model):
        yield model
        return
    for layer in model._layers:
        if isinstance(layer, keras.layers.Layer) and layer._layers:
            yield from _outermost_composites(layer)


def refuse_reads(
    model: keras.Model, variables: Iterable[keras.Variable]
) -> None:
    """Refuses a model that reads some of `variables` which are not its own.

    It is traced, which computes nothing; what cannot be traced is let pass.
    """
    layers = [model, *iterate_layers(model)]
    if not any(
        isinstance(layer, keras.layers.Lambda)
        or scopes.is_own_class(type(layer))
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

    with scopes.patched(scope, get_current_value=record):
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
    stack = private_keras.global_state.get_global_attribute("name_scope_stack")
    callers = [known.get(id(scope.caller)) for scope in stack or ()]
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
