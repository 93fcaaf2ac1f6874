"""Backups are consistent beside writers, report missing blobs, and are verified before a restore."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from contextlib import closing

import pytest
from filelock import FileLock
from sqlalchemy import create_engine

from lora_engine.files import sha256_bytes, sha256_file
from registry.errors import HomeError, RegistryError, StoreError
from registry.home import Home
from registry.maintenance.backup import backup
from registry.maintenance.fsck import fsck
from registry.maintenance.restore import restore_backup
from registry.store.schema import migrate
from registry.versions.promotion import history
from registry.versions.versions import Versions


@pytest.fixture
def filled(plain):
    (plain.home.path / "policy.yaml").write_text("{}")
    return plain


def opened(path):
    return Versions(Home.open(path))


def everything(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["backups", "one.tar"])
def test_a_restored_home_equals_the_original(filled, tmp_path, name):
    done = backup(filled.home, tmp_path / name)
    assert done.problems == ()
    assert done.left_out == ()
    assert done.copied == done.blobs == len(list(filled.store.blobs.digests()))
    result = restore_backup(tmp_path / name, tmp_path / "new")
    assert result.blobs == done.blobs
    assert result.before is None
    home = Home(tmp_path / "new")
    assert fsck(home, mlflow=False) == []
    with closing(opened(home.path)) as restored:
        for number in (1, 2):
            assert restored.show("zorb", number).sha256 == filled.show("zorb", number).sha256
        assert restored.get("zorb", "staging").version == 2
        assert history(restored, "zorb") == history(filled, "zorb")
    assert (home.path / "policy.yaml").read_text() == "{}"
    assert not list(tmp_path.glob(".*"))


def test_next_backup_adds_only_new_blobs(filled, register, tmp_path):
    first = backup(filled.home, tmp_path / "backups")
    assert backup(filled.home, tmp_path / "backups").copied == 0
    register(filled, b"third weights")
    third = backup(filled.home, tmp_path / "backups")
    assert 0 < third.copied < first.copied
    restore_backup(tmp_path / "backups", tmp_path / "latest")
    restore_backup(first.path, tmp_path / "first")
    with closing(opened(tmp_path / "latest")) as latest, closing(opened(tmp_path / "first")) as oldest:
        assert [len(versions.list("zorb")) for versions in (latest, oldest)] == [3, 2]


def test_damaged_blob_in_the_backup_is_rewritten(filled, tmp_path):
    backup(filled.home, tmp_path / "backups")
    blob = next((tmp_path / "backups" / "blobs").glob("??/*"))
    content = blob.read_bytes()
    blob.write_bytes(b"damaged")
    backup(filled.home, tmp_path / "backups")
    assert blob.read_bytes() == content


WRITER = """
import sys, time
from pathlib import Path
import registry.versions.versions
registry.versions.versions.sync_mlflow = lambda *a, **k: None
from registry.home import Home
from registry.versions.versions import Versions
versions = Versions(Home.open(Path(sys.argv[1])))
for number in range(1000):
    ref = versions.store.put_files("adapter", {"adapter.safetensors": b"weights %d" % number})
    versions.register("busy", ref, alias_request="candidate")
    print(number, flush=True)
