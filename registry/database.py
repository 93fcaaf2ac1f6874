"""How the registry talks to its database: one engine, short transactions, the schema's version, worded errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Connection, create_engine, event, inspect, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from lora_engine.files import canonical_json
from registry.errors import HomeError, disk_errors
from registry.tables import SCHEMA, MetaRow, Table


class Database:
    """The registry's database, with its schema made on first use.

    Args:
        url: SQLAlchemy URL.

    Raises:
        HomeError: Damaged, read-only, full, or written by a newer release (and then not touched).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.where = make_url(url).database or url
        self.engine = create_engine(url, json_serializer=lambda value: canonical_json(value).decode())
        self._is_sqlite = self.engine.dialect.name == "sqlite"
        if self._is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        with self._worded():
            self._open_schema()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one consistent state and changes nothing."""
        with self._worded(), Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session in one transaction: all of it is durable at the end, or none of it after an exception."""
        # SQLite: take the write lock at once; a reader that turns writer could not wait for it.
        engine = self.engine.execution_options(loraline_write=True)
        with self._worded(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    def _open_schema(self) -> None:
        if self._is_sqlite:
            path = Path(self.where)
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and path.stat().st_size and self._schema_is_current():
                return
            lock = path.parent / "locks" / f"{path.name}.lock"
            with disk_errors(path):
                lock.parent.mkdir(parents=True, exist_ok=True)
            with disk_errors(path), FileLock(lock):
                self._create_schema()
        else:
            self._create_schema()

    def _schema_is_current(self) -> bool:
        with self.engine.connect() as connection:
            if not inspect(connection).has_table(MetaRow.__tablename__):
                return False
            found = connection.scalar(select(MetaRow.value).where(MetaRow.key == "schema"))
        if found is None:
            return False
        if not found.isdigit() or int(found) > SCHEMA:
            raise HomeError(
                f"the database has schema {found!r}",
                where=self.where,
                allowed=f"schema {SCHEMA}, which this release reads",
                remedy="use the newer release of loraline that wrote it; nothing was changed",
            )
        return int(found) == SCHEMA

    def _create_schema(self) -> None:
        if self._schema_is_current():
            return
        if self._is_sqlite:
            connection = self.engine.raw_connection()
            try:
                # Kept in the file for good; set under the lock, since this statement does not wait for others.
                connection.cursor().execute("PRAGMA journal_mode=WAL")
            finally:
                connection.close()
        with self.write() as session:
            Table.metadata.create_all(session.connection())
            insert_missing(session, MetaRow, [{"key": "schema", "value": str(SCHEMA)}])

    @contextmanager
    def _worded(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            worded = _word(str(error.orig), self.where)
            if worded is None:
                raise
            raise worded from error


def insert_missing(session: Session, table: type[Table], rows: Iterable[Mapping[str, Any]]) -> None:
    """Inserts the rows whose primary key is not there yet."""
    listed = [dict(row) for row in rows]
    if not listed:
        return
    dialect = session.connection().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    session.execute(insert(table).on_conflict_do_nothing(), listed)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Leave transactions to `_begin_sqlite`; the driver would begin them too late.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("busy_timeout=20000", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("loraline_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _word(message: str, where: str) -> HomeError | None:
    worded = {
        "disk is full": ("the disk is full", "free some space and run the same command again"),
        "readonly": ("the database cannot be written", "make the file and its folder writable"),
        "read-only": ("the database cannot be written", "make the file and its folder writable"),
        "unable to open": ("the database cannot be opened", "see that the folder exists and is writable"),
        "malformed": ("the database is damaged", "restore it from a backup"),
        "not a database": ("this is not a database", "restore it from a backup, or move it away"),
        "disk I/O error": ("the disk does not read or write", "check the disk; then run `loraline fsck`"),
        "database is locked": ("the database was busy for 20 seconds", "see what else uses it, and try again"),
    }
    for sign, (problem, remedy) in worded.items():
        if sign in message:
            return HomeError(f"{problem} ({message})", where=where, remedy=remedy)
    return None
