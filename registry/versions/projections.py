"""Computes aliases, states of versions and revocations from the event log alone: pure functions over events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from registry.entities import Event, VersionState

_STATES: dict[str, VersionState] = {"withdraw": "WITHDRAWN", "delete": "DELETED", "restore": "ACTIVE"}


def replay(events: Iterable[Event]) -> dict[tuple[str, str], int]:
    """Computes the aliases from the log alone: (name, alias) -> number."""
    aliases: dict[tuple[str, str], int | None] = {}
    for event in sorted(events, key=lambda entry: entry.seq):
        if event.alias and event.action != "refuse":
            aliases[event.name, event.alias] = event.after
    return {key: number for key, number in aliases.items() if number is not None}


def stack(events: Iterable[Event]) -> list[int]:
    """Returns the versions that one alias had, oldest first, without those that were rolled back."""
    numbers: list[int] = []
    for event in events:
        if event.action == "refuse" or event.after is None:
            continue
        if event.action == "rollback" and event.after in numbers:
            last = len(numbers) - 1 - numbers[::-1].index(event.after)
            del numbers[last + 1 :]
        else:
            numbers.append(event.after)
    return numbers


def project_states(events: Iterable[Event]) -> dict[tuple[str, int], VersionState]:
    """Computes the state of every version that was ever withdrawn, deleted or restored: (name, number) -> state."""
    states: dict[tuple[str, int], VersionState] = {}
    for event in sorted(events, key=lambda entry: entry.seq):
        if event.action in _STATES and event.after is not None:
            states[event.name, event.after] = _STATES[event.action]
    return states


def project_revocations(events: Iterable[Event]) -> dict[tuple[str, str], int]:
    """Computes the active revocations: (kind, subject) -> its event, the first one since the last lift."""
    revoked: dict[tuple[str, str], int] = {}
    for event in sorted(events, key=lambda entry: entry.seq):
        key = (_kind_of(event), event.subject)
        if event.action == "revoke" and event.subject:
            revoked.setdefault(key, event.seq)
        elif event.action == "lift":
            revoked.pop(key, None)
    return revoked


def find_overridden(events: Iterable[Event], number: int) -> frozenset[str]:
    """Returns the reasons that were overridden when a version last got an alias by a decision.

    Args:
        events: The events of the alias.
        number: Number of the version.
    """
    overridden: frozenset[str] = frozenset()
    for event in sorted(events, key=lambda entry: entry.seq):
        if event.after == number and event.action in {"stage", "promote", "override"}:
            overridden = frozenset(map(str, event.details.get("overridden", ())))
    return overridden


def _kind_of(event: Event) -> str:
    """Returns the kind of a revoked subject; an image for an event whose details are damaged."""
    return str(event.details.get("kind", "picture")) if isinstance(event.details, Mapping) else "picture"
