"""What `compress` can replace, and what is chosen of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.layers.distilled_embedding import (
    DistilledEmbedding,
)
from keras_distilled_embedding.layers.distilled_embedding import (
    embedding_tables,
)
from keras_distilled_embedding.layers.distilled_embedding import (
    float_policy_name,
)
from keras_distilled_embedding.layers.distilled_embedding import to_numpy

Layer = keras.layers.Layer

# A subclass with a call of its own may do anything with its table.
_KNOWN_CALLS = (
    keras.layers.Embedding.call,
    keras.layers.ReversibleEmbedding.call,
)


def is_embedding(layer: Layer) -> bool:
    """Whether a layer is a table that a `DistilledEmbedding` can replace."""
    return (
        isinstance(layer, keras.layers.Embedding)
        and type(layer).call in _KNOWN_CALLS
    )


def is_head(layer: Layer, vocabularies: Iterable[int]) -> bool:
    """Whether a layer projects to one of the vocabularies."""
    return (
        type(layer) is keras.layers.Dense
        and layer.built
        and layer.quantization_mode is None
        and layer.units in vocabularies
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A layer with a table: an embedding, or a dense head.

    Args:
        layer: The layer.
    """

    layer: Layer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def is_head(self) -> bool:
        return isinstance(self.layer, keras.layers.Dense)

    @property
    def input_dim(self) -> int:
        return self.layer.units if self.is_head else self.layer.input_dim

    @property
    def output_dim(self) -> int:
        if self.is_head:
            return self.layer.kernel.shape[0]
        return self.layer.output_dim

    @property
    def parameters(self) -> int:
        """Of its tables, of which an untied layer has two."""
        untied = not getattr(self.layer, "tie_weights", True)
        return (1 + untied) * self.input_dim * self.output_dim

    @property
    def variable_dtype(self) -> str:
        return self.layer.variable_dtype

    def tables(self) -> list[np.ndarray]:
        """The table, and the projection's where that is another one."""
        if self.is_head:
            return [to_numpy(self.layer.kernel).T]
        return [t for t in embedding_tables(self.layer) if t is not None]

    def factorized(self, **options: Any) -> DistilledEmbedding:
        """The layer of factors for it, built, its factors still random."""
        if not self.is_head:
            return DistilledEmbedding.like(self.layer, **options)
        # The sizes are all that is asked of an array.
        shape = np.broadcast_to(
            np.float32(0), (self.input_dim, self.output_dim)
        )
        return DistilledEmbedding.like(
            shape,
            name=self.name,
            dtype=float_policy_name(self.layer),
            trainable=self.layer.trainable,
            **options,
        )


def choose_targets(
    model: keras.Model,
    layers: Iterable[str] | Callable[[Layer], bool] | None,
    heads: str | None,
    min_parameters: int,
) -> list[Target]:
    """The tables to factorise, those of heads after the embeddings.

    Args:
        model: The model.
        layers: As of `compress`.
        heads: As of `compress`. Heads that are to be tied have no table.
        min_parameters: As of `compress`.

    Raises:
        ValueError: If there is none.
    """
    targets = [
        Target(layer)
        for layer in keras_internals.iterate_layers(model)
        if is_embedding(layer)
    ]
    known = [target.name for target in targets]
    if layers is not None:
        targets = _matching(targets, layers)
    targets = [t for t in targets if t.parameters >= min_parameters]
    if not targets:
        raise ValueError(
            "`model` has no embedding to compress: of its "
            "`keras.layers.Embedding` and `keras.layers.ReversibleEmbedding` "
            f"layers, {known}, none is chosen. Received: model "
            f"'{model.name}' with layers "
            f"{[layer.name for layer in model.layers]}, "
            f"min_parameters={min_parameters}"
        )
    if heads is None:
        return targets
    found = heads_of(model, targets)
    if not found:
        raise ValueError(
            "`heads` needs a `keras.layers.Dense` that projects to the "
            "vocabulary of an embedding, of "
            f"{sorted({t.input_dim for t in targets})} tokens. Received: "
            f"heads={heads!r}, and no such layer in model '{model.name}'"
        )
    if heads == "factorize":
        targets += [Target(head) for head in found]
    return targets


def heads_of(
    model: keras.Model, targets: Iterable[Target | DistilledEmbedding]
) -> list[Layer]:
    """The dense layers that project to a vocabulary of the targets."""
    vocabularies = {target.input_dim for target in targets}
    return [
        layer
        for layer in keras_internals.iterate_layers(model)
        if is_head(layer, vocabularies)
    ]


def embedding_of(head: Layer, targets: Iterable[Target]) -> Target:
    """The embedding that a head is tied to.

    Raises:
        ValueError: If there is not exactly one of its shape.
    """
    width = head.kernel.shape[0]
    fitting = [
        target
        for target in targets
        if (target.input_dim, target.output_dim) == (head.units, width)
    ]
    if len(fitting) != 1:
        raise ValueError(
            f'`heads="tie"` needs one embedding of the shape of the head '
            f"'{head.name}', ({head.units}, {width}). Received: "
            f"{[target.name for target in fitting]}"
        )
    return fitting[0]


def _matching(
    targets: list[Target], layers: Iterable[str] | Callable[[Layer], bool]
) -> list[Target]:
    if callable(layers):
        return [target for target in targets if layers(target.layer)]
    names = [layers] if isinstance(layers, str) else list(layers)
    # Nested models may each have a layer of one name; all of them are meant.
    known = [target.name for target in targets]
    if not set(names) <= set(known):
        raise ValueError(
            f"`layers` must name embedding layers of the model, of {known}. "
            f"Received: layers={names}"
        )
    return [target for target in targets if target.name in names]
