"""Searches with the Keras model itself, each step of which reads all so far.

What the runner finds with a file, caches and all, is compared with this.
"""

import keras_nlp
import numpy as np
import tensorflow as tf
from keras import ops

from examples.nmt.tokens import BOS_ID
from examples.nmt.tokens import EOS_ID
from examples.nmt.tokens import PAD_ID


def translate(model, vocabulary, sentences, max_length, num_beams=1):
    """Translations of `sentences`.

    Args:
        model: A model of `examples.nmt.model.build_transformer`.
        vocabulary: Its vocabulary.
        sentences: The text; what is too long is cut.
        max_length: Positions of the model.
        num_beams: 1 searches greedily, more keep that many hypotheses.
    """
    sampler = (
        keras_nlp.samplers.GreedySampler()
        if num_beams == 1
        else keras_nlp.samplers.BeamSampler(num_beams)
    )
    begin = np.full((1, max_length), PAD_ID, "int32")
    begin[0, 0] = BOS_ID

    @tf.function(input_signature=[tf.TensorSpec([1, None], "int32")])
    def search(source):
        def next(prompt, cache, index):
            hypotheses = ops.shape(prompt)[0]
            logits = model(
                {
                    "source": ops.repeat(source, hypotheses, axis=0),
                    "target": prompt,
                },
                training=False,
            )
            logits = ops.take(logits, index - 1, axis=1)
            return _only_padding_after_end(logits, prompt), None, cache

        return sampler(next, begin, index=1, stop_token_ids=[EOS_ID])

    return [
        vocabulary.decode(search(np.array([row[:max_length]]))[:, 1:])[0]
        for row in vocabulary.encode(sentences).to_list()
    ]


def _only_padding_after_end(logits, prompt):
    """A finished hypothesis goes on with padding, at no cost to its score."""
    finished = ops.any(ops.equal(prompt, EOS_ID), axis=-1, keepdims=True)
    is_padding = ops.equal(ops.arange(ops.shape(logits)[-1]), PAD_ID)
    padding_only = ops.where(is_padding, 0.0, -1e9)
    return ops.where(finished, padding_only[None], logits)
