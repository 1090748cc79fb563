"""Translating: greedy and beam search with Keras, greedy with LiteRT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from collections.abc import Iterable
from pathlib import Path

import keras
import keras_nlp
import numpy as np
import tensorflow as tf
from keras import ops
from rich.progress import track

from .data import Batching
from .data import Vocabulary
from .data import sentence_batches
from .model import decoder_layers
from .model import encoder
from .tokens import BOS_ID
from .tokens import EOS_ID
from .tokens import PAD_ID


def _progress(items: list, description: str) -> Iterable:
    """A progress bar, on a terminal."""
    return track(
        items, description, transient=True, disable=not sys.stdout.isatty()
    )


class Translator:
    """Translates with a Keras model, one cached decoder step a token.

    Args:
        model: A model of `model.build_transformer`, compressed or not.
        vocabulary: The vocabulary it was trained with.
        batching: Gives the widths that sentences are padded to.
        num_beams: 1 searches greedily, more keep that many hypotheses.
        jit_compile: Whether XLA compiles the search, once a width: for long
            texts, where beam search then takes less than half the time.
    """

    def __init__(
        self,
        model: keras.Model,
        vocabulary: Vocabulary,
        batching: Batching,
        num_beams: int = 1,
        jit_compile: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.batching = batching
        self._model = model
        self._encoder = encoder(model)
        self._decoder_layers = decoder_layers(model)
        self._sampler = (
            keras_nlp.samplers.GreedySampler()
            if num_beams == 1
            else keras_nlp.samplers.BeamSampler(num_beams)
        )
        self._generate = tf.function(
            self._search,
            # XLA wants to know the shapes.
            input_signature=None
            if jit_compile
            else [tf.TensorSpec([None, None], "int32")],
            jit_compile=jit_compile,
        )

    def translate(
        self, sentences: list[str], batch_size: int = 64
    ) -> list[str]:
        """Translates `sentences`, `batch_size` of like length at a time."""
        translations = [""] * len(sentences)
        batches = list(
            sentence_batches(
                sentences, self.vocabulary, self.batching, batch_size
            )
        )
        for rows, source in _progress(batches, "Translating"):
            ids = self._generate(source).numpy()[: len(rows), 1:]
            for row, text in zip(rows, self.vocabulary.decode(ids)):
                translations[row] = text
        return translations

    def _search(self, source: tf.Tensor) -> tf.Tensor:
        """Source ids `(b, s)` to target ids `(b, max_length)`, BOS first."""
        memory = self._encoder({"source": source}, training=False)
        padding = ops.not_equal(source, PAD_ID)
        batch_size = ops.shape(source)[0]
        length = self.batching.max_length
        prompt = ops.full((batch_size, length), PAD_ID, "int32")
        prompt = ops.slice_update(
            prompt, (0, 0), ops.full((batch_size, 1), BOS_ID, "int32")
        )
        # What attention needs of the memory never changes: keys and values
        # are computed once, by a first step whose own result is not used.
        _, caches = self._step(
            prompt[:, :1], memory, padding, 0, self._empty_caches(memory), 0
        )
        first = {"memory": memory, "padding": padding, "layers": caches}

        def next(prompt, cache, index):
            last = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
            logits, layers = self._step(
                last,
                cache["memory"],
                cache["padding"],
                index - 1,
                cache["layers"],
            )
            logits = _only_padding_after_end(logits, prompt)
            return logits, None, {**cache, "layers": layers}

        return self._sampler(
            next,
            prompt,
            cache=first,
            index=1,
            stop_token_ids=[EOS_ID],
        )

    def _step(self, token, memory, padding, index, caches, memory_index=None):
        """One decoder step: the logits `(b, v)` after `token` `(b, 1)`."""
        layer = self._model.get_layer
        x = layer("embedding_scale")(layer("token_embedding")(token))
        x = x + layer("target_position")(x, start_index=index)
        updated = []
        for decoder, (own, cross) in zip(self._decoder_layers, caches):
            x, own, cross = decoder(
                x,
                memory,
                encoder_padding_mask=padding,
                self_attention_cache=own,
                self_attention_cache_update_index=index,
                cross_attention_cache=cross,
                cross_attention_cache_update_index=memory_index,
                training=False,
            )
            updated.append((own, cross))
        x = layer("decoder_output")(x)
        logits = layer("token_embedding")(x[:, 0], reverse=True)
        return logits, updated

    def _empty_caches(self, memory):
        """Zeros `(b, 2, length, heads, head_dim)` twice for each layer."""
        batch_size, memory_length, width = ops.shape(memory)
        length = self.batching.max_length
        caches = []
        for decoder in self._decoder_layers:
            heads = decoder.num_heads
            caches.append(
                tuple(
                    ops.zeros((batch_size, 2, n, heads, width // heads))
                    for n in (length, memory_length)
                )
            )
        return caches


def translate_to_file(
    translator: Translator | LiteRTTranslator,
    sentences: list[str],
    path: Path,
    chunk_size: int = 2_900,
) -> list[str]:
    """Translates a long text, a line a sentence; goes on where it stopped.

    Args:
        translator: Translates the sentences that `path` does not hold yet.
        sentences: The text.
        path: File of the translations, appended to after every chunk.
        chunk_size: Sentences translated between two appends.

    Returns:
        The translations, as many as `sentences`.
    """
    lines = []
    if path.exists():
        # Not splitlines(): a sentence may hold other separators than \n.
        *lines, cut = path.read_text(encoding="utf-8").split("\n")
        if cut:  # interrupted within a line
            path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    while len(lines) < len(sentences):
        chunk = sentences[len(lines) : len(lines) + chunk_size]
        chunk = [t.replace("\n", " ") for t in translator.translate(chunk)]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in chunk)
        lines += chunk
    return lines


def _only_padding_after_end(logits, prompt):
    """A finished hypothesis goes on with padding, at no cost to its score."""
    finished = ops.any(ops.equal(prompt, EOS_ID), axis=-1, keepdims=True)
    is_padding = ops.equal(ops.arange(ops.shape(logits)[-1]), PAD_ID)
    padding_only = ops.where(is_padding, 0.0, -1e9)
    return ops.where(finished, padding_only[None], logits)


class LiteRTTranslator:
    """Translates greedily, sentence by sentence, with an exported file.

    Args:
        path: File with the signatures `encode` and `decode`.
        vocabulary: The vocabulary the model was trained with.
        max_length: Longest translation, in tokens.
        num_threads: Threads of the interpreter.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        max_length: int,
        num_threads: int = 1,
    ) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.vocabulary = vocabulary
        self.max_length = max_length
        self._interpreter = Interpreter(str(path), num_threads=num_threads)
        self._encode = self._runner("encode")
        self._decode = self._runner("decode")

    def _runner(self, signature: str) -> Callable[..., np.ndarray]:
        runner = self._interpreter.get_signature_runner(signature)
        (output,) = runner.get_output_details()
        return lambda **inputs: runner(**inputs)[output]

    def translate(self, sentences: list[str]) -> list[str]:
        """Translates `sentences` one at a time, as a phone would."""
        ids = self.vocabulary.encode(sentences).to_list()
        targets = np.full((len(ids), self.max_length), PAD_ID, "int32")
        for row, source in _progress(
            list(enumerate(ids)), "Translating (LiteRT)"
        ):
            target = self._greedy(source[: self.max_length])
            targets[row, : len(target)] = target
        return self.vocabulary.decode(targets)

    def _greedy(self, source: list[int]) -> list[int]:
        source = np.array([source], "int32")
        memory = self._encode(source=source)
        target = [BOS_ID]
        while len(target) < self.max_length and target[-1] != EOS_ID:
            logits = self._decode(
                memory=memory,
                source=source,
                target=np.array([target], "int32"),
            )
            target.append(int(np.argmax(logits)))
        return target[1:]
