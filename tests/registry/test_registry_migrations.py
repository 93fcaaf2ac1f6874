"""Tests that a database is created, migrated completely or not at all, or refused without a change."""

import json
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, func, inspect, text

from lora_engine.files import sha256_file
from registry.errors import HomeError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.fsck import fsck
from registry.store.database import Database
from registry.store.schema import MIGRATIONS, migrate
from registry.store.tables import NAMESPACE, SCHEMA, Table
from registry.versions.promotion import promote
from registry.versions.versions import Versions

SCHEMA_1 = (Path(__file__).parent / "data" / "schema-1.sql").read_text()


@pytest.fixture
def old(tmp_path):
    """Returns the path of a database of the first schema."""
    path = tmp_path / "old" / "lineage.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
    return path


def url(path):
    return f"sqlite:///{path}"


def rows(path):
    """Returns table -> its rows."""
    with closing(sqlite3.connect(path)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: connection.execute(f'SELECT * FROM "{table}" ORDER BY 1, 2').fetchall() for table in tables}


def timeless(path):
    """Returns the rows without the time of the migration's own event, and its digest."""
    tables = rows(path)
    assert len(tables["events"]) <= 3
    tables["events"] = [row[:9] + row[10:-1] if row[3] == "link" else row for row in tables["events"]]
    return tables


def shape(engine):
    """Returns tables, columns, keys, indexes and triggers of a database, as far as it reports them."""
    with engine.connect() as connection:
        schema = NAMESPACE if engine.dialect.name == "postgresql" else None
        inspector = inspect(connection)
        shapes = {
            table: {
                "columns": [
                    {key: str(column.get(key)) for key in ("name", "type", "nullable", "default", "primary_key")}
                    | {"collation": getattr(column["type"], "collation", None)}
                    for column in inspector.get_columns(table, schema)
                ],
                "key": inspector.get_pk_constraint(table, schema)["constrained_columns"],
                "foreign": sorted(
                    (key["constrained_columns"], key["referred_table"], key["referred_columns"])
                    for key in inspector.get_foreign_keys(table, schema)
                ),
                "unique": sorted(key["column_names"] for key in inspector.get_unique_constraints(table, schema)),
                "indexes": sorted((key["name"], key["column_names"]) for key in inspector.get_indexes(table, schema)),
            }
            for table in inspector.get_table_names(schema)
        }
        if schema:
            triggers = "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgname"
            shapes["sequences"] = inspector.get_sequence_names(schema)
        else:
            triggers = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name"
        shapes["triggers"] = [tuple(row) for row in connection.execute(text(triggers))]
        return shapes


def migrated_engine(address):
    database = Database(address)
    database.close()
    return database.engine


def test_every_schema_has_its_revision():
    assert sorted(path.stem for path in MIGRATIONS.glob("revision_*.py")) == [
        f"revision_{number}" for number in range(1, SCHEMA + 1)
    ]


def test_first_revision_creates_the_schema_of_the_first_release(old):
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        connection.execute(text("PRAGMA foreign_keys=OFF"))
        migrate(connection, 0, 1)
        connection.commit()
        created = shape(engine)
    released = create_engine(url(old))
    assert created == shape(released)
    released.dispose()
    engine.dispose()


