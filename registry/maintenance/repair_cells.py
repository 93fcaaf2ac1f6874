"""Restores damaged cells of the registry's database from the event log, the store and their own meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Table, and_, delete, select, type_coerce, update
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from registry import event_log
from registry.entities import ArtifactRef
from registry.errors import RegistryError
from registry.lineage.rows import read_artifacts
from registry.maintenance.check_chain import is_intact
from registry.maintenance.repair_bytes import Repair
from registry.store.artifacts import Store
from registry.store.cells import find_damaged_cells
from registry.store.damaged import DamagedCell
from registry.store.database import Database
from registry.store.tables import Table as Rows
from registry.versions.projections import project_states

_DERIVED = {"aliases", "revocations", "contents"}
"""Tables whose rows other repairs write again, from the log or from the store."""
_UNSYNCED = {("versions", "mirrored"): False, ("versions", "mlflow_run_id"): None}
"""Columns that the next sync of MLflow writes again -> the value before it."""


def repair_cells(database: Database, store: Store) -> Iterator[Repair]:
    """Restores the damaged cells that can be rebuilt, and yields what it did with each.

    Args:
        database: The registry's database.
        store: The store, for the sizes of artifacts.
    """
    with database.write() as session:
        done = [_repair(session, store, cell) for cell in find_damaged_cells(session)]
    yield from done


def _repair(session: Session, store: Store, cell: DamagedCell) -> Repair:
    table = Rows.metadata.tables[cell.table]
    what, where = f"the column {cell.column!r} is damaged: {cell.problem}", f"row {cell.row} of the table {cell.table}"
    if cell.table in _DERIVED:
        session.execute(delete(table).where(_is_row(table, cell)))
        return Repair(what, where, "deleted, to be written again")
    if (cell.table, cell.column) in _UNSYNCED:
        values = {cell.column: _UNSYNCED[cell.table, cell.column], "mirrored": False}
        session.execute(update(table).where(_is_row(table, cell)).values(values))
        return Repair(what, where, "reset, to be synced again")
    try:
        value = _rebuild(session, store, table, cell)
    except RegistryError as error:
        return Repair(what, where, f"restore the database from a backup ({error.problem})", done=False)
    if value is None:
        return Repair(what, where, "restore the database from a backup", done=False)
    session.execute(update(table).where(_is_row(table, cell)).values({cell.column: value}))
    return Repair(what, where, f"{value}, rebuilt")


def _is_row(table: Table, cell: DamagedCell) -> ColumnElement[bool]:
    pairs = zip(table.primary_key.columns, cell.key, strict=True)
    return and_(*(type_coerce(column, NullType()) == value for column, value in pairs))


def _rebuild(session: Session, store: Store, table: Table, cell: DamagedCell) -> Any:
    """Returns the value of a cell that follows from others; None if nothing determines it."""
    row = session.execute(select(table).where(_is_row(table, cell))).mappings().one()
    if (cell.table, cell.column) == ("versions", "state") and is_intact(session):
        states = project_states(event_log.read_events(session))
        return states.get((row["name"], row["version"]), "ACTIVE")
    if (cell.table, cell.column) == ("artifacts", "size"):
        files = store.files(ArtifactRef(row["kind"], row["sha256"], 0))
        return sum(entry.size for entry in files.values())
    if cell.table == "versions" and cell.column in ("sha256", "size"):
        ref = read_artifacts(session, [row["artifact"]]).get(row["artifact"])
        entry = store.files(ref).get(row["adapter_path"]) if ref else None
        return getattr(entry, cell.column, None)
    return None
