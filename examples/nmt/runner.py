"""Translates with a LiteRT file, where there is no Keras.

Nothing else of the repository is needed: copy this file and a model to a
device, `pip install ai-edge-litert numpy sentencepiece`, and

    python runner.py model.tflite "A dog runs through the snow."

The model is one of `stepwise.stepwise_signatures`, and carries its tokenizer
where `stepwise.embed_vocabulary` has put it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import sentencepiece
from ai_edge_litert.interpreter import Interpreter


class LiteRTRunner:
    """Translates one sentence at a time.

    Args:
        model_path: The LiteRT file.
        vocabulary_path: A SentencePiece model; by default the one in the file.
        num_threads: Threads of the interpreter.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is not what it should be, or if the two do not
            belong together.
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        vocabulary_path: str | os.PathLike | None = None,
        num_threads: int = 1,
    ) -> None:
        model_path = Path(model_path)
        _check_file("model_path", model_path)
        num_threads = _at_least_one("num_threads", num_threads)
        # First: the interpreter trusts what it reads.
        members = _associated_files(model_path)
        try:
            interpreter = Interpreter(str(model_path), num_threads=num_threads)
            signatures = interpreter.get_signature_list()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "`model_path` must be a LiteRT file, and complete. Received: "
                f"model_path={str(model_path)!r}; LiteRT says: {error}"
            ) from error
        self._caches = _check_signatures(signatures, model_path)
        self._encode = interpreter.get_signature_runner("encode")
        self._decode = interpreter.get_signature_runner("decode")
        shapes = {
            name: detail["shape_signature"]
            for name, detail in self._decode.get_input_details().items()
        }
        self._cache_shapes = {name: shapes[name][1:] for name in self._caches}
        self._zeros: dict[int, dict[str, np.ndarray]] = {}

        if vocabulary_path is not None:
            _check_file("vocabulary_path", Path(vocabulary_path))
            proto = Path(vocabulary_path).read_bytes()
        elif "vocabulary.spm" in members:
            proto = members["vocabulary.spm"]
        else:
            raise ValueError(
                "`vocabulary_path` must be given: the model carries no "
                "tokenizer (or has lost it, being cut short). Received: "
                f"vocabulary_path=None, model_path={str(model_path)!r}"
            )
        self._pieces = _load_pieces(proto, vocabulary_path, model_path)
        logits = self._decode.get_output_details()["logits"]
        vocabulary_size = int(logits["shape_signature"][-1])
        if len(self._pieces) != vocabulary_size:
            raise ValueError(
                "`vocabulary_path` must be the tokenizer that the model was "
                f"trained with. Received: {len(self._pieces):,} pieces for a "
                f"model of {vocabulary_size:,}"
            )
        settings = {
            "pad_id": self._pieces.pad_id(),
            "bos_id": self._pieces.bos_id(),
            "eos_id": self._pieces.eos_id(),
            "max_length": min(
                shape[1] for shape in self._cache_shapes.values()
            ),
        }
        settings |= json.loads(members.get("translation.json", "{}"))
        self._pad_id = settings["pad_id"]
        self._bos_id = settings["bos_id"]
        self._eos_id = settings["eos_id"]
        self.max_length = int(settings["max_length"])

    def translate(self, sentence: str, num_beams: int = 1) -> str:
        """Translates a sentence.

        Args:
            sentence: What to translate; "" remains "".
            num_beams: 1 searches greedily; more keep that many hypotheses,
                and the likeliest is the translation.

        Raises:
            TypeError: If `sentence` is not a string.
            ValueError: If it is longer than the model's longest, or if
                `num_beams` is not a positive integer.
        """
        num_beams = _at_least_one("num_beams", num_beams)
        if not isinstance(sentence, str):
            raise TypeError(
                "`sentence` must be one string. "
                f"Received: sentence={sentence!r}"
            )
        source = self._pieces.encode(sentence)
        if not source:
            return ""
        source.append(self._eos_id)
        if len(source) > self.max_length:
            raise ValueError(
                f"`sentence` must have at most {self.max_length} tokens, its "
                "end included: translate it in parts. Received: "
                f"{len(source)} tokens, sentence={sentence!r}"
            )
        target = self._search(np.array([source], "int32"), num_beams).tolist()
        if self._eos_id in target:
            target = target[: target.index(self._eos_id)]
        special = (self._pad_id, self._bos_id)
        return self._pieces.decode([i for i in target if i not in special])

    def _search(self, source: np.ndarray, num_beams: int) -> np.ndarray:
        """Ids `(1, s)` to the ids of the likeliest hypothesis found."""
        cross = self._encode(source=source)
        caches = self._empty_caches(num_beams)
        shape = (num_beams, self.max_length)
        ids = np.full(shape, self._pad_id, "int32")
        token = np.full((num_beams, 1), self._bos_id, "int32")
        position = np.zeros(1, "int32")
        finished = np.zeros(num_beams, bool)
        # All hypotheses start alike: only the first one counts.
        totals = np.full(num_beams, -1e9, "float32")
        totals[0] = 0.0
        for index in range(1, self.max_length):
            position[0] = index - 1
            caches = self._decode(
                token=token, position=position, **cross, **caches
            )
            scores = caches.pop("logits")
            if num_beams > 1:  # or the order is the same
                _log_softmax(scores)
                # What is finished goes on with padding, at no cost.
                scores[finished] = -np.inf
                scores[finished, self._pad_id] = 0.0
                scores += totals[:, None]
            totals, best = _take_largest(scores.reshape(-1), num_beams)
            parents, token[:, 0] = np.divmod(best, scores.shape[1])
            if (parents != np.arange(num_beams)).any():
                ids, finished = ids[parents], finished[parents]
                caches = {name: c[parents] for name, c in caches.items()}
            ids[:, index] = token[:, 0]
            finished |= token[:, 0] == self._eos_id
            if finished.all():
                break
        return ids[np.argmax(totals), 1:]

    def _empty_caches(self, batch: int) -> dict[str, np.ndarray]:
        if batch not in self._zeros:
            self._zeros[batch] = {
                name: np.zeros((batch, *shape), "float32")
                for name, shape in self._cache_shapes.items()
            }
        return self._zeros[batch]


