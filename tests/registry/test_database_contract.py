"""Tests the registry on SQLite and PostgreSQL; its other tests run on SQLite only."""

import math
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, event, func, insert, inspect, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DatabaseError, IntegrityError

from registry.documents.storage import find_records
from registry.entities import Execution, FileEntry, Subject, now
from registry.errors import Conflict, GoneVersion, HomeError, LineageError, Refused, RightsError, UnknownName
from registry.event_log import log_event, read_events
from registry.home import Home
from registry.lineage.openlineage import to_openlineage
from registry.lineage.record import Lineage
from registry.maintenance.backup import backup
from registry.maintenance.doctor import doctor
from registry.maintenance.fsck import fsck
from registry.maintenance.gc import collect
from registry.maintenance.repair import repair
from registry.maintenance.restore import restore_backup
from registry.policy.license_terms import allows_commercial
from registry.policy.revocations import read_revoked
from registry.policy.rights import resolve_rights
from registry.queries import AliasRow, alias_table
from registry.settings import Settings, read_file, write_file
from registry.store.artifacts import open_store
from registry.store.chain import find_breaks, read_links
from registry.store.copy_database import copy_tables
from registry.store.database import Database, insert_missing, name_of, sqlite_file
from registry.store.schema import migrate
from registry.store.tables import (
    NAMESPACE,
    SCHEMA,
    DistributionsRow,
    DocumentRow,
    EventRow,
    ExecutionRow,
    MetaRow,
    NameRow,
    RevocationRow,
    RunRow,
    SubjectRow,
    Table,
    VersionRow,
)
from registry.versions import promotion
from registry.versions.deletion import delete, restore, withdraw
from registry.versions.mlflow_tables import read_tables
from registry.versions.mlflow_writer import MlflowWriter
from registry.versions.projections import replay
from registry.versions.promotion import history, promote, read_log, remove, rollback
from registry.versions.revocation import lift, revoke
from registry.versions.versions import Versions
from tests.conftest import find_program
from tests.registry.test_registry_migrations import SCHEMA_1, shape

ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)
needs_postgres = pytest.mark.needs("postgres")


# The databases


