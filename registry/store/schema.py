"""Opening a database at the schema of this release: made if there is none, migrated after a backup, or refused.

The one record of a schema's number is the row `schema` of the table `meta`, changed in the transaction of the migration
itself; Alembic gives the operations and the order of `registry/store/migrations`, and its own table is not used, since MLflow
has one of that name.
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
    """Brings a SQLite file to the schema of this release.

    Args:
        path: The file; made if it is missing.
        engine: Engine of the same file that does not enforce foreign keys, as SQLite asks of one that rebuilds tables.

    Raises:
        HomeError: Damaged, of a newer release or of another program; the file is as it was, and none beside it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if file_schema(path) == SCHEMA:
        return
    locks = path.parent / "locks"
    with disk_errors(path):
        locks.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), FileLock(locks / f"{path.name}.lock"):
        found = file_schema(path)
        if found is None:
            atomic_write(path, _new_file())
        elif found != SCHEMA:
            with engine.execution_options(loraline_write=True).begin() as connection:
                # Nobody writes from here on, so that the copy is what the migration starts from.
                if found:
                    _check_file(path)
                    back_up(path, found)
                    migrate(connection, found)
                    _check_keys(connection, str(path))
                else:
                    _create(connection)


def open_server(engine: Engine, where: str) -> None:
    """Brings a PostgreSQL database to the schema of this release.

    Raises:
        HomeError: Of a newer release or of another program; nothing was changed.
    """
    with engine.connect() as connection:
        if _server_schema(connection, where) == SCHEMA:
            return
    with engine.begin() as connection:
        # Others may be at it for longer than one waits for a common lock.
        connection.execute(text("SET LOCAL lock_timeout TO 0"))
        connection.execute(WRITER)
        found = _server_schema(connection, where)
        if found is None:
            if NAMESPACE not in inspect(connection).get_schema_names():
                connection.execute(text(f"CREATE SCHEMA {NAMESPACE}"))
            _create(connection)
        elif found != SCHEMA:
            _copy_tables(connection, found)
            migrate(connection, found)


def file_schema(path: Path) -> int | None:
    """The schema of a SQLite file, read without a trace; None where there is no file, 0 for a database without tables.

    Raises:
        HomeError: Damaged, of a newer release or of another program.
    """
    log = path.with_name(f"{path.name}-wal")
    if not path.exists():
        if log.exists() and log.stat().st_size:
            raise HomeError(
                "the database is gone, but its log is there",
                where=str(log),
                remedy="restore the database from a backup, or move the log away",
            )
        return None
    _check_size(path)
    # A writer removes the log when it closes, and a reader does not; so each leaves what it found.
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
    """Refuses what SQLite would take for a new database.

    SQLite itself sees whether the rest is one. The file is never opened by other means than SQLite's: when a process
    closes a file, the system lets go of all locks that it has on it, those of its open connections too. Another process
    then takes itself for the last one, and removes the log that the first one goes on writing to.
    """
    size = path.stat().st_size
    if size < _HEADER:
        what = "this is not a database" if size else "the database is an empty file"
        raise HomeError(what, where=str(path), remedy="restore it from a backup, or move it away")


def back_up(path: Path, found: int) -> Path:
    """Copies a SQLite file while it is in use, verifies the copy, and gives its path; no earlier copy is overwritten.

    Args:
        path: The file.
        found: Its schema, which the name of the copy tells.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(partial)) as target:
            source.backup(target)
        _check_file(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        number, copy = 1, path.with_name(f"{path.name}.schema-{found}.bak")
        while copy.exists() and sha256_file(copy) != sha256_file(partial):
            number += 1
            copy = path.with_name(f"{path.name}.schema-{found}.bak{number}")
        partial.replace(copy)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
    sync_folder(path.parent)
    return copy


def migrate(connection: Connection, found: int, wanted: int = SCHEMA) -> None:
    """Runs the revisions between two schemas within the connection's transaction.

    Args:
        connection: In a writing transaction.
        found: The schema that is there; 0 for none.
        wanted: The schema to reach.
    """
    from alembic.migration import MigrationContext
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(MIGRATIONS), version_locations=[str(MIGRATIONS)])
    revisions = list(scripts.iterate_revisions(str(wanted), str(found) if found else "base"))
    with Operations.context(MigrationContext.configure(connection)):
        for revision in reversed(revisions):
            upgrade: Callable[[], None] = revision.module.upgrade
            upgrade()
    connection.execute(update(MetaRow).where(MetaRow.key == "schema").values(value=str(wanted)))


def _create(connection: Connection) -> None:
    Table.metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(MetaRow).values(key="schema", value=str(SCHEMA)))


def _new_file() -> bytes:
    """A database without rows as the bytes of its file, which appears whole or not at all."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        _create(connection)
    raw = engine.raw_connection()
    content = bytearray(raw.driver_connection.serialize())  # type: ignore[union-attr]
    raw.close()
    engine.dispose()
    # The two bytes of the file format that say how it is written: 2 is a write-ahead log.
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
    if len(values) != 1 or not str(values[0]).isdecimal():
        raise HomeError(
            "this database is another program's",
            where=where,
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


def _copy_tables(connection: Connection, found: int) -> None:
    """Keeps the rows of every table in a schema of the server beside ours, in the transaction of the migration."""
    taken, number = set(inspect(connection).get_schema_names()), 1
    copy = f"{NAMESPACE}_schema_{found}"
    while copy in taken:
        number += 1
        copy = f"{NAMESPACE}_schema_{found}_{number}"
    connection.execute(text(f"CREATE SCHEMA {copy}"))
    for table in inspect(connection).get_table_names(NAMESPACE):
        connection.execute(text(f"CREATE TABLE {copy}.{table} AS TABLE {NAMESPACE}.{table}"))


def _check_file(path: Path) -> None:
    """Refuses to go on from a file with a damaged page."""
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
            f"{len(broken)} rows refer to nothing, the first in {broken[0][0]}",
            where=where,
            remedy="restore it from a backup; nothing was changed",
        )


def _unreadable(error: sqlite3.DatabaseError, path: Path) -> HomeError:
    unknown = HomeError(
        f"this database is another program's, or damaged ({error})",
        where=str(path),
        remedy="restore it from a backup, or move it away; nothing was changed",
    )
    return database_error(str(error), str(path)) or unknown
