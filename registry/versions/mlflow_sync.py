"""Syncs registry rows to MLflow: rows that it does not have yet, a database that was replaced, what others changed.

`registry.versions.mlflow_drift` finds changes by others, `registry.versions.mlflow_writer` writes to MLflow.
"""

from __future__ import annotations

import json
import logging

from sqlalchemy import delete, exists, select, update
from sqlalchemy.orm import Session

from lora_engine.files import canonical_json
from registry import queries
from registry.context import RegistryContext
from registry.documents.storage import gather_shown
from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.rows import artifact_ref
from registry.store.database import Database, name_of, sqlite_file
from registry.store.tables import AliasRow, ArtifactRow, ExecutionRow, MetaRow, NameRow, RunRow, VersionRow
from registry.versions.mlflow_drift import find_drift
from registry.versions.mlflow_tables import read_models, read_tables
from registry.versions.mlflow_writer import MlflowWriter

_logger = logging.getLogger(__name__)

_TARGET = "mlflow"
"""The row of `meta` that holds the target of the last sync: MLflow's database and artifact folder."""


def is_synced(home: Home, database: Database) -> bool:
    """Returns True if MLflow has every row, by the registry's database alone; does not query MLflow."""
    return not find_unsynced(home, database)


def find_unsynced(home: Home, database: Database) -> list[str]:
    """Returns the versions and aliases, as `name@ref`, that MLflow does not have as they are; does not query MLflow.

    A database that was replaced is one entry, its name.
    """
    with database.read() as session:
        versions = select(VersionRow.name, VersionRow.version).where(VersionRow.mirrored.is_(False))
        aliases = select(AliasRow.name, AliasRow.alias).where(AliasRow.mirrored_seq < AliasRow.seq)
        refs = [f"{name}@{ref}" for query in (versions, aliases) for name, ref in session.execute(query)]
        if refs or not session.scalar(select(exists().where(VersionRow.id > 0))):
            return refs
        is_same = _database_exists(home) and _synced_target(session) == _target(home)
        return [] if is_same else [name_of(home.mlflow_url)]


def sync_mlflow(context: RegistryContext, timeout: float = -1, *, full: bool = False) -> None:
    """Syncs MLflow under the lock, and restores what others changed there; an interrupted sync can be repeated.

    Args:
        context: The opened home.
        timeout: Seconds to wait for the lock; -1 waits forever.
        full: True writes all rows, also those that MLflow should have already.

    Raises:
        MlflowError: MLflow failed.
        filelock.Timeout: Another process is syncing.
    """
    home, database = context.home, context.lineage.database
    if not full and is_synced(home, database) and not find_drift(home, database):
        return
    with home.lock("mlflow", timeout):
        synced, target = _read_synced_target(database), _target(home)
        if full or not _database_exists(home) or (synced and synced["database"] != target["database"]):
            _mark_unsynced(database)
        writer = MlflowWriter(home, context.store)
        if synced != target:
            with database.read() as session:
                names = session.scalars(select(NameRow.name)).all()
            writer.move_artifacts(names)
        _restore(context, writer)
        _set_aliases(database, writer)  # first: a changed alias serves another version meanwhile
        _add_versions(context, writer)
        _set_aliases(database, writer)
        if synced != target:
            with database.write() as session:
                session.execute(delete(MetaRow).where(MetaRow.key == _TARGET))
                session.add(MetaRow(key=_TARGET, value=canonical_json(target).decode()))


def _database_exists(home: Home) -> bool:
    """Returns False if MLflow's database is a missing file; does not query a server."""
    file = sqlite_file(home.mlflow_url)
    return file is None or file.exists()


def _target(home: Home) -> dict[str, str]:
    # A database in the home moves with it and stays the same one, so its path is not part of the target.
    database = "home" if sqlite_file(home.mlflow_url) == home.mlflow_db else name_of(home.mlflow_url)
    return {"database": database, "artifacts": home.mlflow_artifacts.as_uri()}


def _synced_target(session: Session) -> dict[str, str] | None:
    text = session.scalar(select(MetaRow.value).where(MetaRow.key == _TARGET))
    try:
        target = None if text is None else json.loads(text)
    except ValueError:
        target = None  # damaged: the next sync writes all rows again
    return target if isinstance(target, dict) else None


def _read_synced_target(database: Database) -> dict[str, str] | None:
    with database.read() as session:
        return _synced_target(session)


def _mark_unsynced(database: Database) -> None:
    with database.write() as session:
        session.execute(update(VersionRow).values(mirrored=False))
        session.execute(update(AliasRow).values(mirrored_seq=0))