@pytest.fixture(scope="module")
def postgres():
    """Yields the URL of a PostgreSQL server, with `%s` for the name of a database; its socket is in a new folder."""
    # Not in pytest's folder, which only its owner may enter. Sockets require a short path.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    user: dict[str, object] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": ()}
    programs = Path(os.path.realpath(find_program("postgres"))).parent
    initdb = [programs / "initdb", "-D", folder / "data", "-U", "loraline", "-A", "trust", "-E", "UTF8", "--no-sync"]
    settings = {"listen_addresses": "", "unix_socket_directories": folder, "max_connections": 100, "fsync": "off"}
    settings |= {"shared_buffers": "32MB", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    # To a file: the server logs every statement that fails, and would block on a full pipe.
    path = folder / "server.log"
    with path.open("wb") as log:
        common = {"stdout": log, "stderr": log, "cwd": folder, **user}
        assert subprocess.run(initdb, **common).returncode == 0, path.read_text()
        server = subprocess.Popen([programs / "postgres", "-D", folder / "data", *options], **common)
    try:
        while subprocess.run([programs / "pg_isready", "-q", "-h", folder]).returncode:
            assert server.poll() is None, path.read_text()
            time.sleep(0.05)
        yield f"postgresql+psycopg://loraline@/%s?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait(timeout=30)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def administer(postgres):
    """Yields a function that runs a statement in the server's maintenance database."""
    import psycopg

    url = (postgres % "postgres").replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection.execute


@pytest.fixture(scope="module")
def made(postgres, administer):
    """Returns the name of a PostgreSQL database with the tables of this release."""
    administer("CREATE DATABASE made TEMPLATE template0")
    Database(postgres % "made").close()
    return "made"


@pytest.fixture
def create(postgres, administer):
    """Yields a function that returns the URL of a new copy of a PostgreSQL database; drops the copies at the end."""
    names = []

    def copy(template="template0"):
        names.append(f"test_{uuid4().hex}")
        administer(f"CREATE DATABASE {names[-1]} TEMPLATE {template}")
        return postgres % names[-1]

    yield copy
    for name in names:
        administer(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def server_url(create):
    """Returns the URL of an empty PostgreSQL database."""
    return create()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def backend(request):
    return request.param


@pytest.fixture
def empty_home(backend, request, tmp_path):
    """Returns a home whose database is of this backend and has no rows."""
    home = Home.open(tmp_path / "home")
    if backend == "postgres":
        url = request.getfixturevalue("create")(request.getfixturevalue("made"))
        write_file(home.path, Settings(database=url))
    return home


@pytest.fixture
def url(empty_home):
    return empty_home.lineage_url


@pytest.fixture
def other_url(backend, request, tmp_path):
    """Returns the URL of an empty database of the other backend."""
    if backend == "sqlite":
        return request.getfixturevalue("server_url")
    return f"sqlite:///{tmp_path / 'other' / 'lineage.db'}"


@pytest.fixture
def lineage(url):
    with closing(Lineage(url)) as opened:
        yield opened


@pytest.fixture(scope="module")
def filled_folder(tmp_path_factory, register):
    """Returns a home on SQLite without MLflow: versions in staging and production, a revoked image, non-ASCII text."""
    path = tmp_path_factory.mktemp("contract") / "home"
    with pytest.MonkeyPatch.context() as patch, closing(Lineage(Home.open(path).lineage_url)) as lineage:
        patch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
        versions = Versions(Home(path), lineage=lineage)
        register(versions, b"first weights", alias_request="staging")
        register(versions, b"second weights", card={"title": "Zörb ✶", "big": 1 << 60})
        promote(versions, "zorb", 2, "production", actor="ada", reason="it is better")
        revoke(versions, "5" * 64, actor="ada", reason="the photographer asked")
    return path


@pytest.fixture(scope="module")
def filled_database(filled_folder, postgres, administer, made):
    """Returns the name of a PostgreSQL database with the rows of `filled_folder`."""
    administer(f"CREATE DATABASE filled TEMPLATE {made}")
    copy_tables(Home(filled_folder).lineage_url, postgres % "filled")
    return "filled"


@pytest.fixture
def filled(backend, filled_folder, request, tmp_path, monkeypatch):
    """Yields the versions of a copy of `filled_folder` on this backend."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    home = Home(shutil.copytree(filled_folder, tmp_path / "home"))
    if backend == "postgres":
        url = request.getfixturevalue("create")(request.getfixturevalue("filled_database"))
        write_file(home.path, Settings(database=url))
    with closing(Versions(home)) as opened:
        yield opened


def state(versions):
    with versions.lineage.database.read() as session:
        assert list(find_breaks(read_links(session, EventRow.__table__))) == []
        return alias_table(session), read_events(session)


def damage(home):
    """Returns the problems of a home; the revoked image under `production` is a warning."""
    return [problem for problem in fsck(home, mlflow=False) if problem.severity != "warning"]


def rows_of(url):
    with closing(Database(url)) as database, database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
            for table in Table.metadata.sorted_tables
            if table is not MetaRow.__table__
        }


def count_rows(lineage):
    with lineage.database.read() as session:
        return {
            name: session.scalar(select(func.count()).select_from(table))
            for name, table in Table.metadata.tables.items()
        }


class Interrupted(Exception):
    """Raised at the point of an injected interruption."""


# Types: text, JSON, numbers, times


def test_text_sorts_by_its_bytes(lineage):
    subjects = ["a", "B", "Z", "_", "a b", "a-b", "aB", "ab", "é", "ß", "z", "ÿ", "日本", "\U0001f600", "C-1", "c-1"]
    with lineage.database.write() as session:
        session.add_all(NameRow(name=subject, created_at=now()) for subject in subjects)
    with lineage.database.read() as session:
        ordered = session.scalars(select(NameRow.name).order_by(NameRow.name)).all()
        assert ordered == sorted(subjects, key=str.encode)
        prefix = select(NameRow.name).where(NameRow.name >= "a", NameRow.name < "a\uffff").order_by(NameRow.name)
        assert session.scalars(prefix).all() == ["a", "a b", "a-b", "aB", "ab"]
        assert session.scalars(select(NameRow.name).where(NameRow.name == "C-1")).all() == ["C-1"]


def test_consents_that_differ_in_case_or_accent_are_different_subjects(lineage, versions):
    run = lineage.start_run("p", {})
    names = ["C-1", "c-1", "É-1", "é-1", "e\u0301-1", "o'neill; DROP TABLE runs --", "100%_", "back\\slash"]
    refs = [versions.store.put_files("manifest", {"a": name.encode()}) for name in names]
    for number, (name, ref) in enumerate(zip(names, refs, strict=True)):
        execution = Execution(f"{number}", run.id, "s", "ingest", "1", "k", output=ref)
        lineage.log_execution(execution, contents={}, subjects=[Subject(name, "consent", f"consent {name}")])
    for number, name in enumerate(names):
        assert ids(lineage.walk(name, "down"), "artifact") == {refs[number].sha256}
        revoke(versions, name, actor="ada", reason=f"as {name} asked")
        assert set(read_revoked(lineage)) == set(names[: number + 1])
    with pytest.raises(RightsError, match="did you mean"):
        revoke(versions, "C-2", reason="r")


JSON_VALUES = {
    "text": "Zörb ✶ \U0001f600 \u0000 \" \\ '",
    "numbers": [0, -1, 2**31, 2**53 + 1, 1 << 60, 0.1, 1e-7, 1e300, -0.5, math.pi],
    "nothing": [None, {}, [], "", False, True],
    "order": {"z": 1, "a": {"é": [{"deep": [[]]}]}},
}


def test_json_columns_return_what_was_written(lineage, versions):
    run = lineage.start_run("p", JSON_VALUES)
    ref = versions.store.put_files("adapter", {"adapter.safetensors": b"w"})
    execution = Execution(
        "e", run.id, "s", "train", "1", "k", settings=JSON_VALUES, output=ref, environment={"a": JSON_VALUES}
    )
    lineage.log_execution(execution, contents=versions.store.files(ref))
    gates = [{"metric": "m", "value": 0.1, "min": None, "passed": True}]
    version = versions.register(
        "zorb", ref, card=JSON_VALUES, metrics={"m": {"d": 1e-7}}, gates=gates, params=JSON_VALUES
    )
    assert lineage.run(run.id).spec == JSON_VALUES
    assert lineage.executions(run.id)[0].settings == JSON_VALUES
    assert lineage.executions(run.id)[0].environment == {"a": JSON_VALUES}
    assert (version.card, version.params) == (JSON_VALUES, JSON_VALUES)
    assert (version.metrics, version.gates) == ({"m": {"d": 1e-7}}, tuple(gates))
    details = versions.log_export(version, JSON_VALUES).details
    assert details == read_log(versions)[-1].details == {**JSON_VALUES, "actor": {"established": "os"}}
    with pytest.raises(LineageError, match="JSON"):
        lineage.start_run("p", {"rate": math.nan})


def test_execution_is_read_as_it_was_recorded(lineage, store):
    run = lineage.start_run("p", {})
    data, base, output = (store.put_files("manifest", {"a": content}) for content in (b"data", b"base", b"output"))
    execution = Execution(
        id="whole",
        run_id=run.id,
        step="adapter",
        uses="train",
        revision="3",
        key="k",
        settings={"rank": 8, "nested": {"é": [1, None]}},
        inputs={"dataset": data, "base": base},
        output=output,
        environment={"torch": "2.13.0"},
        seed=2**40,
        started_at=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        ended_at=datetime(2026, 1, 2, 3, 4, 5, 678902, tzinfo=UTC),
    )
    lineage.log_execution(execution, contents=store.files(output))
    (recorded,) = lineage.executions(run.id)
    assert recorded == execution
    assert list(recorded.inputs) == ["dataset", "base"]


def test_times_of_any_zone_sort_by_time(lineage):
    from datetime import timezone

    noon = datetime(2026, 6, 1, 12, tzinfo=UTC)
    moments = [noon, noon + timedelta(microseconds=1), noon + timedelta(seconds=1), noon - timedelta(hours=1)]
    with lineage.database.write() as session:
        session.add_all(
            NameRow(name=str(index), created_at=moment.astimezone(timezone(timedelta(hours=index - 2))))
            for index, moment in enumerate(moments)
        )
    with lineage.database.read() as session:
        assert session.scalars(select(NameRow.created_at).order_by(NameRow.created_at)).all() == sorted(moments)


def test_error_texts_may_contain_nul_and_markup(lineage):
    run = lineage.start_run("p", {})
    for status in ("FAILED", "INTERRUPTED"):
        error = f"EngineError: {status} \x00 <b> 'quoted' %s \U0001f600"
        lineage.log_execution(
            Execution(status, run.id, "s", "train", "1", "k", status=status, error=error, ended_at=now())
        )
    for execution in lineage.executions(run.id):
        assert execution.error == f"EngineError: {execution.status} \ufffd <b> 'quoted' %s \U0001f600"
    events = to_openlineage(lineage, lineage.walk(run.id, "down"))
    assert sorted(entry["eventType"] for entry in events) == ["ABORT", "FAIL", "START", "START"]


# Transactions: all or nothing, one writer at a time, readers that see one snapshot


def test_reader_sees_one_snapshot_beside_a_writer(lineage):
    count = select(func.count()).select_from(RunRow)
    with lineage.database.read() as session:
        assert session.scalar(count) == 0
        lineage.start_run("p", {})
        assert session.scalar(count) == 0
    with lineage.database.read() as session:
        assert session.scalar(count) == 1


def test_reader_changes_nothing(lineage, backend):
    lineage.start_run("p", {})
    statement = text("DELETE FROM runs")
    if backend == "postgres":
        with pytest.raises(HomeError, match="read-only"), lineage.database.read() as session:
            session.execute(statement)
    else:
        with lineage.database.read() as session:
            session.execute(statement)
    assert len(lineage.runs()) == 1


def test_step_is_recorded_completely_or_not_at_all(lineage, store):
    run = lineage.start_run("p", {})
    dataset, output = (store.put_files("manifest", {"a": content, "b": b""}) for content in (b"in", b"out"))
    execution = Execution("1", run.id, "s", "train", "1", "k", inputs={"dataset": dataset}, output=output)
    before, engine = count_rows(lineage), lineage.database.engine
    for fault in range(1, 100):
        statements = iter(range(1, 1000))

        def fail(*_arguments, fault=fault, statements=statements):
            if next(statements) == fault:
                raise Interrupted

        event.listen(engine, "after_cursor_execute", fail)
        try:
            lineage.log_execution(
                execution, contents=store.files(output), subjects=[Subject(ONE, "picture", "cat.jpg")]
            )
            break
        except Interrupted:
            event.remove(engine, "after_cursor_execute", fail)
            assert count_rows(lineage) == before
    event.remove(engine, "after_cursor_execute", fail)
    assert fault > 5
    after = count_rows(lineage)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"artifacts", "contents", "subjects", "executions", "execution_inputs"}


def test_failed_promotion_leaves_neither_alias_nor_event(versions, register, monkeypatch):
    register(versions, b"weights")
    move_alias = promotion.changes.move_alias

    def interrupt(*arguments, **settings):
        move_alias(*arguments, **settings)
        raise Interrupted

    monkeypatch.setattr(promotion.changes, "move_alias", interrupt)
    with pytest.raises(Interrupted):
        promote(versions, "zorb", 1, "production", reason="r")
    assert state(versions) == ({}, [])


def test_interrupted_registration_leaves_no_version_and_no_gap(versions, register, monkeypatch):
    def interrupt(*_arguments):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("registry.versions.registration._stage", interrupt)
        with pytest.raises(Interrupted):
            register(versions, b"weights", alias_request="staging")
    assert versions.list() == ()
    assert register(versions, b"weights", alias_request="staging").ref == "zorb@1"


def test_log_numbers_have_no_gaps_after_a_failure(lineage):
    for number in range(4):
        with lineage.database.write() as session:
            log_event(session, "revoke", actor="a", reason="r", subject=f"{number}")
            if number % 2:
                session.rollback()
    with lineage.database.read() as session:
        assert [(entry.seq, entry.subject) for entry in read_events(session)] == [(1, "0"), (2, "2")]


@pytest.mark.parametrize("statement", ["UPDATE events SET actor = 'eve'", "DELETE FROM events"])
def test_events_cannot_be_changed(versions, register, statement):
    register(versions, b"weights", alias_request="staging")
    with pytest.raises(DatabaseError, match="append-only"), versions.lineage.database.write() as session:
        session.execute(text(statement))
    (entry,) = state(versions)[1]
    assert entry.actor != "eve"


@needs_postgres
@pytest.mark.parametrize(
    "statement", ["UPDATE events SET actor = 'eve'", "DELETE FROM events", "TRUNCATE events CASCADE"]
)
def test_events_cannot_be_changed_by_another_program_of_the_server(create, made, statement):
    engine = create_engine(create(made))
    with pytest.raises(DatabaseError, match="append-only"), engine.begin() as connection:
        connection.execute(text(statement.replace("events", f"{NAMESPACE}.events")))
    engine.dispose()


def test_row_with_a_missing_reference_is_refused(lineage, store):
    ref = store.put_files("manifest", {"a": b"1"})
    with pytest.raises(LineageError, match="no run 'nobody'"):
        lineage.log_execution(Execution("1", "nobody", "s", "ingest", "1", "k", output=ref), contents=store.files(ref))
    for row in (
        AliasRow(name="nobody", alias="a", version=1, seq=1, mirrored_seq=0),
        SubjectRow(artifact=ONE, subject="s", label="l", kind="picture"),
    ):
        with pytest.raises(IntegrityError, match=r"(?i)foreign key"), lineage.database.write() as session:
            session.add(row)
    assert not any(count for name, count in count_rows(lineage).items() if name != "meta")


def test_existing_rows_are_not_overwritten(lineage):
    first, later = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    with lineage.database.write() as session:
        insert_missing(session, NameRow, [{"name": "a", "created_at": first}])
        insert_missing(session, NameRow, [{"name": name, "created_at": later} for name in ("a", "b", "b")])
        insert_missing(session, NameRow, [])
    with lineage.database.read() as session:
        rows = session.execute(select(NameRow.name, NameRow.created_at).order_by(NameRow.name)).all()
    assert [tuple(row) for row in rows] == [("a", first), ("b", later)]


def test_second_writer_waits_for_the_first(url):
    order, inside, finished = [], threading.Event(), threading.Event()
    with closing(Lineage(url)) as first, closing(Lineage(url)) as second:

        def write():
            inside.wait(60)
            second.start_run("second", {})
            order.append("second")
            finished.set()

        thread = threading.Thread(target=write)
        thread.start()
        with first.database.write() as session:
            session.execute(text("DELETE FROM runs"))
            inside.set()
            # Longer than the second takes without waiting.
            assert not finished.wait(0.3)
            order.append("first")
        thread.join(60)
        assert order == ["first", "second"]
        assert [run.name for run in first.runs()] == ["second"]


def test_writer_that_times_out_writes_nothing(url, monkeypatch):
    monkeypatch.setattr("registry.store.database._PATIENCE", 0.1)
    with closing(Lineage(url)) as first, closing(Lineage(url)) as second:
        with first.database.write() as session:
            session.execute(text("DELETE FROM runs"))
            with pytest.raises(HomeError, match="was busy"):
                second.start_run("second", {})
        assert first.runs() == []
        assert second.start_run("third", {}).name == "third"


KILLED_INSIDE = """
import sys, time
from registry.lineage.record import Lineage
from registry.store.tables import NameRow
from registry.entities import now
lineage = Lineage(sys.argv[1])
with lineage.database.write() as session:
    session.add(NameRow(name="half", created_at=now()))
    session.flush()
    print("inside", flush=True)
    time.sleep(600)
"""


def test_writer_killed_inside_its_transaction_leaves_nothing_and_blocks_no_writer(lineage, url, spawn):
    child = spawn(KILLED_INSIDE, url)
    assert child.stdout.readline() == "inside\n", child.communicate()[1]
    child.kill()
    lineage.start_run("next", {})
    assert count_rows(lineage)["names"] == 0


# Counting and compare-and-set


def test_stale_expectation_is_a_conflict_that_names_the_change(versions, register):
    for content in (b"1", b"2", b"3"):
        register(versions, content)
    promote(versions, "zorb", 1, "production", reason="first")
    promote(versions, "zorb", 2, "production", reason="better", actor="ada@lab", expected=1)
    with pytest.raises(Conflict, match=r"not at version 1 as expected, since event 2: promote by ada@lab \(better\)"):
        promote(versions, "zorb", 3, "production", reason="mine", expected=1)
    with pytest.raises(Conflict, match="points at nothing"):
        promote(versions, "zorb", 3, "other", reason="mine", expected=1)
    assert versions.show("zorb", "production").version == 2
    assert len(state(versions)[1]) == 2


def run_together(jobs):
    """Runs functions in threads; returns name -> result or error."""
    outcomes = {}

    def run(name, job):
        try:
            outcomes[name] = job()
        except (Conflict, Refused, GoneVersion) as error:
            outcomes[name] = error

    threads = [threading.Thread(target=run, args=job) for job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.keys() == jobs.keys()
    return outcomes


def test_of_two_promotions_from_the_same_state_exactly_one_wins(versions, register, monkeypatch):
    for content in (b"1", b"2", b"3"):
        register(versions, content)
    promote(versions, "zorb", 3, "production", reason="start")
    damage, barrier = versions.damage, threading.Barrier(2, timeout=60)

    def combine(version):
        barrier.wait()  # both have read the state and decided; neither has written
        return damage(version)

    monkeypatch.setattr(versions, "damage", combine)
    for _round in range(4):
        expected = versions.show("zorb", "production").version
        rivals = [number for number in (1, 2, 3) if number != expected]
        outcomes = run_together(
            {
                number: lambda number=number: promote(versions, "zorb", number, "production", reason="race")
                for number in rivals
            }
        )
        winners = [number for number, outcome in outcomes.items() if not isinstance(outcome, Conflict)]
        assert winners == [versions.show("zorb", "production").version]
    aliases, events = state(versions)
    assert len(events) == 5
    assert replay(events) == aliases


def test_of_a_deletion_and_a_promotion_at_once_exactly_one_wins(versions, register, monkeypatch):
    damage, barrier = versions.damage, threading.Barrier(2, timeout=60)
    for number in range(1, 4):
        register(versions, f"{number}".encode())

    def combine(version):
        barrier.wait()  # the promotion has decided and not written; the deletion has not begun
        return damage(version)

    monkeypatch.setattr(versions, "damage", combine)
    for number in range(1, 4):

        def delete_it(number=number):
            barrier.wait()
            return delete(versions, "zorb", number, reason="race")

        outcomes = run_together(
            {
                "promote": lambda number=number: promote(versions, "zorb", number, "candidate", reason="race"),
                "delete": delete_it,
            }
        )
        failed = [name for name, outcome in outcomes.items() if isinstance(outcome, Exception)]
        assert len(failed) == 1, outcomes
        version = versions.show("zorb", number)
        expected = ("ACTIVE", True) if failed == ["delete"] else ("DELETED", False)
        assert (version.state, "candidate" in version.aliases) == expected
    aliases, events = state(versions)
    assert replay(events) == aliases


PROMOTERS = """
import sys, time
from pathlib import Path
from registry.versions import promotion
from registry.errors import Conflict
from registry.home import Home
from registry.versions.versions import Versions
Versions.sync = lambda *arguments, **settings: None
versions = Versions(Home.open(sys.argv[1]))
version, rounds, folder = int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
won = []
for number in range(rounds):
    (folder / f"ready-{version}-{number}").touch()
    while not all((folder / f"ready-{rival}-{number}").exists() for rival in (1, 2)):
        time.sleep(0.0005)
    try:
        promotion.promote(versions, "zorb", version, f"alias{number}", reason="race", expected=None)
        won.append(str(number))
    except Conflict:
        pass
print(",".join(won))
"""


def test_of_two_processes_promoting_each_alias_goes_to_exactly_one(tmp_path, versions, register, spawn):
    rounds = 25
    register(versions, b"1")
    register(versions, b"2")
    children = [spawn(PROMOTERS, versions.home.path, number, rounds, tmp_path) for number in (1, 2)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    won = [set(filter(None, out.strip().split(","))) for out, _ in outputs]
    assert won[0] | won[1] == {str(number) for number in range(rounds)}
    assert won[0] & won[1] == set()
    aliases, events = state(versions)
    assert [entry.seq for entry in events] == list(range(1, rounds + 1))
    assert replay(events) == aliases
    assert aliases == {("zorb", f"alias{number}"): 1 if str(number) in won[0] else 2 for number in range(rounds)}


REGISTER = """
import sys
from registry.home import Home
from registry.versions.versions import Versions
Versions.sync = lambda *arguments, **settings: None
versions = Versions(Home.open(sys.argv[1]))
for number in range(2):
    own = versions.store.put_files("adapter", {"adapter.safetensors": f"{sys.argv[2]} {number}".encode()})
    common = versions.store.put_files("adapter", {"adapter.safetensors": f"all {number}".encode()})
    for artifact in (own, common):
        print(versions.register("zorb", artifact, passed=True, alias_request="staging").version)
"""


def test_processes_registering_at_once_number_versions_without_gaps(empty_home, spawn):
    children = [spawn(REGISTER, empty_home.path, number) for number in range(4)]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * 4, outputs
    versions = Versions(empty_home)
    registered = versions.list()
    # Two of each process, and two that every process registered, which get one number each.
    assert [version.version for version in registered] == list(range(1, 11))
    assert {int(line) for out, _ in outputs for line in out.split()} == set(range(1, 11))
    assert len({versions.read_adapter(version) for version in registered}) == 10
    versions.close()
    assert fsck(empty_home, grace=0, mlflow=False) == []


def test_processes_that_create_the_tables_at_once_agree(backend, request, tmp_path, spawn):
    url = request.getfixturevalue("server_url") if backend == "postgres" else f"sqlite:///{tmp_path / 'lineage.db'}"
    script = (
        "import sys; from registry.lineage.record import Lineage; print(Lineage(sys.argv[1]).start_run('p', {}).id)"
    )
    children = [spawn(script, url) for _ in range(3)]
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * 3, outputs
    with closing(Lineage(url)) as lineage:
        assert {run.id for run in lineage.runs()} == {out.strip() for out, _ in outputs}


KILLED = """
import os, sys
from registry.versions import versions as module
from registry.home import Home
module.sync_mlflow = lambda *arguments, **settings: os._exit(9)
versions = module.Versions(Home.open(sys.argv[1]))
artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"weights"})
versions.register("zorb", artifact, passed=True, alias_request="staging", card={"license": "apache-2.0"})
"""


def test_process_killed_between_database_and_mlflow_loses_nothing(
    backend, empty_home, place_home, fresh_template, spawn
):
    home = place_home(fresh_template)
    if backend == "postgres":
        write_file(home.path, read_file(empty_home.path))
    child = spawn(KILLED, home.path)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 9, errors
    assert [problem.where for problem in fsck(home)] == ["MLflow's zorb@1", "MLflow's zorb@staging"]
    with closing(Versions(home)) as versions:
        assert versions.is_synced()
        assert versions.get("zorb", "staging").version == 1
        with versions.lineage.database.read() as session:
            run = session.scalar(select(VersionRow.mlflow_run_id))
        assert run
    assert fsck(home, grace=0) == []


GC_WRITER = """
import sys, time
from pathlib import Path
from registry.entities import Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store
home = Home.open(Path(sys.argv[1]))
store, lineage = Store(home.store), Lineage(home.lineage_url)
run = lineage.start_run(f"writer {sys.argv[2]}", {})
for turn in range(15):
    # The same few artifacts repeatedly: old ones that exist, and some that a collection removed.
    ref = store.put_files("manifest", {"a": b"a%d" % (turn % 5), "own": f"{sys.argv[2]} {turn % 5}".encode()})
    time.sleep(0.002)
    assert store.verify(ref) == [], store.verify(ref)
    if turn % 5 == 4:
        execution = Execution(f"{sys.argv[2]}-{turn}", run.id, "s", "s", "1", "k", output=ref)
        lineage.log_execution(execution, contents=store.files(ref))
        print(ref.sha256, flush=True)
