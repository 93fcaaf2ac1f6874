"""Repairs what can be rebuilt from intact data (`fsck --repair`), and reports what it did and what it could not do.

The event log and the store are the source of truth for everything else. Damaged data is not deleted but moved to the
store's `damaged/` or the home's `aside/`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.entities import Problem
from registry.errors import HomeError, MlflowError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.check_chain import is_intact
from registry.maintenance.check_mlflow import check_mlflow
from registry.maintenance.check_rows import check_sqlite, is_fatal
from registry.maintenance.gc import sweep_leftovers
from registry.maintenance.repair_bytes import Repair, repair_bytes
from registry.maintenance.repair_cells import repair_cells
from registry.store.artifacts import open_store
from registry.store.database import Database, sqlite_file
from registry.store.tables import AliasRow, RevocationRow, VersionRow
from registry.versions.projections import project_revocations, project_states, replay
from registry.versions.versions import Versions

__all__ = ["Repair", "repair"]

_LOG = "find out who changed the log, and restore the database from a backup"


@dataclass(frozen=True)
class _Quarantine:
    """The folder of the home for damaged files."""

    home: Home

    def move(self, path: Path) -> str:
        """Moves a file or folder, with the other files of a SQLite database, and returns its new path."""
        folder = self.home.path / "aside" / f"{time.time_ns()}"
        folder.mkdir(parents=True)
        for suffix in ("", "-wal", "-shm", "-journal"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.rename(folder / file.name)
        return str(folder / path.name)


def repair(home: Home, *, mlflow: bool = True, grace: float = 3600.0) -> list[Repair]:
    """Repairs a home as far as possible; a later `fsck` lists the remaining problems.

    Args:
        home: The home.
        mlflow: True syncs MLflow too, which takes a few seconds.
        grace: Seconds for which an unfinished file counts as work in progress.

    Raises:
        HomeError: A collection or a backup is running, or a newer release wrote the database.
    """
    own = sqlite_file(home.lineage_url)
    broken = check_sqlite(own, "") if own else []
    if any(is_fatal(problem) for problem in broken):
        return [Repair(problem.what, problem.where, "restore it from a backup", done=False) for problem in broken]
    try:
        with home.lock("gc", timeout=0), closing(Lineage(home.lineage_url)) as lineage:
            store = open_store(home)
            done = [*repair_cells(lineage.database, store), *_repair_rows(lineage.database)]
            done += [
                Repair("its process does not exist", f"run {run.id} ({run.name})", "marked as CRASHED")
                for run in lineage.find_dead_runs()
            ]
            done += repair_bytes(home, lineage.database, store)
            done += [
                Repair("unfinished file of a killed process", item.name, "deleted")
                for item in sweep_leftovers(home, store.blobs, time.time() - grace)
            ]
    except Timeout:
        raise HomeError(
            "a collection or a backup is running", where=str(home.path), remedy="wait until it ends"
        ) from None
    return done + (list(_repair_mlflow(home)) if mlflow else [])


def _repair_rows(database: Database) -> Iterator[Repair]:
    """Restores aliases, states and revocations from the event log, unless the log itself was changed."""
    with database.write() as session:
        if not is_intact(session):
            yield Repair("the log was changed, so nothing is restored from it", "events", _LOG, done=False)
            return
        events = event_log.read_events(session)
        done = [*_repair_aliases(session), *_repair_revocations(session, project_revocations(events))]
        states = project_states(events)
        for row in session.scalars(select(VersionRow).order_by(VersionRow.name, VersionRow.version)):
            state = states.get((row.name, row.version), "ACTIVE")
            if row.state != state:
                done.append(Repair(f"was {row.state}", f"{row.name}@{row.version}", f"{state}, from the event log"))
                row.state, row.mirrored = state, False
    yield from done


def _repair_aliases(session: Session) -> Iterator[Repair]:
    events = [event for event in event_log.read_events(session) if event.alias and event.action != "refuse"]
    replayed, last = replay(events), {(event.name, event.alias): event.seq for event in events}
    table = queries.alias_table(session)
    for name, alias in sorted(replayed.keys() | table.keys()):
        number = replayed.get((name, alias))
        if number == table.get((name, alias)):
            continue
        session.execute(delete(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias))
        if (name, alias) in last:
            seq = last[name, alias]
            session.add(AliasRow(name=name, alias=alias, version=number, seq=seq, mirrored_seq=0))
        problem = f"pointed at version {table.get((name, alias))}"
        yield Repair(problem, f"{name}@{alias}", f"version {number}, from the event log")


def _repair_revocations(session: Session, revoked: dict[tuple[str, str], int]) -> Iterator[Repair]:
    rows = {(kind, subject) for kind, subject in session.execute(select(RevocationRow.kind, RevocationRow.subject))}
    for kind, subject in sorted(rows - revoked.keys()):
        session.execute(delete(RevocationRow).where(RevocationRow.kind == kind, RevocationRow.subject == subject))
        yield Repair("was revoked", f"subject {subject}", "not revoked, from the event log")
    for kind, subject in sorted(revoked.keys() - rows):
        session.add(RevocationRow(kind=kind, subject=subject, seq=revoked[kind, subject]))
        yield Repair("was not revoked", f"subject {subject}", "revoked, from the event log")


def _repair_mlflow(home: Home) -> Iterator[Repair]:
    """Syncs MLflow; if problems remain, moves its files to the quarantine and rebuilds them."""
    quarantine, file = _Quarantine(home), sqlite_file(home.mlflow_url)
    broken = check_sqlite(file, "") if file is not None and file.exists() else []
    if broken and file is not None:
        yield from _rebuild(home, quarantine, file, broken[0].what)
    existed = file is None or file.exists()
    with closing(Versions(home)) as versions:
        problems = _compare(versions)
        if file is not None and not existed and file.exists():
            yield Repair("the database was missing", str(file), "rebuilt")
        if not problems:
            return
        remaining = problems
        for full in (False, True):
            try:
                versions.sync(full=full)
            except MlflowError as error:
                remaining = [Problem(error.problem, error.where, error.remedy)]
            else:
                remaining = _compare(versions)
            if not remaining:
                break
        repaired = (problem for problem in problems if problem not in remaining)
        yield from (Repair(problem.what, problem.where, "rewritten") for problem in repaired)
    if remaining and file is not None:
        yield from _rebuild(home, quarantine, file, remaining[0].what)
        with closing(Versions(home)) as versions:
            remaining = _compare(versions)
    yield from (Repair(problem.what, problem.where, problem.remedy, done=False) for problem in remaining)


def _compare(versions: Versions) -> list[Problem]:
    with versions.lineage.database.read() as session:
        registered = queries.read_versions(session)
    file = sqlite_file(versions.home.mlflow_url)
    if not registered and file is not None and not file.exists():
        return []
    return list(check_mlflow(versions.home, versions.lineage.database, registered))


def _rebuild(home: Home, quarantine: _Quarantine, file: Path, problem: str) -> Iterator[Repair]:
    with home.lock("mlflow"):
        moved = quarantine.move(file)
        if any(home.mlflow_artifacts.iterdir()):
            quarantine.move(home.mlflow_artifacts)
            home.mlflow_artifacts.mkdir()
        with closing(Lineage(home.lineage_url)) as lineage, lineage.database.write() as session:
            session.execute(update(VersionRow).values(mirrored=False))
            session.execute(update(AliasRow).values(mirrored_seq=0))
    with closing(Versions(home)) as versions:
        try:
            versions.sync(full=True)
        except MlflowError as error:
            yield Repair(problem, str(file), f"moved to {moved}; rebuilding it failed: {error}", done=False)
            return
    yield Repair(problem, str(file), f"rebuilt; the old database, with manual changes in MLflow, is in {moved}")
