"""Translating with files, as a device does: one sentence at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from rich.progress import track

from keras_distilled_embedding_runner import Runner

from .data import Vocabulary
from .tokens import EOS_ID

# So many sentences by one file, then by the next: a busy moment of the
# machine slows all alike.
TURN = 50


@dataclass
class Translations:
    """What one file makes of a text.

    Args:
        lines: The translations.
        seconds: What they took, on one thread.
    """

    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ms_per_sentence(self) -> float:
        return 1_000 * self.seconds / len(self.lines)


def translate_by_turns(
    files: Mapping[str, Path],
    sentences: list[str],
    vocabulary: Vocabulary,
    max_length: int,
    num_beams: int = 1,
) -> dict[str, Translations]:
    """Translates a text with several files.

    Args:
        files: Files of `stepwise.write_file`, by name.
        sentences: The text. What is too long for the models is cut.
        vocabulary: Of the models.
        max_length: The longest sentence that the models take, in tokens.
        num_beams: Hypotheses that the search keeps.

    Returns:
        `Translations` by name.
    """
    prompts = _prompts(sentences, vocabulary, max_length)
    runners = {name: Runner(path) for name, path in files.items()}
    for runner in runners.values():
        runner.generate(prompts[0], num_beams=num_beams)  # warms it
    made = {name: Translations() for name in files}
    turns = [prompts[i : i + TURN] for i in range(0, len(prompts), TURN)]
    for turn in _progress(turns):
        for name, runner in runners.items():
            start = time.perf_counter()
            lines = [runner.generate(p, num_beams=num_beams) for p in turn]
            made[name].seconds += time.perf_counter() - start
            made[name].lines += lines
    return made


def _prompts(
    sentences: list[str], vocabulary: Vocabulary, max_length: int
) -> list[str | list[int]]:
    """Sentences; the ids of a beginning for those that are too long."""
    return [
        sentence if len(ids) <= max_length else [*ids[: max_length - 1], EOS_ID]
        for sentence, ids in zip(
            sentences, vocabulary.encode(sentences).to_list()
        )
    ]


def _progress(turns: list) -> Iterable:
    """A progress bar, on a terminal."""
    return track(
        turns, "Translating", transient=True, disable=not sys.stdout.isatty()
    )
