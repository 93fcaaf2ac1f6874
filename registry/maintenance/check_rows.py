"""Whether the rows agree with the log of events and with each other: part of `registry.maintenance.fsck`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import queries
from registry.entities import Problem
from registry.lineage.record import is_alive
from registry.store.tables import EventRow, ExecutionRow, InputRow, RevocationRow, RunRow, VersionRow
from registry.versions.projections import project_revocations, project_states
from registry.versions.promotion import replay

_REPLAY = "`loraline fsck --repair` writes what the log says; then see who wrote the database"
_DATABASE = "restore the database from a backup"
_RUN = "the next run marks it as CRASHED; `loraline fsck --repair` does so now"


def check_sqlite(path: Path, remedy: str) -> list[Problem]:
    """Whether a SQLite file is whole, and no row refers to one that is not there.

    Args:
        path: The file.
        remedy: What to do if it is not.
    """
    where = str(path)
    if not path.is_file():
        return [Problem("the database is gone", where, remedy)]
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            findings = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            findings += [
                f"row {row[1]} of {row[0]} refers to nothing" for row in connection.execute("PRAGMA foreign_key_check")
            ]
    except sqlite3.DatabaseError as error:
        findings = [str(error)]
    return [Problem(f"the database is damaged: {finding}", where, remedy) for finding in findings]


def check_log(session: Session) -> Iterator[Problem]:
    """Whether aliases, states and revocations are the replay of the log, and the log has no holes."""
    events = queries.read_events(session)
    replayed, table = replay(events), queries.alias_table(session)
    for name, alias in sorted(replayed.keys() | table.keys()):
        log, row = replayed.get((name, alias)), table.get((name, alias))
        if log != row:
            yield Problem(f"points at version {row}, but the log of events says {log}", f"{name}@{alias}", _REPLAY)
    numbers = {(row.name, row.version): row.state for row in session.scalars(select(VersionRow))}
    states = project_states(events)
    for (name, number), state in sorted(numbers.items()):
        told = states.get((name, number), "ACTIVE")
        if state != told:
            yield Problem(f"is {state}, but the log of events says {told}", f"{name}@{number}", _REPLAY)
    revoked, rows = project_revocations(events), _revocations(session)
    for subject in sorted(revoked.keys() ^ rows.keys()):
        said, is_so = (("revoked" if subject in source else "not revoked") for source in (revoked, rows))
        yield Problem(f"is {is_so}, but the log of events says {said}", f"subject {subject}", _REPLAY)
    yield from _check_sequence(session)
    for event in events:
        if event.name and event.after is not None and (event.name, event.after) not in numbers:
            what = f"event {event.seq} ({event.action}) is about a version that is gone"
            yield Problem(what, f"{event.name}@{event.after}", _DATABASE)


def check_runs(session: Session) -> Iterator[Problem]:
    """Whether what is RUNNING does run, and what was done belongs to runs and artifacts that are known."""
    for row in session.scalars(select(RunRow).where(RunRow.status == "RUNNING").order_by(RunRow.id)):
        if not is_alive(row):
            what = f"run {row.name!r} is RUNNING, but its process {row.pid} is gone"
            yield Problem(what, f"run {row.id}", _RUN, "leftover")
    lonely = select(InputRow.execution).where(InputRow.execution.not_in(select(ExecutionRow.id))).distinct()
    for execution in session.scalars(lonely):
        yield Problem("inputs are recorded of an execution that is not", f"execution {execution}", _DATABASE)


def _check_sequence(session: Session) -> Iterator[Problem]:
    sequence = list(session.scalars(select(EventRow.seq).order_by(EventRow.seq)))
    if sequence != list(range(1, len(sequence) + 1)):
        yield Problem("events are missing from the log", "events", _DATABASE)


def _revocations(session: Session) -> dict[str, int]:
    return {row.subject: row.seq for row in session.scalars(select(RevocationRow))}
