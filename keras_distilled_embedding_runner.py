"""Writes text with a LiteRT file, where there are no Keras and TensorFlow.

    python keras_distilled_embedding_runner.py MODEL "A dog runs."

MODEL is a file of `export_litert_seq2seq`, which answers or translates, or a
bundle of `export_litertlm`, which goes on with a text. Nothing else of the
package is needed: copy this file and a model to a device, and `pip install
ai-edge-litert numpy`, and what cuts the model's texts into tokens:
`sentencepiece` or `tokenizers`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import operator
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import NoReturn

import numpy as np

# Names in the zip at the end of a LiteRT file.
SENTENCEPIECE, BYTE_PAIRS = "vocabulary.spm", "tokenizer.json"
SETTINGS, DIGEST = "translation.json", "model.sha256"
# Where a bundle has its settings, among the entries of its header.
BUNDLE_SETTINGS = "keras_distilled_embedding"

BAD_USE, INTERRUPTED = 2, 130
_BUNDLE_MAGIC = b"LITERTLM"


class Runner:
    """Writes one text at a time.

    Args:
        model_path: A file of `export_litert_seq2seq`, or a bundle of
            `export_litertlm`.
        num_threads: Threads of the interpreter.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not such a file, not complete, or damaged.

    Example:

    ```
    runner = Runner("translator.tflite")
    runner.generate("A dog runs through the snow.", num_beams=4)
    for piece in runner.stream("A dog", temperature=0.8, seed=0):
        print(piece, end="", flush=True)
    ```
    """

    def __init__(
        self, model_path: str | os.PathLike, num_threads: int = 1
    ) -> None:
        path = Path(model_path)
        if not path.is_file():
            raise FileNotFoundError(
                "`model_path` must be a file. Received: "
                f"model_path={str(path)!r}, "
                + ("a folder" if path.is_dir() else "which does not exist")
            )
        _at_least_one("num_threads", num_threads)
        # First: the interpreter trusts what it reads.
        parts = _read_parts(path)
        interpreter = _interpreter(parts, path, num_threads)
        self._model = _Model(interpreter, path)
        self._tokenizer = _tokenizer(parts, path)
        self.vocabulary_size = self._model.vocabulary_size
        if self._tokenizer.size > self.vocabulary_size:
            raise ValueError(
                "`model_path` must carry the tokenizer that the model was "
                f"trained with. Received: {self._tokenizer.size:,} pieces for "
                f"a model of {self.vocabulary_size:,}, {str(path)!r}"
            )
        settings = parts.settings
        self.max_length = int(settings["max_length"])
        self._start = settings.get("start_ids", [settings.get("bos_id")])
        self._stop = settings.get("stop_ids", [settings.get("eos_id")])
        self._source_start = settings.get("source_start_ids", [])
        self._pad = settings.get("pad_id", 0)
        self._special = {self._pad, *self._start, *self._stop}
        self._special.update(self._source_start)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The text that follows a prompt, or its translation.

        Args:
            prompt: A text, or token ids.
            **options: As of `stream_ids`.
        """
        return "".join(self.stream(prompt, **options))

    def stream(
        self, prompt: str | Sequence[int], **options: Any
    ) -> Iterator[str]:
        """The same in pieces, each as soon as it is known.

        Args:
            prompt: A text, or token ids.
            **options: As of `stream_ids`.
        """
        return self._texts(self.stream_ids(prompt, **options))

    def stream_ids(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_beams: int = 1,
        seed: int | None = None,
    ) -> Iterator[int]:
        """The same as token ids, without those that end a text.

        The likeliest token is taken, unless `temperature`, `top_k` or `top_p`
        is given: then one is drawn.

        Args:
            prompt: A text, or token ids with all that the model expects
                around them. What has no tokens to translate stays empty.
            max_tokens: Tokens to write at most; by default as many as the
                model has places for.
            temperature: Divides the logits before a token is drawn; 0 takes
                the likeliest. By default 1.
            top_k: Draw among so many likeliest tokens.
            top_p: Draw among the likeliest tokens that have this share of the
                probability together.
            num_beams: Hypotheses to keep; the likeliest is the text. More
                than one exclude drawing.
            seed: Of the draws.

        Raises:
            TypeError: If `prompt` is neither a text nor integers.
            ValueError: If it is longer than the model takes or has ids out of
                range, or if an option is out of range.
        """
        choose = _chooser(
            max_tokens, temperature, top_k, top_p, num_beams, seed
        )
        ids = self._prompt_ids(prompt)
        if self._model.translates:
            if not ids:
                return iter(())
            source, ids = ids, self._start
            longest = self._model.source_length or self.max_length
            self._check_length(prompt, source, longest)
        else:
            source = []
            self._check_length(prompt, ids, self.max_length - 1)
        count = self.max_length - len(ids)
        if max_tokens is not None:
            count = min(count, max_tokens)
        state = _State(self._model, source, self._pad)
        state.read(ids[:-1])
        if num_beams > 1:
            return iter(self._search(state, ids[-1], count, num_beams))
        return self._walk(state, ids[-1], count, choose)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without those that have none."""
        pieces = self._tokenizer.size
        return self._tokenizer.decode(
            [i for i in ids if i not in self._special and i < pieces]
        )

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            try:
                ids = [operator.index(i) for i in prompt]
            except TypeError:
                raise TypeError(
                    "`prompt` must be one text, or token ids. "
                    f"Received: prompt={prompt!r}"
                ) from None
        else:
            ids = self._tokenizer.encode(prompt)
            if not self._model.translates:
                ids = [*self._start, *ids]
            elif ids:
                ids = [*self._source_start, *ids, self._stop[0]]
        wrong = [i for i in ids if not 0 <= i < self.vocabulary_size]
        if wrong:
            raise ValueError(
                f"`prompt` must have ids from 0 to {self.vocabulary_size - 1}. "
                f"Received: {wrong[:5]}"
            )
        return ids

    def _check_length(self, prompt: Any, ids: list[int], longest: int) -> None:
        if not 1 <= len(ids) <= longest:
            raise ValueError(
                f"`prompt` must have 1 to {longest} tokens, those that start "
                f"and end it included. Received: {len(ids)} tokens, "
                f"prompt={prompt!r}"
            )

    def _walk(
        self,
        state: _State,
        token: int,
        count: int,
        choose: Callable[[np.ndarray], int],
    ) -> Iterator[int]:
        for _ in range(count):
            token = choose(state.step([token])[0])
            if token in self._stop:
                break
            yield token

    def _search(
        self, state: _State, token: int, count: int, num_beams: int
    ) -> list[int]:
        """The likeliest hypothesis found."""
        state.repeat(num_beams)
        tokens = np.full(num_beams, token)
        ids = np.full((num_beams, count), self._pad)
        finished = np.zeros(num_beams, bool)
        # All hypotheses start alike: only the first one counts.
        totals = np.full(num_beams, -1e9, "float32")
        totals[0] = 0.0
        for index in range(count):
            scores = _log_softmax(state.step(tokens))
            # What is finished goes on with padding, at no cost.
            scores[finished] = -np.inf
            scores[finished, self._pad] = 0.0
            scores += totals[:, None]
            totals, best = _take_largest(scores.reshape(-1), num_beams)
            parents, tokens = np.divmod(best, scores.shape[1])
            if (parents != np.arange(num_beams)).any():
                ids, finished = ids[parents], finished[parents]
                state.choose(parents)
            ids[:, index] = tokens
            finished |= np.isin(tokens, self._stop)
            if finished.all():
                break
        found = ids[np.argmax(totals)]
        stops = np.flatnonzero(np.isin(found, self._stop))
        return found[: stops[0] if stops.size else count].tolist()

    def _texts(self, ids: Iterable[int]) -> Iterator[str]:
        known: list[int] = []
        shown = ""
        for token in ids:
            known.append(token)
            text = self.decode(known)
            # Not yet, where a letter is still to be completed.
            if text.startswith(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        yield self.decode(known)[len(shown) :]


# The model


def _interpreter(parts: _Parts, path: Path, num_threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    where: dict[str, Any] = {"model_content": parts.model}
    if parts.is_whole_file:  # which is mapped, rather than held in memory
        where = {"model_path": str(path)}
    try:
        interpreter = Interpreter(**where, num_threads=num_threads)
        interpreter.get_signature_list()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "`model_path` must be a LiteRT file, and complete. Received: "
            f"model_path={str(path)!r}; LiteRT says: {error}"
        ) from error
    return interpreter


class _Model:
    """The signatures of a file, known by the names of their tensors.

    What `decode` has among inputs and outputs are caches: zeros at first, then
    what the last step returned. Inputs with the name of an output of `encode`
    get what that returned.
    """

    def __init__(self, interpreter: Any, path: Path) -> None:
        signatures = interpreter.get_signature_list()
        inputs = set(signatures.get("decode", {}).get("inputs", ()))
        outputs = set(signatures.get("decode", {}).get("outputs", ()))
        caches = inputs & outputs
        known = set(signatures.get("encode", {}).get("outputs", ()))
        rest = inputs - caches - known
        self.translates = rest == {"token", "position"}
        if (
            not caches
            or outputs != caches | {"logits"}
            or not (self.translates or rest == {"tokens", "input_pos"})
        ):
            raise ValueError(
                "`model_path` must have the signatures of "
                "`export_litert_seq2seq`, `encode` and `decode`, or of "
                "`export_litertlm`. Received: "
                f"model_path={str(path)!r} with signatures {signatures}"
            )
        names = ("token", "position"), ("tokens", "input_pos")
        self.token, self.position = names[not self.translates]
        self.decode = interpreter.get_signature_runner("decode")
        details = self.decode.get_input_details()
        self.caches = {
            name: details[name]["shape_signature"][1:] for name in caches
        }
        self.known = known & inputs
        self.takes_one = details[self.token]["shape_signature"][0] == 1
        logits = self.decode.get_output_details()["logits"]
        self.vocabulary_size = int(logits["shape_signature"][-1])
        self.source_length = 0
        if self.translates:
            self.encode = interpreter.get_signature_runner("encode")
            source = self.encode.get_input_details()["source"]
            self.source_length = max(int(source["shape_signature"][1]), 0)
        prefills = [
            interpreter.get_signature_runner(name)
            for name in signatures
            if name.startswith("prefill")
        ]
        # By the tokens that they read at once, the most first.
        self.prefills = sorted(
            ((int(p.get_input_details()["tokens"]["shape"][1]), p))
            for p in prefills
        )[::-1]


class _State:
    """What is known of a text: its source, and caches of its tokens."""

    def __init__(self, model: _Model, source: list[int], pad_id: int) -> None:
        self._model = model
        self._position = 0
        self._known = {}
        if model.translates:
            length = model.source_length or len(source)
            padded = source + [pad_id] * (length - len(source))
            found = model.encode(source=np.array([padded], "int32"))
            self._known = {name: found[name] for name in model.known}
        self._caches = {
            name: np.zeros((1, *shape), "float32")
            for name, shape in model.caches.items()
        }

    def read(self, ids: list[int]) -> None:
        """Takes tokens in, in pieces as large as there are."""
        for length, prefill in self._model.prefills:
            while len(ids) >= length:
                positions = np.arange(length) + self._position
                self._caches = prefill(
                    tokens=np.array([ids[:length]], "int32"),
                    input_pos=positions.astype("int32"),
                    **self._caches,
                )
                self._position += length
                ids = ids[length:]
        for token in ids:
            self.step([token])

    def step(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """The logits after one token of each hypothesis."""
        model = self._model
        rows = np.array(tokens, "int32")[:, None]
        position = np.array([self._position], "int32")
        self._position += 1

        def decode(chosen: slice) -> dict[str, np.ndarray]:
            caches = {name: c[chosen] for name, c in self._caches.items()}
            inputs = {model.token: rows[chosen], model.position: position}
            return model.decode(**inputs, **self._known, **caches)

        if model.takes_one:
            parts = [decode(slice(i, i + 1)) for i in range(len(rows))]
            found = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
        else:
            found = decode(slice(None))
        logits = found.pop("logits")
        self._caches = found
        return logits.reshape(len(rows), -1)

    def repeat(self, count: int) -> None:
        self.choose(np.zeros(count, int))

    def choose(self, rows: np.ndarray) -> None:
        """Goes on with some of the hypotheses."""
        self._caches = {name: c[rows] for name, c in self._caches.items()}


# Choosing a token


def _likeliest(logits: np.ndarray) -> int:
    return int(logits.argmax())


def _chooser(
    max_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    num_beams: int,
    seed: int | None,
) -> Callable[[np.ndarray], int]:
    """Checks the options; takes the likeliest token, or draws one."""
    _at_least_one("num_beams", num_beams)
    if max_tokens is not None:
        _at_least_one("max_tokens", max_tokens)
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(
            "`temperature` must be a number of at least 0. "
            f"Received: temperature={temperature!r}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            "`top_p` must be a number above 0, and 1 at most. "
            f"Received: top_p={top_p!r}"
        )
    if top_k is not None:
        _at_least_one("top_k", top_k)
    if temperature == 0 or (temperature, top_k, top_p) == (None, None, None):
        return _likeliest
    if num_beams > 1:
        raise ValueError(
            "`num_beams` must be 1 where tokens are drawn. Received: "
            f"num_beams={num_beams}, temperature={temperature}, "
            f"top_k={top_k}, top_p={top_p}"
        )
    divisor = 1.0 if temperature is None else temperature
    share = 1.0 if top_p is None else top_p
    random = np.random.default_rng(seed)

    def draw(logits: np.ndarray) -> int:
        order = np.argsort(-logits, kind="stable")[:top_k]
        shares = np.exp(_log_softmax(logits[order].astype(float) / divisor))
        # Of the likeliest, all that begin within the share.
        shares[shares.cumsum() - shares >= share] = 0.0
        return int(random.choice(order, p=shares / shares.sum()))

    return draw


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


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


def _at_least_one(argument: str, value: int) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"`{argument}` must be an integer, 1 or more. "
            f"Received: {argument}={value!r}"
        )


# The file


class _Parts(NamedTuple):
    """The model in a file, its tokenizer by the name of its kind, settings."""

    model: bytes
    is_whole_file: bool  # but for what follows it
    tokenizer: dict[str, bytes]
    settings: dict[str, Any]


def _read_parts(path: Path) -> _Parts:
    """Takes a file apart, and refuses what is not as it was written."""
    content = path.read_bytes()
    try:
        if content.startswith(_BUNDLE_MAGIC):
            parts, digest = _read_bundle(content)
        else:
            parts, digest = _read_zip(path, content)
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
        *(RuntimeError, ValueError, KeyError, IndexError, TypeError),
    ) as error:
        raise ValueError(
            "`model_path` must be complete and as it was written. Received: "
            f"model_path={str(path)!r} with damaged parts ({error})"
        ) from error
    if digest and hashlib.sha256(parts.model).hexdigest() != digest:
        raise ValueError(
            "`model_path` must be as it was written. Received: "
            f"model_path={str(path)!r}, whose model is damaged"
        )
    return parts


def _read_zip(path: Path, content: bytes) -> tuple[_Parts, str]:
    """A LiteRT file, with associated files in a zip at its end."""
    if not zipfile.is_zipfile(path):
        return _Parts(content, True, {}, {}), ""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        # As they are in the file, they cannot be more than it.
        if any(info.compress_type for info in infos):
            raise ValueError("they are compressed")
        members = {info.filename: archive.read(info) for info in infos}
    start = min((info.header_offset for info in infos), default=len(content))
    kinds = {SENTENCEPIECE, BYTE_PAIRS} & set(members)
    settings = json.loads(members.get(SETTINGS, "{}"))
    digest = members.get(DIGEST, b"").decode()
    tokenizer = {kind: members[kind] for kind in kinds}
    return _Parts(content[:start], True, tokenizer, settings), digest


def _read_bundle(content: bytes) -> tuple[_Parts, str]:
    """A bundle: a header that names the sections, a FlatBuffer, and these."""
    from flatbuffers import number_types
    from flatbuffers.table import Table

    # Numbers of fields and types, of LiteRT-LM's schema.
    model_type, pieces_type, pairs_type = 3, 4, 6

    def children(table: Table, field: int) -> list[Table]:
        offset = table.Offset(4 + 2 * field)
        start = table.Vector(offset)
        return [
            Table(table.Bytes, table.Indirect(start + 4 * i))
            for i in range(table.VectorLen(offset))
        ]

    def child(table: Table, field: int) -> Table:
        offset = table.Offset(4 + 2 * field)
        return Table(table.Bytes, table.Indirect(table.Pos + offset))

    def string(table: Table, field: int) -> str:
        offset = table.Offset(4 + 2 * field)
        return table.String(table.Pos + offset).decode()

    (end,) = struct.unpack_from("<Q", content, 24)
    root = Table(bytearray(content[32:end]), 0)
    root.Pos = root.Indirect(0)
    sections = {}
    for section in children(child(root, 1), 0):
        first = section.GetSlot(6, 0, number_types.Uint64Flags)
        last = section.GetSlot(8, 0, number_types.Uint64Flags)
        kind = section.GetSlot(10, 0, number_types.Uint8Flags)
        if last > len(content):
            raise ValueError("it is cut short")
        sections[kind] = content[first:last]
    settings = {}
    for entry in children(child(root, 0), 0):
        if string(entry, 0) == BUNDLE_SETTINGS:
            settings = json.loads(string(child(entry, 2), 0))
    tokenizer = {}
    if pieces_type in sections:
        tokenizer[SENTENCEPIECE] = sections[pieces_type]
    elif pairs_type in sections:
        tokenizer[BYTE_PAIRS] = zlib.decompress(sections[pairs_type][8:])
    parts = _Parts(sections[model_type], False, tokenizer, settings)
    return parts, settings.get("sha256", "")


class _Tokenizer(NamedTuple):
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    size: int


def _tokenizer(parts: _Parts, path: Path) -> _Tokenizer:
    if not parts.tokenizer or not parts.settings:
        raise ValueError(
            "`model_path` must carry a tokenizer and settings, as files of "
            "`export_litert_seq2seq` and `export_litertlm` do, unless they are "
            f"cut short. Received: model_path={str(path)!r}"
        )
    ((kind, content),) = parts.tokenizer.items()
    try:
        if kind == BYTE_PAIRS:
            import tokenizers

            found = tokenizers.Tokenizer.from_str(content.decode())
            return _Tokenizer(
                lambda text: found.encode(text, add_special_tokens=False).ids,
                found.decode,
                found.get_vocab_size(),
            )
        import sentencepiece

        sentencepiece.set_min_log_level(3)  # it prints what it raises
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        return _Tokenizer(pieces.encode, pieces.decode, len(pieces))
    except ImportError as error:
        raise ImportError(
            f"The tokenizer of the model needs {error.name}: "
            f"pip install {error.name}"
        ) from error
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(
            "`model_path` must carry a tokenizer. Received: "
            f"{len(content):,} bytes in {str(path)!r}, of which its library "
            f"says: {error}"
        ) from error


# The command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line, without the usage that argparse prints."""
        self.exit(BAD_USE, f"{self.prog}: error: {message}\n")


