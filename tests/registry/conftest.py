"""Fixtures of the registry's tests: real SQLite and PostgreSQL, real MLflow, real files.

Every test that touches a database runs on both, unless it is about SQLite's files (marked `sqlite`). On PostgreSQL such
a test is slow, but for those marked `quick`: `make check` shall stay short.
"""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from registry.database import Database
from registry.entities import AdapterVersion, Execution, Subject, now
from registry.home import Home
from registry.mirror import Mirror
from registry.store.artifacts import Store
from registry.versions import Versions
from tests.conftest import find_program

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}


POSTGRES = pytest.param("postgres", marks=pytest.mark.needs("postgres"))
SLOW_POSTGRES = pytest.param("postgres", marks=[pytest.mark.needs("postgres"), pytest.mark.slow])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs what asks for a database on each of them."""
    if "database" in metafunc.fixturenames:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        other = [] if "sqlite" in marks else [POSTGRES if "quick" in marks else SLOW_POSTGRES]
        metafunc.parametrize("database", ["sqlite", *other])


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of this session alone, on a socket that only it knows; the URL without a database's name."""
    # Not below pytest's folder, which only its owner may enter, and of a short name, as sockets ask for.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    who: dict[str, object] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        user = pwd.getpwnam("nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
    bin_folder = Path(os.path.realpath(find_program("postgres"))).parent
    initdb = [bin_folder / "initdb", "-D", folder / "data", "-U", "loraline", "-A", "trust", "-E", "UTF8", "--no-sync"]
    settings = {"listen_addresses": "", "unix_socket_directories": folder, "max_connections": 300, "fsync": "off"}
    settings |= {"shared_buffers": "32MB", "synchronous_commit": "off", "full_page_writes": "off"}
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    # Into a file: it reports every statement that tests make fail, and waits for ever where a pipe is full of that.
    told = folder / "server.log"
    with told.open("wb") as log:
        where = {"stdout": log, "stderr": log, "cwd": folder, **who}
        made = subprocess.run(initdb, **where)
        assert made.returncode == 0, told.read_text()
        server = subprocess.Popen([bin_folder / "postgres", "-D", folder / "data", *options], **where)
    url = f"postgresql+psycopg://loraline@/%s?host={folder}"
    try:
        while subprocess.run([bin_folder / "pg_isready", "-q", "-h", folder]).returncode:
            assert server.poll() is None, told.read_text()
            time.sleep(0.05)
        yield url
    finally:
        server.send_signal(signal.SIGINT)  # ends at once, cleanly
        server.wait(timeout=30)
        shutil.rmtree(folder)


def administer(postgres: str, statement: str) -> None:
    """Runs a statement on the server outside of any test's database."""
    import psycopg

    with psycopg.connect((postgres % "postgres").replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of this test alone."""
    name = f"test_{uuid4().hex}"
    administer(postgres, f"CREATE DATABASE {name} TEMPLATE template0")
    yield postgres % name
    administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_template(postgres: str) -> str:
    """The name of a PostgreSQL database that has our tables, made once since that takes as long as a test."""
    administer(postgres, "CREATE DATABASE made TEMPLATE template0")
    Database(postgres % "made").close()
    return "made"


@pytest.fixture
def postgres_home_url(postgres: str, postgres_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database of this test alone, with our tables in it."""
    name = f"test_{uuid4().hex}"
    administer(postgres, f"CREATE DATABASE {name} TEMPLATE {postgres_template}")
    yield postgres % name
    administer(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database_url(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of the database that this test runs on; nothing is registered in it."""
    if database == "postgres":
        return str(request.getfixturevalue("postgres_home_url"))
    return f"sqlite:///{tmp_path / 'home' / 'lineage.db'}"


@pytest.fixture(scope="session")
def fresh_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as it is after its first start, made once since that takes seconds."""
    home = Home.open(tmp_path_factory.mktemp("mlflow") / "home")
    Mirror(home, Store(home.store))
    return home.mlflow_db


@pytest.fixture
def empty_home(tmp_path: Path, database: str, database_url: str) -> Home:
    home = Home.open(tmp_path / "home")
    if database != "sqlite":
        (home.path / "loraline.yaml").write_text(f"database: {database_url}\n")
    return home


@pytest.fixture
def home(empty_home: Home, fresh_mlflow: Path) -> Home:
    shutil.copy(fresh_mlflow, empty_home.mlflow_db)
    return empty_home


@pytest.fixture
def store(empty_home: Home) -> Store:
    return Store(empty_home.store)


@pytest.fixture
def mirrored(home: Home) -> Iterator[Versions]:
    """Versions that MLflow is told of."""
    opened = Versions(home)
    yield opened
    opened.close()


@pytest.fixture
def versions(empty_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Versions]:
    """Versions that MLflow is not told of, which is many times faster."""
    monkeypatch.setattr("registry.versions.bring_level", lambda *_arguments, **_settings: None)
    opened = Versions(empty_home)
    yield opened
    opened.close()


@pytest.fixture
def register() -> Callable[..., AdapterVersion]:
    """Registers an adapter of some bytes, as a pipeline would after its steps."""

    def make(versions: Versions, content: bytes, name: str = "zorb", **changes: object) -> AdapterVersion:
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run("stripes", {"seed": 7})
        dataset = store.put_files("manifest", {"manifest.json": b"{}", "pictures/one.png": b"one as it was prepared"})
        adapter = store.put_files("adapter", {"adapter.safetensors": content, "training.json": b"{}"})
        report = store.put_files("report", {"report.json": b"{}" + content, "pictures/x.png": b"x"})
        train = {"inputs": {"dataset": dataset}, "output": adapter}
        for step, values in {"photos": {"output": dataset}, "adapter": train}.items():
            execution = Execution(
                f"{run.id}-{step}", run.id, step, step, "1", f"key of {step}", started_at=now(), **values
            )
            subjects = [Subject("5" * 64, "picture", "one.jpg")] if step == "photos" else []
            lineage.record(execution, contents=store.files(execution.output), subjects=subjects)
        lineage.finish_run(run.id, "COMPLETED")
        values = {
            "report": report,
            "run_id": run.id,
            "card": {"title": "Zorb"},
            "metrics": {"clip_t": {"base": 0.2, "adapter": 0.21, "difference": 0.01}},
            "gates": [GATE],
            "passed": True,
            "parents": ["base:tiny"],
            "curves": {"loss": [(0, 1.0), (1, 0.5)]},
            "params": {"rank": 8},
            "pictures": {"x.png": b"x"},
            "documents": {"report.html": b"<p>x</p>"},
        }
        return versions.register(name, adapter, **(values | changes))

    return make


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen]:
    """Starts another Python process with this one's import path."""

    def start(script: str, *arguments: object) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
