"""What is different on a server: a namespace beside MLflow's, writers on many connections, places that are URLs."""

import shutil
import subprocess
import sys
from contextlib import closing

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DatabaseError

from registry.audit.fsck import fsck
from registry.catalog import alias_table, read_events
from registry.database import Database, name_of, sqlite_file
from registry.errors import HomeError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.mirror import Mirror
from registry.promotion import promote, replay
from registry.store.artifacts import open_store
from registry.tables import NAMESPACE, Table
from registry.versions import Versions

pytestmark = pytest.mark.needs("postgres")


def let_go_of_mlflow():
    """Closes the connections that MLflow keeps for the life of the process, of which psycopg would complain."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for engine in SqlAlchemyStore._engine_map.values():
        engine.dispose()


@pytest.fixture
def server_home(tmp_path, postgres_url):
    """A home that keeps its own tables and MLflow's in one database of a server."""
    home = Home.open(tmp_path / "home")
    home.path.joinpath("loraline.yaml").write_text(f"database: {postgres_url}\nmlflow: {postgres_url}\n")
    yield home
    let_go_of_mlflow()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:////home/lineage.db", "/home/lineage.db"),
        ("postgresql+psycopg://ada:secret@host:5432/name", "postgresql+psycopg://ada:***@host:5432/name"),
        ("postgresql://ada@host/name", "postgresql+psycopg://ada@host/name"),
    ],
)
def test_database_is_named_without_its_password(url, name):
    assert name_of(url) == name
    assert (sqlite_file(url) is None) == name.startswith("postgresql")


def test_tables_keep_to_their_namespace(postgres_url):
    Database(postgres_url).close()
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names(NAMESPACE)) == set(Table.metadata.tables)
        assert inspect(connection).get_table_names("public") == []
    engine.dispose()


@pytest.mark.parametrize(
    "statement", ["UPDATE events SET actor = 'eve'", "DELETE FROM events", "TRUNCATE events CASCADE"]
)
def test_events_cannot_be_changed_by_anybody_else_either(postgres_url, statement):
    Database(postgres_url).close()
    engine = create_engine(postgres_url)
    with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement.replace("events", f"{NAMESPACE}.events")))
    engine.dispose()


def test_reader_sees_one_state_and_changes_nothing(postgres_url):
    with closing(Lineage(postgres_url)) as lineage:
        with lineage.database.read() as session:
            count = text("SELECT count(*) FROM runs")
            before = session.scalar(count)
            lineage.start_run("p", {})
            assert session.scalar(count) == before
        with lineage.database.read() as session:
            assert session.scalar(count) == 1
        with pytest.raises(HomeError, match="read-only"), lineage.database.read() as session:
            session.execute(text("DELETE FROM runs"))
        assert len(lineage.runs()) == 1


def test_log_counts_without_holes_after_a_failure(postgres_url, tmp_path):
    home = Home.open(tmp_path / "home")
    (home.path / "loraline.yaml").write_text(f"database: {postgres_url}\n")
    with closing(Lineage(home.lineage_url)) as lineage:
        from registry.catalog import log_deed

        for number in range(4):
            with lineage.database.write() as session:
                log_deed(session, "revoke", actor="a", reason="r", subject=f"{number}")
                if number % 2:
                    session.rollback()
        with lineage.database.read() as session:
            assert [event.seq for event in read_events(session)] == [1, 2]


def test_beginnings_are_found_whatever_the_server_sorts_by(postgres, postgres_url):
    with closing(Lineage(postgres_url)) as lineage, lineage.database.read() as session:
        assert session.scalar(text("SELECT 'a' COLLATE \"C\" < 'B' COLLATE \"C\"")) is False
        collations = (
            "SELECT DISTINCT collation_name FROM information_schema.columns "
            "WHERE table_schema = :schema AND data_type LIKE 'character%'"
        )
        assert session.scalars(text(collations), {"schema": NAMESPACE}).all() == ["C"]


def test_server_that_went_away_is_worded(postgres_url, postgres):
    with closing(Lineage(postgres_url)) as lineage:
        with lineage.database.write() as session:
            backend = session.scalar(text("SELECT pg_backend_pid()"))
        engine = create_engine(postgres % "postgres", isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"SELECT pg_terminate_backend({backend})"))
        engine.dispose()
        with pytest.raises(HomeError, match="went away"):
            lineage.runs()
        # The pool noticed: the next one gets a new connection.
        assert lineage.runs() == []


def test_absent_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(HomeError, match=r"loraline\[postgres\]"):
        Database("postgresql+psycopg://host/name")


