"""Small translators: the example's, untrained; KerasHub's, trained."""

from functools import cache

import keras
import numpy as np

from tests.vocabularies import byte_pairs
from tests.vocabularies import sentence_pieces

VOCABULARY = 300
LENGTH = 20
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]
_NAMES = ["Anna", "Ben", "Carla", "the dog", "an old man", "my neighbor"]


def sentences():
    """Commands, and what they ask for: copying, and words of numbers."""
    pairs = []
    for i, number in enumerate(_NUMBERS):
        for j, name in enumerate(_NAMES):
            pairs.append((f"{name} has {i}", f"{name} has {number}."))
            pairs.append((f"{i} and {j}", f"{number} and {_NUMBERS[j]}."))
    return pairs


def _text():
    return [line for pair in sentences() for line in pair]


def _bart():
    """With byte pairs."""
    import keras_hub

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pairs = byte_pairs(_text(), VOCABULARY, special)
    tokenizer = keras_hub.tokenizers.BartTokenizer(*pairs)
    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=len(pairs[0]),
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        dropout=0.0,
        max_sequence_length=LENGTH,
    )
    preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(
        tokenizer, LENGTH, LENGTH
    )
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)


def _t5():
    """With SentencePiece."""
    import keras_hub

    pieces = sentence_pieces(
        _text(), 60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
    )
    tokenizer = keras_hub.tokenizers.T5Tokenizer(pieces)
    backbone = keras_hub.models.T5Backbone(
        vocabulary_size=64,  # more than there are pieces, as T5 has
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        dropout=0.0,
    )
    preprocessor = keras_hub.models.T5Seq2SeqLMPreprocessor(
        tokenizer, LENGTH, LENGTH
    )
    return keras_hub.models.T5Seq2SeqLM(backbone, preprocessor)


def untrained(name):
    """One of KerasHub's, with its tokenizer."""
    keras.utils.set_random_seed(0)
    return {"bart": _bart, "t5": _t5}[name]()


@cache
def translator(name):
    """One for all tests, which leave it as it is."""
    task = untrained(name)
    sources, targets = zip(*sentences())
    # Cut into tokens once: KerasHub would do so in every epoch.
    x, y, weights = task.preprocessor(
        {"encoder_text": list(sources), "decoder_text": list(targets)}
    )
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    bare.compile(
        keras.optimizers.Adam(5e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    bare.fit(x, y, sample_weight=weights, batch_size=20, epochs=100, verbose=0)
    task.compile(sampler="greedy")
    return task


def untrained_translator(vocabulary_size, max_length, end):
    """The example's model, with weights large enough to have opinions.

    Args:
        vocabulary_size: Pieces.
        max_length: Positions.
        end: The length of the row of EOS; the larger, the more texts end.
    """
    from examples.nmt import data
    from examples.nmt import model as nmt

    model = nmt.build_transformer(
        vocabulary_size,
        max_length,
        d_model=16,
        num_layers=2,
        num_heads=2,
        feed_forward_dim=24,
    )
    add_noise(model)
    # So that some translations end: EOS as likely wherever the decoder is.
    layer = model.get_layer("decoder_output")
    center = layer.beta.numpy() / np.linalg.norm(layer.beta)
    table = model.get_layer("token_embedding").embeddings
    rows = table.numpy()
    row = rows[data.EOS_ID] - center * (center @ rows[data.EOS_ID])
    rows[data.EOS_ID] = end * row / np.linalg.norm(row)
    table.assign(rows)
    return model


def add_noise(model):
    """Makes weights large enough to have opinions."""
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        noise = random.normal(size=variable.shape, scale=0.3)
        variable.assign(variable + noise.astype("float32"))