def test_migrated_schema_is_the_created_one(old, tmp_path):
    migrated, created = migrated_engine(url(old)), migrated_engine(url(tmp_path / "new" / "lineage.db"))
    shapes = shape(migrated)
    assert shapes == shape(created)
    assert len(shapes) == len(Table.metadata.tables) + 1 + len({"sqlite_sequence"} & set(shapes))
    assert [name for name, _ in shapes["triggers"]] == ["events_no_delete", "events_no_update"]
    with closing(sqlite3.connect(old)) as connection:
        (events,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'events'").fetchone()
    assert "AUTOINCREMENT" in events
    for engine in (migrated, created):
        engine.dispose()


def test_migration_keeps_every_row_and_a_copy_of_the_old_file(old):
    before = rows(old)
    migrated_engine(url(old)).dispose()
    copy = old.with_name("lineage.db.schema-1.bak")
    assert rows(copy) == before
    after = rows(old)
    assert after.pop("meta") == [("schema", str(SCHEMA))]
    added = after["events"].pop()
    assert (added[3], added[7]) == ("link", "linked the events up to 2, which earlier releases wrote without links")
    assert after.pop("sqlite_sequence") == [("events", 3)]
    for table, entries in before.items():
        if table not in {"meta", "sqlite_sequence"}:
            assert [row[: len(entries[0])] for row in after[table]] == entries, table
    # No other file is left, and the copy is an ordinary database.
    assert sorted(path.name for path in old.parent.iterdir()) == ["lineage.db", "lineage.db.schema-1.bak", "locks"]
    migrated_engine(url(copy)).dispose()


def test_migrated_home_works(tmp_path, old, monkeypatch):
    home = Home.open(tmp_path / "home")
    shutil.copy(old, home.lineage_db)
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    versions = Versions(home)
    version = versions.show("zorb", "production")
    assert (version.version, version.state, version.size) == (1, "ACTIVE", 3_000_000_000)
    walk = versions.lineage.walk("5" * 64, "down")
    assert {node.id for node in walk.nodes if node.kind == "version"} == {"zorb@1"}
    assert versions.lineage.executions("run1")[0].environment == {"packages": {"torch": "2.13.0"}}
    with versions.lineage.database.write() as session, pytest.raises(Exception, match="append-only"):
        session.execute(text("DELETE FROM events"))
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"x"})
    versions.register("zorb", artifact, passed=True, gates=[{"metric": "m", "value": 1, "min": 0, "passed": True}])
    event = promote(versions, "zorb", 2, "mine", reason="after the migration")
    assert event.seq == 4
    versions.close()
    assert "refers to a missing row" not in str(fsck(home, mlflow=False))


def test_earlier_copy_is_never_overwritten(old):
    shutil.copy(old, old.with_name("first"))
    migrated_engine(url(old)).dispose()
    with closing(sqlite3.connect(old.with_name("first"))) as connection, connection:
        connection.execute("UPDATE runs SET name = 'another'")
    old.with_name("first").replace(old)
    migrated_engine(url(old)).dispose()
    names = {path.name: rows(path)["runs"][0][1] for path in old.parent.glob("*.bak*")}
    assert names == {"lineage.db.schema-1.bak": "stripes", "lineage.db.schema-1.bak2": "another"}


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import alembic.migration, alembic.operations, alembic.script
from sqlalchemy import event
from sqlalchemy.engine import Engine
import registry
from registry.store.database import Database

package = str(Path(registry.__file__).parent) + os.sep
old, folder, by, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
count = 0

def strike(*arguments):
    global count
    count += 1
    if count == fault:
        os.kill(os.getpid(), signal.SIGKILL)

def trace(frame, kind, argument):
    ours = frame.f_code.co_filename.startswith(package)
    if ours and kind == "line":
        strike()
    return trace if ours else None

for fault in range(1, 10_000, step):
    path = folder / f"{fault:04}" / "lineage.db"
    path.parent.mkdir()
    if old.exists():
        shutil.copy(old, path)
    if not (child := os.fork()):
        if by == "statement":
            for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
                event.listen(Engine, name, strike)
        else:
            sys.settrace(trace)
        Database(f"sqlite:///{path}").close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(fault, os.WEXITSTATUS(status))
        break
