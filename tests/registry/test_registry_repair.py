"""`fsck --repair`: what can be built again is, what cannot is said, and nothing damaged is deleted."""

import shutil

import pytest

from registry import queries
from registry.maintenance.fsck import fsck
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
    """The home of `plain`, in which a version was withdrawn and a picture revoked."""
    restore(plain)
    return plain


@pytest.fixture
def good(good):
    """The home of `good`, in which a version was withdrawn and a picture revoked; MLflow has that too."""
    restore(good)
    good.sync()
    return good


def restore(versions):
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, "zorb", 2)
        queries.set_state(session, version, "WITHDRAWN", "withdraw", actor="a", reason="r")
        event = queries.log_event(session, "revoke", actor="a", reason="r", subject="5" * 64)
        session.add(RevocationRow(subject=event.subject, seq=event.seq))


ROWS = {
    "moved alias": "UPDATE aliases SET version = 2 WHERE alias = 'production'",
    "lost alias": "DELETE FROM aliases WHERE alias = 'production'",
    "alias cleared": "UPDATE aliases SET version = NULL WHERE alias = 'production'",
    "state changed": "UPDATE versions SET state = 'ACTIVE' WHERE version = 2",
    "state invented": "UPDATE versions SET state = 'DELETED' WHERE version = 1",
    "revocation gone": "DELETE FROM revocations",
    "revocation invented": "UPDATE revocations SET subject = 'somebody else'",
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
    assert all(each.done for each in done)
    assert fsck(plain.home, mlflow=False) == []
    assert repair(plain.home, mlflow=False) == []


def test_dead_runs_and_leftovers_are_cleared(plain):
    leave_run(plain)
    leave_partial(plain)
    done = repair(plain.home, mlflow=False)
    assert {each.outcome for each in done} == {"marked as CRASHED", "deleted"}
    assert fsck(plain.home, mlflow=False) == []


def test_lost_list_of_files_is_written_again_from_the_record(plain):
    for number, harm in ((1, lambda path: path.unlink()), (2, flip)):
        harm(plain.store.blobs.path(plain.show("zorb", number).artifact.sha256))
    assert fsck(plain.home, mlflow=False) != []
    assert all(each.done for each in repair(plain.home, mlflow=False))
    assert fsck(plain.home, mlflow=False) == []


@pytest.mark.parametrize("place", ["mlflow", "work", "exports", "reports"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_blob_is_put_back_from_wherever_it_still_is(plain, place, harm):
    digest = plain.show("zorb", 1).sha256
    blob = plain.store.blobs.path(digest)
    content = blob.read_bytes()
    copy = plain.home.path / place / "deep" / "adapter.safetensors"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)
    (copy.parent / "other").write_bytes(content[::-1])
    (copy.parent / "aaa").symlink_to(copy)
    harm(blob)
    left = blob.read_bytes() if blob.exists() else None
    (done,) = repair(plain.home, mlflow=False)
    assert done.done
    assert str(copy) in done.outcome
    assert blob.read_bytes() == content
    asides = [path.read_bytes() for path in (plain.store.folder / "blobs" / "damaged").glob("*")]
    assert asides == ([] if left is None else [left])
    assert fsck(plain.home, mlflow=False) == []


def test_needed_blob_that_nobody_has_is_named_and_left_alone(plain):
    blob = plain.store.blobs.path(plain.show("zorb", 1).sha256)
    flip(blob)
    damaged = blob.read_bytes()
    (done,) = repair(plain.home, mlflow=False)
    assert not done.done
    assert "backup" in done.outcome
    assert blob.read_bytes() == damaged
    assert fsck(plain.home, mlflow=False) != []


def test_broken_result_of_the_cache_is_moved_aside(plain, register):
    from registry.entities import Execution

    result = plain.store.put_files("manifest", {"a": b"could be made again", "shared": b"one"})
    run = plain.lineage.start_run("other", {})
    execution = Execution("e", run.id, "step", "step", "1", "key", output=result)
    plain.lineage.record(execution, contents=plain.store.files(result))
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
    """A new database of MLflow is a copy of one that MLflow made, which takes seconds less."""

    def make(home, file):
        shutil.copy(fresh_template / file.name, file)
        close_mlflow()

    monkeypatch.setattr("registry.versions.mlflow_writer._make_database", make)


@pytest.mark.parametrize("harm", DAMAGE_IN_MLFLOW)
def test_mlflow_is_brought_level_or_built_anew(good, harm, made_mlflow, close_mlflow):
    assert fsck(good.home) == []
    do, _, _ = DAMAGE_IN_MLFLOW[harm]
    do(good)
    close_mlflow()
    assert fsck(good.home) != []
    done = repair(good.home)
    assert [each for each in done if each.done]
    assert [each for each in done if not each.done] == []
    assert fsck(good.home) == []


def test_adapter_is_put_back_from_mlflows_copy(good):
    flip(good.store.blobs.path(good.show("zorb", 1).sha256))
    assert copy_in_mlflow(good).read_bytes() == b"first weights"
    done = repair(good.home)
    assert [each.done for each in done] == [True]
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
assert all(each.done for each in done), done
assert fsck(home) == [], fsck(home)
"""


def test_damaged_mlflow_is_kept_aside_by_a_process_that_never_opened_it(good, spawn):
    damaged = b"no database" * 1000
    good.home.mlflow_db.write_bytes(damaged)
    child = spawn(REPAIR, good.home.path)
    _, words = child.communicate(timeout=200)
    assert child.returncode == 0, words
    assert [path.read_bytes() for path in good.home.path.glob("aside/*/mlflow.db")] == [damaged]
    assert good.home.mlflow_artifacts.is_dir()
