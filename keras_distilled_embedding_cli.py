"""The command line: inspect, compress and export models, and run them.

    keras-distilled-embedding inspect MODEL
    keras-distilled-embedding compress MODEL -o OUT --compression 8
    keras-distilled-embedding export MODEL -o OUT.tflite
    keras-distilled-embedding export MODEL -o OUT.litertlm
    keras-distilled-embedding generate FILE "A prompt"

Results go to standard output, as text or with `--json` for machines; progress
goes to standard error. The exit status is 2, after one line, on bad use.

This module stands beside the package, not in it: importing anything of the
package imports Keras, which starts TensorFlow and takes seconds. Here `--help`
and every error that needs no model come first, and the package is imported
only when there is work for it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any
from typing import NoReturn

if TYPE_CHECKING:
    import keras

PROGRAM = "keras-distilled-embedding"
BAD_USE = 2
_REPORTED_ERRORS = (ImportError, OSError, RuntimeError, TypeError, ValueError)
_PICTURES = (".pdf", ".png", ".svg")
_BUNDLE = ".litertlm"
# absl's lines, as in "I0000 00:00:1700000000.123456    12 port.cc:153] ...",
# and LiteRT's.
_NATIVE_NOTE = re.compile(
    rb"[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before absl|INFO: "
)
MAX_LENGTH = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Arguments after the program's name. Defaults to those of
            the process.

    Returns:
        The exit status: 0, or 2 after one line on standard error. Those of
        `generate` are of `keras_distilled_embedding_runner.main`.
    """
    arguments = sys.argv[1:] if arguments is None else [*arguments]
    if arguments[:1] == ["generate"]:
        # The runner is one file, and has its own command line.
        import keras_distilled_embedding_runner as runner

        return runner.main(arguments[1:], f"{PROGRAM} generate")
    options = _parser().parse_args(arguments)
    try:
        with quiet_frameworks(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options.run(options)
    except _REPORTED_ERRORS as error:
        message = " ".join(str(error).split())
        if "Could not locate" in message:
            message += " Name the module that registers it with --import."
        print(f"{PROGRAM} {options.command}: error: {message}", file=sys.stderr)
        return BAD_USE
    return 0


def _inspect(options: argparse.Namespace) -> None:
    model = _load(options)
    import keras_distilled_embedding as kde

    sizes = [options.compression] if options.compression else []
    with _progress("Planning"):
        inspection = kde.inspect_model(
            model,
            *sizes,
            calibration_data=_calibration_data(options, model),
            verbose=0,
        )
    _print(inspection, options.json)


def _compress(options: argparse.Namespace) -> None:
    model = _load(options)
    import keras_distilled_embedding as kde

    with _progress("Factorizing"):
        student = kde.compress(
            model,
            options.compression,
            rank=options.rank,
            max_bytes=options.max_bytes,
            max_error=options.max_error,
            min_speedup=options.min_speedup,
            quantization=_unless_none(options.quantization),
            activation=_unless_none(options.activation),
            method=options.method,
            calibration_data=_calibration_data(options, model),
            layers=options.layers,
            min_parameters=options.min_parameters,
            heads=options.heads,
            verbose=0,
        )
    report = kde.compression_report(student, model)
    if options.plot is not None:
        report.plot(options.plot)
    with _progress(f"Writing {options.output}"):
        kde.save_model(student, options.output)
    _print(report, options.json)


def _export(options: argparse.Namespace) -> None:
    quantization = options.quantization
    if quantization == "none":
        quantization = "float32"
    common = {"quantization": quantization, "verbose": False}
    sizes = {
        "sequence_length": options.sequence_length,
        "batch_size": options.batch_size,
    }
    is_bundle = Path(options.output).suffix == _BUNDLE
    writes = is_bundle or options.max_length is not None
    if writes and any(sizes.values()):
        raise ValueError(
            "A model that writes takes one text of up to --max-length tokens: "
            "leave --sequence-length and --batch-size out"
        )
    model = _load(options)
    import keras_distilled_embedding as kde

    export: Callable[..., Any] = kde.export_litert
    if writes:
        export = kde.export_litert_seq2seq
        if is_bundle:
            export = kde.export_litertlm
        sizes = {"max_length": options.max_length or MAX_LENGTH}
    with _progress(f"Writing {options.output}"):
        report = export(model, options.output, **sizes, **common)
    _print(report, options.json)


def _load(options: argparse.Namespace) -> keras.Model:
    for module in options.imports:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module does
            raise ImportError(
                f"--import {module}: {type(error).__name__}: {error}"
            ) from error
    with _progress(f"Loading {options.model}"):
        import keras_distilled_embedding as kde

        return kde.load_model(options.model)


def _calibration_data(
    options: argparse.Namespace, model: keras.Model
) -> list[str] | None:
    """The paragraphs of `--calibrate`, if it is given."""
    if options.calibrate is None:
        return None
    if getattr(model, "preprocessor", None) is None:
        raise ValueError(
            "--calibrate needs a model with a preprocessor, which makes "
            f"tokens of a text. Received: model '{model.name}' without one"
        )
    text = Path(options.calibrate).read_text(encoding="utf-8")
    paragraphs = [line for line in text.splitlines() if line.strip()]
    if not paragraphs:
        raise ValueError(
            "--calibrate needs a file with a paragraph a line. Received: "
            f"{options.calibrate!r}, which has none"
        )
    return paragraphs


@contextlib.contextmanager
def quiet_frameworks() -> Iterator[None]:
    """Keeps what TensorFlow and LiteRT note for their developers to itself.

    They write past Python, to the descriptor of standard error, whatever
    TF_CPP_MIN_LOG_LEVEL says; what is no such note passes. Everything is
    shown where that variable is 0.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    terminal, python_stderr = os.dup(2), sys.stderr
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def pass_on() -> None:
        with open(reading, "rb") as lines:
            for line in lines:
                if not _NATIVE_NOTE.match(line):
                    os.write(terminal, line)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    if _is_standard_error(python_stderr):
        # Python's own words need not take the detour.
        sys.stderr = os.fdopen(terminal, "w", buffering=1, closefd=False)
    try:
        yield
    finally:
        sys.stderr = python_stderr
        os.dup2(terminal, 2)  # the pipe's last writer is gone: it ends
        thread.join(timeout=1.0)
        os.close(terminal)


def _is_standard_error(stream: Any) -> bool:
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return stream.fileno() == 2
    return False


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Says on standard error what is being done; moves on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield


def _print(report: Any, as_json: bool) -> None:
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)


def _unless_none(choice: str) -> str | None:
    return None if choice == "none" else choice


# Checks of arguments. They import nothing.


def _number(
    kind: Callable[[str], float],
    requirement: str,
    accepts: Callable[[float], bool],
) -> Callable[[str], float]:
    """Makes the argparse type of a number that must meet a requirement."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(
            f"must be {requirement}. Received: {text!r}"
        )

    return parse


