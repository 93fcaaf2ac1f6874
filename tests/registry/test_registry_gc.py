"""Garbage collection keeps everything that is needed, deletes the rest, and is safe beside writers."""

import os
import time
from datetime import timedelta

import pytest
from sqlalchemy import update

from registry import queries
from registry.entities import Execution, now
from registry.errors import HomeError, StoreError
from registry.maintenance.fsck import fsck
from registry.maintenance.gc import collect
from registry.store.artifacts import Store
from registry.store.remote import open_blobs
from registry.store.tables import ArtifactRow, DocumentRow, RunRow, VersionRow

OLD = 10 * 24 * 3600


def age(store, seconds=OLD):
    """Sets an old modification time on everything in the store."""
    for path in store.folder.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)


def sql(versions, statement):
    with versions.lineage.database.write() as session:
        session.execute(statement)


def age_runs(versions, days=100):
    sql(versions, update(RunRow).values(started_at=now() - timedelta(days=days)))


def record(versions, name, inputs, output, status="COMPLETED"):
    """Records a separate run with one step."""
    run = versions.lineage.start_run(name, {})
    execution = Execution(run.id, run.id, "step", "step", "1", run.id, inputs=inputs, output=output)
    versions.lineage.log_execution(execution, contents=versions.store.files(output))
    versions.lineage.finish_run(run.id, status)
    return run


def whole(versions, ref):
    return versions.store.verify(ref) == []


@pytest.fixture
def registered(versions, register):
    """A home with one version."""
    register(versions, b"weights", alias_request="staging")
    return versions


def put(versions, content, kind="manifest"):
    return versions.store.put_files(kind, {"a": content, "shared": b"in many artifacts"})


def test_unreferenced_blobs_are_deleted_and_the_rest_stays(registered):
    orphan = put(registered, b"unreferenced")
    age(registered.store)
    age_runs(registered)
    before = set(registered.store.blobs.digests())
    done = collect(registered.home)
    deleted = before - set(registered.store.blobs.digests())
    assert deleted == {item.name for item in done.items} == {orphan.sha256, *_files(orphan)}
    assert done.size > 0
    assert done.kept == len(before) - len(deleted)
    assert not registered.store.has(orphan)
    assert fsck(registered.home, mlflow=False) == []
    assert collect(registered.home).items == ()


def _files(ref):
    from hashlib import sha256

    return {sha256(content).hexdigest() for content in (b"unreferenced", b"in many artifacts")}


def test_dry_run_reports_the_same_and_deletes_nothing(registered):
    put(registered, b"unreferenced")
    age(registered.store)
    before = list(registered.store.blobs.digests())
    planned = collect(registered.home, dry_run=True)
    assert list(registered.store.blobs.digests()) == before
    done = collect(registered.home)
    assert planned.items == done.items
    assert planned.dry_run
    assert len(done.items) == 3


def test_young_blobs_are_not_deleted(registered):
    orphan = put(registered, b"to be recorded in a moment")
    assert collect(registered.home).items == ()
    assert collect(registered.home).waiting == 3
    assert whole(registered, orphan)
    assert len(collect(registered.home, grace=0).items) == 3


@pytest.mark.parametrize("refresh", [lambda v, ref: put(v, b"again"), lambda v, ref: v.store.touch(ref)])
def test_storing_or_touching_a_blob_makes_it_young(registered, refresh):
    orphan = put(registered, b"again")
    age(registered.store)
    refresh(registered, orphan)
    assert collect(registered.home).items == ()
    assert whole(registered, orphan)
    age(registered.store)
    assert len(collect(registered.home).items) == 3


def _version_row(versions, **values):
    sql(versions, update(VersionRow).values(**values))


def test_everything_upstream_of_a_version_stays(registered):
    version = registered.show("zorb", 1)
    age(registered.store)
    age_runs(registered, days=10_000)
    record(registered, "stripes", {}, put(registered, b"a later run of the same pipeline"))
    collect(registered.home, keep_runs=0)
    artifacts = [node.id for node in registered.lineage.walk("zorb@1").nodes if node.kind == "artifact"]
    assert len(artifacts) == 3, "the adapter, its report, and the dataset that it was trained on"
    assert all(map(registered.store.blobs.exists, artifacts))
    assert registered.damage(version) == ()


