"""Which faults are tried on the tests, and what is said of them."""

import ast
import collections
import json

import pytest

from tests.stress.mutation import mutants as mutants_module
from tests.stress.mutation.mutants import all_mutants
from tests.stress.mutation.report import write_report

MODULE = """\
from __future__ import annotations

LIMIT: int | None = 3


class Counter:
    @property
    def total(self) -> int | None:
        return self.first + self.second if self.first > LIMIT else None


def repeat(text: str | bytes, times: int = 2):
    for _ in range(times):
        print(text)
    print(text)
    if not text:
        raise ValueError("nothing")
"""


@pytest.fixture
def module(monkeypatch, tmp_path):
    path = tmp_path / "keras_distilled_embedding" / "factorization" / "code.py"
    path.parent.mkdir(parents=True)
    path.write_text(MODULE)
    monkeypatch.setattr(mutants_module, "ROOT", tmp_path)
    return "keras_distilled_embedding/factorization/code.py"


def test_one_mutant_for_each_place_and_kind(module):
    mutants = all_mutants(seed=0)
    kinds = collections.Counter(m.operator.split("_")[0] for m in mutants)
    assert kinds == {
        "NumberReplacer": 2,  # of them the default, not the types
        "ReplaceBinaryOperator": 1,
        "ReplaceComparisonOperator": 1,
        "RemoveDecorator": 1,
        "ZeroIterationForLoop": 1,
        "AddNot": 2,  # of the condition, of the choice
        "ReplaceUnaryOperator": 1,
    }
    for mutant in mutants:
        assert mutant.module == module
        assert mutant.code != MODULE
        ast.parse(mutant.code)


def test_mutants_are_known_by_their_place_and_their_change(module):
    by_name = {mutant.name: mutant for mutant in all_mutants(seed=0)}
    loop = by_name[f"{module} repeat\n- for _ in range(times):\n+ for _ in []:"]
    assert list(loop.lines) == [13]
    assert list(loop.definition) == list(range(12, 18))
    decorator = by_name[f"{module} Counter.total\n- @property"]
    assert decorator.lines[0] == 7
    assert list(decorator.definition) == [7, 8, 9]


def test_a_seed_draws_always_the_same(module):
    assert all_mutants(seed=0) == all_mutants(seed=0)
    assert all_mutants(seed=0) != all_mutants(seed=1)


def test_the_report_has_a_reason_for_each_survivor(tmp_path):
    names = [f"package/module.py f\n- {n}\n+ {n + 1}" for n in range(5)]
    outcomes = ("survived", "unreached", "survived", "killed", "hung")
    records = [
        {"name": name, "outcome": outcome}
        for name, outcome in zip(names, outcomes)
    ]
    reasons = {"It does not matter.": [names[0], names[3]]}
    (tmp_path / "reasons.json").write_text(json.dumps(reasons))
    unexplained = write_report(records, 7, 0, tmp_path)
    assert unexplained == names[1:3]
    report = (tmp_path / "report.md").read_text()
    assert "5 of 7 mutants" in report
    assert "| module.py | 5 | 1 | 1 | 2 | 1 |" in report
    explained, rest = report.split("**Not explained.**")
    assert "**1.** It does not matter." in explained
    assert "- 0\n+ 1" in explained
    assert "- 3\n+ 4" not in report  # killed since
    assert "- 1\n+ 2" in rest
    assert "- 2\n+ 3" in rest
