"""BLEU and chrF of translations, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sacrebleu
from sacrebleu.significance import PairedTest

BOOTSTRAP_SAMPLES = 1_000


class Score(NamedTuple):
    """The BLEU of a text.

    Args:
        bleu: sacreBLEU, in points.
        ci: Half of its 95 % confidence interval, by bootstrap.
        p_value: That the baseline's is no other, by paired bootstrap; `None`
            of the baseline itself.
    """

    bleu: float
    ci: float
    p_value: float | None


def paired_scores(
    texts: Sequence[Sequence[str]], references: Sequence[str]
) -> list[Score]:
    """Scores translations of the same sentences.

    Args:
        texts: Translations; the first ones are the baseline.
        references: What they should be.
    """
    named = [(str(i), list(text)) for i, text in enumerate(texts)]
    if len(named) == 1:
        # There is nothing to pair: against itself, for the interval alone.
        named.append(("1", named[0][1]))
    metric = sacrebleu.metrics.BLEU(references=[list(references)])
    _, scores = PairedTest(
        named, {"BLEU": metric}, None, "bs", n_samples=BOOTSTRAP_SAMPLES
    )()
    return [
        Score(
            found.score,
            found.ci,
            # Where no sample differs, sacreBLEU would call it certain.
            1.0 if index and text == named[0][1] else found.p_value,
        )
        for index, ((_, text), found) in enumerate(
            zip(named[: len(texts)], scores["BLEU"])
        )
    ]


def chrf(text: Sequence[str], references: Sequence[str]) -> float:
    """The chrF2 of translations."""
    metric = sacrebleu.metrics.CHRF()
    return metric.corpus_score(list(text), [list(references)]).score


def signatures() -> tuple[str, str]:
    """sacreBLEU's own account of how BLEU and chrF are computed."""
    metrics = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
    for metric in metrics:
        metric.corpus_score(["a"], [["a"]])
    return tuple(str(metric.get_signature()) for metric in metrics)
