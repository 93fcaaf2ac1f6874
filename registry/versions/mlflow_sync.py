"""Bringing MLflow level: which rows it has not seen yet, and whether it is still where it was told of them.

Knows rows; MLflow's ways are in `registry.versions.mlflow_writer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from lora_engine.files import canonical_json
from registry import queries
from registry.documents.storage import Shown
from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import artifact_ref
from registry.store.artifacts import Store
from registry.store.database import Database, name_of, sqlite_file
from registry.store.tables import AliasRow, ArtifactRow, MetaRow, NameRow, RunRow, VersionRow
from registry.versions.mlflow_writer import MlflowWriter

_PLACE = "mlflow"
"""The row of `meta` that says which MLflow was brought level, and where its artifacts lay."""


def is_synced(home: Home, database: Database) -> bool:
    """Whether MLflow shows all that is registered, as far as the own database knows; MLflow is not asked."""
    with database.read() as session:
        new_version = exists().where(VersionRow.mirrored.is_(False))
        moved_alias = exists().where(AliasRow.mirrored_seq < AliasRow.seq)
        if session.scalar(select(new_version | moved_alias)):
            return False
        if not session.scalar(select(exists().where(VersionRow.id > 0))):
            return True
        return _is_there(home) and _told(session) == _place(home)


def sync_mlflow(
    home: Home,
    store: Store,
    database: Database,
    timeout: float = -1,
    *,
    again: bool = False,
    show: Callable[[AdapterVersion], Shown],
) -> None:
    """Brings MLflow level under the lock; may be cut off anywhere and repeated.

    Args:
        home: The home.
        store: Where the bytes come from.
        database: The own database.
        timeout: Seconds to wait for the lock; -1 for ever.
        again: Writes what MLflow should have already once more.
        show: Gives what MLflow shows of a version beyond its row.

    Raises:
        MlflowError: MLflow refuses.
        filelock.Timeout: Another process is at it.
    """
    if not again and is_synced(home, database):
        return
    with home.lock("mlflow", timeout):
        told, place = _read_synced_state(database), _place(home)
        if again or not _is_there(home) or (told and told["database"] != place["database"]):
            _forget(database)
        writer = MlflowWriter(home, store)
        if told != place:
            with database.read() as session:
                names = session.scalars(select(NameRow.name)).all()
            writer.move_artifacts(names)
        _add_versions(database, writer, show)
        _set_aliases(database, writer)
        if told != place:
            with database.write() as session:
                session.execute(delete(MetaRow).where(MetaRow.key == _PLACE))
                session.add(MetaRow(key=_PLACE, value=canonical_json(place).decode()))


def _is_there(home: Home) -> bool:
    """Whether MLflow's database is there, as far as that can be said without asking a server."""
    file = sqlite_file(home.mlflow_url)
    return file is None or file.exists()


def _place(home: Home) -> dict[str, str]:
    # A database in the home moves with it, and is still the same one.
    database = "home" if sqlite_file(home.mlflow_url) == home.mlflow_db else name_of(home.mlflow_url)
    return {"database": database, "artifacts": home.mlflow_artifacts.as_uri()}


def _told(session: Session) -> dict[str, str] | None:
    written = session.scalar(select(MetaRow.value).where(MetaRow.key == _PLACE))
    return None if written is None else dict(json.loads(written))


def _read_synced_state(database: Database) -> dict[str, str] | None:
    with database.read() as session:
        return _told(session)


def _forget(database: Database) -> None:
    with database.write() as session:
        session.execute(update(VersionRow).values(mirrored=False))
        session.execute(update(AliasRow).values(mirrored_seq=0))


def _add_versions(database: Database, writer: MlflowWriter, show: Callable[[AdapterVersion], Shown]) -> None:
    with database.read() as session:
        # In the order of the numbers, since MLflow counts by itself.
        query = select(VersionRow).where(VersionRow.mirrored.is_(False))
        rows = session.scalars(query.order_by(VersionRow.name, VersionRow.version)).all()
        versions = queries.entities(session, rows)
        records = [artifact_ref(session.get_one(ArtifactRow, row.record)) for row in rows]
        ids = [row.id for row in rows]
    for row_id, version, record in zip(ids, versions, records, strict=True):
        if version.state == "DELETED":
            mlflow_run_id = writer.delete_version(version)
        else:
            mlflow_run_id = writer.add_version(version, record, show(version))
        with database.write() as session:
            seen = update(VersionRow).where(VersionRow.id == row_id)
            session.execute(seen.values(mirrored=True, mlflow_run_id=mlflow_run_id))
            session.execute(update(RunRow).where(RunRow.id == version.run_id).values(mlflow_run_id=mlflow_run_id))


def _set_aliases(database: Database, writer: MlflowWriter) -> None:
    with database.read() as session:
        # Not those of a version that was registered a moment ago: its process waits for the lock, and does it.
        is_pointed_at = (VersionRow.name == AliasRow.name) & (VersionRow.version == AliasRow.version)
        shown = AliasRow.version.is_(None) | exists().where(is_pointed_at, VersionRow.mirrored)
        query = select(AliasRow.name, AliasRow.alias, AliasRow.version, AliasRow.seq)
        moved = session.execute(query.where(AliasRow.mirrored_seq < AliasRow.seq, shown)).all()
    for name, alias, version, seq in moved:
        writer.set_alias(name, alias, version)
        with database.write() as session:
            seen = update(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias)
            session.execute(seen.values(mirrored_seq=seq))