def test_a_deleted_version_is_collected_unless_an_alias_or_a_child_needs_it(registered, register):
    register(registered, b"child", name="merged", parents=["zorb@1"])
    artifact = registered.show("zorb", 1).artifact
    age(registered.store)
    age_runs(registered)
    record(registered, "stripes", {}, put(registered, b"a later run of the same pipeline"))

    def collected():
        collect(registered.home, keep_runs=0)
        return not registered.store.has(artifact)

    sql(registered, update(VersionRow).where(VersionRow.name == "zorb").values(state="DELETED"))
    with registered.lineage.database.write() as session:
        version = queries.read_version(session, "zorb", 1)
    assert version.aliases == ("staging",)
    assert not collected()
    with registered.lineage.database.write() as session:
        row = session.get(queries.AliasRow, ("zorb", "staging"))
        row.version = None
    assert not collected()
    sql(registered, update(VersionRow).where(VersionRow.name == "merged").values(state="DELETED"))
    assert collected()


def test_documents_of_versions_stay(registered):
    card = put(registered, b"# a model card", "record")
    with registered.lineage.database.write() as session:
        session.add(ArtifactRow(**card.to_json()))
        session.flush()
        row = queries.find_row(session, "zorb", 1)
        session.add(DocumentRow(version=row.id, kind="card", artifact=card.sha256, created_at=now()))
    age(registered.store)
    collect(registered.home, keep_runs=0)
    assert whole(registered, card)
    _version_row(registered, state="DELETED")
    sql(registered, update(queries.AliasRow).values(version=None))
    collect(registered.home, keep_runs=0)
    assert not registered.store.has(card)


def test_artifacts_of_recent_running_and_last_runs_stay(versions):
    refs = {name: put(versions, name.encode()) for name in ("read", "old", "recent", "last", "running")}
    old = record(versions, "nightly", {}, refs["old"])
    last = record(versions, "nightly", {"data": refs["read"]}, refs["last"])
    running = record(versions, "weekly", {}, refs["running"])
    sql(versions, update(RunRow).where(RunRow.id == running.id).values(status="RUNNING"))
    for run, days in ((old, 100), (last, 90), (running, 80)):
        sql(versions, update(RunRow).where(RunRow.id == run.id).values(started_at=now() - timedelta(days=days)))
    record(versions, "weekly", {}, refs["recent"], status="FAILED")
    age(versions.store)
    collect(versions.home, keep_runs=30)
    assert [name for name, ref in refs.items() if not versions.store.has(ref)] == ["old"]
    sql(versions, update(RunRow).where(RunRow.id == running.id).values(process="another boot/1"))
    collect(versions.home, keep_runs=0)
    assert [name for name, ref in refs.items() if versions.store.has(ref)] == ["read", "last"]


def test_collected_artifacts_are_no_problem(registered):
    result = put(registered, b"a result that could be made again")
    record(registered, "other", {}, result)
    record(registered, "other", {}, put(registered, b"the next result"))
    age(registered.store)
    age_runs(registered)
    sql(registered, update(RunRow).where(RunRow.name == "other").values(started_at=now() - timedelta(days=50)))
    with registered.lineage.database.write() as session:
        run = session.scalars(queries.select(RunRow).where(RunRow.name == "other")).first()
        run.started_at = now() - timedelta(days=60)
    collect(registered.home)
    assert not registered.store.has(result)
    assert fsck(registered.home, mlflow=False) == []


