"""What differs between two nested records, place by place; knows nothing of what they record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class Change:
    """One place that differs.

    Args:
        path: The keys that lead to it, with dots between them.
        kind: Whether the second alone has it, the first alone, or both with different values.
        before: The first's value; None where it has none.
        after: The second's value; None where it has none.
    """

    path: str
    kind: Kind
    before: Any
    after: Any


def compare_records(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Every place that differs, sorted by its path; mappings are entered, lists are compared whole."""
    return sorted(_changes(before, after, prefix), key=lambda change: change.path)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key in {*before, *after}:
        path = f"{prefix}{key}"
        if key not in before:
            yield Change(path, "added", None, after[key])
        elif key not in after:
            yield Change(path, "removed", before[key], None)
        elif isinstance(before[key], Mapping) and isinstance(after[key], Mapping):
            yield from _changes(before[key], after[key], f"{path}.")
        elif _plain(before[key]) != _plain(after[key]):
            yield Change(path, "changed", before[key], after[key])


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
