"""Bringing MLflow level: which rows it has not seen yet. Knows rows; MLflow's ways are in `registry.mirror`."""

from __future__ import annotations

from sqlalchemy import exists, select, update

from registry import catalog
from registry.database import Database
from registry.home import Home
from registry.lineage import artifact_ref
from registry.mirror import Mirror
from registry.store import Store
from registry.tables import AliasRow, ArtifactRow, RunRow, VersionRow


def is_level(home: Home, database: Database) -> bool:
    """Whether MLflow shows all that is registered, as far as the own database knows; MLflow is not asked."""
    with database.read() as session:
        new_version = exists().where(VersionRow.mirrored.is_(False))
        moved_alias = exists().where(AliasRow.mirrored_seq < AliasRow.seq)
        if session.scalar(select(new_version | moved_alias)):
            return False
        return home.mlflow_db.exists() or not session.scalar(select(exists().where(VersionRow.id > 0)))


def bring_level(home: Home, store: Store, database: Database, timeout: float = -1, *, again: bool = False) -> None:
    """Brings MLflow level under the lock; may be cut off anywhere and repeated.

    Args:
        home: The home.
        store: Where the bytes come from.
        database: The own database.
        timeout: Seconds to wait for the lock; -1 for ever.
        again: Writes what MLflow should have already once more.

    Raises:
        MirrorError: MLflow refuses.
        filelock.Timeout: Another process is at it.
    """
    if not again and is_level(home, database):
        return
    with home.lock("mlflow", timeout):
        if again or not home.mlflow_db.exists():
            _forget(database)
        mirror = Mirror(home, store)
        _add_versions(database, mirror)
        _set_aliases(database, mirror)


def _forget(database: Database) -> None:
    with database.write() as session:
        session.execute(update(VersionRow).values(mirrored=False))
        session.execute(update(AliasRow).values(mirrored_seq=0))


def _add_versions(database: Database, mirror: Mirror) -> None:
    with database.read() as session:
        # In the order of the numbers, since MLflow counts by itself.
        query = select(VersionRow).where(VersionRow.mirrored.is_(False))
        rows = session.scalars(query.order_by(VersionRow.name, VersionRow.version)).all()
        versions = catalog.entities(session, rows)
        records = [artifact_ref(session.get_one(ArtifactRow, row.record)) for row in rows]
        ids = [row.id for row in rows]
    for row_id, version, record in zip(ids, versions, records, strict=True):
        mlflow_run_id = mirror.add_version(version, record)
        with database.write() as session:
            seen = update(VersionRow).where(VersionRow.id == row_id)
            session.execute(seen.values(mirrored=True, mlflow_run_id=mlflow_run_id))
            session.execute(update(RunRow).where(RunRow.id == version.run_id).values(mlflow_run_id=mlflow_run_id))


def _set_aliases(database: Database, mirror: Mirror) -> None:
    with database.read() as session:
        # Not those of a version that was registered a moment ago: its process waits for the lock, and does it.
        is_pointed_at = (VersionRow.name == AliasRow.name) & (VersionRow.version == AliasRow.version)
        shown = AliasRow.version.is_(None) | exists().where(is_pointed_at, VersionRow.mirrored)
        query = select(AliasRow.name, AliasRow.alias, AliasRow.version, AliasRow.seq)
        moved = session.execute(query.where(AliasRow.mirrored_seq < AliasRow.seq, shown)).all()
    for name, alias, version, seq in moved:
        mirror.set_alias(name, alias, version)
        with database.write() as session:
            seen = update(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias)
            session.execute(seen.values(mirrored_seq=seq))
