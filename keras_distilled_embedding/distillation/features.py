"""What the layers inside a model return, caught in its one run."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from keras_distilled_embedding import keras_internals


class FeatureExtractor:
    """Runs a model once, and keeps the outputs of some of its layers.

    The layers are found by name at any depth, and caught while the model
    runs: it may be of any class. Not a layer itself: the models belong to the
    distiller.

    Args:
        model: A built model.
        layer_names: Names of the layers whose outputs are wanted.
        argument: What the model is called in errors.

    Raises:
        ValueError: If no layer, or more than one, has such a name.
    """

    def __init__(
        self, model: keras.Model, layer_names: Iterable[str], argument: str
    ) -> None:
        self._model = model
        self._argument = argument
        self._layers = {
            name: keras_internals.find_layer(model, name, argument)
            for name in layer_names
        }
        self._features: dict[str | None, Any] = {}

    def __call__(self, inputs: Any, training: bool | None) -> Any:
        """Returns the model's outputs; `of` then returns the layers'."""
        with self._catching() as caught:
            outputs = self._model(inputs, training=training)
        self._features = {None: outputs}
        for name, calls in caught.items():
            if len(calls) != 1:
                raise ValueError(
                    "A feature must be what a layer returns in its one call. "
                    f"Received: layer '{name}' of the {self._argument}, "
                    f"called {len(calls)} times"
                )
            self._features[name] = calls[0]
        return outputs

    def of(self, layer_name: str | None) -> Any:
        """The outputs of the layer of that name; of the model, for `None`."""
        return self._features[layer_name]

    @contextmanager
    def _catching(self) -> Iterator[dict[str, list[Any]]]:
        caught: dict[str, list[Any]] = {name: [] for name in self._layers}

        def keep(name: str) -> Callable[..., None]:
            return lambda outputs, *_, **__: caught[name].append(outputs)

        try:
            for name, layer in self._layers.items():
                keras_internals.watch_calls(layer, keep(name))
            yield caught
        finally:
            for layer in self._layers.values():
                keras_internals.stop_watching(layer)
