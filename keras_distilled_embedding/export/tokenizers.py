"""KerasHub's tokenizers as the LiteRT-LM runtime reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from typing import NamedTuple


class StoredVocabulary(NamedTuple):
    """A tokenizer as the content of a file.

    Args:
        content: The file.
        is_sentencepiece: Whether it is a SentencePiece model, or else the
            `tokenizer.json` of Hugging Face.
    """

    content: bytes
    is_sentencepiece: bool


def stored_vocabulary(tokenizer: Any) -> StoredVocabulary:
    """What the bundle holds of a tokenizer.

    Raises:
        ValueError: If the runtime has no tokenizer of that kind.
    """
    import keras_hub

    if isinstance(tokenizer, keras_hub.tokenizers.SentencePieceTokenizer):
        proto = tokenizer.proto
        if not isinstance(proto, bytes):
            proto = Path(proto).read_bytes()
        return StoredVocabulary(proto, is_sentencepiece=True)
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        # What KerasHub itself cuts texts with, outside of TensorFlow's graphs.
        tokenizer._maybe_initialized_tokenizers()
        content = tokenizer._tokenizer.to_str()
        return StoredVocabulary(content.encode(), is_sentencepiece=False)
    raise ValueError(
        "`task` must have a SentencePiece or byte-pair tokenizer, which the "
        f"runtime knows. Received: {type(tokenizer).__name__}"
    )


def stop_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer, as KerasHub's `generate` takes them.

    Raises:
        ValueError: If there is none: the runtime would never stop.
    """
    found = [
        getattr(tokenizer, name, None)
        for name in ("end_token_id", "end_token2_id")
    ]
    ids = [int(token) for token in found if token is not None]
    if not ids:
        raise ValueError(
            "`task` must have a tokenizer with an end token, without which "
            f"no answer ends. Received: {type(tokenizer).__name__}"
        )
    return ids
