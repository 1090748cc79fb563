"""What a model's layers are, beyond what its configuration tells."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras

from keras_distilled_embedding.keras_internals.swapping import swap_layers


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
                variable.trainable for variable in own_variables(layer)
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
            raise not_as_configured(layer, f"is not a {tree.kind}")
        if type(layer) is type(replacement):  # recorded by the configuration
            replacement = None
        known = self.layers.setdefault(tree.number, replacement or layer)
        layer.name = tree.name  # a configuration may leave names to be numbered
        if known is not layer:
            self._to_swap.append((layer, known))
        by_parts = is_default(layer.build)
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
            raise not_as_configured(
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
        variables = own_variables(layer)
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


def not_as_configured(layer: keras.layers.Layer, how: str) -> ValueError:
    return ValueError(
        "A layer must be what its `get_config()` tells, or it cannot be "
        f"copied or loaded: '{layer.name}' ({type(layer).__name__}), made "
        f"anew by `from_config`, {how}."
    )


def is_default(method: Callable) -> bool:
    return getattr(method, "_is_default", False)


def _shapes(build_config: Mapping[str, Any]) -> dict[str, Any]:
    return build_config.get("shapes_dict", dict(build_config))


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    return layer._trainable_variables + layer._non_trainable_variables
