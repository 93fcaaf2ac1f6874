"""Queries and row writes for versions, aliases and events; each runs within the caller's transaction."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import case, func, select, tuple_
from sqlalchemy.orm import Session

from lora_engine.errors import did_you_mean
from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import Action, AdapterVersion, ArtifactRef, Event, EventType, VersionState, now
from registry.errors import Conflict, GoneVersion, UnknownName, UnknownVersion
from registry.identity import Actor
from registry.lineage.graph import version_ids
from registry.lineage.rows import artifact_of, read_artifacts
from registry.refs import LATEST, can_exist, split_ref, version_number
from registry.store.chain import append_event
from registry.store.damaged import DamagedCell
from registry.store.database import batched, insert_missing
from registry.store.tables import AliasRow, EventRow, NameRow, ParentRow, VersionRow

_logger = logging.getLogger(__name__)
_SHOWN = 64
"""Characters of an unknown name that a message shows."""


def find_row(session: Session, name: str, ref: str | int) -> VersionRow:
    """Returns the row of a version by its number, an alias, or `latest`.

    Raises:
        UnknownName: No adapter of that name; the message names the nearest matches.
        UnknownVersion: No such number or alias; the message lists the existing ones.
    """
    number = version_number(ref)
    if not can_exist(name, ref):
        raise _unknown(session, name, str(ref) if isinstance(ref, str) else "a number of over 18 digits")
    versions = select(VersionRow).where(VersionRow.name == name)
    text = str(ref)
    if text == LATEST:
        # A withdrawn or deleted version is not the latest unless no other version is left.
        active_first = (case((VersionRow.state == "ACTIVE", 0), else_=1), VersionRow.version.desc())
        row = session.scalars(versions.order_by(*active_first).limit(1)).first()
    elif number is not None:
        row = session.scalars(versions.where(VersionRow.version == number)).first()
    else:
        alias = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == text).scalar_subquery()
        row = session.scalars(versions.where(VersionRow.version == alias)).first()
    if row is None:
        raise _unknown(session, name, text)
    return row


def read_version(session: Session, name: str, ref: str | int) -> AdapterVersion:
    """Returns the version by its number, an alias, or `latest`; raises as `find_row` does."""
    return entities(session, [find_row(session, name, ref)])[0]


def read_versions(session: Session, name: str | None = None) -> list[AdapterVersion]:
    """Returns all versions of one name or of all names, ordered by name and number."""
    query = select(VersionRow).order_by(VersionRow.name, VersionRow.version)
    if name is not None and not can_exist(name):
        return []
    if name is not None:
        query = query.where(VersionRow.name == name)
    return entities(session, [row for row in session.scalars(query) if _has_ref(row)])


def read_aliased(session: Session, name: str | None = None) -> list[AdapterVersion]:
    """Returns the versions of one name, or of all names, that an alias points at, ordered by name and number."""
    targets = select(AliasRow.name, AliasRow.version).where(AliasRow.version.is_not(None))
    if name is not None:
        targets = targets.where(AliasRow.name == name)
    if not can_exist(name or "any"):
        return []
    query = select(VersionRow).where(tuple_(VersionRow.name, VersionRow.version).in_(targets))
    rows = session.scalars(query.order_by(VersionRow.name, VersionRow.version))
    return entities(session, [row for row in rows if _has_ref(row)])


def read_latest(session: Session, name: str | None = None) -> list[tuple[AdapterVersion, int]]:
    """Returns the latest active version of one name, or of all, with the number of its active versions; by name."""
    if not can_exist(name or "any"):
        return []
    latest = select(VersionRow.name, func.max(VersionRow.version).label("version"), func.count().label("active"))
    latest = latest.where(VersionRow.state == "ACTIVE").group_by(VersionRow.name)
    found = (latest if name is None else latest.where(VersionRow.name == name)).subquery()
    query = select(VersionRow, found.c.active).join(
        found, (VersionRow.name == found.c.name) & (VersionRow.version == found.c.version)
    )
    rows = {row.name: (row, active) for row, active in session.execute(query) if _has_ref(row)}
    versions = {version.name: version for version in entities(session, [row for row, _ in rows.values()])}
    return [(versions[adapter], rows[adapter][1]) for adapter in sorted(versions)]


def read_versions_of_runs(session: Session, runs: Iterable[str]) -> list[AdapterVersion]:
    """Returns the versions that runs registered, by the runs' ids, ordered by name and number."""
    rows = [row for (row,) in batched(session, select(VersionRow), VersionRow.run_id, runs) if _has_ref(row)]
    return entities(session, sorted(rows, key=lambda row: (row.name, row.version)))


def find_versions(session: Session, refs: Iterable[str]) -> list[AdapterVersion]:
    """Returns the versions by `name@version`, ordered by name and number; leaves out those that do not exist."""
    rows = [row for (row,) in batched(session, select(VersionRow), VersionRow.id, version_ids(session, refs))]
    return entities(session, sorted(rows, key=lambda row: (row.name, row.version)))


def find_identical(session: Session, name: str, artifact: ArtifactRef, report: ArtifactRef | None) -> VersionRow | None:
    """Returns the row of that name with the same artifact and report; None if there is none."""
    identity = identity_of(artifact, report)
    return session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.identity == identity)).first()