def test_nothing_is_deleted_while_the_files_of_a_needed_artifact_are_unknown(registered):
    version = registered.show("zorb", 1)
    put(registered, b"unreferenced")
    age(registered.store)
    path = registered.store.blobs.path(version.artifact.sha256)
    content = path.read_bytes()
    path.write_bytes(b"damaged")
    sql(registered, queries.select(1))
    before = list(registered.store.blobs.digests())
    assert collect(registered.home, dry_run=True).items  # the database still has its files
    with registered.lineage.database.write() as session:
        from registry.store.tables import ContentRow

        session.query(ContentRow).filter(ContentRow.artifact == version.artifact.sha256).delete()
    with pytest.raises(StoreError, match=r"nothing was collected.*fsck --repair"):
        collect(registered.home)
    assert list(registered.store.blobs.digests()) == before
    path.write_bytes(content)
    assert collect(registered.home).items


def test_old_leftovers_and_work_folders_are_deleted(registered):
    home, key = registered.home, "ab" * 32
    paths = [
        home.store / "blobs" / ".x.partial",
        home.path / ".mlflow.db.1.partial",
        home.reports / ".r.html.partial",
        home.cache / "latents" / ".t.partial",
        home.work / "mirror-abc" / "files" / "adapter",
        home.work / "tmpabc" / "artifact",
        home.work / key / "kept" / "checkpoint",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"four")
    (home.work / "link").symlink_to(home.reports)
    assert collect(home).items == ()
    age(Store(home.path))
    with home.lock(key):
        done = collect(home)
    assert (home.work / key / "kept" / "checkpoint").exists()
    collect(home)
    assert not any(path.exists() for path in paths)
    assert list(home.work.iterdir()) == []
    assert home.reports.is_dir()
    assert {item.what for item in done.items} == {"leftover", "work"}
    assert sum(item.size for item in done.items if not item.name.endswith("link")) == 6 * 4


def test_a_second_collection_is_refused(registered):
    with registered.home.lock("gc"), pytest.raises(HomeError, match="another collection or a backup"):
        collect(registered.home)


def test_blobs_of_a_remote_store_are_deleted_in_two_collections(versions, monkeypatch):
    monkeypatch.setenv("LORALINE_STORE_URL", "memory://collected")
    store = Store(versions.home.store, open_blobs("memory://collected"))
    first, second = (store.put_files("manifest", {"a": content}) for content in (b"unreferenced", b"referenced later"))
    done = collect(versions.home, grace=-1)
    assert len(done.items) == 4
    assert done.binned > 0
    assert store.verify(first) == store.verify(second) == []
    run = versions.lineage.start_run("late", {})
    execution = Execution(run.id, run.id, "step", "step", "1", "key", output=second)
    versions.lineage.log_execution(execution, contents=store.files(second))
    second_collection = collect(versions.home, grace=-1)
    assert {item.what for item in second_collection.items} == {"bin"}
    assert second_collection.binned == 0
    assert not store.has(first)
    assert store.verify(second) == []
    assert list(store.blobs.trash()) == []


COLLECTOR = """
import sys
from pathlib import Path
from registry.maintenance.gc import collect
from registry.home import Home
home = Home.open(Path(sys.argv[1]))
print("ready", flush=True)
collect(home, grace=30, keep_runs=0)
"""


def test_a_killed_collection_leaves_no_damage(registered, spawn):
    orphans = [put(registered, b"unreferenced %d" % number) for number in range(100)]
    record(registered, "other", {}, put(registered, b"recorded but not needed"))
    record(registered, "other", {}, put(registered, b"its last run"))
    age_runs(registered)
    remaining = [len(orphans)]
    for trial in range(6):
        age(registered.store)
        child = spawn(COLLECTOR, registered.home.path)
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.01 * trial)
        child.kill()
        child.communicate()
        remaining.append(sum(registered.store.has(orphan) for orphan in orphans))
        assert [problem for problem in fsck(registered.home, mlflow=False) if problem.severity == "damage"] == []
    assert remaining == sorted(remaining, reverse=True)
    age(registered.store)
    collect(registered.home, keep_runs=0)
    assert fsck(registered.home, mlflow=False) == []
    assert not any(registered.store.has(orphan) for orphan in orphans)
    assert not any(item.what == "artifact" for item in collect(registered.home, grace=0, keep_runs=0).items)
