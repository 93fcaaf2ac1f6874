"""The event log of aliases, versions and subjects: appends and reads; each runs within the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import Action, AdapterVersion, Event, EventType, now
from registry.identity import Actor
from registry.refs import LATEST, can_exist
from registry.store.chain import append_event
from registry.store.damaged import as_tuple
from registry.store.tables import AliasRow, EventRow


def log_alias_event(
    session: Session,
    version: AdapterVersion,
    alias: str,
    before: int | None,
    *,
    action: Action,
    actor: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
) -> Event:
    """Appends an event of an alias to the log, within a transaction."""
    row = EventRow(
        name=version.name,
        alias=alias,
        action=action,
        before=before,
        after=None if action == "remove" else version.version,
        actor=str(actor),
        reason=reason,
        gates=[dict(gate) for gate in version.gates],
        at=now(),
        details=_with_actor(details, actor),
    )
    return _event(append_event(session, row))


def log_event(
    session: Session,
    action: EventType,
    *,
    actor: str,
    reason: str,
    version: AdapterVersion | None = None,
    subject: str = "",
    details: Mapping[str, Any] | None = None,
) -> Event:
    """Appends an event of a version or a subject to the log, within a transaction; it moves no alias."""
    row = EventRow(
        name=version.name if version else None,
        alias=None,
        action=action,
        before=None,
        after=version.version if version else None,
        actor=str(actor),
        reason=reason,
        gates=[],
        at=now(),
        subject=subject or None,
        details=_with_actor(details, actor),
    )
    return _event(append_event(session, row))


def _with_actor(details: Mapping[str, Any] | None, actor: str) -> dict[str, Any]:
    """Adds how the actor was established, which the digest of the event covers."""
    return {**(details or {}), **({"actor": actor.record()} if isinstance(actor, Actor) else {})}


def read_events(
    session: Session, name: str | None = None, alias: str | None = None, *, after: int | None = None
) -> list[Event]:
    """Returns the events of one name and alias, or all events, in the order of the log.

    Args:
        session: A session.
        name: The adapter; None for all.
        alias: The alias; None for all.
        after: Only events after which the alias points, or which are about, this version; None for all.
    """
    query = select(EventRow).order_by(EventRow.seq)
    if name is not None:
        query = query.where(EventRow.name == name)
    if not can_exist(name or LATEST, alias or LATEST):
        return []
    if alias is not None:
        query = query.where(EventRow.alias == alias)
    if after is not None:
        query = query.where(EventRow.after == after)
    return [_event(row) for row in session.scalars(query)]


def read_moves(session: Session, name: str | None = None) -> dict[tuple[str, str], Event]:
    """Returns the event that moved each alias to where it points, by (name, alias); of one name, or of all.

    An alias whose event is damaged is left out.
    """
    query = select(AliasRow.name, AliasRow.alias, EventRow).join(EventRow, AliasRow.seq == EventRow.seq)
    if name is not None:
        query = query.where(AliasRow.name == name)
    return {(adapter, alias): _event(row) for adapter, alias, row in session.execute(query)}


def read_event(session: Session, seq: int) -> Event:
    """Returns the event with a number, which must exist."""
    return _event(session.get_one(EventRow, seq))


def read_events_after(session: Session, number: int, limit: int) -> list[Event]:
    """Returns at most `limit` events with a greater number, in the order of the log."""
    query = select(EventRow).where(EventRow.seq > number).order_by(EventRow.seq).limit(limit)
    return [_event(row) for row in session.scalars(query)]


def _or_empty(value: str | None) -> str:
    return "" if value is None else value


def _event(row: EventRow) -> Event:
    return Event(
        row.seq,
        _or_empty(row.name),
        _or_empty(row.alias),
        cast("Action | EventType", row.action),
        row.before,
        row.after,
        row.actor,
        row.reason,
        as_tuple(row.gates),
        row.at,
        _or_empty(row.subject),
        row.details,
        row.previous,
        row.digest,
    )