"""


def killed(spawn, tmp_path, old, by, step):
    """Returns the databases of processes killed at every `step`-th statement or line; the last one finished."""
    folder = tmp_path / "killed"
    folder.mkdir()
    out, errors = spawn(KILLED, old, folder, by, step).communicate(timeout=500)
    assert out, errors
    fault, status = map(int, out.split())
    assert status == 0, errors
    paths = [entry / "lineage.db" for entry in sorted(folder.iterdir())]
    assert len(paths) == 1 + (fault - 1) // step > 10
    return paths


@pytest.mark.parametrize(
    ("by", "step"),
    [("statement", 1), ("line", 11), pytest.param("line", 1, marks=pytest.mark.nightly)],
)
def test_migration_killed_anywhere_leaves_the_old_or_the_new(old, tmp_path, spawn, by, step):
    paths = killed(spawn, tmp_path, old, by, step)
    first, last = rows(old), timeless(paths[-1])
    outcomes = set()
    for path in paths:
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        after = timeless(path)
        assert after in (first, last), path
        outcomes.add(after == last)
        # Every backup copy is complete.
        assert all(rows(copy) == first for copy in path.parent.glob("*.bak*"))
        migrated_engine(url(path)).dispose()
        assert timeless(path) == last
    assert outcomes == {True, False}


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_creation_killed_anywhere_leaves_nothing_or_all(tmp_path, spawn, step):
    paths = killed(spawn, tmp_path, tmp_path / "absent", "line", step)
    exists = [path.exists() for path in paths]
    assert sorted(exists) == exists
    assert set(exists) == {True, False}
    for path in paths:
        migrated_engine(url(path)).dispose()
        assert rows(path)["meta"] == [("schema", str(SCHEMA))]


def damage(path, begin, end):
    content = bytearray(path.read_bytes())
    content[begin:end] = b"\xa5" * (end - begin)
    path.write_bytes(content)


def sql(path, *statements):
    with closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def fresh(path):
    migrated_engine(url(path)).dispose()
    shutil.rmtree(path.parent / "locks")


def newer(path):
    fresh(path)
    sql(path, f"UPDATE meta SET value = '{SCHEMA + 1}'", "CREATE TABLE more (a)")


def newer_with_a_log(path):
    """Writes a database as a killed process of a newer release leaves it: with its rows only in the log."""
    fresh(path)
    aside = path.with_name("aside")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"UPDATE meta SET value = '{SCHEMA + 1}'")
        connection.commit()
        shutil.copy(path, aside)
        shutil.copy(path.with_name("lineage.db-wal"), path.with_name("aside-wal"))
    for name in ("", "-wal"):
        path.with_name(f"aside{name}").replace(path.with_name(f"lineage.db{name}"))


def truncated(path):
    fresh(path)
    os.truncate(path, path.stat().st_size // 2)


def broken_schema(path):
    fresh(path)
    damage(path, 100, 4096)


def broken_old_page(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'versions'").fetchone()
    damage(path, (page - 1) * 4096, page * 4096 - 100)


def dangling_old_row(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
        connection.execute("DELETE FROM names")
        connection.commit()


REFUSED = {
    "newer": (newer, "newer release"),
    "newer, with a log": (newer_with_a_log, "newer release"),
    "older than the first": (lambda p: (fresh(p), sql(p, "UPDATE meta SET value = '0'")), "schema 0"),
    "MLflow's": (lambda p: sql(p, "CREATE TABLE alembic_version (version_num)"), "another program"),
    "with a meta of its own": (lambda p: sql(p, "CREATE TABLE meta (a)"), "another program"),
    "with another meta": (lambda p: sql(p, "CREATE TABLE meta (key, value)"), "another program"),
    "no number": (lambda p: (fresh(p), sql(p, "UPDATE meta SET value = 'two'")), "another program"),
    "a letter": (lambda p: p.write_bytes(b"this is a letter, not a database" * 100), "not a database"),
    "a short letter": (lambda p: p.write_bytes(b"x"), "not a database"),
    "empty": (lambda p: p.write_bytes(b""), "empty file"),
    "truncated": (truncated, "damaged"),
    "truncated within the header": (lambda p: (fresh(p), os.truncate(p, 60)), "not a database"),
    "damaged header": (lambda p: (fresh(p), damage(p, 0, 40)), "not a database"),
    "damaged list of tables": (broken_schema, "damaged"),
    "old with a damaged page": (broken_old_page, "damaged"),
    "old with a row that refers to a missing row": (dangling_old_row, "refer to missing rows"),
    "gone but for its log": (lambda p: p.with_name("lineage.db-wal").write_bytes(b"x" * 100), "database is missing"),
    "a folder": (lambda p: p.mkdir(), "cannot be opened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_database_is_refused_without_a_change(tmp_path, case):
    make, message = REFUSED[case]
    path = tmp_path / "place" / "lineage.db"
    path.parent.mkdir()
    make(path)

    def digests():
        return {
            entry.name: sha256_file(entry)
            for entry in path.parent.iterdir()
            # An old database is checked under the lock, and is copied before the row with a missing reference is found.
            if entry.is_file() and not entry.name.endswith((".bak", "-shm"))
        }

    before = digests()
    for _ in range(2):
        with pytest.raises(HomeError, match=message) as caught:
            Database(url(path))
        assert caught.value.remedy
        assert "place" in str(caught.value)
        assert digests() == before
    # A reader of a log creates its index, which holds no data; no other database leaves one.
    assert path.with_name("lineage.db-shm").exists() == (case == "newer, with a log")


def test_reading_the_schema_changes_nothing(tmp_path):
    path = tmp_path / "lineage.db"
    fresh(path)
    before = sha256_file(path)
    lineage = Lineage(url(path))
    assert lineage.runs() == []
    lineage.close()
    assert sha256_file(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["lineage.db"]


def test_database_without_tables_is_filled(tmp_path):
    # The first release leaves this if it is killed between two statements.
    path = tmp_path / "lineage.db"
    sql(path, "PRAGMA journal_mode=WAL")
    assert path.stat().st_size
    migrated_engine(url(path)).dispose()
    assert rows(path)["meta"] == [("schema", str(SCHEMA))]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "not a database URL"),
        ("oracle://host/name", "unsupported database"),
        ("mysql+unknown://host/name", "database"),
        ("sqlite://", "in memory"),
        ("postgresql+psycopg://nobody:secret@127.0.0.1:9/x", "cannot be reached"),
    ],
)
def test_unusable_address_is_an_error_without_its_password(address, message):
    with pytest.raises(HomeError, match=message) as caught:
        Database(address)
    assert "secret" not in str(caught.value)


def test_writers_at_once_wait_for_the_migration(old):
    runs, failures = [], []

    def work(number):
        try:
            lineage = Lineage(url(old))
            runs.append(lineage.start_run(f"run {number}", {}).id)
            lineage.close()
        except HomeError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {row[0] for row in rows(old)["runs"]} == {"run1", *runs}
    assert len(list(old.parent.glob("*.bak*"))) == 1


def test_fixture_has_a_row_in_every_table(old):
    with closing(sqlite3.connect(old)) as connection:
        counts = {table: connection.execute(f"SELECT {func.count()} FROM {table}").fetchone()[0] for table in rows(old)}
    assert all(counts.values()), json.dumps(counts)


def test_the_kind_of_a_revocation_is_taken_from_its_event():
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        connection.execute(text("PRAGMA foreign_keys=OFF"))
        migrate(connection, 0, 2)
        columns = "seq, action, actor, reason, gates, at, subject, details"
        for seq, details in ((1, '{"kind":"consent"}'), (2, '{"kind":"picture"}'), (3, "broken")):
            values = {"seq": seq, "subject": f"s{seq}", "details": details}
            connection.execute(
                text(
                    f"INSERT INTO events ({columns}) VALUES (:seq, 'revoke', 'a', 'r', '[]', 't', :subject, :details)"
                ),
                values,
            )
            connection.execute(text("INSERT INTO revocations VALUES (:subject, :seq)"), values)
        migrate(connection, 2)
        kept = connection.execute(text("SELECT kind, subject, seq FROM revocations ORDER BY seq")).all()
    assert kept == [("consent", "s1", 1), ("picture", "s2", 2), ("picture", "s3", 3)]
    engine.dispose()
