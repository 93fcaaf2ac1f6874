"""Copies the registry's tables to another database, SQLite or PostgreSQL, from one consistent snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from sqlalchemy import Table as Rows
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from registry.errors import HomeError
from registry.store.database import Database
from registry.store.tables import MetaRow, Table

_TABLES: list[Rows] = [rows for rows in Table.metadata.sorted_tables if rows is not MetaRow.__table__]
"""Referenced tables first. Without `meta`, which describes its own database only."""
_BLOCK = 1000


def copy_tables(source: str, target: str) -> dict[str, int]:
    """Copies every row in one transaction; other processes may read and write the source meanwhile.

    Args:
        source: SQLAlchemy URL of the database that is read.
        target: SQLAlchemy URL of the database that is written; missing tables are created.

    Returns:
        Table -> number of copied rows.

    Raises:
        HomeError: A database cannot be opened, or the target is not empty; nothing was copied.
    """
    with closing(Database(source)) as old, closing(Database(target)) as new, old.read() as rows, new.write() as session:
        for table in _TABLES:
            if session.scalar(select(func.count()).select_from(table)):
                raise HomeError(
                    f"the table {table.name} is not empty",
                    where=new.where,
                    allowed="a database that no home has used",
                    remedy="name an empty database",
                )
        return {table.name: _copy(rows, session, table) for table in _TABLES}


def _copy(source: Session, target: Session, table: Rows) -> int:
    count = 0
    for block in _blocks(source, table):
        target.execute(insert(table), block)
        count += len(block)
    serial = table.autoincrement_column
    if count and serial is not None and target.connection().dialect.name == "postgresql":
        # Inserting explicit numbers does not advance PostgreSQL's sequence.
        sequence = func.pg_get_serial_sequence(table.name, serial.name)
        target.execute(select(func.setval(sequence, select(func.max(serial)).scalar_subquery())))
    return count


def _blocks(source: Session, table: Rows) -> Iterator[list[dict[str, Any]]]:
    # In primary key order, which keeps the order of the log on disk too.
    rows = source.execute(select(table).order_by(*table.primary_key).execution_options(yield_per=_BLOCK))
    for block in rows.mappings().partitions():
        yield [dict(row) for row in block]
