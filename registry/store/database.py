"""Connects to the registry's database: one engine, short transactions, readable errors, for SQLite and PostgreSQL.

Both have one writer at a time, so counting, compare-and-set and event logging share one code path. SQLite allows only
one; on PostgreSQL an advisory lock of the transaction has the same effect. `registry.store.schema` opens the schema.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, ColumnElement, Connection, Engine, Row, Select, and_, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, SQLAlchemyError, StatementError
from sqlalchemy.orm import InstrumentedAttribute, Session

from lora_engine.files import canonical_json
from registry.errors import DamagedRow, HomeError, RegistryError, database_error
from registry.refs import is_unicode
from registry.store.damaged import broken
from registry.store.redaction import redact, redact_url
from registry.store.schema import WRITER, open_file, open_server
from registry.store.snapshot import copy_to_scratch
from registry.store.tables import NAMESPACE, Table

_PATIENCE = 20
"""Seconds to wait for another writer."""
BATCH = 500
"""Values per query of `batched`; databases limit the parameters of a statement."""


class Database:
    """The registry's database at the schema of this release; created on first use, migrated from an older schema.

    Args:
        url: SQLAlchemy URL, of SQLite or PostgreSQL. `?mode=ro` reads a SQLite file without changing it or its folder:
            from a copy, which is migrated or created instead.

    Raises:
        HomeError: Not reachable, damaged, read-only, full, or written by a newer release or another program (then it
            is not changed).
    """

    def __init__(self, url: str) -> None:
        parsed = parse_url(url)
        self.url, self.where = url, name_of(url)
        self.read_only = parsed.get_backend_name() == "sqlite" and parsed.query.get("mode") == "ro"
        self._remove_copy: Callable[[], object] = lambda: None
        if self.read_only and parsed.database:
            copy = copy_to_scratch(Path(parsed.database))
            self._remove_copy = weakref.finalize(self, shutil.rmtree, copy.parent, ignore_errors=True)
            parsed = parsed.set(database=str(copy), query={})
        self.engine = _make_engine(parsed)
        self._is_sqlite = self.engine.dialect.name == "sqlite"
        try:
            with self._readable_errors():
                self._open_schema(parsed)
        except BaseException as error:
            # An open connection would leave its log files beside a database that must not change.
            self.close()
            if self.read_only and isinstance(error, HomeError):
                raise error.at(self.where) from None
            if self._is_sqlite or not isinstance(error, SQLAlchemyError):
                raise
            message = redact(str(getattr(error, "orig", None) or error).strip(), url)
            raise HomeError(
                f"the database cannot be opened ({message})", where=self.where, remedy="correct the URL or the server"
            ) from None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Opens a read-only session that sees one consistent snapshot."""
        engine = self.engine
        if not self._is_sqlite:
            engine = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with self._readable_errors(), Session(engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Opens a session in one transaction: commits durably at the end, rolls back after an exception.

        Raises:
            HomeError: The database is read-only.
        """
        if self.read_only:
            raise HomeError(
                "the registry cannot be written", where=self.where, remedy="make the home writable, or free some space"
            )
        # SQLite: take the write lock at once; a read transaction cannot wait for it.
        engine = self.engine.execution_options(loraline_write=True)
        with self._readable_errors(), Session(engine, expire_on_commit=False) as session, session.begin():
            if not self._is_sqlite:
                session.execute(WRITER)
            yield session

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()
        self._remove_copy()

    def _open_schema(self, url: URL) -> None:
        if not self._is_sqlite:
            open_server(self.engine, self.where)
        elif url.database and url.database != ":memory:":
            without_keys = _make_engine(url, foreign_keys=False)
            try:
                open_file(Path(url.database), without_keys)
            finally:
                without_keys.dispose()
        else:
            raise HomeError("a database in memory does not outlive its process", where=self.where, allowed="a file")

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            readable = database_error(redact(str(error.orig), self.url), self.where)
            if readable is None:
                raise
            raise readable from error
        except StatementError as error:
            # A value of one row, of a type that no release writes, was to be searched for in another table.
            raise DamagedRow(
                f"a cell of the database is damaged: {redact(str(error.orig), self.url)}",
                where=self.where,
                remedy="`loraline fsck` names it, and `--repair` restores what can be rebuilt; else restore a backup",
            ) from error


def sqlite_file(url: str) -> Path | None:
    """Returns the file of a SQLite URL; None for another database."""
    parsed = parse_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def name_of(url: str) -> str:
    """Returns the name of a database for messages: its file, or its URL without secrets."""
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        return parsed.database or ""
    return redact_url(parsed.render_as_string(hide_password=False))


def insert_missing(session: Session, table: type[Table], rows: Iterable[Mapping[str, Any]]) -> None:
    """Inserts the rows whose primary key does not exist yet."""
    values = [dict(row) for row in rows]
    if not values:
        return
    dialect = session.connection().dialect.name
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    session.execute(insert(table).on_conflict_do_nothing(), values)


def batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    """Yields the values in lists that fit into one query."""
    listed = list(values)
    return (listed[begin : begin + BATCH] for begin in range(0, len(listed), BATCH))


def batched(
    session: Session,
    query: Select[Any],
    column: ColumnElement[Any] | InstrumentedAttribute[Any],
    values: Iterable[Any],
) -> Iterator[Row[Any]]:
    """Yields the rows of a query for any number of values of an indexed column, or of a tuple of columns."""
    # A damaged cell may hold text that cannot be searched for.
    for batch in batches(value for value in values if not isinstance(value, str) or is_unicode(value)):
        yield from session.execute(query.where(column.in_(batch)))


def begins_with(column: ColumnElement[str] | InstrumentedAttribute[str], prefix: str) -> ColumnElement[bool]:
    """Returns the condition that a column begins with a prefix; a range uses the index everywhere, unlike LIKE."""
    return and_(column >= prefix, column < prefix + "\uffff")


def require_json(error: type[RegistryError], value: Any, where: str) -> None:
    """Raises an error if a JSON column cannot hold the value.

    Raises:
        error: The value contains NaN, infinity, or a type that JSON does not have.
    """
    try:
        canonical_json(value)
    except (ValueError, TypeError) as cause:
        raise error(f"a value that JSON cannot hold: {cause}", where=where, allowed="finite JSON") from cause


def parse_url(url: str) -> URL:
    """Returns the parts of a SQLAlchemy URL; `postgresql://` names the driver psycopg.

    Raises:
        HomeError: Malformed, of another kind of database, or its driver is not installed; names no secret.
    """
    try:
        parsed = make_url(url)
        if parsed.drivername in {"postgresql", "postgres"}:
            # SQLAlchemy's default driver is psycopg2, which is not a dependency.
            parsed = parsed.set(drivername="postgresql+psycopg")
        backend = parsed.get_backend_name()
        if backend not in {"sqlite", "postgresql"}:
            raise HomeError(f"unsupported database {backend!r}", allowed="sqlite, postgresql+psycopg")
        dialect = parsed.get_dialect()
        dialect.import_dbapi()
        dialect().create_connect_args(parsed)
    except (ArgumentError, NoSuchModuleError, ValueError, TypeError):
        # The cause may quote a part of the password, also in a traceback.
        raise HomeError(
            f"not a database URL: {redact_url(url)!r}",
            where="LORALINE_DATABASE_URL, LORALINE_MLFLOW_URL or loraline.yaml",
            allowed="sqlite:////PATH or postgresql+psycopg://USER@HOST/DATABASE",
            remedy="correct the URL; write `@`, `/` and `:` of a password as %40, %2F and %3A",
        ) from None
    except ImportError as error:
        raise HomeError(
            f"the PostgreSQL driver is not installed ({error})",
            where=redact_url(parsed.render_as_string(hide_password=False)),
            remedy="pip install 'loraline[postgres]'",
        ) from error
    return parsed


def _write_json(value: Any) -> str:
    return canonical_json(value).decode()


def _read_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return broken(text, "is no JSON")


def _make_engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    engine = create_engine(url, json_serializer=_write_json, json_deserializer=_read_json)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite(foreign_keys))
        event.listen(engine, "begin", _begin_sqlite)
    else:
        # Before all other listeners: SQLAlchemy queries the current schema when it first connects.
        event.listen(engine, "connect", _configure_postgres, insert=True)
    return engine


def _configure_sqlite(foreign_keys: bool) -> Callable[[Any, Any], None]:
    def configure(connection: Any, _record: Any) -> None:
        # `_begin_sqlite` begins transactions; the driver would begin them too late, and commit them before DDL.
        connection.isolation_level = None
        # Undecodable text would stop every query of its table.
        connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")
        cursor = connection.cursor()
        keys = "ON" if foreign_keys else "OFF"
        for pragma in (f"busy_timeout={_PATIENCE * 1000}", f"foreign_keys={keys}", "synchronous=FULL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return configure


def _begin_sqlite(connection: Connection) -> None:
    is_writer = connection.get_execution_options().get("loraline_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writer else "BEGIN")


def _configure_postgres(connection: Any, _record: Any) -> None:
    connection.autocommit = True
    with connection.cursor() as cursor:
        # MLflow may have its tables in the same database, and some have the same names: use a schema of our own.
        cursor.execute(f"SET search_path TO {NAMESPACE}")
        cursor.execute(f"SET lock_timeout TO '{_PATIENCE}s'")
    connection.autocommit = False
