"""The tables of a model, and which of them `compress` replaces."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any
from typing import TypeAlias

import keras
import numpy as np

from keras_distilled_embedding import keras_internals
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding.layers.conversion import embedding_tables
from keras_distilled_embedding.layers.conversion import float_policy_name
from keras_distilled_embedding.layers.conversion import new_layer
from keras_distilled_embedding.layers.conversion import to_numpy

Layer: TypeAlias = keras.layers.Layer

# A subclass with a call of its own may do anything with its table.
_KNOWN_CALLS = (
    keras.layers.Embedding.call,
    keras.layers.ReversibleEmbedding.call,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A layer with a table: an embedding, factors of one, or a dense layer."""

    layer: Layer

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense layer, whose kernel is a table transposed."""
        return isinstance(self.layer, keras.layers.Dense)

    @property
    def projects(self) -> bool:
        """Whether it can project to the vocabulary, and not only look up."""
        kinds = keras.layers.ReversibleEmbedding, DistilledEmbedding
        return self.is_dense or isinstance(self.layer, kinds)

    @property
    def is_factorized(self) -> bool:
        return isinstance(self.layer, DistilledEmbedding)

    @property
    def shape(self) -> tuple[int, int]:
        """`(input_dim, output_dim)` of its table."""
        if self.is_dense:
            return self.layer.units, self.layer.kernel.shape[0]
        return self.layer.input_dim, self.layer.output_dim

    @property
    def num_tables(self) -> int:
        """Two, if look-up and projection have a table each, or else one."""
        return 1 if getattr(self.layer, "tie_weights", True) else 2

    @property
    def parameters(self) -> int:
        """Parameters of its tables."""
        input_dim, output_dim = self.shape
        return self.num_tables * input_dim * output_dim

    def tables(self) -> list[np.ndarray]:
        """The table, and the projection's where that is another one."""
        if self.is_dense:
            return [to_numpy(self.layer.kernel).T]
        return embedding_tables(self.layer)

    def new_layer(self, rank: int, **options: Any) -> DistilledEmbedding:
        """Returns the built layer of factors for it, of random values."""
        if not self.is_dense:
            return new_layer(DistilledEmbedding, self.layer, rank, **options)
        layer = DistilledEmbedding(
            *self.shape,
            rank,
            name=self.name,
            dtype=float_policy_name(self.layer),
            trainable=self.layer.trainable,
            **options,
        )
        layer.build()
        return layer


def named_tables(
    model: keras.Model,
) -> Iterator[tuple[tuple[str, int], Target]]:
    """Yields the tables of a model, dense layers too.

    Their keys pair them between models: a name, and how many came before.
    """
    kinds = keras.layers.Embedding, DistilledEmbedding, keras.layers.Dense
    counts: collections.Counter[str] = collections.Counter()
    for layer in keras_internals.iterate_layers(model):
        if isinstance(layer, kinds) and layer.built:
            yield (layer.name, counts[layer.name]), Target(layer)
            counts[layer.name] += 1


def is_embedding(layer: Layer) -> bool:
    """Whether a layer is a table that a `DistilledEmbedding` can replace."""
    return (
        isinstance(layer, keras.layers.Embedding)
        and type(layer).call in _KNOWN_CALLS
    )


def choose_targets(
    model: keras.Model,
    layers: Iterable[str] | Callable[[Layer], bool] | None,
    heads: str | None,
    min_parameters: int,
) -> list[Target]:
    """The tables that `compress` factorizes, of heads after the embeddings."""
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
            f"{sorted({t.shape[0] for t in targets})} tokens. Received: "
            f"heads={heads!r}, and no such layer in model '{model.name}'"
        )
    if heads == "factorize":
        targets += [Target(head) for head in found]
    return targets


def heads_of(model: keras.Model, targets: Iterable[Target]) -> list[Layer]:
    """The dense layers that project to the vocabulary of one of the targets."""
    vocabularies = {target.shape[0] for target in targets}
    return [
        layer
        for layer in keras_internals.iterate_layers(model)
        if type(layer) is keras.layers.Dense
        and layer.built
        and layer.quantization_mode is None
        and layer.units in vocabularies
    ]


def embedding_of(head: Layer, targets: Iterable[Target]) -> Target:
    """The one embedding of a head's shape, which the head is tied to."""
    shape = Target(head).shape
    fitting = [target for target in targets if target.shape == shape]
    if len(fitting) != 1:
        raise ValueError(
            f'`heads="tie"` needs one embedding of the shape of the head '
            f"'{head.name}', {shape}. Received: "
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
