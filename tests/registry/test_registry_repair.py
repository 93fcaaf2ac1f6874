"""`fsck --repair` rebuilds what it can, reports the rest, and deletes nothing damaged."""

import shutil

import pytest

from registry import changes, event_log, queries
from registry.maintenance.fsck import fsck as find_problems
from registry.maintenance.repair import repair
from registry.store.tables import RevocationRow
from tests.registry.test_registry_audit import (
    DAMAGE_IN_MLFLOW,
    aged,
    copy_in_mlflow,
    flip,
    leave_partial,
    leave_run,
    sql,
)


@pytest.fixture
def plain(plain):
    """The home of `plain`, with a withdrawn version and a revoked image."""
    withdraw_and_revoke(plain)
    return plain


@pytest.fixture
def good(good):
    """The home of `good`, with a withdrawn version and a revoked image, in sync with MLflow."""
    withdraw_and_revoke(good)
    good.sync()
    return good


def fsck(home, **settings):
    """Returns the problems but for warnings: the revoked image is one of the versions with aliases."""
    return [problem for problem in find_problems(home, **settings) if problem.severity != "warning"]


def withdraw_and_revoke(versions):
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, "zorb", 2)
        changes.set_state(session, version, "WITHDRAWN", "withdraw", actor="a", reason="r")
        event = event_log.log_event(session, "revoke", actor="a", reason="r", subject="5" * 64)
        session.add(RevocationRow(kind="picture", subject=event.subject, seq=event.seq))


ROWS = {
    "moved alias": "UPDATE aliases SET version = 2 WHERE alias = 'production'",
    "lost alias": "DELETE FROM aliases WHERE alias = 'production'",
    "alias cleared": "UPDATE aliases SET version = NULL WHERE alias = 'production'",
    "state changed": "UPDATE versions SET state = 'ACTIVE' WHERE version = 2",
    "state invented": "UPDATE versions SET state = 'DELETED' WHERE version = 1",
    "revocation missing": "DELETE FROM revocations",
    "revocation invented": "UPDATE revocations SET subject = 'other subject'",
    "recorded files changed": "DELETE FROM contents WHERE path = 'adapter.safetensors'",
    "recorded digest changed": f"UPDATE contents SET sha256 = '{'0' * 64}' WHERE path = 'report.json'",
}


@pytest.mark.parametrize("harm", ROWS)
def test_projections_are_rebuilt_from_the_log_and_the_store(plain, harm):
    assert fsck(plain.home, mlflow=False) == []
    assert repair(plain.home, mlflow=False) == []
    sql(plain, ROWS[harm])
    assert fsck(plain.home, mlflow=False) != []
    done = repair(plain.home, mlflow=False)
    assert done
    assert all(entry.done for entry in done)
    assert fsck(plain.home, mlflow=False) == []
    assert repair(plain.home, mlflow=False) == []


def test_dead_runs_and_leftovers_are_cleared(plain):
    leave_run(plain)
    leave_partial(plain)
    done = repair(plain.home, mlflow=False)
    assert {entry.outcome for entry in done} == {"marked as CRASHED", "deleted"}
    assert fsck(plain.home, mlflow=False) == []


def test_lost_list_of_files_is_rewritten_from_the_database(plain):
    for number, harm in ((1, lambda path: path.unlink()), (2, flip)):
        harm(plain.store.blobs.path(plain.show("zorb", number).artifact.sha256))
    assert fsck(plain.home, mlflow=False) != []
    assert all(entry.done for entry in repair(plain.home, mlflow=False))
    assert fsck(plain.home, mlflow=False) == []


