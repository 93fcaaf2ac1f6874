"""Computes states of versions and revocations from the event log; `promotion.replay` computes the aliases.

Pure functions over events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from registry.entities import Event, VersionState

_STATES: dict[str, VersionState] = {"withdraw": "WITHDRAWN", "delete": "DELETED", "restore": "ACTIVE"}


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
