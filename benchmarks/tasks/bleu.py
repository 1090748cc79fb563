"""BLEU and chrF of translations, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sacrebleu
from sacrebleu.significance import PairedTest

BOOTSTRAP_SAMPLES = 1_000


def paired_scores(
    texts: Sequence[Sequence[str]], references: Sequence[str]
) -> list[Any]:
    """Scores translations of the same sentences by BLEU.

    Args:
        texts: Translations; the first ones are the baseline.
        references: What they should be.

    Returns:
        sacreBLEU's results: `score`, `ci`, half of the 95 % confidence
        interval, and `p_value`, that the baseline's score is no other, both
        by paired bootstrap.
    """
    named = [(str(i), list(text)) for i, text in enumerate(texts)]
    if len(named) == 1:
        # There is nothing to pair: against itself, for the interval alone.
        named.append(("1", named[0][1]))
    metric = sacrebleu.metrics.BLEU(references=[list(references)])
    _, scores = PairedTest(
        named, {"BLEU": metric}, None, "bs", n_samples=BOOTSTRAP_SAMPLES
    )()
    found = scores["BLEU"][: len(texts)]
    for (_, text), score in zip(named[1:], found[1:]):
        if text == named[0][1]:
            # Where no sample differs, sacreBLEU would call it certain.
            score.p_value = 1.0
    return found


def chrf(text: Sequence[str], references: Sequence[str]) -> float:
    """The chrF2 of translations."""
    metric = sacrebleu.metrics.CHRF()
    return metric.corpus_score(list(text), [list(references)]).score


def signatures() -> list[str]:
    """sacreBLEU's own account of how BLEU and chrF are computed."""
    metrics = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
    for metric in metrics:
        metric.corpus_score(["a"], [["a"]])
    return [str(metric.get_signature()) for metric in metrics]
