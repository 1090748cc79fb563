"""Command line of the main job: `python -m examples.nmt --help`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

# Before TensorFlow is imported: its start-up log is not news to a user.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.nmt",
        description=(
            "Trains a small English-German Transformer, makes its table 8x "
            "smaller, distills it, exports it to LiteRT, and prints what was "
            "gained and lost. Run again, it goes on where it stopped."
        ),
    )
    add = parser.add_argument
    add("--dataset", choices=("cldr", "multi30k"), default="cldr")
    add("--data-dir", help="folder of Multi30k's .gz files (else: download)")
    add("--work-dir", help="folder of the results (runs/DATASET)")
    add("--quick", action="store_true", help="a toy of a minute, for tests")
    sizes = parser.add_argument_group("sizes (defaults: the data set's own)")
    add = sizes.add_argument
    add("--vocabulary-size", type=int, help="joint SentencePiece pieces")
    add("--d-model", type=int, help="width of the table")
    add("--num-layers", type=int, help="layers of encoder and decoder each")
    add("--num-heads", type=int, help="attention heads")
    add("--feed-forward-dim", type=int, help="feed-forward hidden units")
    add("--dropout", type=float, help="dropout of the teacher's training")
    add("--student-dropout", type=float, help="dropout of the distillation")
    add("--compression", type=float, help="times smaller (8)")
    add("--activation", choices=("relu", "none"), help="f in E ~ f(U) W")
    add("--teacher-epochs", type=int)
    add("--student-epochs", type=int)
    add("--num-beams", type=int, help="above 1: score beam search too")
    add("--seed", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
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
    if given.get("activation") == "none":
        given["activation"] = None
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
    try:
        Run(
            replace(settings, **given), work_dir, data_dir=options.data_dir
        ).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
