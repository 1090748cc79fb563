"""A KerasHub language model, step by step, as Keras models.

A step takes some tokens and the keys and values of those before them, and
returns these with its own added. Names, shapes and order are what the runtime
LiteRT-LM expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_distilled_embedding._utils.arguments import as_integer

TOKENS, POSITIONS, LOGITS = "tokens", "input_pos", "logits"
PREFILL, DECODE = "prefill", "decode"
# Tokens that are read at once and in two pieces, and how far the logits may
# differ, as a share of their size.
_COMPARED_TOKENS, _TOLERANCE = 8, 1e-3


def check_task(task: Any, method: str) -> None:
    """Refuses what has no caches or no tokenizer."""
    if not hasattr(task, method):
        raise ValueError(
            "`task` must be able to keep keys and values between calls, by a "
            f"method `{method}`. Received: {type(task).__name__}"
        )
    if getattr(task.preprocessor, "tokenizer", None) is None:
        raise ValueError(
            "`task` must have a preprocessor with a tokenizer, which the "
            "file holds: `task.preprocessor = ...`. "
            f"Received: task.preprocessor={task.preprocessor!r}"
        )


def check_length(task: Any, argument: str, length: int) -> int:
    """Refuses more tokens than a task has positions for."""
    length = as_integer(argument, length, minimum=2)
    most = getattr(task.backbone, "max_sequence_length", None)
    if most is not None and length > most:
        raise ValueError(
            f"`{argument}` must be at most {most}, the positions that the "
            f"model has. Received: {argument}={length}"
        )
    return length


class CacheForm(NamedTuple):
    """How a task keeps the keys and values of tokens that it has seen.

    Args:
        is_nested: Whether they come as a pair for each layer, or else as one
            tensor `(1, num_layers, 2, max_length, heads, size)`.
        num_layers: How many layers have keys and values.
        shape: Of the keys of one layer, `(1, max_length, heads, size)`.
    """

    is_nested: bool
    num_layers: int
    shape: tuple[int, ...]

    @property
    def names(self) -> list[tuple[str, str]]:
        """The runtime's names of each layer's keys and values."""
        return self.names_like("kv_cache_k", "kv_cache_v")

    def names_like(self, keys: str, values: str) -> list[tuple[str, str]]:
        """Names of each layer's keys and values."""
        return [
            (f"{keys}_{i}", f"{values}_{i}") for i in range(self.num_layers)
        ]


class _Found(Exception):
    """Ends a generation once its first call is known."""


def find_cache(task: Any, max_length: int) -> CacheForm:
    """Finds out what cache a task makes for one text of `max_length` tokens.

    Its class has no method for that: the first call of a generation is
    watched.

    Raises:
        ValueError: If it makes none that can be kept layer by layer.
    """
    text = {
        "token_ids": ops.ones((1, max_length), "int32"),
        "padding_mask": ops.expand_dims(ops.arange(max_length) < 2, 0),
    }
    cache = first_call(task, "call_with_cache", text)["cache"]
    if isinstance(cache, tuple | list):
        pairs = [[tuple(x.shape) for x in pair] for pair in cache]
        if len({shape for pair in pairs for shape in pair}) == 1:
            return CacheForm(True, len(pairs), pairs[0][0])
    elif len(cache.shape) == 6 and cache.shape[2] == 2:
        batch, num_layers, _, *rest = cache.shape
        return CacheForm(False, num_layers, (batch, *rest))
    shapes = keras.tree.map_structure(lambda x: tuple(x.shape), cache)
    raise ValueError(
        "`task` must keep keys and values of one shape for each layer. "
        f"Received: {type(task).__name__} with caches {shapes}"
    )