"""


def test_backup_beside_a_writer_is_consistent(filled, tmp_path, spawn):
    child = spawn(WRITER, filled.home.path)
    assert child.stdout.readline() == "0\n"
    counts = []
    for number in range(2):
        while number and filled.show("busy").version <= counts[-1]:
            time.sleep(0.01)
        done = backup(filled.home, tmp_path / "backups")
        assert done.problems == ()
        restore_backup(done.path, tmp_path / f"new{number}")
        assert fsck(Home(tmp_path / f"new{number}"), mlflow=False) == []
        with closing(opened(tmp_path / f"new{number}")) as restored:
            counts.append(len(restored.list("busy")))
            assert restored.show("busy", "candidate").version == counts[-1]
            assert restored.damage(restored.show("busy", "latest")) == ()
    assert child.poll() is None
    child.kill()
    child.communicate()
    assert counts == sorted(set(counts))


def test_backup_of_a_damaged_home_reports_problems(filled, tmp_path):
    version = filled.show("zorb", 1)
    filled.store.blobs.path(version.sha256).write_bytes(b"damaged")
    filled.store.blobs.path(filled.show("zorb", 2).sha256).unlink()
    done = backup(filled.home, tmp_path / "backups")
    assert len(done.problems) == 2
    assert all("fsck --repair" in problem.remedy for problem in done.problems)
    assert done.blobs == len(list(filled.store.blobs.digests())) - 1


def test_backup_refuses_unsuitable_targets(filled, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match="other content"):
        backup(filled.home, tmp_path / "photos")
    with pytest.raises(StoreError, match="must not be inside its home"):
        backup(filled.home, filled.home.path / "work" / "backups")
    with filled.home.lock("gc"), pytest.raises(HomeError, match="a collection or another backup"):
        backup(filled.home, tmp_path / "backups")
    assert not (tmp_path / "backups").exists()


def test_restore_replaces_a_home_only_on_request(filled, tmp_path):
    backup(filled.home, tmp_path / "backups")
    before = everything(filled.home.path)
    with pytest.raises(HomeError, match="not empty"):
        restore_backup(tmp_path / "backups", filled.home.path)
    assert everything(filled.home.path) == before
    filled.close()
    result = restore_backup(tmp_path / "backups", filled.home.path, replace=True)
    assert {path.name for path in result.before.iterdir()} >= {"lineage.db", "store"}
    assert fsck(filled.home, mlflow=False) == []
    home = Home.open(tmp_path / "only folders")
    (home.locks / "x.lock").touch()
    assert restore_backup(tmp_path / "backups", home.path).before is None


def _manifest(folder, change):
    path = next((folder / "snapshots").iterdir()) / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def _blob(folder):
    return max((folder / "blobs").glob("??/*"), key=lambda path: path.stat().st_size)


def _snapshot(folder):
    return next((folder / "snapshots").iterdir())


def _link(path, to):
    path.unlink()
    path.symlink_to(to)


def _sql(*statements, name="lineage.db"):
    def change(folder):
        path = _snapshot(folder) / name
        with closing(sqlite3.connect(path)) as connection, connection:
            for statement in statements:
                connection.execute(statement)
        _manifest(folder, lambda it: it["files"].update({name: sha256_file(path)}))

    return change


REFUSE = "BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END"
DROP_LOG = ("DROP TRIGGER events_no_update", "DROP TRIGGER events_no_delete")
HARM = {
    "blob changed": (lambda folder: _blob(folder).write_bytes(b"x"), "digest"),
    "blob missing": (lambda folder: _blob(folder).unlink(), "no such file"),
    "blob is a link": (lambda folder: _link(_blob(folder), "/etc/hostname"), "regular"),
    "database changed": (lambda folder: (_snapshot(folder) / "lineage.db").write_bytes(b"x"), "digest"),
    "database missing": (lambda folder: (_snapshot(folder) / "lineage.db").unlink(), "no such file"),
    "database of a newer release": (_sql("UPDATE meta SET value = '99' WHERE key = 'schema'"), "schema 99"),
    "no database": (lambda folder: _manifest(folder, lambda it: it["files"].pop("lineage.db")), "no lineage.db"),
    "manifest missing": (lambda folder: (_snapshot(folder) / "manifest.json").unlink(), "not a backup"),
    "manifest is not JSON": (lambda folder: (_snapshot(folder) / "manifest.json").write_text("{"), "not JSON"),
    "another format": (lambda folder: _manifest(folder, lambda it: it.update(format=9)), "format 9"),
    "file outside the backup": (
        lambda folder: _manifest(folder, lambda it: it["files"].update({"../../evil.yaml": "0" * 64})),
        r"evil\.yaml",
    ),
    "unknown file": (lambda folder: _manifest(folder, lambda it: it["files"].update({"x.py": "0" * 64})), r"x\.py"),
    "blob outside the backup": (
        lambda folder: _manifest(folder, lambda it: it["blobs"].update({"../evil": 1})),
        "not a digest",
    ),
    "no finished backup": (lambda folder: shutil.rmtree(_snapshot(folder)), "no finished backup"),
    "invalid settings": (
        lambda folder: (
            (_snapshot(folder) / "loraline.yaml").write_text("what: ever"),
            _manifest(folder, lambda it: it["files"].update({"loraline.yaml": sha256_bytes(b"what: ever")})),
        ),
        "settings cannot be read",
    ),
}


FOREIGN_TABLES = {
    "a trigger": (
        _sql("CREATE TRIGGER evil AFTER INSERT ON versions BEGIN DELETE FROM aliases; END"),
        "not in schema 4: 'trigger evil'",
    ),
    "another trigger of a known name": (
        _sql(DROP_LOG[0], "CREATE TRIGGER events_no_update BEFORE UPDATE ON runs " + REFUSE),
        "not in schema 4: 'trigger events_no_update'",
    ),
    "a missing trigger": (_sql(*DROP_LOG), "missing in schema 4: 'trigger events_no_delete'"),
    "a view": (_sql("CREATE VIEW evil AS SELECT * FROM versions"), "'view evil'"),
    "a view for a table": (
        _sql("ALTER TABLE revocations RENAME TO r", "CREATE VIEW revocations AS SELECT * FROM r"),
        "'view revocations'",
    ),
    "a table": (_sql("CREATE TABLE evil (a)"), "'table evil'"),
    "a column": (_sql("ALTER TABLE versions ADD COLUMN evil TEXT"), r"'column versions\.evil'"),
    "a computed column": (_sql("ALTER TABLE runs ADD COLUMN evil AS (1)"), r"'column runs\.evil'"),
    "a missing column": (
        _sql("ALTER TABLE runs DROP COLUMN ended_at"),
        r"missing in schema 4: 'column runs\.ended_at'",
    ),
    "a name that is a path": (_sql("UPDATE names SET name = '../../evil'"), "invalid adapter name '../../evil'"),
    "an adapter outside its artifact": (_sql("UPDATE versions SET adapter_path = '/evil'"), "invalid path '/evil'"),
}


@pytest.mark.parametrize("harm", HARM)
def test_an_incomplete_backup_changes_nothing(filled, tmp_path, harm):
    folder = tmp_path / "backups"
    backup(filled.home, folder)
    damage, message = HARM[harm]
    damage(folder)
    before = everything(filled.home.path)
    for target, replace in ((tmp_path / "new", False), (filled.home.path, True)):
        with pytest.raises(RegistryError, match=message):
            restore_backup(folder, target, replace=replace)
    assert not (tmp_path / "new").exists()
    assert everything(filled.home.path) == before
    assert not list(tmp_path.glob(".*"))


def test_tables_that_are_not_the_registrys_are_refused(filled, tmp_path):
    folder = tmp_path / "backups"
    backup(filled.home, folder)
    manifest, database = (_snapshot(folder) / name for name in ("manifest.json", "lineage.db"))
    intact = manifest.read_bytes(), database.read_bytes()
    for harm, (damage, message) in FOREIGN_TABLES.items():
        damage(folder)
        with pytest.raises(StoreError, match=message):
            restore_backup(folder, tmp_path / "new")
        assert not (tmp_path / "new").exists(), harm
        manifest.write_bytes(intact[0])
        database.write_bytes(intact[1])
    restore_backup(folder, tmp_path / "new")


def test_tables_of_an_earlier_schema_are_restored(filled, tmp_path):
    folder = tmp_path / "backups"
    backup(filled.home, folder)
    path = _snapshot(folder) / "lineage.db"
    path.unlink()
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        migrate(connection, 0, 1)
        connection.exec_driver_sql("INSERT INTO meta VALUES ('schema', '1')")
    engine.dispose()
    _manifest(folder, lambda it: it["files"].update({"lineage.db": sha256_file(path)}))
    restore_backup(folder, tmp_path / "new")
    with closing(opened(tmp_path / "new")) as restored:
        assert restored.list() == ()
    _sql("CREATE VIEW revocations AS SELECT 1", name="lineage.db")(folder)
    with pytest.raises(StoreError, match="not in schema 1: 'view revocations'"):
        restore_backup(folder, tmp_path / "other")


def _archive(path, *members):
    with tarfile.open(path, "w") as archive:
        for info in members:
            archive.addfile(info, __import__("io").BytesIO(b"\0" * info.size))


def _member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
    return info


EVIL = {
    "parent folder": (_member("../evil"),),
    "absolute": (_member("/tmp/evil"),),
    "link": (_member("snapshots", tarfile.SYMTYPE, "/tmp"), _member("snapshots/evil")),
    "hard link": (_member("evil", tarfile.LNKTYPE, "/etc/hostname"),),
    "pipe": (_member("evil", tarfile.FIFOTYPE),),
    "device": (_member("evil", tarfile.CHRTYPE),),
    "twice": (_member("evil"), _member("evil")),
}


@pytest.mark.parametrize("kind", EVIL)
def test_archive_never_leaves_its_folder(tmp_path, kind):
    _archive(tmp_path / "evil.tar", *EVIL[kind])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"not a regular file|invalid path|appears twice"):
        restore_backup(tmp_path / "evil.tar", tmp_path / "new")
    assert set(tmp_path.rglob("*")) == before


def test_archive_that_was_cut_off_is_refused(filled, tmp_path):
    backup(filled.home, tmp_path / "one.tar")
    content = (tmp_path / "one.tar").read_bytes()
    (tmp_path / "half.tar").write_bytes(content[: len(content) // 2])
    with pytest.raises(RegistryError, match=r"not a complete archive|no finished backup|no such file|digest"):
        restore_backup(tmp_path / "half.tar", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_backup_that_is_killed_leaves_earlier_ones_and_the_next_works(filled, tmp_path, spawn):
    first = backup(filled.home, tmp_path / "backups")
    script = (
        "import sys; from pathlib import Path; from registry.home import Home\n"
        "from registry.maintenance.backup import backup\n"
        "home = Home(Path(sys.argv[1])); print('ready', flush=True)\n"
        "while True: backup(home, Path(sys.argv[2]))"
    )
    for trial in range(3):
        child = spawn(script, filled.home.path, tmp_path / "backups")
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05 * trial)
        child.kill()
        child.communicate()
        for snapshot in (tmp_path / "backups" / "snapshots").iterdir():
            assert snapshot.name.startswith(".") or (snapshot / "manifest.json").is_file()
    assert backup(filled.home, tmp_path / "backups").problems == ()
    restore_backup(first.path, tmp_path / "first")
    restore_backup(tmp_path / "backups", tmp_path / "last")
    assert fsck(Home(tmp_path / "last"), mlflow=False) == []


def test_blobs_of_a_remote_store_are_backed_up_and_restored(versions, register, tmp_path, monkeypatch):
    from registry.store.artifacts import Store
    from registry.store.remote import open_blobs

    versions.store = Store(versions.home.store, open_blobs("memory://backed-up"))
    register(versions, b"weights")
    (versions.home.path / "loraline.yaml").write_text("store: memory://backed-up\n")
    done = backup(versions.home, tmp_path / "backups")
    assert done.problems == ()
    for digest in list(versions.store.blobs.digests()):
        versions.store.blobs.quarantine(digest)
    restore_backup(tmp_path / "backups", tmp_path / "new", with_settings=True)
    assert len(list(versions.store.blobs.digests())) == done.blobs
    assert fsck(Home(tmp_path / "new"), mlflow=False) == []


OUTSIDE = (
    "UPDATE runs SET artifact_uri = 'file:///victim'",
    "UPDATE runs SET artifact_uri = artifact_uri || '/%2e%2e/%2e%2e/%2e%2e/%2e%2e/victim'",
    "UPDATE experiments SET artifact_location = 's3://bucket/victim'",
    "UPDATE model_versions SET source = '/victim'",
    "ALTER TABLE logged_models RENAME TO victim",
)


def test_artifacts_of_mlflow_stay_in_the_restored_home(filled_home, tmp_path):
    folder, new = tmp_path / "backups", tmp_path / "new"
    backup(filled_home, folder)
    manifest, database = (_snapshot(folder) / name for name in ("manifest.json", "mlflow.db"))
    intact = manifest.read_bytes(), database.read_bytes()
    assert restore_backup(folder, new).left_out == ()
    with closing(sqlite3.connect(new / "mlflow.db")) as connection:
        uris = connection.execute("SELECT artifact_uri FROM runs UNION SELECT source FROM model_versions").fetchall()
    assert len(uris) > 1
    assert all(uri.startswith(f"{(new / 'mlflow').as_uri()}/zorb/") for (uri,) in uris)
    for number, harm in enumerate(OUTSIDE):
        _sql(harm, name="mlflow.db")(folder)
        (note,) = restore_backup(folder, tmp_path / str(number)).left_out
        assert "victim" in note or "logged_models" in note
        assert not (tmp_path / str(number) / "mlflow.db").exists()
        manifest.write_bytes(intact[0])
        database.write_bytes(intact[1])
    _sql("CREATE TRIGGER evil AFTER INSERT ON runs BEGIN DELETE FROM experiments; END", name="mlflow.db")(folder)
    with pytest.raises(StoreError, match="not in MLflow's schema: 'trigger evil'"):
        restore_backup(folder, tmp_path / "last")


def test_mlflow_is_rebuilt_after_a_restore(filled_home, tmp_path, spawn):
    backup(filled_home, tmp_path / "backups")
    filled_home.path.rename(tmp_path / "lost")
    restore_backup(tmp_path / "backups", tmp_path / "elsewhere")
    # A separate process, like a command: MLflow caches the artifact URIs of runs.
    script = (
        "import sys; from pathlib import Path; from registry.home import Home\n"
        "from registry.maintenance.fsck import fsck\n"
        "from registry.versions.versions import Versions\n"
        "home = Home.open(Path(sys.argv[1])); versions = Versions(home); assert versions.is_synced()\n"
        "assert fsck(home, grace=0) == [], fsck(home, grace=0)"
    )
    child = spawn(script, tmp_path / "elsewhere")
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors
    copies = {copy.read_bytes() for copy in (tmp_path / "elsewhere" / "mlflow").rglob("adapter.safetensors")}
    assert copies == {b"first weights", b"second weights"}


def test_what_a_killed_restore_left_is_deleted_by_the_next(filled, tmp_path):
    backup(filled.home, tmp_path / "backups")
    dead, running, young, other = (
        tmp_path / name for name in (".new.a.partial", ".new.b.partial", ".new.c.partial", "x")
    )
    for folder in (dead, running, young, other):
        (folder / "home").mkdir(parents=True)
        (folder / "lock").touch()
        if folder != young:
            os.utime(folder / "lock", (1, 1))
    with FileLock(running / "lock"):
        os.utime(running / "lock", (1, 1))
        restore_backup(tmp_path / "backups", tmp_path / "new")
    assert not dead.exists()
    assert all(folder.is_dir() for folder in (running, young, other))
    assert {path.name for path in tmp_path.glob(".new.*")} == {running.name, young.name}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b'{"format": 1, "format": 1}', "duplicate key"),
        (b'{"format": %s}' % (b"9" * 5000), "an integer of 5000 digits"),
        (b'{"format": 1}', "the manifest cannot be read: created_at: Field required"),
        (b"[]", "the manifest cannot be read"),
    ],
)
def test_a_broken_manifest_of_a_backup_is_refused_in_words(filled, tmp_path, content, words):
    done = backup(filled.home, tmp_path / "backups")
    (done.path / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=words) as caught:
        restore_backup(tmp_path / "backups", tmp_path / "new")
    assert str(done.path / "manifest.json") in str(caught.value)
    assert not (tmp_path / "new").exists()


KILLED = """\
import os, sys
from pathlib import Path
import registry.maintenance.backup as module
from registry.home import Home
module._referenced_blobs = lambda *arguments: os._exit(9)
module.backup(Home(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def left_by(*folders):
    return sorted(path.name for folder in folders for path in folder.glob(".*") if path.name.endswith(".partial"))


@pytest.mark.parametrize("name", ["backups", "one.tar"])
def test_the_next_backup_removes_what_a_killed_one_left(filled, tmp_path, name):
    target = tmp_path / name
    folders = (tmp_path, target / "snapshots")
    done = subprocess.run([sys.executable, "-c", KILLED, str(filled.home.path), str(target)], check=False)
    assert done.returncode == 9
    assert len(left_by(*folders)) == 1
    backup(filled.home, target)
    assert left_by(*folders) == []
    restore_backup(target, tmp_path / "new")


def test_unfinished_files_of_another_home_stay_for_a_day(filled, tmp_path):
    backup(filled.home, tmp_path / "backups")
    blobs = next((tmp_path / "backups" / "blobs").glob("[0-9a-f]*"))
    snapshot, blob = tmp_path / "backups" / "snapshots" / ".0123456789ab-x.partial", blobs / ".ab.x.partial"
    snapshot.mkdir()
    blob.write_bytes(b"x")
    backup(filled.home, tmp_path / "backups")
    assert snapshot.exists()
    assert blob.exists()
    for path in (snapshot, blob):
        os.utime(path, (time.time() - 90_000,) * 2)
    backup(filled.home, tmp_path / "backups")
    assert not snapshot.exists()
    assert not blob.exists()
