"""Marian's small translators in Keras: the graphs, and greedy search.

A transformer reads the source and normalizes after each block; the decoder
has a simpler simple recurrent unit (SSRU) where others have self-attention,
so that all that is kept of the past is one vector a layer. One table looks up
source and target and projects to the vocabulary. Layers have the names of
Marian's weights.

`EOS` ends a sentence, and fills it up: a source counts up to its first one.
The decoder is given the target one token later, `EOS` first; Marian has zeros
there in place of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from benchmarks.tasks.marian_file import TABLE
from benchmarks.tasks.marian_file import read_file
from benchmarks.tasks.marian_layers import SSRU
from benchmarks.tasks.marian_layers import DotAttention
from benchmarks.tasks.marian_layers import OutputBias
from benchmarks.tasks.marian_layers import SinePositions

EOS = 0
_EXCLUDED = -1e9


@dataclass(frozen=True)
class Sizes:
    """Sizes of a translator."""

    vocabulary: int
    width: int
    heads: int
    inner: int
    encoder_layers: int
    decoder_layers: int


class Translator:
    """The graphs of a translator, all of the same layers.

    Args:
        sizes: Its sizes.
        model: The model of such a translator, compressed or not, whose layers
            are used. New ones by default.
    """

    def __init__(self, sizes: Sizes, model: keras.Model | None = None) -> None:
        self.sizes = sizes
        layers = model.layers if model is not None else []
        self._layers = {layer.name: layer for layer in layers}
        self.model = model or self._teacher_forced()

    @classmethod
    def of_file(cls, path: Path) -> Translator:
        """The translator in a file, with its weights."""
        settings, weights = read_file(path)
        vocabulary, width = weights[TABLE].shape
        names = ("heads", "dim-ffn")
        heads, inner = (int(settings[f"transformer-{name}"]) for name in names)
        depths = int(settings["enc-depth"]), int(settings["dec-depth"])
        found = cls(Sizes(vocabulary, width, heads, inner, *depths))
        variables = found.variables()
        if set(weights) != set(variables):
            raise ValueError(
                "The file must have the weights of a post-norm transformer "
                "with an SSRU decoder and one table. Received: these are in "
                f"one of both only, {sorted(set(weights) ^ set(variables))}"
            )
        for name, variable in variables.items():
            variable.assign(weights[name].reshape(variable.shape))
        return found

    def variables(self) -> dict[str, keras.Variable]:
        """The weights by Marian's names; of a model that is not compressed."""
        found = {}
        for name, layer in self._layers.items():
            if isinstance(layer, keras.layers.Dense):
                found[name] = layer.kernel
                if layer.use_bias:
                    found[name.replace("_W", "_b")] = layer.bias
            elif isinstance(layer, keras.layers.LayerNormalization):
                found[f"{name}_scale"] = layer.gamma
                found[f"{name}_bias"] = layer.beta
            elif layer.variables:
                (found[name],) = layer.variables
        return found

    def _teacher_forced(self) -> keras.Model:
        """Logits `(b, t, vocabulary)` of all tokens of known targets."""
        source = keras.Input((None,), dtype="int32", name="source")
        target = keras.Input((None,), dtype="int32", name="target")
        memory, bias = self._encode(source)
        crosses = self._crosses(memory)
        past = ops.zeros_like(memory[:, 0])
        pasts = [past] * self.sizes.decoder_layers
        start = ops.zeros_like(target[0, :1])
        logits, _ = self._decode(target, start, crosses, bias, pasts)
        return keras.Model({"source": source, "target": target}, logits)

    def signatures(self) -> dict[str, keras.Model]:
        """What a search calls, as `export_litert` takes it.

        `encode` maps the `source` `(b, s)` to `keys_i` and `values_i` of each
        decoder layer, and to the `bias` that leaves out what fills it up.
        `decode` has besides them a `token` `(b, 1)`, the `position` `(1,)`
        where it is, and the states `past_i` `(b, width)`, which start as zeros
        and which it returns with the `logits` `(b, vocabulary)`.
        """
        sizes, numbers = self.sizes, range(1, 1 + self.sizes.decoder_layers)
        source = keras.Input((None,), dtype="int32", name="source")
        memory, bias = self._encode(source)
        outputs = {"bias": bias}
        for i, (keys, values) in zip(numbers, self._crosses(memory)):
            outputs |= {f"keys_{i}": keys, f"values_{i}": values}
        shapes = {name: x.shape[1:] for name, x in outputs.items()}
        shapes |= {f"past_{i}": (sizes.width,) for i in numbers}
        inputs = {n: keras.Input(shape, name=n) for n, shape in shapes.items()}
        integers = {"token": (None, 1), "position": (1,)}
        for name, shape in integers.items():
            inputs[name] = keras.Input(
                batch_shape=shape, dtype="int32", name=name
            )
        logits, pasts = self._decode(
            inputs["token"],
            inputs["position"],
            [(inputs[f"keys_{i}"], inputs[f"values_{i}"]) for i in numbers],
            inputs["bias"],
            [inputs[f"past_{i}"] for i in numbers],
        )
        after = {f"past_{i}": past for i, past in zip(numbers, pasts)}
        after["logits"] = logits[:, 0]
        return {
            "encode": keras.Model({"source": source}, outputs, name="encode"),
            "decode": keras.Model(inputs, after, name="decode"),
        }

    def translate(self, sources: list[list[int]]) -> list[list[int]]:
        """Greedy translations of some sentences, see `greedy_search`."""
        encode, decode = (part.predict_on_batch for part in self._search)
        return greedy_search(encode, decode, sources, self.sizes)

    @cached_property
    def _search(self) -> tuple[keras.Model, keras.Model]:
        parts = self.signatures()
        return parts["encode"], parts["decode"]

    # The parts of the graphs

    def _encode(self, source: Any) -> tuple[Any, Any]:
        ends = ops.cast(ops.equal(source, EOS), "int32")
        is_filling = ops.greater(ops.cumsum(ends, axis=1) - ends, 0)
        bias = ops.where(is_filling, _EXCLUDED, 0.0)
        bias = ops.expand_dims(bias, (1, 2))  # for all heads and queries
        x = self._layer(SinePositions, "positions")(
            self._table(source), ops.zeros_like(source[0, :1])
        )
        for i in range(1, 1 + self.sizes.encoder_layers):
            name = f"encoder_l{i}_self"
            x = self._attend(name, x, *self._keys_values(name, x), bias)
            x = self._feed_forward(f"encoder_l{i}_ffn", x)
        return x, bias

    def _decode(
        self, ids: Any, start: Any, crosses: Any, bias: Any, pasts: Any
    ) -> tuple[Any, list]:
        is_token = ops.cast(ops.not_equal(ids, EOS), "float32")
        x = self._table(ids) * is_token[:, :, None]
        x = self._layer(SinePositions, "positions")(x, start)
        after = []
        for i, past in enumerate(pasts, start=1):
            name = f"decoder_l{i}"
            kept = self._dense(f"{name}_rnn_Wf", x, activation="sigmoid")
            added = self._dense(f"{name}_rnn_W", x, use_bias=False)
            states = self._layer(SSRU, f"{name}_ssru")(added, kept, past)
            after.append(states[:, -1])
            x = self._normalize(f"{name}_rnn_ffn", x + ops.relu(states))
            x = self._attend(f"{name}_context", x, *crosses[i - 1], bias)
            x = self._feed_forward(f"{name}_ffn", x)
        logits = self._table(x, reverse=True)
        return self._layer(OutputBias, "decoder_ff_logit_out_b")(logits), after

    def _crosses(self, memory: Any) -> list[tuple[Any, Any]]:
        """Keys and values of the source, for each layer of the decoder."""
        names = range(1, 1 + self.sizes.decoder_layers)
        return [
            self._keys_values(f"decoder_l{i}_context", memory) for i in names
        ]

    def _keys_values(self, name: str, x: Any) -> tuple[Any, Any]:
        return self._dense(f"{name}_Wk", x), self._dense(f"{name}_Wv", x)

    def _attend(
        self, name: str, x: Any, keys: Any, values: Any, bias: Any
    ) -> Any:
        attention = self._layer(DotAttention, name, heads=self.sizes.heads)
        found = attention(self._dense(f"{name}_Wq", x), keys, values, bias)
        found = self._dense(f"{name}_Wo", found)
        return self._normalize(f"{name}_Wo", x + found)

    def _feed_forward(self, name: str, x: Any) -> Any:
        inner = self.sizes.inner
        y = self._dense(f"{name}_W1", x, units=inner, activation="relu")
        return self._normalize(f"{name}_ffn", x + self._dense(f"{name}_W2", y))

    def _normalize(self, name: str, x: Any) -> Any:
        layer = keras.layers.LayerNormalization
        return self._layer(layer, f"{name}_ln", epsilon=1e-9)(x)

    def _dense(self, name: str, x: Any, **options: Any) -> Any:
        options = {"units": self.sizes.width, **options}
        return self._layer(keras.layers.Dense, name, **options)(x)

    @property
    def _table(self) -> keras.layers.Layer:
        sizes = self.sizes.vocabulary, self.sizes.width
        layer = keras.layers.ReversibleEmbedding
        return self._layer(
            layer, TABLE, input_dim=sizes[0], output_dim=sizes[1]
        )

    def _layer(self, kind: type, name: str, **options: Any) -> Any:
        """The layer of a name, which is made where there is none."""
        if name not in self._layers:
            self._layers[name] = kind(name=name, **options)
        return self._layers[name]