lineage.finish_run(run.id, "COMPLETED")
"""

COLLECTOR = """
import os, sys, time
from pathlib import Path
from registry.maintenance.gc import collect
from registry.home import Home
home = Home.open(Path(sys.argv[1]))
for turn in range(10_000):
    # Makes every blob old that was not written or touched just now.
    for path in (home.store / "blobs").glob("??/*"):
        try:
            if path.stat().st_mtime < time.time() - 0.5:
                os.utime(path, (1, 1))
        except FileNotFoundError:
            pass
    collect(home, grace=30, keep_runs=0)
    if not turn:
        print("collected", flush=True)
"""


def test_writers_lose_nothing_to_a_concurrent_collection(versions, spawn):
    home = versions.home
    stale = [versions.store.put_files("manifest", {"a": b"a%d" % n, "own": b"of an earlier time"}) for n in range(5)]
    for path in (home.store / "blobs").glob("??/*"):
        os.utime(path, (1, 1))
    collector = spawn(COLLECTOR, home.path)
    assert collector.stdout.readline() == "collected\n"
    writers = [spawn(GC_WRITER, home.path, number) for number in range(2)]
    outputs = [writer.communicate(timeout=120) for writer in writers]
    assert collector.poll() is None
    collector.kill()
    collector.communicate()
    assert [writer.returncode for writer in writers] == [0, 0], outputs
    recorded = {line for out, _ in outputs for line in out.split()}
    assert recorded
    # A killed collector may leave blobs that it was about to remove.
    assert [problem for problem in fsck(home, mlflow=False) if problem.severity == "damage"] == []
    assert not any(versions.store.has(ref) for ref in stale)
    for digest in recorded:
        assert versions.store.blobs.actual_digest(digest) == digest


# Every query of the registry


def test_whole_life_of_versions(versions, from_images):
    """Registers, promotes, merges, exports, revokes, lifts, withdraws, deletes, restores, collects and checks."""
    home, lineage = versions.home, versions.lineage
    first = from_images(b"1", {ONE: "C-1", TWO: "C-2"}, promoted="staging")
    second = from_images(b"2", {THREE: "C-3"}, promoted="production")
    third = from_images(b"3", {TWO: None}, name="other", declared="cc-by-nc-4.0")
    merged = from_images(
        b"4",
        name="merged",
        adapters=[first, second],
        parents=["zorb@1", f"0.5 other sha256:{third.sha256}", "base:tiny"],
    )
    assert [version.ref for version in versions.list()] == ["merged@1", "other@1", "zorb@1", "zorb@2"]
    assert versions.show("zorb").version == versions.show("zorb", "production").version == 2
    with pytest.raises(UnknownName, match="did you mean 'zorb'"):
        versions.show("zorp")
    with versions.lineage.database.read() as session:
        assert not allows_commercial(resolve_rights(session, versions, merged).terms)
        assert allows_commercial(resolve_rights(session, versions, first).terms)
    assert set(find_records(lineage, merged)) == set(find_records(lineage, first)) != set()

    promote(versions, "zorb", 1, "production", reason="compare")
    assert rollback(versions, "zorb").after == 2
    assert remove(versions, "zorb", "staging", reason="done").before == 1
    versions.log_export(first, {"format": "kohya", "files": [{"file": "/mnt/x", "sha256": "0" * 64}]})

    planned = revoke(versions, "C-1", reason="r", policy="withdraw", dry_run=True)
    report = revoke(versions, ONE[:10], reason="she asked", policy="withdraw")
    assert set(planned.versions) == set(report.versions) == {"zorb@1", "merged@1"}
    assert [run["name"] for run in report.runs] == ["make zorb", "make merged"]
    assert any(entry.get("version") == "zorb@1" for entry in report.exports)
    assert versions.show("zorb", 1).state == "WITHDRAWN"
    with pytest.raises(GoneVersion, match="withdrawn"):
        versions.get("zorb", 1)
    assert sorted(lift(versions, ONE[:10], reason="a mistake").details["restored"]) == ["merged@1", "zorb@1"]
    assert read_revoked(lineage) == {}

    withdraw(versions, "merged", 1, reason="r")
    delete(versions, "merged", 1, reason="r")
    assert [version.ref for version in versions.list()] == ["other@1", "zorb@1", "zorb@2"]
    assert len(versions.list(deleted=True)) == 4
    restore(versions, "merged", 1, reason="after all")
    delete(versions, "merged", 1, reason="and again")

    aliases, events = state(versions)
    assert aliases == {("zorb", "production"): 2} == replay(events)
    assert [entry.seq for entry in events] == list(range(1, len(events) + 1))
    assert history(versions, "merged")[-1].action == "delete"

    orphan = versions.store.put_files("manifest", {"a": b"no execution has it"})
    for path in (home.store / "blobs").glob("??/*"):
        os.utime(path, (1, 1))
    with lineage.database.write() as session:
        session.execute(text("UPDATE runs SET started_at = '2020-01-01T00:00:00.000000+00:00'"))
    planned = collect(home, dry_run=True)
    assert collect(home).items == planned.items != ()
    assert not versions.store.has(orphan)
    assert versions.damage(versions.show("zorb", 1)) == ()
    assert fsck(home, grace=0, mlflow=False) == []


def ids(walk, kind):
    return {node.id for node in walk.nodes if node.kind == kind}


def test_walks_start_at_any_node_in_both_directions(versions, register, monkeypatch):
    monkeypatch.setattr("registry.store.database.BATCH", 2)
    first = register(versions, b"a", name="a", alias_request="staging")
    register(versions, b"b", name="b")
    register(versions, b"ab", name="ab", parents=["a@1", "b@1", "base:tiny", "c@9"])
    lineage = versions.lineage
    up = lineage.walk("ab@1", subjects=True)
    assert ids(up, "version") == {"ab@1", "a@1", "b@1"}
    assert ids(up, "origin") == {"base:tiny", "c@9"}
    assert ids(up, "subject") == {"5" * 64}
    assert len(ids(up, "execution")) == 6
    for start in ("5" * 64, "5" * 8, versions.store.files(first.artifact)["training.json"].sha256):
        assert ids(lineage.walk(start, "down"), "version") == {"a@1", "b@1", "ab@1"}
    assert ids(lineage.walk("a@1", "down"), "version") == {"a@1", "ab@1"}
    assert ids(lineage.walk(first.sha256, "down"), "version") == {"a@1", "ab@1"}
    assert lineage.walk("a@staging", subjects=True) == lineage.walk("a@latest", subjects=True)
    (execution,) = [entry for entry in lineage.executions(first.run_id) if entry.step == "adapter"]
    assert first.artifact.sha256 in ids(lineage.walk(execution.id, "down"), "artifact")
    assert first.artifact.sha256 in ids(lineage.walk(first.run_id, "down"), "artifact")
    assert [event["eventType"] for event in to_openlineage(lineage, up)] == ["START", "COMPLETE"] * 6
    for unknown in ("", "5", "f" * 64, "a@2", "a@production", "nonsense"):
        with pytest.raises(LineageError):
            lineage.walk(unknown)


def test_ambiguous_prefix_is_refused(lineage, store):
    run = lineage.start_run("p", {})
    ref = store.put_files("manifest", {"a": b"1"})
    contents = {path: FileEntry("abcdef" + path * 58, 1) for path in ("0", "1")}
    lineage.log_execution(Execution("1", run.id, "s", "ingest", "1", "k", output=ref), contents=contents)
    with pytest.raises(LineageError, match="ambiguous"):
        lineage.walk("abcdef")
    assert lineage.walk("abcdef0").start.kind == "file"


def test_runs_and_executions_are_found_by_key_output_and_status(lineage, store):
    run, dead = lineage.start_run("p", {}), lineage.start_run("dead", {})
    refs = [store.put_files("adapter", {"a": content}) for content in (b"old", b"new")]
    environment = {"python": "3.11", "distributions": ["a==1", "b==2"]}
    for number, ref in enumerate(refs):
        lineage.log_execution(
            Execution(f"{number}", run.id, "s", "train", "1", "k", output=ref, environment=environment)
        )
    lineage.log_execution(Execution("failed", run.id, "s", "train", "1", "k", status="FAILED", error="NaN"))
    assert lineage.find_cached("k") == refs[1]
    assert lineage.find_cached("another") is None
    assert lineage.last_execution("p", "s").id == "1"
    assert [entry.id for entry in lineage.executions(output=refs[0].sha256)] == ["0"]
    assert [entry.id for entry in lineage.executions(ids=["failed", "0", "absent"])] == ["0", "failed"]
    assert [entry.environment for entry in lineage.executions(run.id)][:2] == [environment] * 2
    with pytest.raises(LineageError, match="recorded already"):
        lineage.log_execution(Execution("0", run.id, "s", "train", "1", "k", output=refs[0]))
    with lineage.database.write() as session:
        session.get_one(RunRow, dead.id).process = "another boot/1"
    assert [entry.id for entry in lineage.find_dead_runs()] == [dead.id]
    assert lineage.finish_run(run.id, "COMPLETED").status == lineage.finish_run(run.id, "FAILED").status == "COMPLETED"
    assert {entry.status for entry in lineage.runs()} == {"CRASHED", "COMPLETED"}
    with lineage.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DistributionsRow)) == 1
        stored = session.scalars(select(ExecutionRow.environment).where(ExecutionRow.status == "COMPLETED")).all()
    assert [len(row["distributions"]) for row in stored] == [64, 64]


def bypass_guards(lineage, *statements):
    with lineage.database.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        else:
            connection.rollback()
            connection.connection.execute("PRAGMA foreign_keys=OFF")
        for statement in statements:
            connection.exec_driver_sql(statement)
        connection.commit()
        if connection.dialect.name != "postgresql":
            connection.connection.execute("PRAGMA foreign_keys=ON")


def test_changed_projections_are_found_and_rebuilt_from_the_log(filled):
    withdraw(filled, "zorb", 1, reason="r")
    assert damage(filled.home) == []
    expected = rows_of(filled.home.lineage_url)
    changes = {
        "event log": "UPDATE aliases SET version = 1 WHERE alias = 'production'",
        "has 2": "DELETE FROM aliases WHERE alias = 'production'",
        "is ACTIVE": "UPDATE versions SET state = 'ACTIVE' WHERE version = 1",
        "revoked": "DELETE FROM revocations",
        "not revoked": "UPDATE revocations SET subject = 'another'",
        "recorded files": "DELETE FROM contents WHERE path = 'adapter.safetensors'",
        "RUNNING": "UPDATE runs SET status = 'RUNNING', process = 'another boot/1'",
    }
    for finding, statement in changes.items():
        bypass_guards(filled.lineage, statement)
        problems = damage(filled.home)
        assert any(finding in problem.what for problem in problems), (finding, problems)
        repairs = repair(filled.home, mlflow=False)
        assert repairs
        assert all(entry.done for entry in repairs)
        assert damage(filled.home) == []
        assert repair(filled.home, mlflow=False) == []
    rebuilt = rows_of(filled.home.lineage_url)
    changed = {name for name in expected if rebuilt[name] != expected[name]}
    assert changed == {"runs"}, "runs of dead processes were ended"


def test_lost_rows_are_found(filled):
    bypass_guards(filled.lineage, "DELETE FROM version_parents", "DELETE FROM version_records")
    bypass_guards(filled.lineage, "DELETE FROM versions WHERE version = 1")
    assert any("an earlier version is missing" in problem.what for problem in fsck(filled.home, mlflow=False))


# Copying, backups


@needs_postgres
def test_every_row_is_copied_and_the_registry_continues_there(filled, other_url, register):
    before = rows_of(filled.home.lineage_url)
    counts = copy_tables(filled.home.lineage_url, other_url)
    assert rows_of(other_url) == before == rows_of(filled.home.lineage_url)
    assert counts == {name: len(rows) for name, rows in before.items()}
    assert (counts["versions"], counts["revocations"]) == (2, 1)

    write_file(filled.home.path, Settings(database=other_url))
    with closing(Versions(filled.home)) as moved:
        assert moved.show("zorb", "production") == moved.get("zorb", 2)
        with pytest.raises(Refused, match="was revoked"):
            moved.get("zorb", "production")
        assert history(moved, "zorb") == history(filled, "zorb")
        assert register(moved, b"third weights").version == 3
        with pytest.raises(Refused, match="was revoked"):
            promote(moved, "zorb", 1, "trial", actor="ada", reason="to compare")
        # The registration of a version from a revoked image flags it.
        assert [event.action for event in read_log(moved)[len(before["events"]) :]] == ["flag", "refuse"]
    assert damage(filled.home) == []


@needs_postgres
def test_more_rows_than_one_block_are_copied(filled, other_url):
    with closing(Database(filled.home.lineage_url)) as database, database.write() as session:
        (artifact,) = session.scalars(select(SubjectRow.artifact).limit(1))
        session.execute(
            insert(SubjectRow),
            [{"artifact": artifact, "subject": f"{i:064}", "label": str(i), "kind": "picture"} for i in range(2500)],
        )
    assert copy_tables(filled.home.lineage_url, other_url)["subjects"] > 2500
    assert rows_of(other_url) == rows_of(filled.home.lineage_url)


@needs_postgres
def test_database_that_is_not_empty_is_not_copied_to(filled, other_url):
    copy_tables(filled.home.lineage_url, other_url)
    before = rows_of(other_url)
    for source, target in ((filled.home.lineage_url, other_url), (other_url, filled.home.lineage_url)):
        with pytest.raises(HomeError, match="is not empty"):
            copy_tables(source, target)
    assert rows_of(other_url) == before


@needs_postgres
def test_interrupted_copy_leaves_no_row(filled, other_url, monkeypatch):
    from registry.store import copy_database as module

    copy, copied = module._copy, []

    def fail(source, target, table):
        if table.name == "versions":
            raise HomeError("the disk is full", where="here")
        copied.append(table.name)
        return copy(source, target, table)

    monkeypatch.setattr(module, "_copy", fail)
    with pytest.raises(HomeError, match="the disk is full"):
        copy_tables(filled.home.lineage_url, other_url)
    assert "artifacts" in copied
    assert not any(rows_of(other_url).values())


def test_backup_of_a_home_is_restored_without_its_server(filled, backend, tmp_path):
    home = filled.home
    settings = read_file(home.path)
    assert backup(home, tmp_path / "backups").problems == ()
    restored = restore_backup(tmp_path / "backups", tmp_path / "new")
    assert sum("lineage.db" in entry for entry in restored.left_out) == (backend == "postgres")
    new = Home(tmp_path / "new")
    assert read_file(new.path) == Settings()
    assert read_file(home.path) == settings
    assert rows_of(new.lineage_url) == rows_of(home.lineage_url)
    assert damage(new) == []
    with closing(Versions(new)) as versions:
        assert versions.get("zorb", 2).aliases == ("production",)
        assert versions.damage(versions.show("zorb", 2)) == ()


@needs_postgres
def test_backup_names_mlflow_on_a_server_as_left_out(filled_home, server_url, tmp_path):
    write_file(filled_home.path, Settings(mlflow=server_url))
    assert ["MLflow" in entry for entry in backup(filled_home, tmp_path / "backups").left_out] == [True]


# PostgreSQL alone: namespace, migrations, connections, MLflow beside our tables


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


@needs_postgres
def test_tables_are_in_their_namespace_with_one_collation(create, made):
    engine = create_engine(create(made))
    collations = (
        "SELECT DISTINCT collation_name FROM information_schema.columns "
        "WHERE table_schema = :schema AND data_type LIKE 'character%'"
    )
    with engine.connect() as connection:
        assert set(inspect(connection).get_table_names(NAMESPACE)) == set(Table.metadata.tables)
        assert inspect(connection).get_table_names("public") == []
        assert connection.scalars(text(collations), {"schema": NAMESPACE}).all() == ["C"]
    engine.dispose()


def write_first_schema(connection):
    """Writes the tables of the first schema with the rows of schema-1.sql into an empty database."""
    script = SCHEMA_1
    if connection.dialect.name == "postgresql":
        # SQLite has no boolean type.
        script = script.replace("'ml1', 1,", "'ml1', true,").replace("'[]', 1, '{", "'[]', true, '{")
        connection.execute(text(f"CREATE SCHEMA {NAMESPACE}"))
        connection.execute(text(f"SET search_path TO {NAMESPACE}"))
    migrate(connection, 0, 1)
    for statement in (part.strip() for part in script.split(";\n")):
        if statement.startswith("INSERT"):
            connection.exec_driver_sql(statement)


@pytest.fixture
def old_server(server_url):
    """Yields an engine of a PostgreSQL database with the first schema and the rows of schema-1.sql."""
    engine = create_engine(server_url)
    with engine.begin() as connection:
        write_first_schema(connection)
    yield engine
    engine.dispose()


SECOND_SCHEMA = (
    "INSERT INTO events (seq, action, actor, reason, gates, at, subject, details) VALUES "
    "(3, 'revoke', 'ada', 'r', '[]', '2026-01-02T00:00:00.000000+00:00', 'C-1', '{\"kind\": \"consent\"}'), "
    f"(4, 'revoke', 'ada', 'r', '[]', '2026-01-02T00:00:01.000000+00:00', '{'5' * 64}', '{{}}'), "
    f"(5, 'revoke', 'ada', 'r', '[]', '2026-01-02T00:00:02.000000+00:00', '{'6' * 64}', '{{\"kind\": \"picture\"}}')",
    f"INSERT INTO revocations (subject, seq) VALUES ('C-1', 3), ('{'5' * 64}', 4), ('{'6' * 64}', 5)",
    f"INSERT INTO subjects (artifact, subject, label, kind) VALUES ('{ONE}', 'C-1', 'consent C-1', 'consent')",
    f"INSERT INTO version_records VALUES (1, 'card', '{THREE}', '2026-01-02T00:00:03.000000+00:00')",
)
"""Rows that only the second schema can have, beside those of the first one."""


def test_rows_of_the_second_schema_keep_their_meaning(backend, request, tmp_path):
    """The kind of a revocation moves from its event to its row, and the log gets its chain over JSON of both forms."""
    address = request.getfixturevalue("create")() if backend == "postgres" else f"sqlite:///{tmp_path / 'two.db'}"
    engine = create_engine(address)
    with engine.begin() as connection:
        write_first_schema(connection)
        migrate(connection, 1, 2)
        for statement in SECOND_SCHEMA:
            connection.exec_driver_sql(statement)
    engine.dispose()
    with closing(Lineage(address)) as lineage, lineage.database.read() as session:
        revocations = session.execute(select(RevocationRow.kind, RevocationRow.subject, RevocationRow.seq))
        assert sorted(revocations.all()) == [("consent", "C-1", 3), ("picture", "5" * 64, 4), ("picture", "6" * 64, 5)]
        subjects = session.execute(select(SubjectRow.kind, SubjectRow.subject, SubjectRow.label))
        assert sorted(subjects.all()) == [("consent", "C-1", "consent C-1"), ("picture", "5" * 64, "picture one.jpg")]
        assert session.execute(select(DocumentRow.version, DocumentRow.kind, DocumentRow.artifact)).all() == [
            (1, "card", THREE)
        ]
        assert list(find_breaks(read_links(session, EventRow.__table__))) == []
        assert [event.action for event in read_events(session)][-4:] == ["revoke", "revoke", "revoke", "link"]
        assert set(read_revoked(lineage)) == {"C-1", "5" * 64, "6" * 64}
    if backend == "postgres":
        with engine.connect() as connection:
            assert connection.scalar(text(f"SELECT count(*) FROM {NAMESPACE}_schema_2.revocations")) == 3
        engine.dispose()


@needs_postgres
def test_migrated_server_has_the_created_tables_every_row_and_a_copy(old_server, server_url, postgres, made):
    database, created = Database(server_url), Database(postgres % made)
    shapes = shape(database.engine)
    assert shapes == shape(created.engine)
    assert len(shapes) == len(Table.metadata.tables) + 2
    assert [name for name, _ in shapes["triggers"]] == ["events_no_change"]
    with database.read() as session:
        assert session.scalar(select(MetaRow.value).where(MetaRow.key == "schema")) == str(SCHEMA)
        assert session.scalar(select(ExecutionRow.seed).where(ExecutionRow.id == "e2")) == 2**40
        assert session.scalar(select(VersionRow.state)) == "ACTIVE"
        assert list(find_breaks(read_links(session, EventRow.__table__))) == []
    with old_server.connect() as connection:
        copied = connection.scalar(text(f"SELECT count(*) FROM {NAMESPACE}_schema_1.events"))
        assert copied == connection.scalar(text(f"SELECT count(*) FROM {NAMESPACE}.events")) - 1 == 2
    for entry in (database, created):
        entry.close()


@needs_postgres
def test_migration_of_a_server_interrupted_at_any_statement_leaves_the_old_schema(old_server, server_url, request):
    before = shape(old_server)
    # Every third position in `make test`, every one in `make nightly`.
    step = 1 if request.config.getoption("--nightly") else 3
    fault, finished = 0, False
    while not finished:
        fault += step
        countdown = iter(range(fault - 1, -1, -1))

        def fail(*_arguments, countdown=countdown):
            if next(countdown, None) == 0:
                raise Interrupted

        event.listen(Engine, "after_cursor_execute", fail)
        try:
            Database(server_url).close()
            finished = True
        except Interrupted:
            assert shape(old_server) == before
        finally:
            event.remove(Engine, "after_cursor_execute", fail)
    assert fault > 30
    assert shape(old_server) != before


KILLED_MIGRATION = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from registry.store.database import Database

def strike(_connection, _cursor, statement, *_rest):
    if "version_records" in statement and statement.lstrip().startswith("CREATE TABLE"):
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "after_cursor_execute", strike)
Database(sys.argv[1])
"""