def _log_softmax(logits: np.ndarray) -> None:
    """Of each row, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def _take_largest(
    scores: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest of `scores` and where they were, which they are no more."""
    # For a few, much faster than a partition.
    indices = np.empty(count, int)
    values = np.empty(count, scores.dtype)
    for i in range(count):
        indices[i] = index = scores.argmax()
        values[i] = scores[index]
        scores[index] = -np.inf
    return values, indices


# What is read, and what is refused


def _check_file(argument: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"`{argument}` must be a file. Received: {argument}={str(path)!r}, "
            + ("a folder" if path.is_dir() else "which does not exist")
        )


def _at_least_one(argument: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"`{argument}` must be an integer, 1 or more. "
            f"Received: {argument}={value!r}"
        )
    return number


def _check_signatures(
    signatures: dict[str, dict[str, list[str]]], path: Path
) -> list[str]:
    """The names of the caches."""
    encode, decode = (
        {kind: set(names) for kind, names in signatures.get(name, {}).items()}
        for name in ("encode", "decode")
    )
    caches = decode.get("outputs", set()) - {"logits"}
    cross = encode.get("outputs", set())
    if (
        encode.get("inputs") != {"source"}
        or not caches
        or "logits" not in decode["outputs"]
        or decode["inputs"] != {"token", "position"} | cross | caches
    ):
        raise ValueError(
            "`model_path` must have the signatures `encode` and `decode` of "
            "`stepwise.stepwise_signatures`. Received: "
            f"model_path={str(path)!r} with signatures {signatures}"
        )
    return sorted(caches)


def _associated_files(path: Path) -> dict[str, bytes]:
    """What is in the zip at the end of the model, if there is one.

    With it, as `model.sha256`, can be the digest of the model before it.
    """
    if not zipfile.is_zipfile(path):
        return {}
    damage = None
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            # As they are in the file, they cannot be more than it.
            if any(info.compress_type for info in infos):
                damage = "they are compressed"
            members = {i.filename: archive.read(i) for i in infos if not damage}
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        damage = error
    if damage is not None:
        raise ValueError(
            "`model_path` must be complete and as it was written. Received: "
            f"model_path={str(path)!r} with damaged associated files ({damage})"
        )
    if "model.sha256" in members:
        start = min(info.header_offset for info in infos)
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(start)).hexdigest()
        if digest.encode() != members["model.sha256"]:
            raise ValueError(
                "`model_path` must be as it was written. Received: "
                f"model_path={str(path)!r}, whose model is damaged"
            )
    return members


def _load_pieces(
    proto: bytes,
    vocabulary_path: str | os.PathLike | None,
    model_path: Path,
) -> sentencepiece.SentencePieceProcessor:
    sentencepiece.set_min_log_level(3)  # it prints what it raises
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        path = model_path if vocabulary_path is None else vocabulary_path
        raise ValueError(
            "`vocabulary_path` must be a SentencePiece model. Received: "
            f"{len(proto):,} bytes of {str(path)!r}; SentencePiece says: "
            f"{error}"
        ) from error


# The command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Translates sentences with a LiteRT file."
    )
    parser.add_argument("model", help="LiteRT file")
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="SentencePiece model (default: the one in the LiteRT file)",
    )
    parser.add_argument(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        help="hypotheses to keep (default: 1, greedy search)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="(default: 1)"
    )
    parser.add_argument(
        "sentence",
        nargs="*",
        help="what to translate (default: standard input, one a line)",
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        runner = LiteRTRunner(
            options.model, options.vocabulary, options.threads
        )
        _at_least_one("beams", options.beams)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.stdout.reconfigure(encoding="utf-8")
    if not options.sentence:
        sys.stdin.reconfigure(encoding="utf-8")
    status = 0
    for number, sentence in enumerate(options.sentence or sys.stdin, 1):
        try:
            translation = runner.translate(sentence.strip(), options.beams)
        except ValueError as error:
            print(f"error in sentence {number}: {error}", file=sys.stderr)
            translation, status = "", 1  # lines of both texts stay in step
        print(translation, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
