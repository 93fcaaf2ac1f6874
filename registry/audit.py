"""Whether all of it still agrees: bytes and digests, rows, events and aliases, MLflow. Reads; never mends."""

from __future__ import annotations

import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_file
from registry import catalog
from registry.entities import AdapterVersion, Problem
from registry.errors import DamagedBlob, HomeError, MirrorError, MissingBlob
from registry.home import Home
from registry.lineage import Lineage, artifact_ref, is_alive
from registry.mirror import Mirror, MirroredVersion
from registry.promotion import replay
from registry.store import Store, open_store
from registry.tables import ArtifactRow, ContentRow, EventRow, RunRow

_RESTORE = "run the pipeline again (the step that made it is repeated), or restore it from a backup"
_SYNC = "bring MLflow level again; if this stays, move mlflow.db away, and it is built anew"


def fsck(home: Home, *, grace: float = 3600.0, mlflow: bool = True) -> list[Problem]:
    """Checks every promise of a home and lists what does not hold; an empty list is good news.

    Args:
        home: The home.
        grace: Seconds for which what nothing refers to is taken for work in progress.
        mlflow: Whether to ask MLflow too, which takes a few seconds.
    """
    problems = _check_sqlite(home.lineage_db)
    if problems:
        return problems
    store = open_store(home)
    try:
        lineage = Lineage(home.lineage_url)
    except HomeError as error:
        return [Problem(error.problem, error.where, error.remedy)]
    with closing(lineage), lineage.database.read() as session:
        versions = catalog.read_versions(session)
        problems += _check_bytes(session, store, versions, grace)
        problems += _check_versions(store, versions)
        problems += _check_log(session)
        problems += _check_runs(session)
        aliases = catalog.alias_table(session)
    problems += _check_leftovers(home, grace)
    if mlflow and (versions or home.mlflow_db.exists()):
        problems += _check_sqlite(home.mlflow_db) or _check_mlflow(home, store, versions, aliases)
    return problems


