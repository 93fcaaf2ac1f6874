"""Reads what the registry has to report to others: the events after a number, and runs that failed since a time."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import select

from registry import event_log
from registry.entities import Event, Run
from registry.lineage.record import Lineage
from registry.lineage.rows import read_run
from registry.store.chain import read_head
from registry.store.database import batched
from registry.store.tables import EventRow, RunRow, VersionRow

_FAILED = ("FAILED", "CRASHED")


def last_event(lineage: Lineage) -> int:
    """Returns the number of the newest event; 0 for an empty log."""
    with lineage.database.read() as session:
        head = read_head(session, EventRow.__table__)
    return head.seq if head is not None else 0


def events_after(lineage: Lineage, number: int, limit: int) -> list[Event]:
    """Returns the next events of the log, oldest first.

    Args:
        lineage: The open database.
        number: Number of the event before the first one.
        limit: Maximum number of events.
    """
    with lineage.database.read() as session:
        return event_log.read_events_after(session, number, limit)


def digests_of(lineage: Lineage, names: Collection[str]) -> dict[tuple[str, int], str]:
    """Returns the sha256 of the adapter file of all versions of some names, by name and number."""
    query = select(VersionRow.name, VersionRow.version, VersionRow.sha256)
    with lineage.database.read() as session:
        rows = batched(session, query, VersionRow.name, names)
        return {(name, number): sha256 for name, number, sha256 in rows}


def failed_runs(lineage: Lineage, since: datetime) -> list[Run]:
    """Returns the runs that failed or crashed since a time, by their end."""
    with lineage.database.read() as session:
        query = select(RunRow).where(RunRow.status.in_(_FAILED), RunRow.ended_at >= since)
        return [read_run(row) for row in session.scalars(query.order_by(RunRow.ended_at, RunRow.id))]
