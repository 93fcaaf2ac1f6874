"""Checks the rows against the event log and each other. Part of `registry.maintenance.fsck`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.entities import Problem
from registry.lineage.record import is_alive
from registry.store.cells import find_damaged_cells
from registry.store.snapshot import readable
from registry.store.tables import ExecutionRow, InputRow, RevocationRow, RunRow, VersionRow
from registry.versions.projections import project_revocations, project_states, replay

_REPLAY = "`loraline fsck --repair` restores the state of the log; then find out what changed the database"
_DATABASE = "restore the database from a backup"
_CELL = "`loraline fsck --repair` restores what can be rebuilt; else restore the database from a backup"
_RUN = "the next run marks it as CRASHED; `loraline fsck --repair` does so now"


def check_sqlite(path: Path, remedy: str, *, copy: bool = False) -> list[Problem]:
    """Checks the integrity and the foreign keys of a SQLite file.

    Args:
        path: The file.
        remedy: Remedy for the reported problems.
        copy: True checks a copy, for a file on a read-only or full disk.
    """
    where = str(path)
    if not path.is_file():
        return [Problem("the database is missing", where, remedy)]
    try:
        with (
            readable(path, copy=copy) as file,
            closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection,
        ):
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")
            findings = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            findings += _find_orphans(connection)
    except sqlite3.DatabaseError as error:
        findings = [str(error)]
    return [Problem(f"the database is damaged: {finding}", where, remedy) for finding in findings]


def is_fatal(problem: Problem) -> bool:
    """Returns True if a problem of `check_sqlite` prevents reading the database."""
    return "refers to a missing row" not in problem.what and "NULL value in" not in problem.what


def _find_orphans(connection: sqlite3.Connection) -> Iterator[str]:
    for table, row, other, key in connection.execute("PRAGMA foreign_key_check").fetchall():
        keys = connection.execute('SELECT "from" FROM pragma_foreign_key_list(?) WHERE id = ?', (table, key))
        columns = ", ".join(repr(column) for (column,) in keys)
        yield f"row {row} of {table} refers to a missing row of {other} (column {columns})"


def check_cells(session: Session) -> Iterator[Problem]:
    """Checks that each cell has a value that a release could have written there."""
    for cell in find_damaged_cells(session):
        where = f"row {cell.row} of the table {cell.table}"
        yield Problem(f"the column {cell.column!r} is damaged: {cell.problem}", where, _CELL)


def check_log(session: Session) -> Iterator[Problem]:
    """Checks that aliases, states and revocations equal the replay of the log; `check_chain` checks the log itself."""
    events = event_log.read_events(session)
    replayed, table = replay(events), queries.alias_table(session)
    for name, alias in sorted(replayed.keys() | table.keys()):
        log, row = replayed.get((name, alias)), table.get((name, alias))
        if log != row:
            yield Problem(f"points at version {row}, but the event log has {log}", f"{name}@{alias}", _REPLAY)
    numbers = {(row.name, row.version): row.state for row in session.scalars(select(VersionRow))}
    states = project_states(events)
    for (name, number), state in sorted(numbers.items()):
        logged = states.get((name, number), "ACTIVE")
        if state != logged:
            yield Problem(f"is {state}, but the event log has {logged}", f"{name}@{number}", _REPLAY)
    revoked, rows = project_revocations(events), _revocations(session)
    for key in sorted(revoked.keys() ^ rows.keys()):
        expected, current = (("revoked" if key in source else "not revoked") for source in (revoked, rows))
        yield Problem(f"is {current}, but the event log has {expected}", f"subject {key[1]}", _REPLAY)
    for event in events:
        if event.name and event.after is not None and (event.name, event.after) not in numbers:
            problem = f"event {event.seq} ({event.action}) refers to a missing version"
            yield Problem(problem, f"{event.name}@{event.after}", _DATABASE)


def check_runs(session: Session) -> Iterator[Problem]:
    """Checks that RUNNING runs have a live process, and that recorded inputs belong to recorded executions."""
    for row in session.scalars(select(RunRow).where(RunRow.status == "RUNNING").order_by(RunRow.id)):
        if not is_alive(row):
            problem = f"run {row.name!r} is RUNNING, but its process {row.pid} does not exist"
            yield Problem(problem, f"run {row.id}", _RUN, "leftover")
    orphans = select(InputRow.execution).where(InputRow.execution.not_in(select(ExecutionRow.id))).distinct()
    for execution in session.scalars(orphans):
        yield Problem("inputs refer to a missing execution", f"execution {execution}", _DATABASE)


def _revocations(session: Session) -> dict[tuple[str, str], int]:
    rows = session.scalars(select(RevocationRow))
    return {(row.kind, row.subject): row.seq for row in rows if isinstance(row.subject, str)}