def identity_of(artifact: ArtifactRef, report: ArtifactRef | None) -> str:
    """Returns the digest of artifact and report; versions of a name with the same identity are the same version."""
    return sha256_bytes(canonical_json([artifact.sha256, report.sha256 if report else None]))


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
    event = log_alias_event(session, version, alias, before, action=action, actor=actor, reason=reason, details=details)
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
    event = log_alias_event(
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
    return log_event(session, event_type, version=version, **event_fields)


def require_active(session: Session, name: str, number: int) -> None:
    """Raises an error if a version was withdrawn or deleted.

    Raises:
        GoneVersion: Withdrawn or deleted; the message names actor, date and reason.
    """
    row = session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.version == number)).one()
    if row.state == "ACTIVE":
        return
    action = {"WITHDRAWN": "withdraw", "DELETED": "delete"}.get(row.state, "")
    events = select(EventRow).where(EventRow.name == name, EventRow.after == number, EventRow.action == action)
    event = session.scalars(events.order_by(EventRow.seq.desc()).limit(1)).first()
    origin = f" by {event.actor} on {event.at:%Y-%m-%d}, event {event.seq} ({event.reason})" if event else ""
    raise GoneVersion(
        f"was {row.state.lower()}{origin}",
        where=f"{name}@{number}",
        remedy=f"use another version, or run `loraline restore {name}@{number} --reason TEXT`",
    )


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


def alias_target(session: Session, name: str, alias: str) -> int | None:
    """Returns the number that an alias points at, or None."""
    return session.scalar(select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == alias))


def alias_table(session: Session) -> dict[tuple[str, str], int]:
    """Returns all aliases that point at a version: (name, alias) -> number."""
    rows = session.scalars(select(AliasRow).order_by(AliasRow.name, AliasRow.alias))
    # A damaged row is left out; the log has its target.
    intact = (row for row in rows if isinstance(row.name, str) and isinstance(row.alias, str))
    return {(row.name, row.alias): row.version for row in intact if isinstance(row.version, int)}


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


def entities(session: Session, rows: Sequence[VersionRow]) -> list[AdapterVersion]:
    """Returns the versions of rows with their artifacts, aliases and parents; uses a few queries for all rows."""
    digests = {digest for row in rows for digest in (row.artifact, row.report) if isinstance(digest, str)}
    artifacts = read_artifacts(session, digests)
    aliases: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    by_alias, names = select(AliasRow).order_by(AliasRow.alias), {row.name for row in rows}
    for (alias,) in batched(session, by_alias, AliasRow.name, names):
        if not isinstance(alias.version, DamagedCell) and isinstance(alias.alias, str):
            aliases[alias.name, alias.version].append(alias.alias)
    parents: dict[int, list[str]] = defaultdict(list)
    by_position = select(ParentRow).order_by(ParentRow.child, ParentRow.position)
    for (parent,) in batched(session, by_position, ParentRow.child, (row.id for row in rows)):
        parents[parent.child].append(parent.text)
    return [
        AdapterVersion(
            name=row.name,
            version=row.version,
            sha256=row.sha256,
            size=row.size,
            artifact=artifact_of(artifacts, row.artifact, "versions", row.id, "artifact"),
            adapter_path=row.adapter_path,
            report=artifact_of(artifacts, row.report, "versions", row.id, "report") if row.report is not None else None,
            aliases=tuple(aliases[row.name, row.version]),
            created_at=row.created_at,
            run_id=row.run_id,
            mlflow_run_id=row.mlflow_run_id,
            card=row.card,
            metrics=row.metrics,
            gates=_tuple(row.gates),
            passed=row.passed,
            parents=tuple(parents[row.id]),
            params=row.params,
            state=cast("VersionState", row.state),
        )
        for row in rows
    ]


def _version_id(session: Session, text: str) -> int | None:
    name, ref = split_ref(text)
    number = version_number(ref)
    if number is None:
        return None
    return session.scalar(select(VersionRow.id).where(VersionRow.name == name, VersionRow.version == number))


def _has_ref(row: VersionRow) -> bool:
    """Returns False, and logs it, if the number of a version is damaged: only `fsck` can name such a version."""
    damaged = [value for value in (row.name, row.version) if isinstance(value, DamagedCell)]
    for cell in damaged:
        _logger.warning("left out row %s of the table %s: its column %r is damaged", cell.row, cell.table, cell.column)
    return not damaged


def _tuple(values: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", values) if isinstance(values, DamagedCell) else tuple(values)


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
        _tuple(row.gates),
        row.at,
        _or_empty(row.subject),
        row.details,
        row.previous,
        row.digest,
    )


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


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _unknown(session: Session, name: str, ref: str) -> UnknownName | UnknownVersion:
    names = list(session.scalars(select(NameRow.name).order_by(NameRow.name)))
    if name not in names:
        remedy = did_you_mean(name[:_SHOWN], names, "see `loraline list`", most=3)
        return UnknownName(f"no adapter {_short(name)} among {len(names)}", remedy=remedy)
    count = session.scalar(select(func.count()).where(VersionRow.name == name)) or 0
    table = alias_table(session)
    aliases = ", ".join(alias for owner, alias in table if owner == name) or "none"
    return UnknownVersion(
        f"no version {_short(ref)}", where=name, allowed=f"1 to {count}, 'latest', or one of the aliases: {aliases}"
    )
