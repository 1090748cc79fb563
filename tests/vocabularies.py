"""Small tokenizers, trained on the spot, as KerasHub's are made of them."""

import io
import json
from functools import cache
from pydoc_data.topics import topics


@cache
def paragraphs():
    """Of Python's own manual."""
    found = (p for text in topics.values() for p in text.split("\n\n"))
    return [" ".join(p.split()) for p in found if len(p) > 80]


def byte_pairs(texts, size, special_tokens):
    """The ids of pieces, by piece, and the merges."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    trained.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special_tokens,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def sentence_pieces(texts, size, **options):
    """The bytes of a SentencePiece model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        minloglevel=2,
        **options,
    )
    return model.getvalue()
