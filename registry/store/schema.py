"""Opens a database at the schema of this release: creates it, migrates it after a backup, or refuses it.

The row `schema` of the table `meta` holds the schema's number; each migration updates it in its own transaction.
Alembic orders and runs `registry/store/migrations`. Its version table is not used, because MLflow has one of that name.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from filelock import FileLock
from sqlalchemy import Connection, Engine, StaticPool, create_engine, insert, inspect, select, text, update

from lora_engine.files import atomic_write, sha256_file, sync_folder
from registry.errors import HomeError, database_error, disk_errors
from registry.store.tables import NAMESPACE, SCHEMA, MetaRow, Table

MIGRATIONS = Path(__file__).parent / "migrations"
WRITER = text("SELECT pg_advisory_xact_lock(7020041002071)")
"""Waits until this transaction is the only one that writes (PostgreSQL); released at its end, or with its process."""
_OLDEST = 1
_HEADER = 100


def open_file(path: Path, engine: Engine) -> None:
    """Creates a SQLite file at the schema of this release, or migrates it to that schema.

    Args:
        path: The file; created if it is missing.
        engine: Engine of the same file without enforced foreign keys, which SQLite requires to recreate tables.

    Raises:
        HomeError: Damaged, of a newer release or of another program; neither the file nor its folder was changed.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if file_schema(path) == SCHEMA:
        return
    locks = path.parent / "locks"
    with disk_errors(path):
        locks.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), FileLock(locks / f"{path.name}.lock"):
        schema = file_schema(path)
        if schema is None:
            atomic_write(path, _new_file())
        elif schema != SCHEMA:
            with engine.execution_options(loraline_write=True).begin() as connection:
                # The write lock is held from here on: the backup equals the state that the migration starts from.
                if schema:
                    _check_file(path)
                    back_up(path, schema)
                    migrate(connection, schema)
                    _check_keys(connection, str(path))
                else:
                    create_tables(connection)


def open_server(engine: Engine, where: str) -> None:
    """Creates the tables of this release in a PostgreSQL database, or migrates them.

    Raises:
        HomeError: Of a newer release or of another program; nothing was changed.
    """
    with engine.connect() as connection:
        if _server_schema(connection, where) == SCHEMA:
            return
    with engine.begin() as connection:
        # Another process's migration may take longer than the usual lock timeout.
        connection.execute(text("SET LOCAL lock_timeout TO 0"))
        connection.execute(WRITER)
        schema = _server_schema(connection, where)
        if schema is None:
            if NAMESPACE not in inspect(connection).get_schema_names():
                connection.execute(text(f"CREATE SCHEMA {NAMESPACE}"))
            create_tables(connection)
        elif schema != SCHEMA:
            _copy_tables(connection, schema)
            migrate(connection, schema)


def file_schema(path: Path) -> int | None:
    """Returns the schema of a SQLite file without changing it; None if there is no file, 0 for one without tables.

    Raises:
        HomeError: Damaged, of a newer release or of another program.
    """
    log = path.with_name(f"{path.name}-wal")
    if not path.exists():
        if log.exists() and log.stat().st_size:
            raise HomeError(
                "the database is missing, but its write-ahead log exists",
                where=str(log),
                remedy="restore the database from a backup, or move the log away",
            )
        return None
    _check_size(path)
    # A writable connection removes the log when it closes, a read-only one does not: each leaves the files unchanged.
    mode = "ro" if log.exists() and log.stat().st_size else "rw"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=20)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not tables - {"sqlite_sequence"}:
                return 0
            rows = connection.execute("SELECT value FROM meta WHERE key = 'schema'") if "meta" in tables else ()
            return _known_schema([row[0] for row in rows], str(path))
    except sqlite3.DatabaseError as error:
        raise _unreadable(error, path) from error


def _check_size(path: Path) -> None:
    """Raises HomeError for a folder, and if the file is so short that SQLite would treat it as a new database.

    SQLite recognizes longer files itself. Open the file through SQLite only: when a process closes any handle of it,
    the system releases all POSIX locks of that process, including those of its open connections. Another process could
    then believe that it is the last one, and remove the log while the first one still writes to it.
    """
    if path.is_dir():
        problem = "the database cannot be opened: this is a folder"
        raise HomeError(problem, where=str(path), remedy="move the folder away, or restore the database from a backup")
    size = path.stat().st_size
    if size < _HEADER:
        problem = "this is not a database" if size else "the database is an empty file"
        raise HomeError(problem, where=str(path), remedy="restore it from a backup, or move it away")