@needs_postgres
def test_migration_of_a_server_by_a_process_that_is_killed_leaves_the_old_schema(old_server, server_url, spawn):
    before = shape(old_server)
    child = spawn(KILLED_MIGRATION, server_url)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    # The next process waits until the server has released the lock, and migrates.
    assert shape(old_server) == before
    Database(server_url).close()
    assert shape(old_server) != before


@needs_postgres
@pytest.mark.parametrize("value", [str(SCHEMA + 1), "0", "two", None])
def test_unusable_server_is_refused_without_a_change(create, made, value):
    url = create(made)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"SET search_path TO {NAMESPACE}"))
        connection.execute(text("DELETE FROM meta"))
        if value is not None:
            connection.execute(text("INSERT INTO meta VALUES ('schema', :value)"), {"value": value})
    before = shape(engine)
    with pytest.raises(HomeError, match=r"newer release|another program"):
        Database(url)
    assert shape(engine) == before
    with engine.connect() as connection:
        assert connection.scalars(text(f"SELECT value FROM {NAMESPACE}.meta")).all() == ([value] if value else [])
    engine.dispose()


@needs_postgres
def test_lost_connection_is_a_clear_error(create, made, administer):
    with closing(Lineage(create(made))) as lineage:
        with lineage.database.write() as session:
            backend = session.scalar(text("SELECT pg_backend_pid()"))
        administer(f"SELECT pg_terminate_backend({backend})")
        with pytest.raises(HomeError, match="connection was lost"):
            lineage.runs()
        # The pool detects the lost connection: the next call gets a new one.
        assert lineage.runs() == []


