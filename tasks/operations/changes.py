"""Compares two nested mappings of any content, key by key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ChangeKind = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class Change:
    """A key whose values differ.

    Args:
        path: The key with its parents, separated by dots.
        kind: `added` if only the second mapping has it, `removed` if only the first has it, else `changed`.
        before: Value in the first mapping; None if it is missing.
        after: Value in the second mapping; None if it is missing.
    """

    path: str
    kind: ChangeKind
    before: Any
    after: Any


def compare_records(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """Returns all differences, sorted by path; compares mappings key by key and lists as a whole."""
    return sorted(_changes(before, after, prefix), key=lambda change: change.path)


def show_value(value: Any) -> str:
    """Returns a value as a pipeline file has it: text as it is, everything else as JSON; `unset` for None."""
    if value is None:
        return "unset"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


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