def _restore(context: RegistryContext, writer: MlflowWriter) -> None:
    """Restores what others changed in MLflow, except lost versions and the targets of aliases: marks them unsynced."""
    database = context.lineage.database
    _rename_models(context, writer)
    differences = find_drift(context.home, database)
    if not differences:
        return
    for difference in differences:
        _logger.warning("%s: %s; restoring it", difference.problem.where, difference.what)
    lost = {(entry.name, entry.version) for entry in differences if entry.is_lost}
    changed = {(entry.name, entry.version) for entry in differences if entry.version is not None} - lost
    aliases = read_tables(context.home.mlflow_url).aliases
    different = {(entry.name, entry.alias) for entry in differences if entry.alias is not None}
    # MLflow may have another program's version under the number of a lost one.
    different |= {(name, alias) for (name, alias), number in aliases.items() if (name, number) in lost}
    with database.write() as session:
        for name, number in lost:
            row = update(VersionRow).where(VersionRow.name == name, VersionRow.version == number)
            session.execute(row.values(mirrored=False))
        for name, alias in different:
            row = update(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias)
            session.execute(row.values(mirrored_seq=0))
        versions = [version for version in queries.read_versions(session) if (version.name, version.version) in changed]
        targets = queries.alias_table(session)
    for name, alias in sorted(different & aliases.keys()):
        if (name, targets.get((name, alias))) in {*lost, (name, None)}:
            writer.set_alias(name, alias, None)
    for version in versions:
        writer.restore_version(version)


def _rename_models(context: RegistryContext, writer: MlflowWriter) -> None:
    """Renames registered models back that someone renamed in MLflow."""
    with context.lineage.database.read() as session:
        names = set(session.scalars(select(VersionRow.name).where(VersionRow.mirrored).distinct()))
    if names <= read_models(context.home.mlflow_url):
        return
    tables = read_tables(context.home.mlflow_url)
    renamed = {}
    for (model, _), entry in tables.versions.items():
        name = entry.tags.get("loraline.version", "").rpartition("@")[0]
        if name in names - tables.models and model != name:
            renamed[name] = model
    for name, model in sorted(renamed.items()):
        _logger.warning("MLflow's %s: has the name %r; restoring it", name, model)
        writer.rename_model(model, name)


def _add_versions(context: RegistryContext, writer: MlflowWriter) -> None:
    database = context.lineage.database
    with database.read() as session:
        # In the order of their numbers, because MLflow assigns version numbers itself.
        query = select(VersionRow).where(VersionRow.mirrored.is_(False))
        rows = session.scalars(query.order_by(VersionRow.name, VersionRow.version)).all()
        versions = queries.entities(session, rows)
        records = [artifact_ref(session.get_one(ArtifactRow, row.metadata_artifact)) for row in rows]
        ids = [row.id for row in rows]
    for row_id, version, record in zip(ids, versions, records, strict=True):
        if version.state == "DELETED":
            mlflow_run_id = writer.delete_version(version)
        else:
            keys = _training_keys(database, version)
            mlflow_run_id = writer.add_version(version, record, gather_shown(context, version), keys)
        with database.write() as session:
            statement = update(VersionRow).where(VersionRow.id == row_id)
            session.execute(statement.values(mirrored=True, mlflow_run_id=mlflow_run_id))
            session.execute(update(RunRow).where(RunRow.id == version.run_id).values(mlflow_run_id=mlflow_run_id))


def _training_keys(database: Database, version: AdapterVersion) -> list[str]:
    """Returns the cache keys of the trainings that made a version's adapter."""
    made = (ExecutionRow.output == version.artifact.sha256, ExecutionRow.status == "COMPLETED")
    with database.read() as session:
        return list(session.scalars(select(ExecutionRow.key).where(*made).distinct()))


def _set_aliases(database: Database, writer: MlflowWriter) -> None:
    with database.read() as session:
        # MLflow may lack a version that was registered meanwhile: its process waits for the lock, and sets its alias.
        is_target = (VersionRow.name == AliasRow.name) & (VersionRow.version == AliasRow.version)
        has_synced_target = AliasRow.version.is_(None) | exists().where(is_target, VersionRow.mirrored)
        query = select(AliasRow.name, AliasRow.alias, AliasRow.version, AliasRow.seq)
        moved = session.execute(query.where(AliasRow.mirrored_seq < AliasRow.seq, has_synced_target)).all()
    for name, alias, version, seq in moved:
        writer.set_alias(name, alias, version)
        with database.write() as session:
            statement = update(AliasRow).where(AliasRow.name == name, AliasRow.alias == alias)
            session.execute(statement.values(mirrored_seq=seq))
