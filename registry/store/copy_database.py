"""Copying the registry's own tables to another database, of either kind: every row, as they are at one instant."""

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
"""Those of a table's foreign keys before it. What `meta` says holds for its own database alone."""
_BLOCK = 1000


def copy_tables(source: str, target: str) -> dict[str, int]:
    """Copies every row, in one transaction; others may read and write the source meanwhile.

    Args:
        source: SQLAlchemy URL of the database that is only read.
        target: URL of the one that gets the rows; its tables are made if it has none.

    Returns:
        Table -> number of its rows.

    Raises:
        HomeError: One of them cannot be opened, or the target holds something already; nothing was copied then.
    """
    with closing(Database(source)) as old, closing(Database(target)) as new, old.read() as rows, new.write() as session:
        for table in _TABLES:
            if session.scalar(select(func.count()).select_from(table)):
                raise HomeError(
                    f"the table {table.name} holds something already",
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
    counted = table.autoincrement_column
    if count and counted is not None and target.connection().dialect.name == "postgresql":
        # The server counts by itself, and does not look at what is there.
        sequence = func.pg_get_serial_sequence(table.name, counted.name)
        target.execute(select(func.setval(sequence, select(func.max(counted)).scalar_subquery())))
    return count


def _blocks(source: Session, table: Rows) -> Iterator[list[dict[str, Any]]]:
    # In the order of the keys, so that the log keeps its order on disk too.
    found = source.execute(select(table).order_by(*table.primary_key).execution_options(yield_per=_BLOCK))
    for block in found.mappings().partitions():
        yield [dict(row) for row in block]
