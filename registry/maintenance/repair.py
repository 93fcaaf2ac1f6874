"""Mending what can be built again from what is whole: `fsck --repair`. Says what it did and what it could not.

The log of events and the store are the truth; what follows from them is written anew. Nothing damaged is deleted: it is
moved aside, in the store's own `damaged/` or the home's `aside/`.
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

from registry import queries
from registry.entities import Problem
from registry.errors import HomeError, MlflowError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.check_mlflow import check_mlflow
from registry.maintenance.check_rows import check_sqlite
from registry.maintenance.gc import sweep_leftovers
from registry.maintenance.repair_bytes import Mended, mend_bytes
from registry.store.artifacts import open_store
from registry.store.database import Database, sqlite_file
from registry.store.tables import AliasRow, RevocationRow, VersionRow
from registry.versions.projections import project_revocations, project_states
from registry.versions.promotion import replay
from registry.versions.versions import Versions

__all__ = ["Mended", "repair"]


@dataclass(frozen=True)
class _Asides:
    """The folder of this repair for what it moves out of the way."""

    home: Home

    def take(self, path: Path) -> str:
        """Moves a file or folder, and what SQLite keeps beside it, and says where to."""
        folder = self.home.path / "aside" / f"{time.time_ns()}"
        folder.mkdir(parents=True)
        for suffix in ("", "-wal", "-shm", "-journal"):
            beside = path.with_name(path.name + suffix)
            if beside.exists():
                beside.rename(folder / beside.name)
        return str(folder / path.name)


def repair(home: Home, *, mlflow: bool = True, grace: float = 3600.0) -> list[Mended]:
    """Mends a home as far as it can be; `fsck` afterwards says what is left.

    Args:
        home: The home.
        mlflow: Whether to bring MLflow level too, which takes a few seconds.
        grace: Seconds for which an unfinished file is taken for work in progress.

    Raises:
        HomeError: A collection or a backup is at it, or a newer release wrote the database.
    """
    own = sqlite_file(home.lineage_url)
    broken = check_sqlite(own, "") if own else []
    if broken:
        return [Mended(problem.what, problem.where, "restore it from a backup", done=False) for problem in broken]
    try:
        with home.lock("gc", timeout=0), closing(Lineage(home.lineage_url)) as lineage:
            store = open_store(home)
            done = list(_mend_rows(lineage.database))
            done += [
                Mended("its process is gone", f"run {run.id} ({run.name})", "marked as CRASHED")
                for run in lineage.find_dead_runs()
            ]
            done += mend_bytes(home, lineage.database, store)
            done += [
                Mended("left over by a process that died", item.name, "deleted")
                for item in sweep_leftovers(home, store.blobs, time.time() - grace)
            ]
    except Timeout:
        raise HomeError(
            "a collection or a backup is running", where=str(home.path), remedy="wait for its end"
        ) from None
    return done + (list(_mend_mlflow(home)) if mlflow else [])


def _mend_rows(database: Database) -> Iterator[Mended]:
    """Writes aliases, states and revocations as the log has them."""
    with database.write() as session:
        events = queries.read_events(session)
        done = [*_mend_aliases(session), *_mend_revocations(session, project_revocations(events))]
        states = project_states(events)
        for row in session.scalars(select(VersionRow).order_by(VersionRow.name, VersionRow.version)):
            told = states.get((row.name, row.version), "ACTIVE")
            if row.state != told:
                done.append(Mended(f"was {row.state}", f"{row.name}@{row.version}", f"{told}, as the log says"))
                row.state, row.mirrored = told, False
    yield from done


def _mend_aliases(session: Session) -> Iterator[Mended]:
    events = [event for event in queries.read_events(session) if event.alias and event.action != "refuse"]
    told, last = replay(events), {(event.name, event.alias): event.seq for event in events}
    table = queries.alias_table(session)
    for name, alias in sorted(told.keys() | table.keys()):
        number = told.get((name, alias))
        if number == table.get((name, alias)):
            continue
        session.execute(delete(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias))
        if (name, alias) in last:
            seq = last[name, alias]
            session.add(AliasRow(name=name, alias=alias, version=number, seq=seq, mirrored_seq=0))
        was = f"pointed at version {table.get((name, alias))}"
        yield Mended(was, f"{name}@{alias}", f"version {number}, as the log says")


def _mend_revocations(session: Session, told: dict[str, int]) -> Iterator[Mended]:
    rows = set(session.scalars(select(RevocationRow.subject)))
    for subject in sorted(rows - told.keys()):
        session.execute(delete(RevocationRow).where(RevocationRow.subject == subject))
        yield Mended("was revoked", f"subject {subject}", "not revoked, as the log says")
    for subject in sorted(told.keys() - rows):
        session.add(RevocationRow(subject=subject, seq=told[subject]))
        yield Mended("was not revoked", f"subject {subject}", "revoked, as the log says")


def _mend_mlflow(home: Home) -> Iterator[Mended]:
    """Brings MLflow level; where that does not help, its files are moved aside and built anew."""
    asides, file = _Asides(home), sqlite_file(home.mlflow_url)
    broken = check_sqlite(file, "") if file is not None and file.exists() else []
    if broken and file is not None:
        yield from _build_anew(home, asides, file, broken[0].what)
    was_there = file is None or file.exists()
    with closing(Versions(home)) as versions:
        found = _compare(versions)
        if file is not None and not was_there and file.exists():
            yield Mended("the database was gone", str(file), "built anew")
        if not found:
            return
        try:
            versions.sync(again=True)
        except MlflowError as error:
            left = [Problem(error.problem, error.where, error.remedy)]
        else:
            left = _compare(versions)
        yield from (Mended(problem.what, problem.where, "written again") for problem in found if problem not in left)
    if left and file is not None:
        yield from _build_anew(home, asides, file, left[0].what)
        with closing(Versions(home)) as versions:
            left = _compare(versions)
    yield from (Mended(problem.what, problem.where, problem.remedy, done=False) for problem in left)


def _compare(versions: Versions) -> list[Problem]:
    with versions.lineage.database.read() as session:
        known, aliases = queries.read_versions(session), queries.alias_table(session)
    file = sqlite_file(versions.home.mlflow_url)
    if not known and file is not None and not file.exists():
        return []
    return list(check_mlflow(versions.home, versions.store, known, aliases))


def _build_anew(home: Home, asides: _Asides, file: Path, why: str) -> Iterator[Mended]:
    with home.lock("mlflow"):
        kept = asides.take(file)
        if any(home.mlflow_artifacts.iterdir()):
            asides.take(home.mlflow_artifacts)
            home.mlflow_artifacts.mkdir()
        with closing(Lineage(home.lineage_url)) as lineage, lineage.database.write() as session:
            session.execute(update(VersionRow).values(mirrored=False))
            session.execute(update(AliasRow).values(mirrored_seq=0))
    with closing(Versions(home)) as versions:
        try:
            versions.sync(again=True)
        except MlflowError as error:
            yield Mended(why, str(file), f"moved to {kept}; building it anew failed: {error}", done=False)
            return
    yield Mended(why, str(file), f"moved to {kept}, and built anew; what was written in MLflow by hand is there")