_compression = _number(
    float, "a number greater than 1", lambda x: 1 < x < math.inf
)
_positive = _number(int, "an integer of at least 1", lambda x: x >= 1)
_count = _number(int, "an integer of at least 0", lambda x: x >= 0)
_share = _number(float, "a number between 0 and 1", lambda x: 0 < x < 1)
_speedup = _number(float, "a number of at least 1", lambda x: 1 <= x < math.inf)


def _model_file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    if not zipfile.is_zipfile(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a saved model, or not all of one: it is no "
            "archive of the .keras format"
        )
    return text


def _text_file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def _output_file(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be a file, not a folder. Received: {text!r}"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"the folder does not exist: make it first. Received: {text!r}"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(
            f"the folder cannot be written to. Received: {text!r}"
        )
    return text


def _picture_file(text: str) -> str:
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(
            f"must end in {' or '.join(_PICTURES)}. Received: {text!r}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "needs matplotlib: pip install 'keras-distilled-embedding[plots]'"
        )
    return _output_file(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with one line, without the usage that argparse prints."""
        self.exit(BAD_USE, f"{self.prog}: error: {message}\n")


class _Version(argparse.Action):
    """Prints the version of the installed package, without importing it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(importlib.metadata.version(PROGRAM))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Make the embedding tables of saved Keras models 8 to 64 "
        "times smaller, and export the models for phones.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the version"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    common = _Parser(add_help=False)
    common.add_argument(
        "model",
        type=_model_file,
        metavar="MODEL",
        help="a .keras file, of model.save() or of save_model()",
    )
    common.add_argument(
        "--json", action="store_true", help="print JSON, for machines"
    )
    common.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module that registers classes of the model; may be repeated",
    )
    data = _Parser(add_help=False)
    data.add_argument(
        "--calibrate",
        type=_text_file,
        metavar="FILE",
        help="text of the kind that the model will read, a paragraph a line: "
        "sizes are then planned by what the logits lose",
    )
    output = _Parser(add_help=False)
    output.add_argument(
        "-o",
        "--output",
        type=_output_file,
        required=True,
        metavar="OUT",
        help="file to write",
    )

    inspect = commands.add_parser(
        "inspect",
        parents=[common, data],
        help="list the tables of a model, and what can be saved",
        description="List the tables of a model and their share of it; then "
        "what compress would make of them: bytes, expected loss, "
        "multiplications. Nothing is compressed.",
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "--compression",
        type=_compression,
        action="append",
        metavar="TIMES",
        help="how many times smaller; may be repeated (default: 4, 8 and 16)",
    )

    compress = commands.add_parser(
        "compress",
        parents=[common, data, output],
        help="replace the tables of a model by factors",
        description="Replace the tables of a model by factors and save the "
        "result, to be fine-tuned with keras_distilled_embedding.Distiller.",
    )
    compress.set_defaults(run=_compress)
    size = compress.add_argument_group(
        "size", "At most one of:"
    ).add_mutually_exclusive_group()
    size.add_argument(
        "--compression",
        type=_compression,
        metavar="TIMES",
        help="how many times fewer bytes than in float32 (default: 8)",
    )
    size.add_argument(
        "--rank", type=_positive, metavar="RANK", help="rank of every table"
    )
    size.add_argument(
        "--max-bytes",
        type=_positive,
        metavar="BYTES",
        help="bytes of all factors together",
    )
    size.add_argument(
        "--max-error",
        type=_share,
        metavar="SHARE",
        help="share of its energy that a table may lose",
    )
    compress.add_argument(
        "--quantization",
        choices=["auto", "none", "int8", "int4", "int2"],
        default="auto",
        help="how the factors are stored; auto: as loses least (default)",
    )
    compress.add_argument(
        "--min-speedup",
        type=_speedup,
        metavar="TIMES",
        help="how many times fewer multiplications a projection takes, at "
        "least",
    )
    compress.add_argument(
        "--activation",
        choices=["relu", "none"],
        default="relu",
        help="f in E ~ f(U) W + c (default: relu)",
    )
    compress.add_argument(
        "--method",
        choices=["exact", "learned"],
        default="exact",
        help="closed form (default), or gradient descent",
    )
    compress.add_argument(
        "--layer",
        dest="layers",
        action="append",
        metavar="NAME",
        help="layer to replace; may be repeated (default: all)",
    )
    compress.add_argument(
        "--min-parameters",
        type=_count,
        default=0,
        metavar="N",
        help="leave smaller tables as they are",
    )
    compress.add_argument(
        "--heads",
        choices=["factorize", "tie"],
        help="replace dense layers that project to the vocabulary, too",
    )
    compress.add_argument(
        "--plot",
        type=_picture_file,
        metavar="PICTURE",
        help="draw the bytes before and after",
    )

    export = commands.add_parser(
        "export",
        parents=[common, output],
        help="write a LiteRT (TFLite) file, or a LiteRT-LM bundle",
        description="Write a LiteRT (TFLite) file with one copy of each table "
        "and built-in operators only; of a KerasHub language model, where OUT "
        f"ends in {_BUNDLE}, a bundle that the LiteRT-LM runtime runs; of a "
        "sequence-to-sequence model, with --max-length, a file that translates "
        "step by step.",
    )
    export.set_defaults(run=_export)
    export.add_argument(
        "--quantization",
        choices=["none", "int8", "int4", "int2"],
        help="of the weights (default: as the model was compressed for)",
    )
    export.add_argument(
        "--sequence-length",
        type=_positive,
        metavar="N",
        help="the one length of sequences, for models that need one",
    )
    export.add_argument(
        "--batch-size",
        type=_positive,
        metavar="N",
        help="the one size of batches, for models that need one",
    )
    export.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens of a prompt and its answer, in a bundle (default: "
        f"{MAX_LENGTH}); of a translation, in a file that translates",
    )

    commands.add_parser(
        "generate",
        help="write or translate text with an exported file",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
