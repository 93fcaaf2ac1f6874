"""Tests that one damaged cell of a database is named by `fsck`, and stops no verb without words.

The columns come from the metadata of the tables, so a new column is tested by being added.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Integer
from sqlalchemy.types import JSON

from registry.home import Home
from registry.maintenance.fsck import fsck
from registry.maintenance.repair import repair
from registry.store.tables import Instant, Table
from tests.flows.commands import loraline_here
from tests.flows.shared import Trained, copy_trained

VALUES: dict[str, Any] = {
    "NULL": None,
    "blob": b"\xff\x00",
    "undecodable": "CAST(x'ff61' AS TEXT)",
    "absurd": "\x1b[2J" + "x" * 5000,
    "JSON": '{"a": [1,',
    "other JSON": "5",
    "date": "2026-13-45T00:00:00",
    "negative": -7,
    "real": 0.5,
}
FREE = {
    ("meta", "value"): "state of the sync, in its own form",
    ("meta", "key"): "an unknown key has no meaning",
    ("artifacts", "kind"): "`fsck` compares it with the list of files, and reports the artifact",
    ("contents", "path"): "any path",
    ("subjects", "subject"): "an id of a consent is any text",
    ("subjects", "label"): "any text",
    ("runs", "id"): "any text; its executions refer to it",
    ("runs", "name"): "any text",
    ("runs", "host"): "any text",
    ("runs", "process"): "any text",
    ("runs", "mlflow_run_id"): "MLflow chooses it",
    ("executions", "id"): "any text; its inputs refer to it",
    ("executions", "step"): "any text",
    ("executions", "uses"): "steps of plug-ins have other names",
    ("executions", "revision"): "any text",
    ("executions", "key"): "a key of another release",
    ("executions", "error"): "any text",
    ("execution_inputs", "role"): "any text",
    ("versions", "mlflow_run_id"): "MLflow chooses it; `fsck` compares it with MLflow",
    ("version_records", "kind"): "documents of later releases",
    ("version_parents", "text"): "any text",
    ("events", "alias"): "any text",
    ("events", "actor"): "any text",
    ("events", "reason"): "any text",
    ("events", "subject"): "any text",
    ("revocations", "subject"): "any text",
    ("aliases", "alias"): "any text",
}
"""Columns of text in which `fsck` cannot know another text to be wrong -> why."""
COLUMNS = [column for table in Table.metadata.sorted_tables for column in table.columns]
ONCE = [(column, random.Random(str(column)).choice(list(VALUES))) for column in COLUMNS]
VERBS = (("list",), ("show", "small@1"), ("log",), ("lineage", "small@1"))


@contextmanager
def _damaged(file: Path, table: str, column: str, value: Any) -> Iterator[bool]:
    """Changes a cell of the last row, past all constraints, and restores the file. Yields False without a row."""
    original = file.with_name("original.db")
    shutil.copy(file, original)
    try:
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            count = connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
            schema = connection.execute("SELECT name, sql FROM sqlite_master WHERE tbl_name = ?", (table,)).fetchall()
            for name, sql in schema:
                if sql and sql.startswith("CREATE TRIGGER"):
                    connection.execute(f'DROP TRIGGER "{name}"')
            own = next(sql for name, sql in schema if name == table)
            _write_schema(connection, table, own.replace(" NOT NULL", ""))
        with closing(sqlite3.connect(file, isolation_level=None)) as connection:
            is_sql = isinstance(value, str) and value.startswith("CAST(")
            change = f'UPDATE "{table}" SET "{column}" = {value if is_sql else "?"}'
            last = f'WHERE rowid = (SELECT max(rowid) FROM "{table}")'
            try:
                connection.execute(f"{change} {last}", () if is_sql else (value,))
            except sqlite3.IntegrityError:
                count = 0  # SQLite itself refuses the value: a number of a row must be an integer
            _write_schema(connection, table, own)
            for _, sql in schema:
                if sql and sql.startswith("CREATE TRIGGER"):
                    connection.execute(sql)
        yield count > 0
    finally:
        shutil.move(original, file)


def _write_schema(connection: sqlite3.Connection, table: str, sql: str) -> None:
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?", (sql, table))
    connection.execute("PRAGMA writable_schema = RESET")


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("damaged") / "trained")


def _is_valid(column: Any, value: Any) -> bool:
    """Returns True for a value that is as good as another one in its column."""
    if value is None:
        return bool(column.nullable)
    if isinstance(column.type, JSON | Instant):
        return False
    if isinstance(column.type, Integer):
        return bool(value == "5")  # SQLite stores it as a number
    # SQLite stores numbers in columns of text as text.
    is_text = isinstance(value, int | float) or (isinstance(value, str) and not value.startswith("CAST("))
    return is_text and (column.table.name, column.name) in FREE


def check(small: Trained, column: Any, kind: str, verbs: Sequence[Sequence[str]] = VERBS) -> None:
    table, value = column.table.name, VALUES[kind]
    home = small.home.path
    with _damaged(home / "lineage.db", table, column.name, value) as is_changed:
        if not is_changed:
            return
        problems = fsck(Home.open(home), mlflow=False)  # before a verb that syncs MLflow writes columns of the sync
        for verb in verbs:
            done = loraline_here(*verb, home=home)
            assert done.returncode in (0, 1)
            assert "Traceback" not in done.stderr
        texts = [f"{problem.what} {problem.where}" for problem in problems]
        is_named = any(table in text and repr(column.name) in text for text in texts)
        assert is_named or _is_valid(column, value), texts


@pytest.mark.parametrize("index", range(len(ONCE)), ids=[f"{column}-{kind}" for column, kind in ONCE])
def test_a_damaged_cell_is_named_and_stops_no_verb_without_words(small: Trained, index: int) -> None:
    column, kind = ONCE[index]
    check(small, column, kind, [VERBS[index % len(VERBS)]])


@pytest.mark.nightly
@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_every_damage_of_a_cell_is_named(small: Trained, column: Any) -> None:
    for kind in VALUES:
        check(small, column, kind)


REPAIRED = [
    ("versions", "state", "blob"),
    ("versions", "mirrored", "JSON"),
    ("versions", "mlflow_run_id", "blob"),
    ("versions", "sha256", "absurd"),
    ("versions", "size", "NULL"),
    ("artifacts", "size", "negative"),
    ("contents", "size", "real"),
    ("contents", "sha256", "undecodable"),
    ("aliases", "version", "JSON"),
    ("aliases", "seq", "absurd"),
]


@pytest.mark.parametrize(("table", "column", "kind"), REPAIRED)
def test_a_cell_that_follows_from_others_is_repaired(small: Trained, table: str, column: str, kind: str) -> None:
    home = Home.open(small.home.path)
    before = small.version()
    with _damaged(home.path / "lineage.db", table, column, VALUES[kind]):
        assert [problem for problem in fsck(home, mlflow=False) if table in problem.where and column in problem.what]
        assert any(done.done and column in done.what for done in repair(home, mlflow=False))
        assert fsck(home, mlflow=False) == []
        assert replace(small.version(), mlflow_run_id=None) == replace(before, mlflow_run_id=None)


def test_what_cannot_be_rebuilt_is_left_and_reported(small: Trained) -> None:
    home = Home.open(small.home.path)
    with _damaged(home.path / "lineage.db", "events", "at", VALUES["date"]):
        assert [done.done for done in repair(home, mlflow=False) if "'at'" in done.what] == [False]
        assert [problem for problem in fsck(home, mlflow=False) if "'at'" in problem.what]


def test_a_damaged_cell_stops_what_decides_by_it(small: Trained) -> None:
    home = small.home.path
    with _damaged(home / "lineage.db", "versions", "gates", VALUES["JSON"]):
        done = loraline_here("promote", "small@1", "--to", "production", "--reason", "test", home=home)
        assert done.returncode == 1
        assert "row 1 of the table versions: the column 'gates' is damaged" in done.stderr
        listed = loraline_here("list", home=home)
        assert listed.returncode == 0
        assert "the column 'gates' is damaged" in listed.stdout


MLFLOW = [
    ("registered_models", "name"),
    *(("model_versions", name) for name in ("name", "version", "current_stage", "run_id", "source")),
    *(("model_version_tags", name) for name in ("name", "version", "key", "value")),
    *(("registered_model_aliases", name) for name in ("name", "alias", "version")),
    *(("runs", name) for name in ("run_uuid", "lifecycle_stage")),
    *(("tags", name) for name in ("run_uuid", "key", "value")),
]
"""The columns of MLflow that the registry reads; others are MLflow's own."""


@pytest.mark.parametrize("index", range(len(MLFLOW)), ids=["-".join(column) for column in MLFLOW])
def test_a_damaged_cell_of_mlflow_stops_no_verb_and_is_reported(small: Trained, index: int) -> None:
    table, column = MLFLOW[index]
    kind = random.Random(str(index)).choice(["NULL", "blob", "undecodable", "absurd"])
    home = Home.open(small.home.path)
    with _damaged(home.path / "mlflow.db", table, column, VALUES[kind]) as is_changed:
        done = loraline_here(*VERBS[index % 2], home=home.path)
        assert done.returncode == 0, done.stderr
        if is_changed and table != "tags":  # the last tag is one of MLflow's own
            assert fsck(home), kind