@pytest.mark.parametrize("folder", ["mlflow", "work", "exports", "reports"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_blob_is_restored_from_any_copy_in_the_home(plain, folder, harm):
    digest = plain.show("zorb", 1).sha256
    blob = plain.store.blobs.path(digest)
    content = blob.read_bytes()
    copy = plain.home.path / folder / "deep" / "adapter.safetensors"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)
    (copy.parent / "other").write_bytes(content[::-1])
    (copy.parent / "aaa").symlink_to(copy)
    harm(blob)
    damaged = blob.read_bytes() if blob.exists() else None
    (done,) = repair(plain.home, mlflow=False)
    assert done.done
    assert str(copy) in done.outcome
    assert blob.read_bytes() == content
    quarantined = [path.read_bytes() for path in (plain.store.folder / "blobs" / "damaged").glob("*")]
    assert quarantined == ([] if damaged is None else [damaged])
    assert fsck(plain.home, mlflow=False) == []


def test_needed_blob_without_a_copy_is_reported_and_not_changed(plain):
    blob = plain.store.blobs.path(plain.show("zorb", 1).sha256)
    flip(blob)
    damaged = blob.read_bytes()
    (done,) = repair(plain.home, mlflow=False)
    assert not done.done
    assert "backup" in done.outcome
    assert blob.read_bytes() == damaged
    assert fsck(plain.home, mlflow=False) != []


def test_broken_cached_result_is_quarantined(plain, register):
    from registry.entities import Execution

    result = plain.store.put_files("manifest", {"a": b"could be made again", "shared": b"one"})
    run = plain.lineage.start_run("other", {})
    execution = Execution("e", run.id, "step", "step", "1", "key", output=result)
    plain.lineage.log_execution(execution, contents=plain.store.files(result))
    plain.lineage.finish_run(run.id, "COMPLETED")
    flip(plain.store.blobs.path(plain.store.files(result)["a"].sha256))
    assert fsck(plain.home, mlflow=False) != []
    (done,) = repair(plain.home, mlflow=False)
    assert done.done
    assert not plain.store.has(result)
    assert len(list((plain.store.folder / "blobs" / "damaged").iterdir())) == 2
    aged(plain.store.blobs.path(plain.show("zorb", 1).sha256))
    assert fsck(plain.home, mlflow=False) == []


def test_damaged_database_is_left_to_a_backup(plain):
    plain.close()
    plain.home.lineage_db.write_bytes(b"no database" * 1000)
    (done,) = repair(plain.home)
    assert not done.done
    assert "backup" in done.outcome
    assert plain.home.lineage_db.read_bytes() == b"no database" * 1000


@pytest.fixture
def made_mlflow(monkeypatch, fresh_template, close_mlflow):
    """Replaces the creation of MLflow's database by a copy, which saves seconds."""

    def make(home, file):
        shutil.copy(fresh_template / file.name, file)
        close_mlflow()

    monkeypatch.setattr("registry.versions.mlflow_client._make_database", make)


@pytest.mark.parametrize("harm", DAMAGE_IN_MLFLOW)
def test_mlflow_is_synced_or_rebuilt(good, harm, made_mlflow, close_mlflow):
    assert fsck(good.home) == []
    damage, _, _ = DAMAGE_IN_MLFLOW[harm]
    damage(good)
    close_mlflow()
    assert fsck(good.home) != []
    done = repair(good.home)
    assert [entry for entry in done if entry.done]
    assert [entry for entry in done if not entry.done] == []
    assert fsck(good.home) == []


def test_adapter_is_restored_from_mlflows_copy(good):
    flip(good.store.blobs.path(good.show("zorb", 1).sha256))
    assert copy_in_mlflow(good).read_bytes() == b"first weights"
    done = repair(good.home)
    assert [entry.done for entry in done] == [True]
    assert good.get("zorb", 1).sha256 == good.show("zorb", 1).sha256
    assert fsck(good.home) == []


REPAIR = """
import sys
from pathlib import Path
from registry.maintenance.fsck import fsck
from registry.home import Home
from registry.maintenance.repair import repair
home = Home(Path(sys.argv[1]))
done = repair(home)
assert done
assert all(entry.done for entry in done), done
assert {p.severity for p in fsck(home)} <= {'warning'}, fsck(home)
"""


def test_a_new_process_moves_a_damaged_mlflow_database_aside(good, spawn):
    damaged = b"no database" * 1000
    good.home.mlflow_db.write_bytes(damaged)
    child = spawn(REPAIR, good.home.path)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors
    assert [path.read_bytes() for path in good.home.path.glob("aside/*/mlflow.db")] == [damaged]
    assert good.home.mlflow_artifacts.is_dir()