def first_call(task: Any, method: str, text: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which a generation first calls a method of a task.

    Raises:
        ValueError: If it does not get that far.
    """
    signature = inspect.signature(getattr(task, method))
    found: list[dict[str, Any]] = []

    def watch(*args: Any, **kwargs: Any) -> None:
        found.append(signature.bind(*args, **kwargs).arguments)
        raise _Found

    # Past Keras, which would take note of the attribute.
    object.__setattr__(task, method, watch)
    try:
        task.generate_step(text, stop_token_ids=None)
    except _Found:
        pass
    except Exception as error:
        raise ValueError(
            "`task` must generate from token ids alone. Received: "
            f"{type(task).__name__}, which raises {error!r}"
        ) from error
    finally:
        object.__delattr__(task, method)
    return found[0]


def step_models(
    task: Any, max_length: int, prefill_lengths: Iterable[int]
) -> tuple[CacheForm, dict[str, keras.Model]]:
    """A model for each number of tokens that a step may take.

    All take `tokens (1, n)` int32, their positions `input_pos (n,)` int32, and
    the caches `kv_cache_k_0 (1, max_length, heads, size)`, ..., and return
    the caches with the tokens' own written from the first position on.

    Args:
        task: A `keras_hub.models.CausalLM`.
        max_length: Tokens of a text, at most.
        prefill_lengths: Numbers of tokens of a prompt.

    Returns:
        The form of the caches, and models `"prefill_<n>"`, and `"decode"` of
        one token, which also returns its `logits (1, 1, V)`.

    Raises:
        ValueError: If the task cannot be called so.
    """
    form = find_cache(task, max_length)
    # One layer in all of them, so that they share its weights.
    step = CachedStep(task, form, name="step")
    _check_pieces(step, min(max_length, _COMPARED_TOKENS))
    models = {
        f"{PREFILL}_{length}": _step_model(step, length, has_logits=False)
        for length in prefill_lengths
    }
    models[DECODE] = _step_model(step, 1, has_logits=True)
    return form, models


def _check_pieces(step: CachedStep, length: int) -> None:
    """Refuses a task that reads a later piece as if it were the first."""
    vocabulary = step.task.output.shape[-1]
    rng = np.random.default_rng(0)
    ids = rng.integers(vocabulary, size=(1, length), dtype="int32")
    wanted = logits_of_whole(step.task, ids)[-1]
    state: dict[str, Any] = empty_caches(step.form)
    for piece in np.split(np.arange(length, dtype="int32"), [length // 2]):
        state = _in_graph(
            step, {TOKENS: ids[:, piece], POSITIONS: piece, **state}
        )
    found = ops.convert_to_numpy(state[LOGITS][0, -1])
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if not error < _TOLERANCE:
        raise ValueError(
            "`task` must predict the same whether it reads a text at once or "
            "in pieces, with the keys and values of those before. Received: "
            f"{type(step.task).__name__}, whose logits then differ by "
            f"{error:.1%}"
        )


def logits_of_whole(task: Any, ids: np.ndarray) -> np.ndarray:
    """What a task predicts of a text `(1, n)` read at once, `(n, V)`."""
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    logits = _in_graph(lambda inputs: task(inputs, training=False), inputs)
    return ops.convert_to_numpy(logits)[0]


def _in_graph(call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Op by op, a table in few bits would be there five times as floats."""
    import tensorflow as tf

    return tf.function(call)(
        {name: tf.constant(array) for name, array in inputs.items()}
    )


def _step_model(step: CachedStep, length: int, has_logits: bool) -> keras.Model:
    def tensor(name: str, shape: tuple[int, ...], dtype: str) -> Any:
        return keras.Input(batch_shape=shape, dtype=dtype, name=name)

    inputs = {
        TOKENS: tensor(TOKENS, (1, length), "int32"),
        POSITIONS: tensor(POSITIONS, (length,), "int32"),
    }
    for pair in step.form.names:
        for name in pair:
            inputs[name] = tensor(name, step.form.shape, "float32")
    outputs = step(inputs)
    if not has_logits:
        outputs = {k: v for k, v in outputs.items() if k != LOGITS}
    return keras.Model(inputs, outputs)


@keras.saving.register_keras_serializable(package="keras_distilled_embedding")
class CachedStep(keras.layers.Layer):
    """`call_with_cache` of a task, with the keys and values of each layer.

    Args:
        task: The task.
        form: What `find_cache` tells of it.
    """

    def __init__(self, task: Any, form: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = task
        is_nested, num_layers, shape = form
        self.form = CacheForm(is_nested, num_layers, tuple(shape))
        self.built = True

    def call(self, inputs: dict[str, Any]) -> dict[str, Any]:
        tokens, position = inputs[TOKENS], inputs[POSITIONS][0]
        names = self.form.names
        pairs = [(inputs[keys], inputs[values]) for keys, values in names]
        if self.form.is_nested:
            logits, _, cache = self.task.call_with_cache(
                tokens, tuple(pairs), position
            )
        else:
            try:
                logits, _, cache = self.task.call_with_cache(
                    tokens, joined(inputs, names), position
                )
            except (TypeError, ValueError, AttributeError):
                # It wants to read the cache as a tensor, which is then copied.
                cache = ops.stack([ops.stack(p, axis=1) for p in pairs], 1)
                logits, _, cache = self.task.call_with_cache(
                    tokens, cache, position
                )
        return {LOGITS: logits} | by_name(cache, names)

    # KerasHub's decoders cannot be called with symbolic tensors and caches.
    def compute_output_spec(
        self, inputs: dict[str, Any]
    ) -> dict[str, keras.KerasTensor]:
        length, vocabulary = inputs[TOKENS].shape[1], self.task.output.shape[-1]
        return {
            name: keras.KerasTensor(inputs[name].shape, "float32")
            for pair in self.form.names
            for name in pair
        } | {LOGITS: keras.KerasTensor((1, length, vocabulary), "float32")}

    def get_config(self) -> dict[str, Any]:
        task = keras.saving.serialize_keras_object(self.task)
        task.pop("compile_config", None)
        return {**super().get_config(), "task": task, "form": list(self.form)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CachedStep:
        task = keras.saving.deserialize_keras_object(config["task"])
        return cls(**{**config, "task": task})


class _LayerCache:
    """Keys and values of a layer, `(1, 2, max_length, heads, size)`.

    They stay apart: put together, they would be copied at every step.
    """

    def __init__(self, keys: Any, values: Any) -> None:
        self._pair = keys, values
        self.dtype = keys.dtype
        self.shape = (1, 2, *keys.shape[1:])

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple) or key[0] != slice(None):
            raise TypeError("read in another way than by KerasHub's layers")
        return self._pair[key[1]]

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Any:
        # Only asked for its shape: the converter leaves it out.
        return ops.stack(self._pair, axis=1)


class _Cache:
    """The caches of all layers, `(1, num_layers, 2, ...)`."""

    def __init__(self, layers: list[_LayerCache]) -> None:
        self._layers = layers
        self.dtype = layers[0].dtype
        self.shape = (1, len(layers), *layers[0].shape[1:])

    def __getitem__(self, key: Any) -> _LayerCache:
        if not isinstance(key, tuple) or key[0] != slice(None):
            raise TypeError("read in another way than by KerasHub's tasks")
        return self._layers[key[1]]


def joined(tensors: dict[str, Any], names: list[tuple[str, str]]) -> _Cache:
    """Keys and values by name, as KerasHub's tasks read them."""
    return _Cache(
        [_LayerCache(tensors[keys], tensors[values]) for keys, values in names]
    )


def by_name(cache: Any, names: list[tuple[str, str]]) -> dict[str, Any]:
    """Keys and values in a cache as a task returns it."""
    if not isinstance(cache, tuple | list):
        cache = [_unstack(layer, 2) for layer in _unstack(cache, len(names))]
    return {
        name: tensor
        for pair, layer in zip(names, cache)
        for name, tensor in zip(pair, layer)
    }


def _unstack(tensor: Any, count: int) -> list[Any]:
    """The parts of a tensor along axis 1, as they were before `ops.stack`."""
    packed: Any = getattr(tensor, "op", None)
    if getattr(packed, "type", "") == "Pack" and packed.get_attr("axis") == 1:
        return list(packed.inputs)
    return ops.unstack(tensor, count, axis=1)


def empty_caches(form: CacheForm) -> dict[str, np.ndarray]:
    """Those of no tokens, by the runtime's names."""
    return {
        name: np.zeros(form.shape, "float32")
        for pair in form.names
        for name in pair
    }
