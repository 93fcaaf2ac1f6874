"""Changes of versions and aliases with their events: both or nothing; each runs within the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import event_log
from registry.entities import Action, AdapterVersion, Event, EventType, VersionState, now
from registry.errors import Conflict, GoneVersion
from registry.queries import find_row
from registry.refs import split_ref, version_number
from registry.store.database import insert_missing
from registry.store.tables import AliasRow, EventRow, NameRow, ParentRow, VersionRow


def insert_version(session: Session, name: str, parents: Sequence[str], values: Mapping[str, Any]) -> VersionRow:
    """Adds a version under the next number of its name.

    Args:
        session: In a writing transaction.
        name: The adapter's name.
        parents: `name@version` of known versions, or free text.
        values: The columns of the row except number and time.
    """
    insert_missing(session, NameRow, [{"name": name, "created_at": now()}])
    # Locks the name where the database has row locks; on SQLite the transaction already holds the only write lock.
    session.scalars(select(NameRow).where(NameRow.name == name).with_for_update()).one()
    last = session.scalar(select(func.max(VersionRow.version)).where(VersionRow.name == name)) or 0
    row = VersionRow(name=name, version=last + 1, created_at=now(), mlflow_run_id=None, mirrored=False, **dict(values))
    session.add(row)
    session.flush()
    for position, text in enumerate(parents):
        parent = _version_id(session, text)
        session.add(ParentRow(child=row.id, position=position, parent=parent, text=text))
    session.flush()
    return row


def move_alias(
    session: Session,
    version: AdapterVersion,
    alias: str,
    *,
    expected: int | None,
    action: Action,
    actor: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
) -> Event:
    """Moves an alias to a version by compare-and-set, and logs the event: both or nothing.

    Args:
        session: In a writing transaction.
        version: The new target.
        alias: The alias.
        expected: The number that it points at now; None for none.
        action: The action that the log records.
        actor: The user.
        reason: The reason.
        details: Further data of the event, such as overridden reasons.

    Raises:
        Conflict: It points elsewhere; the message names the target, the event, its actor and its reason.
        GoneVersion: The version was withdrawn or deleted meanwhile.
    """
    row = session.get(AliasRow, (version.name, alias), with_for_update=True)
    before = row.version if row is not None else None
    if before != expected:
        raise _conflict(session, version.name, alias, row, expected)
    require_active(session, version.name, version.version)
    event = event_log.log_alias_event(
        session, version, alias, before, action=action, actor=actor, reason=reason, details=details
    )
    if row is None:
        session.add(AliasRow(name=version.name, alias=alias, version=version.version, seq=event.seq, mirrored_seq=0))
    else:
        row.version, row.seq = version.version, event.seq
    session.flush()
    return event


def clear_alias(
    session: Session,
    version: AdapterVersion,
    alias: str,
    *,
    actor: str,
    reason: str,
    details: Mapping[str, Any] | None = None,
) -> Event:
    """Removes an alias if it still points at that version, and logs the event: both or nothing.

    Raises:
        Conflict: It points elsewhere.
    """
    row = session.get(AliasRow, (version.name, alias), with_for_update=True)
    if row is None or row.version != version.version:
        raise _conflict(session, version.name, alias, row, version.version)
    event = event_log.log_alias_event(
        session, version, alias, version.version, action="remove", actor=actor, reason=reason, details=details
    )
    row.version, row.seq = None, event.seq
    session.flush()
    return event


def set_state(
    session: Session, version: AdapterVersion, state: VersionState, event_type: EventType, **event_fields: Any
) -> Event:
    """Changes the state of a version and logs the event: both or nothing. MLflow needs a sync afterwards.

    Args:
        session: In a writing transaction.
        version: As it was read in this transaction.
        state: The new state.
        event_type: The action that the log records.
        event_fields: `actor`, `reason` and further arguments of `log_event`.
    """
    row = find_row(session, version.name, version.version)
    row.state, row.mirrored = state, False
    return event_log.log_event(session, event_type, version=version, **event_fields)


def require_active(session: Session, name: str, number: int) -> None:
    """Raises an error if a version was withdrawn or deleted.

    Raises:
        GoneVersion: Withdrawn or deleted; the message names actor, date and reason.
    """
    row = session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.version == number)).one()
    if row.state == "ACTIVE":
        return
    action = {"WITHDRAWN": "withdraw", "DELETED": "delete"}.get(row.state, "")
    logged = select(EventRow).where(EventRow.name == name, EventRow.after == number, EventRow.action == action)
    event = session.scalars(logged.order_by(EventRow.seq.desc()).limit(1)).first()
    origin = f" by {event.actor} on {event.at:%Y-%m-%d}, event {event.seq} ({event.reason})" if event else ""
    raise GoneVersion(
        f"was {row.state.lower()}{origin}",
        where=f"{name}@{number}",
        remedy=f"use another version, or run `loraline restore {name}@{number} --reason TEXT`",
    )


def _version_id(session: Session, text: str) -> int | None:
    name, ref = split_ref(text)
    number = version_number(ref)
    if number is None:
        return None
    return session.scalar(select(VersionRow.id).where(VersionRow.name == name, VersionRow.version == number))


def _conflict(session: Session, name: str, alias: str, row: AliasRow | None, expected: int | None) -> Conflict:
    def describe(number: int | None) -> str:
        return "nothing" if number is None else f"version {number}"

    event = session.get(EventRow, row.seq) if row is not None else None
    since = f", since event {event.seq}: {event.action} by {event.actor} ({event.reason})" if event else ""
    current = describe(row.version if row else None)
    return Conflict(
        f"{alias!r} points at {current}, not at {describe(expected)} as expected{since}",
        where=name,
        remedy=f"check `loraline log {name}`, and repeat the command if it still applies",
    )