def _parser(program: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program,
        description="Write or translate text with a LiteRT file.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="FILE",
        help="a file of export_litert_seq2seq or of export_litertlm",
    )
    add(
        "prompts",
        metavar="PROMPT",
        nargs="*",
        help="what to go on with, or to translate (default: standard input, "
        "one a line)",
    )
    add("--max-tokens", type=int, metavar="N", help="tokens to write, at most")
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="draw tokens, from logits divided by T (default: take the "
        "likeliest)",
    )
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw among the likeliest that have the probability P together",
    )
    add(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        dest="num_beams",
        help="hypotheses to keep, without drawing (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="of the draws")
    add("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    add("--json", action="store_true", help="one JSON object a prompt")
    return parser


def main(
    arguments: Sequence[str] | None = None, program: str | None = None
) -> int:
    """Runs the command line.

    Args:
        arguments: Arguments after the program's name.
        program: The program's name.

    Returns:
        The exit status: 0; 1 where a prompt could not be read; 2 after one
        line on standard error; 130 when interrupted.
    """
    parser = _parser(program)
    options = vars(parser.parse_intermixed_args(arguments))
    paths = options.pop("model"), options.pop("threads")
    prompts, as_json = options.pop("prompts"), options.pop("json")
    try:
        _chooser(**options)
        runner = Runner(*paths)
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8")
        status = 0
        for number, prompt in enumerate(prompts or sys.stdin, 1):
            try:
                _write(runner, prompt.strip(), as_json, options)
            except ValueError as error:
                print(flush=True)  # lines of both texts stay in step
                print(f"error in prompt {number}: {error}", file=sys.stderr)
                status = 1
        return status
    except (ImportError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print(flush=True)
        return INTERRUPTED


def _write(
    runner: Runner, prompt: str, as_json: bool, options: dict[str, Any]
) -> None:
    if as_json:
        ids = list(runner.stream_ids(prompt, **options))
        text = runner.decode(ids)
        print(json.dumps({"prompt": prompt, "text": text, "ids": ids}))
        return
    for piece in runner.stream(prompt, **options):
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