def test_error_of_an_absent_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(HomeError, match=r"loraline\[postgres\]"):
        Database("postgresql+psycopg://host/name")


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


@needs_postgres
def test_doctor_names_the_server(empty_home, create, made, monkeypatch):
    monkeypatch.setenv("LORALINE_DATABASE_URL", create(made))
    (finding,) = [each for each in doctor(empty_home.path) if each.about == "database"]
    assert finding.level == "ok"
    assert "PostgreSQL" in finding.found


@needs_postgres
def test_mlflow_and_the_registry_share_one_database_of_a_server(filled_home, create, made, close_mlflow, tmp_path):
    """A home moves to a server: first the registry's tables, then MLflow, which is written completely."""
    url = create(made)
    copy_tables(filled_home.lineage_url, url)
    write_file(filled_home.path, Settings(database=url))
    Versions(filled_home).close()
    write_file(filled_home.path, Settings(database=url, mlflow=url))
    filled_home.mlflow_db.unlink()
    with closing(Versions(filled_home)) as versions:
        assert versions.is_synced()
        assert read_tables(url).aliases == {("zorb", "production"): 1, ("zorb", "staging"): 2}
    assert fsck(filled_home, grace=0) == []
    assert not filled_home.mlflow_db.exists()
    engine = create_engine(url)
    with engine.connect() as connection:
        assert {"alembic_version", "runs", "model_versions"} <= set(inspect(connection).get_table_names("public"))
        assert {"runs", "events"} <= set(inspect(connection).get_table_names(NAMESPACE))
        assert connection.scalar(text("SELECT count(*) FROM public.model_versions")) == 2
    engine.dispose()

    MlflowWriter(filled_home, open_store(filled_home))._client.set_registered_model_alias("zorb", "production", "2")
    assert {problem.where for problem in fsck(filled_home)} == {"MLflow's zorb@production"}
    with closing(Versions(filled_home)) as versions:
        versions.sync()
    assert fsck(filled_home, grace=0) == []

    filled_home.path.rename(tmp_path / "moved")
    moved = Home.open(tmp_path / "moved")
    Versions(moved).close()
    assert fsck(moved, grace=0) == []
    close_mlflow()  # before the database is dropped
