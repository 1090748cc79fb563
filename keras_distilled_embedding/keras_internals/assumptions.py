"""How Keras works inside, as far as this package relies on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_distilled_embedding.keras_internals.private_keras import TESTED_KERAS
from keras_distilled_embedding.keras_internals.private_keras import KerasHistory
from keras_distilled_embedding.keras_internals.private_keras import map_graph
from keras_distilled_embedding.keras_internals.private_keras import saving_lib
from keras_distilled_embedding.keras_internals.rebuilding import is_default


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
            is_default(keras.layers.Layer.build)
            and not is_default(keras.layers.Dense.build)
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
    """Refuses a Keras that works otherwise than this package relies on.

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