PROMOTERS = """
import sys, time
from pathlib import Path
from registry import promotion
from registry.errors import Conflict
from registry.home import Home
from registry.versions import Versions
Versions.sync = lambda *arguments, **settings: None
versions = Versions(Home.open(sys.argv[1]))
mine, rounds, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
won = []
for number in range(rounds):
    (folder / f"ready-{mine}-{number}").touch()
    while not all((folder / f"ready-{each}-{number}").exists() for each in (1, 2)):
        time.sleep(0.0005)
    try:
        promotion.promote(versions, "zorb", mine, f"alias{number}", reason="race", expected=None)
        won.append(str(number))
    except Conflict:
        pass
print(",".join(won))
"""


def test_of_200_concurrent_promotions_each_has_one_winner(tmp_path, versions, register, spawn):
    register(versions, b"1")
    register(versions, b"2")
    children = [spawn(PROMOTERS, versions.home.path, number, 200, tmp_path) for number in (1, 2)]
    answers = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    won = [set(filter(None, out.strip().split(","))) for out, _ in answers]
    assert won[0] | won[1] == {str(number) for number in range(200)}
    assert won[0] & won[1] == set()
    assert all(won), "one process was always first: there was no race"
    with versions.lineage.database.read() as session:
        events, aliases = read_events(session), alias_table(session)
    assert [event.seq for event in events] == list(range(1, 201))
    assert replay(events) == aliases
    for number in range(200):
        assert aliases["zorb", f"alias{number}"] == (1 if str(number) in won[0] else 2)


REGISTER = """
import sys
from registry.home import Home
from registry.versions import Versions
Versions.sync = lambda *arguments, **settings: None
versions = Versions(Home.open(sys.argv[1]))
for number in range(int(sys.argv[3])):
    own = versions.store.put_files("adapter", {"adapter.safetensors": f"{sys.argv[2]} {number}".encode()})
    common = versions.store.put_files("adapter", {"adapter.safetensors": f"all {number}".encode()})
    for artifact in (own, common):
        print(versions.register("zorb", artifact, passed=True, alias_request="staging").version)
"""


def test_processes_registering_at_once_count_without_holes(empty_home, spawn):
    children = [spawn(REGISTER, empty_home.path, number, 2) for number in range(8)]
    answers = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * 8, answers
    versions = Versions(empty_home)
    registered = versions.list()
    # 16 of their own, and two that all of them registered, each once.
    assert [version.version for version in registered] == list(range(1, 19))
    assert {int(line) for out, _ in answers for line in out.split()} == set(range(1, 19))
    contents = {versions.read_adapter(version).decode() for version in registered}
    assert len(contents) == 18
    versions.close()
    assert fsck(empty_home, grace=0, mlflow=False) == []


def test_mlflow_and_the_registry_share_one_database(server_home, register):
    versions = Versions(server_home)
    register(versions, b"old", alias_request="staging")
    register(versions, b"new", alias_request="staging")
    promote(versions, "zorb", "staging", "production", reason="looks right")
    assert versions.is_level()
    assert fsck(server_home, grace=0) == []
    engine = create_engine(server_home.mlflow_url)
    with engine.connect() as connection:
        public = set(inspect(connection).get_table_names("public"))
        assert {"alembic_version", "runs", "model_versions"} <= public
        assert {"runs", "events"} <= set(inspect(connection).get_table_names(NAMESPACE))
        # What MLflow writes of itself is its own.
        assert connection.scalar(text("SELECT count(*) FROM public.model_versions")) == 2
    engine.dispose()
    assert not server_home.mlflow_db.exists()
    assert not server_home.lineage_db.exists()
    client = Mirror(server_home, versions.store)._client
    client.set_registered_model_alias("zorb", "production", "1")
    assert {problem.where for problem in fsck(server_home)} == {"MLflow's zorb@1", "MLflow's zorb@2"}
    versions.sync(again=True)
    versions.close()
    moved = server_home.path.with_name("moved")
    server_home.path.rename(moved)
    moved_home = Home.open(moved)
    Versions(moved_home).close()
    assert fsck(moved_home, grace=0) == []


def test_mlflow_of_another_place_is_told_everything(tmp_path, postgres_url, register):
    home = Home.open(tmp_path / "home")
    versions = Versions(home)
    register(versions, b"weights", alias_request="staging")
    versions.close()
    home.path.joinpath("loraline.yaml").write_text(f"mlflow: {postgres_url}\n")
    versions = Versions(home)
    assert versions.is_level()
    assert [entry.aliases for entry in Mirror(home, open_store(home)).versions()] == [("staging",)]
    versions.close()
    assert fsck(home, grace=0) == []
    let_go_of_mlflow()


def test_verbs_need_no_driver_on_sqlite(tmp_path):
    script = """
import sys
from registry.lineage.record import Lineage
Lineage(sys.argv[1]).close()
print(sorted({"psycopg", "alembic", "mlflow"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, f"sqlite:///{tmp_path}/lineage.db"], capture_output=True, text=True, cwd="."
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
    shutil.rmtree(tmp_path / "locks")
