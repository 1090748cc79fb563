"""The mutants: one small fault each, of every kind that cosmic-ray knows."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import mutate_code

ROOT = Path(__file__).parents[3]
MUTATED = ("factorization", "distillation")  # folders of the package

Position = tuple[int, int]  # line, from 1; column
Definition = ast.FunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A module with one fault."""

    name: str  # known by it also after lines have moved; see `_name`
    module: str  # its path, from the project's folder
    lines: range  # the place
    definition: range  # the lines of the function or class around it
    operator: str
    code: str  # of the whole module


def all_mutants(seed: int) -> list[Mutant]:
    """One mutant for each place and kind of fault, in a random order.

    A sum can become ten other operations, a comparison seven others: `seed`
    draws one of them for each place, and the order, so that the first N are
    a fair sample of all.
    """
    rng = random.Random(seed)
    paths = sorted(
        path
        for folder in MUTATED
        for path in (ROOT / "keras_distilled_embedding" / folder).rglob("*.py")
    )
    mutants = {
        mutant.name: mutant for path in paths for mutant in _mutants(path, rng)
    }
    return rng.sample(list(mutants.values()), len(mutants))


def _mutants(path: Path, rng: random.Random) -> Iterator[Mutant]:
    source = path.read_text()
    tree = ast.parse(source)
    never_run = _annotations(tree)
    kinds = defaultdict(list)
    for kind, place, *mutation in _mutations(source):
        if not any(_within(place, span) for span in never_run):
            kinds[kind, place].append(mutation)
    module = str(path.relative_to(ROOT))
    for (_, (first, last)), mutations in sorted(kinds.items()):
        operator, occurrence = rng.choice(mutations)
        try:
            code = mutate_code(
                source, plugins.get_operator(operator)(), occurrence
            )
            with warnings.catch_warnings(action="ignore"):
                compile(code, module, "exec")
        # It cannot replace `except module.Error`, and takes the lone `*` of
        # a signature for an operator.
        except (AttributeError, SyntaxError):
            continue
        lines = range(first[0], last[0] + 1)
        around = _definitions_around(tree, lines)
        yield Mutant(
            name=_name(module, around, source, code),
            module=module,
            lines=lines,
            definition=(
                _lines(around[-1])
                if around
                else range(1, source.count("\n") + 2)
            ),
            operator=operator.removeprefix("core/"),
            code=code,
        )


def _name(
    module: str, around: list[Definition], before: str, after: str
) -> str:
    """The module, the function, the lines taken away and put there."""
    changes = [
        f"{line[0]} {line[2:].strip()}"
        for line in difflib.ndiff(before.splitlines(), after.splitlines())
        if line[0] in "+-" and line[2:].strip()
    ]
    names = ".".join(node.name for node in around)
    return "\n".join([f"{module} {names}".strip(), *changes])


def _mutations(source: str) -> Iterator[tuple]:
    """The kind, the place, the operator and its occurrence, for each."""
    tree = get_ast(source)
    for name in plugins.operator_names():
        operator_class = plugins.get_operator(name)
        if operator_class.arguments():  # those need names of variables
            continue
        operator = operator_class()
        places = (
            place
            for node in ast_nodes(tree)
            for place in operator.mutation_positions(node)
        )
        for occurrence, place in enumerate(places):
            # As in "core/ReplaceBinaryOperator_Add_Sub".
            yield name.split("_")[0], place, name, occurrence


def _definitions_around(tree: ast.Module, lines: range) -> list[Definition]:
    """The functions and classes that hold a place, the innermost last."""
    return sorted(
        (
            node
            for node in ast.walk(tree)
            if isinstance(node, Definition)
            and lines[0] in _lines(node)
            and lines[-1] in _lines(node)
        ),
        key=lambda node: node.lineno,
    )


def _lines(node: Definition) -> range:
    """Its decorators' and its own."""
    first = min([node, *node.decorator_list], key=lambda each: each.lineno)
    return range(first.lineno, node.end_lineno + 1)


def _annotations(tree: ast.Module) -> list[tuple[Position, Position]]:
    """Where the types stand: with postponed evaluation, they never run."""
    nodes = [
        annotation
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if (annotation := getattr(node, field, None)) is not None
    ]
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in nodes
    ]


def _within(
    place: tuple[Position, Position], span: tuple[Position, Position]
) -> bool:
    return span[0] <= place[0] and place[1] <= span[1]
