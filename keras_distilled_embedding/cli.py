"""The command line: inspect, compress and export saved models.

    keras-distilled-embedding inspect MODEL
    keras-distilled-embedding compress MODEL -o OUT --compression 8
    keras-distilled-embedding export MODEL -o OUT.tflite

Results go to standard output, as text or with `--json` for machines; what is
being done goes to standard error. Exits with 2 and one line on bad use.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from keras_distilled_embedding._utils.files import check_destination

if TYPE_CHECKING:
    import keras

PROGRAM = "keras-distilled-embedding"
BAD_USE = 2
# EOFError is NumPy's, of an empty file.
_BAD_USES = (
    EOFError,
    ImportError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Those after the program's name; by default the process's.

    Returns:
        The exit status: 0, or 2 after one line on standard error.
    """
    options = _parser().parse_args(arguments)
    try:
        for module in options.imports:
            _import(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options.run(options)
    except _BAD_USES as error:
        line = " ".join(str(error).split())
        line = line.replace(
            "Or give them as `custom_objects`",
            "Name their module with --import",
        )
        print(f"{PROGRAM} {options.command}: error: {line}", file=sys.stderr)
        return BAD_USE
    return 0


def _parser() -> argparse.ArgumentParser:
    from keras_distilled_embedding.version import __version__

    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Makes the vocabulary tables of saved Keras models 8 to "
        "64 times smaller, and exports them for phones.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "model", help="a file of model.save() or of save_model()"
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
        help="a module that registers classes of the model; may be repeated",
    )
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="file to write"
    )

    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="list a model's tables, and what can be saved",
        description="Lists the tables of a model: how large they are, their "
        "share of the model, and the rank that a compression takes.",
    )
    inspect.set_defaults(run=_inspect)
    inspect.add_argument(
        "--compression", type=float, default=8.0, help="times smaller (8)"
    )

    compress = commands.add_parser(
        "compress",
        parents=[common, output],
        help="replace a model's tables by factors",
        description="Replaces the tables of a model by factors and saves the "
        "result, to be fine-tuned (keras_distilled_embedding.Distiller).",
    )
    compress.set_defaults(run=_compress)
    size = compress.add_mutually_exclusive_group()
    size.add_argument(
        "--compression", type=float, default=8.0, help="times smaller (8)"
    )
    size.add_argument("--rank", type=int, help="of every table, instead")
    size.add_argument(
        "--max-bytes", type=int, help="of all factors together, instead"
    )
    size.add_argument(
        "--max-error",
        type=float,
        help="share of its energy that a table may lose, instead",
    )
    compress.add_argument(
        "--quantization",
        choices=["int8", "int4", "auto"],
        help="how the file of `export` is to store the factors; auto: as "
        "--max-bytes is used best",
    )
    compress.add_argument(
        "--min-speedup",
        type=float,
        metavar="TIMES",
        help="fewer multiplications for the projection, at least",
    )
    compress.add_argument(
        "--activation",
        choices=["relu", "none"],
        default="relu",
        help="f in E ~ f(U) W",
    )
    compress.add_argument(
        "--method", choices=["exact", "learned"], default="exact"
    )
    compress.add_argument(
        "--layer",
        dest="layers",
        action="append",
        metavar="NAME",
        help="a layer to replace (all); may be repeated",
    )
    compress.add_argument(
        "--min-parameters",
        type=int,
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
        "--token-frequencies",
        metavar="FILE",
        help=".npy file, how often each token occurs",
    )
    compress.add_argument(
        "--plot", metavar="PICTURE", help="draw the bytes before and after"
    )

    export = commands.add_parser(
        "export",
        parents=[common, output],
        help="write a LiteRT (TFLite) file",
        description="Writes a LiteRT (TFLite) file with one copy of each "
        "table and built-in operators only.",
    )
    export.set_defaults(run=_export)
    export.add_argument(
        "--quantization",
        choices=["none", "int8", "int4"],
        help="of the weights (as the model was compressed for; none: float32)",
    )
    export.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="the one length of sequences, for models that need one",
    )
    return parser


def _inspect(options: argparse.Namespace) -> None:
    from keras_distilled_embedding.inspection import inspect_model

    model = _load(options.model)
    inspection = inspect_model(model, options.compression)
    _print(inspection, options.json)


def _compress(options: argparse.Namespace) -> None:
    import numpy as np

    import keras_distilled_embedding as kde

    check_destination("--output", Path(options.output))
    frequencies = None
    if options.token_frequencies is not None:
        frequencies = np.load(options.token_frequencies, allow_pickle=False)
    model = _load(options.model)
    with _doing("Factorising"):
        student = kde.compress(
            model,
            options.compression,
            rank=options.rank,
            max_bytes=options.max_bytes,
            max_error=options.max_error,
            activation=None if options.activation == "none" else "relu",
            method=options.method,
            layers=options.layers,
            min_parameters=options.min_parameters,
            heads=options.heads,
            token_frequencies=frequencies,
            quantization=options.quantization,
            min_speedup=options.min_speedup,
            verbose=0,
        )
    report = kde.compression_report(student, model)
    if options.plot is not None:
        report.plot(options.plot)
    with _doing(f"Writing {options.output}"):
        kde.save_model(student, options.output)
    _print(report, options.json)


def _export(options: argparse.Namespace) -> None:
    import keras_distilled_embedding as kde

    check_destination("--output", Path(options.output))
    quantization = options.quantization
    if quantization == "none":
        quantization = "float32"
    model = _load(options.model)
    with _doing(f"Writing {options.output}"):
        report = kde.export_litert(
            model,
            options.output,
            quantization=quantization,
            sequence_length=options.sequence_length,
            verbose=False,
        )
    _print(report, options.json)


def _load(path: str) -> keras.Model:
    # An error costs nothing, the import seconds.
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path!r}")
    with _doing(f"Loading {path}"):
        import keras_distilled_embedding as kde

        return kde.load_model(path)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the module does
        raise ImportError(
            f"--import {module}: {type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def _doing(what: str) -> Iterator[None]:
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


if __name__ == "__main__":
    sys.exit(main())
