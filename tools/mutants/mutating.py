"""Samples mutants with the operators of mutmut; the same code gives the same mutants.

Only function bodies change, so a mutant is one code object that replaces the code of a live function. `mutmut run`
skips decorated functions, including every property and validator. Using its operators directly avoids that limit.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from types import CodeType

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_string

Codes = dict[tuple[str, int], CodeType]
"""(qualified name, first line) -> code."""


@dataclass(frozen=True)
class Mutant:
    """One change of one function. All fields but the last three identify it in any version of the file.

    Attributes:
        file: Path from the root of the repository.
        function: Qualified name of the function or method; nested functions belong to it.
        operator: Name of the mutation operator.
        before: Code of the changed node, on one line.
        after: Code of its replacement.
        occurrence: Number of this change among equal changes in the function, from 1.
        lines: First and last line that a test has to reach.
        module: The parsed file.
        nodes: The changed node and its replacement.
    """

    file: str
    function: str
    operator: str
    before: str
    after: str
    occurrence: int
    lines: tuple[int, int]
    module: cst.Module
    nodes: tuple[cst.CSTNode, cst.CSTNode]

    def rank(self) -> str:
        """Returns the sort key in the sample: a digest of the identity, so other changes do not affect it."""
        identity = (self.file, self.function, self.operator, self.before, self.after, self.occurrence)
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def compile(self, path: Path) -> Codes:
        """Returns the changed code of the function; empty if the change is not valid Python or changes nothing."""
        try:
            changed = _functions(self.module.deep_replace(*self.nodes).code, path)
        except SyntaxError:
            return {}
        plain = _functions(self.module.code, path)
        return {
            key: code
            for key, code in changed.items()
            # Code can replace that of a live function only if it has the same free variables.
            if key[0] == self.function and code != plain[key] and code.co_freevars == plain[key].co_freevars
        }


def sample(root: Path, files: Iterable[str], count: int) -> list[tuple[Mutant, Codes]]:
    """Returns up to `count` mutants with their code, from each operator in turn; no operator dominates."""
    groups: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(chain.from_iterable(_mutants(root, file) for file in files), key=Mutant.rank):
        groups[mutant.operator].append(mutant)
    drawn: list[tuple[Mutant, Codes]] = []
    for mutant in filter(None, chain.from_iterable(zip_longest(*(groups[name] for name in sorted(groups))))):
        if len(drawn) < count and (codes := mutant.compile(root / mutant.file)):
            drawn.append((mutant, codes))
    return drawn


def _mutants(root: Path, file: str) -> Iterator[Mutant]:
    wrapper = MetadataWrapper(cst.parse_module((root / file).read_text()))
    positions, module, seen = wrapper.resolve(PositionProvider), wrapper.module, defaultdict[tuple[str, ...], int](int)
    for function, statement, node in _walk(module, "", None):
        for operator, new in _changes(node):
            shown = (n.test if isinstance(n, cst.If) else n for n in (node, new))
            before, after = (" ".join(module.code_for_node(n).split()) for n in shown)
            seen[function, operator, before, after] += 1
            first = positions[statement].start.line
            lines = first, first if isinstance(node, cst.If) else positions[node].end.line
            occurrence = seen[function, operator, before, after]
            yield Mutant(file, function, operator, before, after, occurrence, lines, module, (node, new))


def _walk(
    node: cst.CSTNode, function: str, statement: cst.CSTNode | None
) -> Iterator[tuple[str, cst.CSTNode, cst.CSTNode]]:
    """Yields (function, statement, node) of code that runs when a function is called, not when it is defined."""
    if isinstance(node, cst.FunctionDef | cst.ClassDef) and statement is None:
        name = f"{function}.{node.name.value}".removeprefix(".")
        yield from _walk(node.body, name, node if isinstance(node, cst.FunctionDef) else None)
        return
    if isinstance(node, cst.Annotation):
        return
    if statement is not None:
        statement = node if isinstance(node, cst.BaseSmallStatement | cst.BaseCompoundStatement) else statement
        yield function, statement, node
    elif not isinstance(node, cst.Module | cst.IndentedBlock):
        return
    for child in node.children:
        yield from _walk(child, function, statement)


def _changes(node: cst.CSTNode) -> Iterator[tuple[str, cst.CSTNode]]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            changed = list(operator(node))
            # Strings: only the marked variant, not other letter cases. Arguments: only removal, not None instead.
            if operator is operator_string:
                changed = changed[:1]
            if operator is operator_arg_removal:
                changed = [new for new in changed if len(new.args) < len(node.args)]
            yield from ((operator.__name__.removeprefix("operator_"), new) for new in changed)
    if isinstance(node, cst.If):
        inner = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield "negated_if", node.with_changes(test=cst.UnaryOperation(cst.Not(), inner))
    if isinstance(node, cst.Expr) and isinstance(node.value, cst.Call):
        yield "dropped_call", cst.Pass()


def _functions(source: str | CodeType, path: Path) -> Codes:
    code = compile(source, str(path), "exec", dont_inherit=True) if isinstance(source, str) else source
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    nested = [_functions(function, path) for function in inner]
    return {(function.co_qualname, function.co_firstlineno): function for function in inner} | dict(
        chain.from_iterable(codes.items() for codes in nested)
    )
