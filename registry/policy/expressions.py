"""Evaluates SPDX license expressions with AND, OR, WITH and parentheses (Annex B of the SPDX specification 3.0).

The terms of single licenses come from the caller. The parser is ours, because those of packages accept no ids beside
the SPDX list, or raise IndexError for unbalanced parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from registry.policy.license_terms import LicenseTerms, allows_commercial, combine, unknown

_TOKEN = re.compile(r"[()]|[^\s()]+")
_BINDING = ("OR", "AND", "WITH")
"""Operators, from the weakest to the strongest."""
_MAX_TOKENS = 200
_MAX_DEPTH = 20


@dataclass(frozen=True)
class _Operation:
    """An operator with its sides: ids or operations; those of `WITH` are a license and an exception."""

    operator: str
    sides: tuple[str | _Operation, ...]


def evaluate_expression(text: str, find_terms: Callable[[str], LicenseTerms]) -> LicenseTerms | None:
    """Returns the terms of an SPDX expression; None if the text is no expression, or one identifier.

    `AND` combines all sides. Of `OR`, the side that allows the most counts. `WITH` adds an exception, which only adds
    permissions, to a license: the terms of the license count.

    Args:
        text: The expression; operators in any case.
        find_terms: Returns the terms of a license by its identifier or alias.
    """
    tree = _parse(text)
    return None if tree is None or tree == text else _evaluate(tree, find_terms)


def normalize_expression(text: str, find_id: Callable[[str], str]) -> str | None:
    """Returns an SPDX expression with the ids that `find_id` returns; None if the text is no expression."""
    tree = _parse(text)
    return None if tree is None else _render(tree, find_id)


def _parse(text: str) -> str | _Operation | None:
    tokens = _TOKEN.findall(text)
    if not tokens or len(tokens) > _MAX_TOKENS:
        return None
    try:
        tree = _parse_sides(tokens, 0, 0)
    except ValueError:
        return None
    return None if tokens else tree


def _parse_sides(tokens: list[str], level: int, depth: int) -> str | _Operation:
    """Removes the sides of an operator from the start of the tokens, and returns them.

    Raises:
        ValueError: The tokens are no expression.
    """
    if level == len(_BINDING):
        return _parse_one(tokens, depth)
    sides = [_parse_sides(tokens, level + 1, depth)]
    while tokens and tokens[0].upper() == _BINDING[level]:
        tokens.pop(0)
        sides.append(_parse_sides(tokens, level + 1, depth))
    is_exception = len(sides) == 2 and all(isinstance(side, str) for side in sides)
    if _BINDING[level] == "WITH" and len(sides) > 1 and not is_exception:
        raise ValueError("WITH joins one license and one exception")
    return sides[0] if len(sides) == 1 else _Operation(_BINDING[level], tuple(sides))


def _parse_one(tokens: list[str], depth: int) -> str | _Operation:
    first = tokens.pop(0) if tokens else ")"
    if first == ")" or first.upper() in _BINDING or depth == _MAX_DEPTH:
        raise ValueError("an id or an expression in parentheses is missing, or the parentheses are too deep")
    if first != "(":
        return first
    inner = _parse_sides(tokens, 0, depth + 1)
    if not tokens or tokens.pop(0) != ")":
        raise ValueError("a parenthesis is not closed")
    return inner


def _evaluate(node: str | _Operation, find_terms: Callable[[str], LicenseTerms]) -> LicenseTerms:
    if isinstance(node, str):
        return find_terms(node)
    if node.operator == "WITH":
        license_id, exception = map(str, node.sides)
        return _with_exception(find_terms(license_id), exception)
    sides = [_evaluate(side, find_terms) for side in node.sides]
    return combine(*sides) if node.operator == "AND" else min(sides, key=_strictness)


def _with_exception(terms: LicenseTerms, exception: str) -> LicenseTerms:
    try:
        name = canonicalize_license_expression(f"GPL-2.0-only WITH {exception}").partition(" WITH ")[2]
    except InvalidLicenseExpression:
        # What is no exception of the SPDX list may restrict the license.
        return combine(terms, unknown(f"the exception {exception[:80]!r}, which SPDX does not list"))
    return replace(terms, licenses=frozenset(f"{license_id} WITH {name}" for license_id in terms.licenses))


def _strictness(terms: LicenseTerms) -> tuple[Any, ...]:
    return (
        bool(terms.unknown),
        not allows_commercial(terms),
        -len(terms.permissions),
        len(terms.restrictions),
        len(terms.share_alike),
        len(terms.obligations),
        terms.expression,
    )


def _render(node: str | _Operation, find_id: Callable[[str], str]) -> str:
    if isinstance(node, str):
        return find_id(node)
    rendered = [
        f"({_render(side, find_id)})"
        if isinstance(side, _Operation) and _BINDING.index(side.operator) < _BINDING.index(node.operator)
        else _render(side, find_id)
        for side in node.sides
    ]
    return f" {node.operator} ".join(rendered)
