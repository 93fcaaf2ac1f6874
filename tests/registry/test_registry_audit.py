import os
import socket
import sqlite3

import pytest

from registry.maintenance.fsck import fsck
from registry.versions.mlflow_writer import MlflowWriter


def sql(versions, *statements):
    """Changes rows without any check, like any program with access to the file."""
    connection = sqlite3.connect(versions.home.lineage_db)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def adapter_blob(versions):
    return versions.store.blobs.path(versions.show("zorb", 1).sha256)


def copy_in_mlflow(versions):
    run = versions.show("zorb", 1).mlflow_run_id
    return next(versions.home.mlflow_artifacts.rglob(f"{run}/artifacts/adapter/adapter.safetensors"))


def client(versions):
    return MlflowWriter(versions.home, versions.store)._client


def aged(path):
    os.utime(path, (1, 1))


def leave_partial(versions):
    path = versions.home.store / "blobs" / ".abc.partial"
    path.write_bytes(b"half")
    aged(path)


def leave_blob(versions):
    ref = versions.store.put_files("manifest", {"a": b"unreferenced"})
    aged(versions.store.blobs.path(ref.sha256))


def leave_run(versions):
    run = versions.lineage.start_run("p", {})
    sql(versions, f"UPDATE runs SET process = 'another boot/1' WHERE id = '{run.id}'")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda v: flip(adapter_blob(v)), "adapter.safetensors: the bytes have digest", "zorb@1"),
    "truncated blob": (lambda v: adapter_blob(v).write_bytes(b"f"), "the bytes have digest", "zorb@1"),
    "deleted blob": (lambda v: adapter_blob(v).unlink(), "are missing", "zorb@1"),
    "deleted list": (
        lambda v: v.store.blobs.path(v.show("zorb", 2).artifact.sha256).unlink(),
        "list of files",
        "zorb@2",
    ),
    "moved alias": (
        lambda v: sql(v, "UPDATE aliases SET version = 2 WHERE alias = 'production'"),
        "event log",
        "production",
    ),
    "lost alias": (lambda v: sql(v, "DELETE FROM aliases WHERE alias = 'production'"), "has 1", "production"),
    "lost event": (
        lambda v: sql(
            v, "PRAGMA foreign_keys=OFF", "DROP TRIGGER events_no_delete", "DELETE FROM events WHERE seq = 1"
        ),
        "missing from the log",
        "events",
    ),
    "row with other digest": (
        lambda v: sql(v, f"UPDATE versions SET sha256 = '{'0' * 64}' WHERE version = 1"),
        "registered with digest 000",
        "zorb@1",
    ),
    "lost version": (
        lambda v: sql(
            v, "DELETE FROM version_parents", "DELETE FROM version_records", "DELETE FROM versions WHERE version = 1"
        ),
        "an earlier version is missing",
        "zorb@2",
    ),
    "other recorded files": (
        lambda v: sql(v, "DELETE FROM contents WHERE path = 'adapter.safetensors'"),
        "recorded files",
        "adapter",
    ),
    "leftover file": (leave_partial, "unfinished file", ".abc.partial"),
    "orphan blob": (leave_blob, "nothing refers", "blob"),
    "run of a dead process": (leave_run, "RUNNING", "run"),
}

DAMAGE_IN_MLFLOW = {
    "version missing in MLflow": (lambda v: client(v).delete_model_version("zorb", "1"), "does not have", "zorb@1"),
    "alias moved in MLflow": (
        lambda v: client(v).set_registered_model_alias("zorb", "production", "2"),
        "points at version 2 instead of version 1",
        "zorb@production",
    ),
    "digest tag changed in MLflow": (
        lambda v: client(v).set_model_version_tag("zorb", "1", "loraline.sha256", "0"),
        "the tag 'loraline.sha256' is '0'",
        "zorb@1",
    ),
    "foreign version in MLflow": (
        lambda v: client(v).create_model_version("zorb", source="file:///x"),
        "the registry does not have",
        "zorb@3",
    ),
    "copy changed in MLflow": (lambda v: flip(copy_in_mlflow(v)), "MLflow's copy has digest", "zorb@1"),
    "copy missing in MLflow": (
        lambda v: copy_in_mlflow(v).unlink(),
        "MLflow's copy of the adapter is missing",
        "zorb@1",
    ),
    "MLflow's database missing": (lambda v: v.home.mlflow_db.unlink(), "the database is missing", "mlflow.db"),
    "MLflow's database damaged": (
        lambda v: v.home.mlflow_db.write_bytes(b"no database" * 1000),
        "the database is damaged",
        "mlflow.db",
    ),
}


def test_good_home_has_no_problems(good):
    assert fsck(good.home, grace=0) == []


@pytest.mark.parametrize("harm", DAMAGE)
def test_each_damage_is_found(plain, harm):
    assert fsck(plain.home, mlflow=False) == []
    damage, what, where = DAMAGE[harm]
    damage(plain)
    problems = fsck(plain.home, mlflow=False)
    assert any(what in problem.what and where in problem.where for problem in problems), problems
    assert all(problem.remedy for problem in problems)


def test_a_row_that_refers_to_a_missing_row_is_found(plain):
    sql(plain, "PRAGMA foreign_keys=OFF", "DELETE FROM names")
    assert any("refers to a missing row" in problem.what for problem in fsck(plain.home, mlflow=False))


@pytest.mark.parametrize("harm", DAMAGE_IN_MLFLOW)
def test_each_difference_to_mlflow_is_found(good, harm):
    damage, what, where = DAMAGE_IN_MLFLOW[harm]
    damage(good)
    problems = fsck(good.home)
    assert any(what in problem.what and where in problem.where for problem in problems), problems
    assert all(problem.remedy for problem in problems)


def test_damaged_database_is_found(plain):
    plain.close()
    content = bytearray(plain.home.lineage_db.read_bytes())
    content[4096 : 4096 * 3] = b"\xff" * 8192
    plain.home.lineage_db.write_bytes(content)
    problems = fsck(plain.home, mlflow=False)
    assert problems
    assert all("lineage.db" in problem.where for problem in problems)


def test_home_in_which_nothing_was_registered_has_no_problem(empty_home):
    assert fsck(empty_home) == []


def test_absent_database_is_found(plain):
    plain.close()
    plain.home.lineage_db.unlink()
    assert [problem.what for problem in fsck(plain.home)] == ["the database is missing"]


def test_home_without_versions_needs_no_mlflow(empty_home):
    from registry.lineage.record import Lineage

    Lineage(empty_home.lineage_url).close()
    assert fsck(empty_home) == []
    assert not empty_home.mlflow_db.exists()


def test_work_in_progress_is_no_problem(plain):
    plain.store.put_files("manifest", {"a": b"to be recorded in a moment"})
    (plain.home.store / "blobs" / ".abc.partial").write_bytes(b"half")
    assert fsck(plain.home, mlflow=False) == []
    assert {problem.severity for problem in fsck(plain.home, grace=-1, mlflow=False)} == {"leftover"}


def test_an_mlflow_server_that_never_answers_is_a_problem(plain, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, and says nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        url = f"postgresql+psycopg://user@{address}/mlflow"
        monkeypatch.setenv("LORALINE_MLFLOW_URL", url)
        monkeypatch.setenv("LORALINE_MLFLOW_TIMEOUT", "1")
        problems = [problem.what for problem in fsck(plain.home) if f"@{address}" in problem.where]
    assert ["timeout" in what for what in problems] == [True]
    monkeypatch.setenv("LORALINE_MLFLOW_TIMEOUT", "soon")
    assert "'soon' is no timeout" in fsck(plain.home)[-1].what
