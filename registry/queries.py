"""The rows of versions, aliases and events: reading them, and the few ways to write them, each within a transaction."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import Action, AdapterVersion, ArtifactRef, Event, EventType, VersionState, now
from registry.errors import Conflict, GoneVersion, UnknownName, UnknownVersion
from registry.lineage.record import artifact_ref
from registry.store.database import insert_missing
from registry.store.tables import AliasRow, ArtifactRow, EventRow, NameRow, ParentRow, VersionRow

_BATCH = 500


def find_row(session: Session, name: str, ref: str | int) -> VersionRow:
    """The row of a version by its number, an alias, or `latest`.

    Raises:
        UnknownName: No adapter of that name; the message gives the nearest.
        UnknownVersion: No such number or alias; the message gives those that there are.
    """
    versions = select(VersionRow).where(VersionRow.name == name)
    text = str(ref)
    if text == "latest":
        # What was withdrawn or deleted is no longer the latest, unless there is nothing else.
        active_first = (case((VersionRow.state == "ACTIVE", 0), else_=1), VersionRow.version.desc())
        row = session.scalars(versions.order_by(*active_first).limit(1)).first()
    elif text.isdecimal():
        row = session.scalars(versions.where(VersionRow.version == int(text))).first()
    else:
        alias = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == text).scalar_subquery()
        row = session.scalars(versions.where(VersionRow.version == alias)).first()
    if row is None:
        raise _unknown(session, name, text)
    return row


def read_version(session: Session, name: str, ref: str | int) -> AdapterVersion:
    """The version by its number, an alias, or `latest`; raises as `find_row` does."""
    return entities(session, [find_row(session, name, ref)])[0]


def read_versions(session: Session, name: str | None = None) -> list[AdapterVersion]:
    """All versions, of one name or of all, by name and number."""
    query = select(VersionRow).order_by(VersionRow.name, VersionRow.version)
    if name is not None:
        query = query.where(VersionRow.name == name)
    return entities(session, session.scalars(query).all())


def find_identical(session: Session, name: str, artifact: ArtifactRef, report: ArtifactRef | None) -> VersionRow | None:
    """The version of that name that was registered from the same artifact and report before, if there is one."""
    identity = identity_of(artifact, report)
    return session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.identity == identity)).first()


def identity_of(artifact: ArtifactRef, report: ArtifactRef | None) -> str:
    """What makes a version the same as another one of its name."""
    return sha256_bytes(canonical_json([artifact.sha256, report.sha256 if report else None]))


def insert_version(session: Session, name: str, parents: Sequence[str], values: Mapping[str, Any]) -> VersionRow:
    """Adds a version under the next number of its name.

    Args:
        session: In a writing transaction.
        name: The adapter's name.
        parents: `name@version` of known versions, or free text.
        values: The columns of the row but number and time.
    """
    insert_missing(session, NameRow, [{"name": name, "created_at": now()}])
    # Locks the name where the database knows row locks; on SQLite the transaction holds the only write lock anyway.
    session.scalars(select(NameRow).where(NameRow.name == name).with_for_update()).one()
    last = session.scalar(select(func.max(VersionRow.version)).where(VersionRow.name == name)) or 0
    row = VersionRow(name=name, version=last + 1, created_at=now(), mlflow_run_id=None, mirrored=False, **dict(values))
    session.add(row)
    session.flush()
    for position, text in enumerate(parents):
        parent = _known_version(session, text)
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
    """Points an alias at a version, if it still points at what the caller expects, and logs it: both or nothing.

    Args:
        session: In a writing transaction.
        version: What the alias shall point at.
        alias: The alias.
        expected: The number that it points at now; None for none.
        action: How the log calls it.
        actor: Who does it.
        reason: Why.
        details: What else belongs to the event, such as reasons that were overridden.

    Raises:
        Conflict: It points elsewhere; the message says at what, since when, by whom and why.
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
    """Lets an alias point at nothing, if it still points at that version, and logs it: both or nothing.

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


def set_state(session: Session, version: AdapterVersion, state: VersionState, deed: EventType, **said: Any) -> Event:
    """Changes the state of a version and logs the deed: both or nothing. MLflow is behind then.

    Args:
        session: In a writing transaction.
        version: As it was read in this transaction.
        state: What it becomes.
        deed: How the log calls it.
        said: `actor`, `reason` and what else `log_alias_event` takes.
    """
    row = find_row(session, version.name, version.version)
    row.state, row.mirrored = state, False
    return log_event(session, deed, version=version, **said)


def require_active(session: Session, name: str, number: int) -> None:
    """Raises where a version may not be handed out any more.

    Raises:
        GoneVersion: Withdrawn or deleted; the message says by whom, when and why.
    """
    row = session.scalars(select(VersionRow).where(VersionRow.name == name, VersionRow.version == number)).one()
    if row.state == "ACTIVE":
        return
    deed = {"WITHDRAWN": "withdraw", "DELETED": "delete"}[row.state]
    events = select(EventRow).where(EventRow.name == name, EventRow.after == number, EventRow.action == deed)
    event = session.scalars(events.order_by(EventRow.seq.desc()).limit(1)).first()
    told = f" by {event.actor} on {event.at:%Y-%m-%d}, event {event.seq} ({event.reason})" if event else ""
    raise GoneVersion(
        f"was {row.state.lower()}{told}",
        where=f"{name}@{number}",
        remedy=f"take another version, or `loraline restore {name}@{number} --reason TEXT` if that was a mistake",
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
    """Appends what happened to an alias to the log, within a transaction."""
    row = EventRow(
        name=version.name,
        alias=alias,
        action=action,
        before=before,
        after=None if action == "remove" else version.version,
        actor=actor,
        reason=reason,
        gates=[dict(gate) for gate in version.gates],
        at=now(),
        details=dict(details or {}),
    )
    session.add(row)
    session.flush()
    return _event(row)


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
    """Appends what was done to a version or a subject to the log, within a transaction; it moves no alias."""
    row = EventRow(
        name=version.name if version else None,
        alias=None,
        action=action,
        before=None,
        after=version.version if version else None,
        actor=actor,
        reason=reason,
        gates=[],
        at=now(),
        subject=subject or None,
        details=dict(details or {}),
    )
    session.add(row)
    session.flush()
    return _event(row)


def alias_target(session: Session, name: str, alias: str) -> int | None:
    """The number that an alias points at, or None."""
    return session.scalar(select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == alias))


def alias_table(session: Session) -> dict[tuple[str, str], int]:
    """All aliases that point at something: (name, alias) -> number."""
    rows = session.scalars(select(AliasRow).order_by(AliasRow.name, AliasRow.alias))
    return {(row.name, row.alias): row.version for row in rows if row.version is not None}


def read_events(session: Session, name: str | None = None, alias: str | None = None) -> list[Event]:
    """The log, of one name and alias or of all, in its order."""
    query = select(EventRow).order_by(EventRow.seq)
    if name is not None:
        query = query.where(EventRow.name == name)
    if alias is not None:
        query = query.where(EventRow.alias == alias)
    return [_event(row) for row in session.scalars(query)]


def entities(session: Session, rows: Sequence[VersionRow]) -> list[AdapterVersion]:
    """The versions of rows, with their artifacts, aliases and parents, in a few queries for all of them."""
    digests = {row.artifact for row in rows} | {row.report for row in rows if row.report}
    artifacts: dict[str, ArtifactRef] = {}
    for batch in _batches(sorted(digests)):
        found = session.scalars(select(ArtifactRow).where(ArtifactRow.sha256.in_(batch)))
        artifacts |= {row.sha256: artifact_ref(row) for row in found}
    aliases: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    for batch in _batches(sorted({row.name for row in rows})):
        for alias in session.scalars(select(AliasRow).where(AliasRow.name.in_(batch)).order_by(AliasRow.alias)):
            aliases[alias.name, alias.version].append(alias.alias)
    parents: dict[int, list[str]] = defaultdict(list)
    for batch in _batches([row.id for row in rows]):
        for parent in session.scalars(
            select(ParentRow).where(ParentRow.child.in_(batch)).order_by(ParentRow.child, ParentRow.position)
        ):
            parents[parent.child].append(parent.text)
    return [
        AdapterVersion(
            name=row.name,
            version=row.version,
            sha256=row.sha256,
            size=row.size,
            artifact=artifacts[row.artifact],
            adapter_path=row.adapter_path,
            report=artifacts[row.report] if row.report else None,
            aliases=tuple(aliases[row.name, row.version]),
            created_at=row.created_at,
            run_id=row.run_id,
            mlflow_run_id=row.mlflow_run_id,
            card=row.card,
            metrics=row.metrics,
            gates=tuple(row.gates),
            passed=row.passed,
            parents=tuple(parents[row.id]),
            params=row.params,
            state=cast("VersionState", row.state),
        )
        for row in rows
    ]


def _known_version(session: Session, text: str) -> int | None:
    name, _, number = text.partition("@")
    if not number.isdecimal():
        return None
    return session.scalar(select(VersionRow.id).where(VersionRow.name == name, VersionRow.version == int(number)))


def _batches(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (values[begin : begin + _BATCH] for begin in range(0, len(values), _BATCH))


def _event(row: EventRow) -> Event:
    return Event(
        row.seq,
        row.name or "",
        row.alias or "",
        cast("Action | EventType", row.action),
        row.before,
        row.after,
        row.actor,
        row.reason,
        tuple(row.gates),
        row.at,
        row.subject or "",
        row.details,
    )


def _conflict(session: Session, name: str, alias: str, row: AliasRow | None, expected: int | None) -> Conflict:
    def with_context(number: int | None) -> str:
        return "nothing" if number is None else f"version {number}"

    event = session.get(EventRow, row.seq) if row is not None else None
    since = f", since event {event.seq}: {event.action} by {event.actor} ({event.reason})" if event else ""
    return Conflict(
        f"{alias!r} points at {with_context(row.version if row else None)}, not at {with_context(expected)} as expected{since}",
        where=name,
        remedy="look at what is there now, and decide again",
    )


def _unknown(session: Session, name: str, ref: str) -> UnknownName | UnknownVersion:
    names = list(session.scalars(select(NameRow.name).order_by(NameRow.name)))
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "`loraline list` shows what is registered"
        return UnknownName(f"no adapter {name!r} among {len(names)}", remedy=hint)
    count = session.scalar(select(func.count()).where(VersionRow.name == name)) or 0
    table = alias_table(session)
    aliases = ", ".join(alias for owner, alias in table if owner == name) or "none"
    return UnknownVersion(
        f"no version {ref!r}", where=name, allowed=f"1 to {count}, 'latest', or one of the aliases: {aliases}"
    )
