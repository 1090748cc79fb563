"""Tokenizers in the files of models that write text."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np

import keras_distilled_embedding_runner as runner
from keras_distilled_embedding._utils.files import write_atomically


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


def ids_without_padding(read: Any, side: str = "") -> list[int]:
    """The ids of one text that a preprocessor has read.

    Args:
        read: What `generate_preprocess` returns for a list of one text.
        side: `"encoder_"` or `"decoder_"`, where there are two.
    """
    length = int(np.asarray(read[f"{side}padding_mask"]).sum())
    return np.asarray(read[f"{side}token_ids"])[0, :length].tolist()


def append_tokenizer(
    model_file: str | os.PathLike,
    filepath: str | os.PathLike,
    vocabulary: StoredVocabulary,
    settings: dict[str, Any],
) -> None:
    """Writes a LiteRT file with a tokenizer, whole or not at all.

    They are appended as a zip of associated files, as TFLite Metadata does:
    the model stays as valid as it is. Beside the tokenizer are `settings`, as
    a JSON object, and the model's SHA-256, by which a reader tells that it is
    as it was written. What an earlier call has put there is replaced.

    Args:
        model_file: The LiteRT file.
        filepath: The file to write.
        vocabulary: The tokenizer.
        settings: Ids that start, end and pad a text, and `max_length`.
    """
    content = Path(model_file).read_bytes()
    members: dict[str, bytes] = {}
    if zipfile.is_zipfile(model_file):
        with zipfile.ZipFile(model_file) as archive:
            infos = archive.infolist()
            members = {info.filename: archive.read(info) for info in infos}
        content = content[: min(info.header_offset for info in infos)]
    own, other = runner.SENTENCEPIECE, runner.BYTE_PAIRS
    if not vocabulary.is_sentencepiece:
        own, other = other, own
    members.pop(other, None)
    members[own] = vocabulary.content
    members[runner.SETTINGS] = json.dumps(settings).encode()
    members[runner.DIGEST] = hashlib.sha256(content).hexdigest().encode()
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, member in members.items():
            # Not compressed, so that a device can map them; without a date,
            # so that the same files make the same file.
            archive.writestr(zipfile.ZipInfo(name), member)
    write_atomically(
        Path(filepath), lambda file: file.write(buffer.getbuffer())
    )