def back_up(path: Path, schema: int) -> Path:
    """Copies a SQLite file while it is in use, verifies the copy, and returns its path; overwrites no earlier copy.

    Args:
        path: The file.
        schema: Its schema, which is part of the copy's name.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        _check_file(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        number, copy = 1, path.with_name(f"{path.name}.schema-{schema}.bak")
        while copy.exists() and sha256_file(copy) != sha256_file(partial):
            number += 1
            copy = path.with_name(f"{path.name}.schema-{schema}.bak{number}")
        partial.replace(copy)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
    sync_folder(path.parent)
    return copy


def migrate(connection: Connection, schema: int, target: int = SCHEMA) -> None:
    """Runs the revisions between two schemas within the connection's transaction.

    Args:
        connection: In a writing transaction.
        schema: The current schema; 0 for none.
        target: The schema to migrate to.
    """
    from alembic.migration import MigrationContext
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
    revisions = list(scripts.iterate_revisions(str(target), str(schema) if schema else "base"))
    with Operations.context(MigrationContext.configure(connection)):
        for revision in reversed(revisions):
            upgrade: Callable[[], None] = revision.module.upgrade
            upgrade()
    connection.execute(update(MetaRow).where(MetaRow.key == "schema").values(value=str(target)))


def create_tables(connection: Connection, schema: int = SCHEMA) -> None:
    """Creates the tables of a schema in an empty database, within the connection's transaction."""
    if schema != SCHEMA:
        migrate(connection, 0, schema)
        return
    Table.metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(MetaRow).values(key="schema", value=str(SCHEMA)))


def _new_file() -> bytes:
    """Returns the bytes of a database file without rows; the caller writes them atomically."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        create_tables(connection)
    raw = engine.raw_connection()
    content = bytearray(raw.driver_connection.serialize())  # type: ignore[union-attr]
    raw.close()
    engine.dispose()
    # The read and write versions of the SQLite file format: 2 is write-ahead log.
    content[18] = content[19] = 2
    return bytes(content)


def _server_schema(connection: Connection, where: str) -> int | None:
    tables = inspect(connection).get_table_names(NAMESPACE)
    if not tables:
        return None
    values: Iterable[str] = ()
    if "meta" in tables:
        values = connection.scalars(select(MetaRow.value).where(MetaRow.key == "schema"))
    return _known_schema(list(values), where)


def _known_schema(values: list[str], where: str) -> int:
    if len(values) != 1 or not str(values[0]).isdecimal() or len(str(values[0])) > 9:
        raise HomeError(
            "this database belongs to another program, or its schema number is damaged",
            where=f"{where}: column 'value' of the row schema of the table meta",
            remedy="name another one in loraline.yaml or LORALINE_DATABASE_URL; nothing was changed",
        )
    number = int(values[0])
    if not _OLDEST <= number <= SCHEMA:
        raise HomeError(
            f"the database has schema {number}",
            where=where,
            allowed=f"schema {_OLDEST} to {SCHEMA}, which this release reads",
            remedy="use the newer release of loraline that wrote it; nothing was changed",
        )
    return number


def _copy_tables(connection: Connection, schema: int) -> None:
    """Copies every table into a new PostgreSQL schema, in the transaction of the migration."""
    taken, number = set(inspect(connection).get_schema_names()), 1
    copy = f"{NAMESPACE}_schema_{schema}"
    while copy in taken:
        number += 1
        copy = f"{NAMESPACE}_schema_{schema}_{number}"
    connection.execute(text(f"CREATE SCHEMA {copy}"))
    for table in inspect(connection).get_table_names(NAMESPACE):
        connection.execute(text(f"CREATE TABLE {copy}.{table} AS TABLE {NAMESPACE}.{table}"))


def _check_file(path: Path) -> None:
    """Raises HomeError if the file has a damaged page."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as connection:
        try:
            findings = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
        except sqlite3.DatabaseError as error:
            raise _unreadable(error, path) from error
    if findings != ["ok"]:
        raise HomeError(
            f"the database is damaged: {findings[0]}",
            where=str(path),
            remedy="restore it from a backup; nothing was changed",
        )


def _check_keys(connection: Connection, where: str) -> None:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise HomeError(
            f"{len(broken)} rows refer to missing rows, the first in {broken[0][0]}",
            where=where,
            remedy="restore it from a backup; nothing was changed",
        )


def _unreadable(error: sqlite3.DatabaseError, path: Path) -> HomeError:
    unknown = HomeError(
        f"this database belongs to another program, or is damaged ({error})",
        where=str(path),
        remedy="restore it from a backup, or move it away; nothing was changed",
    )
    return database_error(str(error), str(path)) or unknown