# Search

Call = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def filled(sentences: list[list[int]]) -> np.ndarray:
    """Ids as one int32 array, filled up with `EOS`."""
    ids = np.full((len(sentences), max(map(len, sentences))), EOS, "int32")
    for row, sentence in zip(ids, sentences):
        row[: len(sentence)] = sentence
    return ids


def greedy_search(
    encode: Call, decode: Call, sources: list[list[int]], sizes: Sizes
) -> list[list[int]]:
    """Translates sentences together, taking the likeliest token each time.

    Args:
        encode: The signature of this name, called with arrays by name.
        decode: The same.
        sources: Ids of each sentence, with `EOS`.
        sizes: Those of the translator.

    Returns:
        Ids of each translation, without `EOS`. It ends at the latest after
        eight tokens more than twice those of its source.
    """
    seen = encode({"source": filled(sources)})
    past = np.zeros((len(sources), sizes.width), "float32")
    pasts = {f"past_{i + 1}": past for i in range(sizes.decoder_layers)}
    tokens = [np.full((len(sources), 1), EOS, "int32")]
    limits = np.array([2 * len(source) + 8 for source in sources])
    ended = np.zeros(len(sources), bool)
    for position in range(max(limits)):
        where = {"token": tokens[-1], "position": np.array([position], "int32")}
        pasts = dict(decode({**seen, **pasts, **where}))
        found = pasts.pop("logits").argmax(axis=-1)
        ended |= (found == EOS) | (position >= limits)
        if ended.all():
            break
        tokens.append(np.where(ended, EOS, found).astype("int32")[:, None])
    ids = np.hstack([*tokens[1:], np.full_like(tokens[0], EOS)])
    return [row[: row.tolist().index(EOS)].tolist() for row in ids]
