"""The doctor finds each known problem, with a remedy, and passes a good installation."""

import http.server
import os
import shutil
import socket
import sqlite3
import threading
from collections import namedtuple
from contextlib import closing

import pytest

from registry.home import Home
from registry.maintenance.doctor import KNOWN_BREAKS, Finding, check_packages, doctor
from registry.maintenance.probes import file_system_of
from registry.settings import NAME

GOOD = {"fastapi": "0.150.0", "sqlalchemy": "2.0.58", "pillow": "13.0.0", "torch": "2.13.0"}


def find(findings, about, level):
    return [finding for finding in findings if finding.about == about and finding.level == level]


def broken(findings):
    return {finding.about for finding in findings if finding.level == "broken"}


@pytest.fixture
def examine(empty_home, monkeypatch):
    for name in ("PREFECT_API_URL", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def run(**options):
        return doctor(empty_home.path, **options)

    run.home = empty_home
    return run


def test_good_installation_has_nothing_broken(examine):
    findings = examine(probe=lambda: [Finding("device", "ok", "cpu")])
    assert broken(findings) == set()
    names = {"python", "packages", "home", "settings", "database", "MLflow's database", "store", "locks", "Prefect"}
    assert {finding.about for finding in findings} >= names | {"Hugging Face", "device"}
    assert not any(path.name.startswith(".doctor") for path in examine.home.path.iterdir())
    assert not examine.home.lineage_db.exists()


@pytest.mark.parametrize(
    ("name", "version"), [("fastapi", "0.165.0"), ("sqlalchemy", "2.1.0b1"), ("pillow", "12.3.0"), ("torch", "2.9.1")]
)
def test_a_version_with_a_known_fault_is_found(name, version):
    assert set(GOOD) == set(KNOWN_BREAKS)
    import importlib.metadata

    def installed(package):
        if package == name:
            return version
        return GOOD.get(package) or importlib.metadata.version(package)

    findings = list(check_packages(installed))
    listed = [f for f in find(findings, "packages", "broken") if name in f.found and KNOWN_BREAKS[name][2] in f.found]
    assert len(listed) == 1
    assert listed[0].remedy.startswith(f"pip install '{name}")


def test_missing_package_is_found():
    import importlib.metadata

    findings = list(check_packages(lambda name: None if name == "mlflow" else importlib.metadata.version(name)))
    (finding,) = find(findings, "packages", "broken")
    assert "mlflow is not installed" in finding.found
    assert finding.remedy.startswith("pip install 'mlflow")


def test_absent_home_is_reported_and_not_created(examine, tmp_path):
    findings = doctor(tmp_path / "absent")
    assert find(findings, "home", "warning")
    assert not (tmp_path / "absent").exists()


def test_home_that_is_a_file_is_found(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert broken(doctor(tmp_path / "file")) == {"home"}


@pytest.mark.parametrize(("free", "level"), [(100 << 20, "broken"), (1 << 30, "warning"), (100 << 30, "ok")])
def test_free_space_is_checked(examine, monkeypatch, free, level):
    usage = namedtuple("usage", "total used free")(1 << 40, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert find(examine(), "home", level)


def test_settings_that_cannot_be_read_are_found(examine):
    (examine.home.path / NAME).write_text("stor: s3://bucket")
    (finding,) = find(examine(), "settings", "broken")
    assert "stor" in finding.found


def _future(path):
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        connection.execute("INSERT INTO meta VALUES ('schema', '99')")


@pytest.mark.parametrize(
    ("make", "messages"),
    [(_future, "schema 99"), (lambda path: path.write_bytes(b"no database" * 999), "not a database|damaged")],
)
def test_database_that_cannot_be_used_is_found(examine, make, messages):
    make(examine.home.lineage_db)
    before = examine.home.lineage_db.read_bytes()
    (finding,) = find(examine(), "database", "broken")
    assert any(message in finding.found for message in messages.split("|"))
    assert examine.home.lineage_db.read_bytes() == before


def test_kind_of_file_system_is_read_from_the_mounts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path}/far nfs4 rw 0 0\n//s/y {tmp_path}/with\\040space cifs rw 0 0\n"
    )
    assert file_system_of(tmp_path / "near" / "lineage.db", mounts) == "ext4"
    assert file_system_of(tmp_path / "far" / "home" / "lineage.db", mounts) == "nfs4"
    assert file_system_of(tmp_path / "with space" / "lineage.db", mounts) == "cifs"
    assert file_system_of(tmp_path, tmp_path / "absent") == ""


def test_sqlite_on_a_network_file_system_is_found(examine, monkeypatch):
    monkeypatch.setattr("registry.maintenance.doctor.file_system_of", lambda _path: "nfs4")
    (finding,) = find(examine(), "database", "broken")
    assert "nfs4" in finding.found
    assert "PostgreSQL" in finding.remedy


def _closed_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_postgres_that_does_not_respond_is_found_without_its_password(examine, monkeypatch):
    pytest.importorskip("psycopg")
    url = f"postgresql+psycopg://me:hunter2@127.0.0.1:{_closed_port()}/x"
    monkeypatch.setenv("LORALINE_DATABASE_URL", url)
    findings = examine()
    (finding,) = find(findings, "database", "broken")
    assert "refused" in finding.found
    assert not any("hunter2" in f.found for f in findings)


def test_store_that_does_not_respond_is_found(examine, monkeypatch):
    pytest.importorskip("s3fs")
    settings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{_closed_port()}", "AWS_ACCESS_KEY_ID": "x"}
    settings |= {"AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"}
    for name, value in (settings | {"LORALINE_STORE_URL": "s3://bucket/folder"}).items():
        monkeypatch.setenv(name, value)
    (finding,) = find(examine(), "store", "broken")
    assert "s3://bucket/folder" in finding.found
    monkeypatch.setenv("LORALINE_STORE_URL", "memory://x")
    assert find(examine(), "store", "ok")


def test_mlflow_that_is_behind_is_reported(versions, register):
    register(versions, b"weights")
    assert find(doctor(versions.home.path), "MLflow", "warning")


def test_locks_are_harmless_and_those_held_are_named(examine):
    (examine.home.locks / "dead.lock").touch()
    with examine.home.lock("mlflow"):
        (finding,) = find(examine(), "locks", "ok")
    assert "harmless" in finding.found
    assert "mlflow" in finding.found
    assert "dead" not in finding.found


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *_arguments):
        pass


def test_prefects_server_is_checked(examine, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), _Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{server.server_port}/api")
        assert find(examine(), "Prefect", "ok")
        server.shutdown()
    for url in (f"http://127.0.0.1:{_closed_port()}/api", "file:///etc/passwd"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        assert find(examine(), "Prefect", "broken")


def test_offline_without_models_is_reported(examine, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find(examine(), "Hugging Face", "ok")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = find(examine(), "Hugging Face", "warning")
    assert "HF_HUB_OFFLINE" in finding.remedy
    os.makedirs(tmp_path / "hub" / "models--a--b")  # noqa: PTH103
    assert find(examine(), "Hugging Face", "ok")


def test_secret_in_the_settings_is_not_shown(examine):
    pytest.importorskip("psycopg")
    (examine.home.path / NAME).write_text("mlflow: postgresql+psycopg://me:hunter2@127.0.0.1:9/x\n")
    findings = examine()
    assert find(findings, "settings", "ok")
    assert not any("hunter2" in f"{f.found}{f.remedy}" for f in findings)
    assert isinstance(Home(examine.home.path).mlflow_url, str)
