"""What became of the mutants, and why some survive."""

from __future__ import annotations

import collections
import json
from pathlib import Path

from benchmarks.harness.environment import environment
from benchmarks.harness.files import write_text

OUTCOMES = ("killed", "hung", "survived", "unreached")
ALIVE = ("survived", "unreached")


def write_report(
    records: list[dict], total: int, seed: int, output: Path
) -> list[str]:
    """Writes `report.md` into a folder that holds `reasons.json`.

    Args:
        records: Of each mutant tried, its `name` and its `outcome`.
        total: How many mutants there are.
        seed: What drew them.
        output: The folder. Its `reasons.json` has, for each reason why no
            test can or should kill a mutant, the names of those mutants.

    Returns:
        The names of the survivors without a reason.
    """
    reasons = read_reasons(output)
    alive = sorted(
        record["name"] for record in records if record["outcome"] in ALIVE
    )
    explained = {name for names in reasons.values() for name in names}
    unexplained = [name for name in alive if name not in explained]
    lines = [
        "# Mutants of factorization and distillation",
        "",
        f"`python -m tests.stress.mutation run`, seed {seed}: {len(records):,} "
        f"of {total:,} mutants, one for each place and kind of fault "
        f"(cosmic-ray's operators), in a random order. {environment()}.",
        "",
        "A mutant is tried on the tests that run its lines, on JAX; one that "
        "survives without a reason, again on TensorFlow, with the tests that "
        "the first run led to. Hung: it ran four times as long as the tests "
        "do. Unreached: no test runs the place.",
        "",
        *_table(records),
        "",
        f"## Why {len(alive)} survive",
        "",
    ]
    for reason, names in reasons.items():
        lines += _section(reason, [name for name in alive if name in names])
    lines += _section("**Not explained.**", unexplained)
    write_text(output / "report.md", "\n".join(lines).rstrip() + "\n")
    return unexplained


def read_reasons(output: Path) -> dict[str, list[str]]:
    """The names of the mutants that each reason excuses."""
    return json.loads((output / "reasons.json").read_text())


def _section(reason: str, names: list[str]) -> list[str]:
    if not names:
        return []
    lines = [f"**{len(names)}.** {reason}", ""]
    for name in names:
        place, _, change = name.partition("\n")
        place = place.removeprefix("keras_distilled_embedding/")
        lines += ["```diff", f"@@ {place} @@", *change.split("\n"), "```", ""]
    return lines


def _table(records: list[dict]) -> list[str]:
    by_module = collections.defaultdict(collections.Counter)
    for record in records:
        module = record["name"].split()[0].partition("/")[2]
        by_module[module][record["outcome"]] += 1
    rows = sorted(by_module.items())
    rows.append(("all", sum(by_module.values(), collections.Counter())))
    return [
        f"| module | mutants | {' | '.join(OUTCOMES)} |",
        "|---" + "|---:" * (1 + len(OUTCOMES)) + "|",
        *(
            f"| {module} | {counts.total()} | "
            + " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            + " |"
            for module, counts in rows
        ),
    ]