def _check_sqlite(path: Path) -> list[Problem]:
    where, remedy = str(path), _SYNC if path.name == "mlflow.db" else "restore it from a backup"
    if not path.is_file():
        return [
            Problem("the database is gone", where, "restore it from a backup" if "mlflow" not in path.name else _SYNC)
        ]
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            findings = [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
            findings += [
                f"row {row[1]} of {row[0]} refers to nothing" for row in connection.execute("PRAGMA foreign_key_check")
            ]
    except sqlite3.DatabaseError as error:
        findings = [str(error)]
    return [Problem(f"the database is damaged: {finding}", where, remedy) for finding in findings]


def _check_bytes(session: Session, store: Store, versions: Iterable[AdapterVersion], grace: float) -> Iterator[Problem]:
    """Every blob once; then every known artifact by what was found."""
    actual = {digest: store.blobs.actual_digest(digest) for digest in store.blobs.digests()}
    used_by = defaultdict(list)
    for version in versions:
        for ref in (version.artifact, version.report):
            if ref is not None:
                used_by[ref.sha256].append(version.ref)
    wanted: set[str] = set()
    for artifact in session.scalars(select(ArtifactRow).order_by(ArtifactRow.sha256)):
        ref = artifact_ref(artifact)
        users = f", used by {', '.join(used_by[ref.sha256])}" if used_by[ref.sha256] else ""
        where = f"{ref.kind} {ref.sha256}{users}"
        wanted.add(ref.sha256)
        try:
            files = store.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            yield Problem(f"list of files: {error.problem}", where, _RESTORE)
            continue
        wanted |= {entry.sha256 for entry in files.values()}
        for path, entry in files.items():
            found = actual.get(entry.sha256)
            if found is None:
                yield Problem(f"{path}: the bytes with digest {entry.sha256} are gone", where, _RESTORE)
            elif found != entry.sha256:
                yield Problem(f"{path}: the bytes have digest {found}, but {entry.sha256} was stored", where, _RESTORE)
        rows = session.execute(select(ContentRow.path, ContentRow.sha256).where(ContentRow.artifact == ref.sha256))
        recorded = {path: digest for path, digest in rows}  # noqa: C416
        if recorded and recorded != {path: entry.sha256 for path, entry in files.items()}:
            yield Problem("the recorded files are not those in the store", where, "restore the database from a backup")
    oldest = time.time() - grace
    for digest in sorted(actual.keys() - wanted):
        if store.blobs.age(digest) < oldest:
            yield Problem("nothing refers to this blob", f"blob {digest}", "it only takes room", "leftover")


def _check_versions(store: Store, versions: Iterable[AdapterVersion]) -> Iterator[Problem]:
    numbers: dict[str, int] = defaultdict(int)
    for version in versions:
        numbers[version.name] += 1
        if version.version != numbers[version.name]:
            yield Problem("a version before it is gone", version.ref, "restore the database from a backup")
            numbers[version.name] = version.version
        try:
            entry = store.files(version.artifact).get(version.adapter_path)
        except (MissingBlob, DamagedBlob):
            continue  # found with the bytes
        if entry is None or (entry.sha256, entry.size) != (version.sha256, version.size):
            held = entry.sha256 if entry else "nothing"
            what = f"registered with digest {version.sha256}, but its artifact holds {held}"
            yield Problem(what, version.ref, "restore the database from a backup")


def _check_log(session: Session) -> Iterator[Problem]:
    replayed = replay(catalog.read_events(session))
    table = catalog.alias_table(session)
    for name, alias in sorted(replayed.keys() | table.keys()):
        log, row = replayed.get((name, alias)), table.get((name, alias))
        if log != row:
            what = f"points at version {row}, but the log of events says {log}"
            yield Problem(what, f"{name}@{alias}", "promote to what it should be, and see who wrote the database")
    sequence = list(session.scalars(select(EventRow.seq).order_by(EventRow.seq)))
    # Only SQLite counts without holes.
    if session.get_bind().dialect.name == "sqlite" and sequence != list(range(1, len(sequence) + 1)):
        yield Problem("events are missing from the log", "events", "restore the database from a backup")


def _check_runs(session: Session) -> Iterator[Problem]:
    for row in session.scalars(select(RunRow).where(RunRow.status == "RUNNING").order_by(RunRow.id)):
        if not is_alive(row):
            yield Problem(
                f"run {row.name!r} is RUNNING, but its process {row.pid} is gone",
                f"run {row.id}",
                "the next run marks it as CRASHED",
                "leftover",
            )


def _check_leftovers(home: Home, grace: float) -> Iterator[Problem]:
    oldest = time.time() - grace
    places = [home.path.glob(".*.partial"), home.store.rglob("*"), home.work.rglob("*"), home.reports.rglob("*")]
    for path in sorted({path for place in places for path in place if path.name.endswith(".partial")}):
        if path.lstat().st_mtime < oldest:
            yield Problem("left over by a process that died while it wrote", str(path), "delete it", "leftover")


def _check_mlflow(
    home: Home, store: Store, versions: Iterable[AdapterVersion], aliases: Mapping[tuple[str, str], int]
) -> Iterator[Problem]:
    try:
        with home.lock("mlflow"):
            mirrored = {(entry.name, entry.version): entry for entry in Mirror(home, store).versions()}
    except MirrorError as error:
        yield Problem(error.problem, "MLflow", error.remedy)
        return
    for version in versions:
        entry = mirrored.pop((version.name, version.version), None)
        where = f"MLflow's {version.ref}"
        if entry is None:
            yield Problem("MLflow does not have this version", where, _SYNC)
            continue
        if entry.sha256 != version.sha256:
            yield Problem(f"tagged with digest {entry.sha256!r} instead of {version.sha256}", where, _SYNC)
        wanted = tuple(
            sorted(
                alias for (name, alias), number in aliases.items() if (name, number) == (version.name, version.version)
            )
        )
        if entry.aliases != wanted:
            yield Problem(f"has the aliases {list(entry.aliases)} instead of {list(wanted)}", where, _SYNC)
        yield from _check_copy(entry, version, where)
    for name, number in sorted(mirrored):
        yield Problem(
            "MLflow has a version that was never registered here", f"MLflow's {name}@{number}", "delete it in MLflow"
        )


def _check_copy(entry: MirroredVersion, version: AdapterVersion, where: str) -> Iterator[Problem]:
    if entry.source is None:
        return
    copy = entry.source / Path(version.adapter_path).name
    if not copy.is_file():
        yield Problem("MLflow's copy of the adapter is gone", f"{where}: {copy}", _SYNC)
        return
    actual = sha256_file(copy)
    if actual != version.sha256:
        yield Problem(f"MLflow's copy has digest {actual} instead of {version.sha256}", f"{where}: {copy}", _SYNC)
