"""Checks the tables of a backup, whose origin is unknown, and prepares them for their new home.

A stranger's trigger or view would run with later commands, and a name that is a path would choose where they write.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from sqlalchemy import StaticPool, create_engine
from sqlalchemy.exc import SQLAlchemyError

from registry.errors import StoreError, VersionError
from registry.home import Home
from registry.maintenance.check_rows import check_sqlite
from registry.refs import check_alias, check_name
from registry.store.schema import create_tables, file_schema
from registry.store.trees import check_relative
from registry.versions.rewrite_uris import confine_artifact_uris

_INTERNAL = {"sqlite_sequence", "sqlite_stat1", "sqlite_stat4"}
"""Tables that SQLite itself adds."""
_NAMES = (
    ("SELECT name FROM names", check_name),
    ("SELECT alias FROM aliases", check_alias),
    ("SELECT adapter_path FROM versions", check_relative),
    ("SELECT path FROM contents", check_relative),
)
_REMEDY = "take another backup; do not use this one unless you know where it comes from"
_SHOWN = 4
# MLflow has a trigger that keeps its secrets; such a trigger only refuses.
_REFUSAL = re.compile(r"CREATE TRIGGER \w+ BEFORE [^;]* BEGIN SELECT RAISE\(ABORT, '[^';]*'\); END", re.IGNORECASE)


def prepare_tables(path: Path, where: str) -> None:
    """Checks the registry's tables, marks all as not synced to MLflow, and sets the journal mode.

    Args:
        path: The SQLite file; not trusted.
        where: Its name in messages.

    Raises:
        StoreError: It has a trigger, view, table or column that its schema lacks, or lacks one; or has a name that is
            a path; or is damaged.
        HomeError: It is of a newer release or of another program.
        sqlite3.Error: The disk is full.
    """
    _check_schema(path, file_schema(path) or 0, where)
    _check_pages(path, where)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE versions SET mirrored = 0")
        connection.execute("UPDATE aliases SET mirrored_seq = 0")
        connection.commit()
        connection.execute("PRAGMA journal_mode=WAL")


def prepare_mlflow(path: Path, where: str, old: str, home: Path) -> tuple[str, ...]:
    """Checks MLflow's tables, and lets their artifact URIs name the new home.

    MLflow writes and deletes files where these URIs point. If one is outside of the home, the file is deleted: the next
    command that registers or promotes writes MLflow's tables anew.

    Args:
        path: The SQLite file; not trusted.
        where: Its name in messages.
        old: Path of the home that the backup is of.
        home: Path of the new home.

    Returns:
        Why the file was deleted; empty if it was not.

    Raises:
        StoreError: It has a trigger, a view or a virtual table, or is damaged.
        sqlite3.Error: The disk is full.
    """
    with closing(_open(path)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    _refuse([f"{kind} {name}" for kind, name, sql in rows if _runs_code(kind, sql)], "not in MLflow's schema", where)
    _check_pages(path, where)
    source = Home(Path(old) if Path(old).is_absolute() else home).mlflow_artifacts.as_uri()
    try:
        outside = confine_artifact_uris(f"sqlite:///{path}", source, Home(home).mlflow_artifacts.as_uri())
    except SQLAlchemyError as error:
        outside = str(error).partition("\n")[0]
    if outside is None:
        return ()
    path.unlink()
    return (f"{path.name}: its artifacts are not in its home ({outside[:200]}); MLflow's tables are written anew",)


def _check_schema(path: Path, schema: int, where: str) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as transaction:
        create_tables(transaction, schema)
        expected = _read_objects(transaction.connection.driver_connection)  # type: ignore[arg-type]
    engine.dispose()
    with closing(_open(path)) as connection:
        tables = {name for name in expected if name.startswith("table ")}
        objects = _read_objects(connection, tables)
        _refuse([name for name, sql in objects.items() if expected.get(name) != sql], f"not in schema {schema}", where)
        _refuse(sorted(expected.keys() - objects.keys()), f"missing in schema {schema}", where)
        try:
            for query, check in _NAMES:
                for (value,) in connection.execute(query):
                    check(str(value))
        except (VersionError, StoreError) as error:
            raise StoreError(error.problem, where=where, allowed=error.allowed, remedy=_REMEDY) from error


def _runs_code(kind: str, sql: str) -> bool:
    plain = " ".join(sql.split())
    is_virtual = plain.upper().startswith("CREATE VIRTUAL")
    return kind == "view" or is_virtual or (kind == "trigger" and not _REFUSAL.fullmatch(plain))


def _check_pages(path: Path, where: str) -> None:
    for problem in check_sqlite(path, ""):
        raise StoreError(problem.what, where=where, remedy="take another backup")


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


def _read_objects(connection: sqlite3.Connection, tables: Collection[str] | None = None) -> dict[str, str]:
    """Returns `table x`, `column x.y`, `trigger z`, each with what defines it; columns only of these tables."""
    objects = {}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master WHERE type != 'index'"):
        key = f"{kind} {name}"
        if name in _INTERNAL:
            continue
        objects[key] = " ".join(sql.split()) if kind == "trigger" else ""
        if kind == "table" and (tables is None or key in tables):
            columns = connection.execute("SELECT name, hidden FROM pragma_table_xinfo(?)", (name,))
            objects |= {f"column {name}.{column}": str(hidden) for column, hidden in columns}
    return objects


def _refuse(names: Collection[str], problem: str, where: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(repr(name[:80]) for name in list(names)[:_SHOWN])
        raise StoreError(f"{problem}: {shown}{more}", where=where, remedy=_REMEDY)
