"""Command line of the main job: `python -m examples.nmt --help`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from keras_distilled_embedding_cli import quiet_frameworks


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nmt",
        description=(
            "Trains a small Transformer that translates, makes its table "
            "smaller, distills it, writes LiteRT files, translates with them, "
            "and prints what was gained and lost. Run again, it goes on where "
            "it stopped."
        ),
    )
    add = parser.add_argument
    add(
        "--dataset",
        choices=("cldr", "multi30k"),
        default="cldr",
        help="English-German: generated phrases, or image captions",
    )
    add("--data-dir", help="folder of Multi30k's .gz files (else: download)")
    add("--source", metavar="FILE", help="your own text, a sentence a line")
    add("--target", metavar="FILE", help="its translation, line by line")
    add("--work-dir", help="folder of the results (runs/DATASET)")
    add("--quick", action="store_true", help="a toy of a minute, for tests")
    sizes = parser.add_argument_group("sizes (defaults: the data set's own)")
    add = sizes.add_argument
    add("--compression", type=float, help="fewer bytes of the table (16)")
    add("--vocabulary-size", type=int, help="joint SentencePiece pieces")
    add("--d-model", type=int, help="width of the table")
    add("--num-layers", type=int, help="layers of encoder and decoder each")
    add("--num-heads", type=int, help="attention heads")
    add("--feed-forward-dim", type=int, help="feed-forward hidden units")
    add("--dropout", type=float, help="dropout of the teacher's training")
    add("--student-dropout", type=float, help="dropout of the distillation")
    add("--teacher-epochs", type=int)
    add("--student-epochs", type=int)
    add("--max-pairs", type=int, help="training pairs to use (all)")
    add("--num-beams", type=int, help="above 1: score beam search too")
    add("--seed", type=int)
    options = parser.parse_args(arguments)
    if (options.source is None) != (options.target is None):
        parser.error("--source and --target: give both, or none")
    if options.source is not None:
        options.dataset = "files"
        for name in ("source", "target"):
            if not Path(getattr(options, name)).is_file():
                parser.error(f"--{name}: no file {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with quiet_frameworks():
            _run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run again to go on", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    from .pipeline import PRESETS
    from .pipeline import QUICK
    from .pipeline import Run

    settings = PRESETS[options.dataset]
    if options.quick:
        settings = replace(settings, **QUICK)
    given = {
        key: value
        for key, value in vars(options).items()
        if value is not None and hasattr(settings, key)
    }
    for model in ("teacher", "student"):
        schedule = {
            key: value
            for key in ("epochs", "dropout")
            if (value := getattr(options, f"{model}_{key}", None)) is not None
        }
        given[model] = replace(getattr(settings, model), **schedule)
    work_dir = options.work_dir or (
        f"runs/{options.dataset}{'-quick' if options.quick else ''}"
    )
    Run(replace(settings, **given), work_dir, data_dir=options.data_dir).run()


if __name__ == "__main__":
    sys.exit(main())
