import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from filelock import Timeout

from registry.entities import to_json
from registry.errors import DamagedBlob, MissingBlob, MlflowError, UnknownName, UnknownVersion, VersionError
from registry.maintenance.fsck import fsck
from registry.store.artifacts import open_store
from registry.versions import mlflow_writer
from registry.versions.mlflow_writer import MlflowWriter
from registry.versions.promotion import history
from registry.versions.versions import Versions


def test_version_is_read_as_it_was_registered(synced, register):
    version = register(synced, b"weights", alias_request="staging")
    assert (version.ref, version.aliases, version.size) == ("zorb@1", ("staging",), 7)
    assert synced.list() == (version,)
    assert synced.get("zorb", 1) == synced.get("zorb", "staging") == synced.get("zorb") == version
    assert synced.read_adapter(version) == b"weights"
    assert version.parents == ("base:tiny",)
    assert version.card == {"title": "Zorb"}
    assert synced.lineage.run(version.run_id).mlflow_run_id == version.mlflow_run_id
    fields = json.loads(json.dumps(to_json(version)))
    assert {"name", "version", "aliases", "sha256", "size", "created_at"} <= set(fields)


def test_same_adapter_with_same_report_keeps_its_number(versions, register):
    first = register(versions, b"weights")
    again = register(versions, b"weights", card={"title": "another"})
    assert again == first
    other = versions.store.put_files("report", {"report.json": b"other"})
    assert [register(versions, b"weights", report=other).version, register(versions, b"new").version] == [2, 3]
    assert register(versions, b"weights", name="star").version == 1


def test_numbers_count_within_each_name(versions, register):
    for content in (b"1", b"2", b"3"):
        register(versions, content)
        register(versions, content, name="star")
    assert [version.ref for version in versions.list("zorb")] == ["zorb@1", "zorb@2", "zorb@3"]
    assert len(versions.list()) == 6
    assert versions.show("star").version == 3


def test_repeated_registration_does_not_move_the_alias_back(versions, register):
    register(versions, b"old", alias_request="staging")
    register(versions, b"new", alias_request="staging")
    assert register(versions, b"old", alias_request="staging").aliases == ()
    assert versions.show("zorb", "staging").version == 2
    assert [event.action for event in history(versions, "zorb")] == ["stage", "stage"]


def test_alias_requested_later_is_given(versions, register):
    register(versions, b"weights")
    assert register(versions, b"weights", alias_request="staging").aliases == ("staging",)


def test_version_that_failed_its_gates_is_registered_but_not_staged(versions, register, caplog):
    good = register(versions, b"good", alias_request="staging")
    bad = register(versions, b"bad", passed=False, alias_request="staging")
    assert versions.show("zorb", "staging").version == good.version
    assert bad.aliases == ()
    refused = history(versions, "zorb")[-1]
    assert (refused.action, refused.before, refused.after) == ("refuse", 1, 2)
    assert "did not pass" in caplog.text


def test_version_of_known_parents_is_walked_to_them(versions, register):
    register(versions, b"a", name="a")
    register(versions, b"b", name="b")
    register(versions, b"ab", name="ab", parents=["a@1", "b@1", "base:tiny", "c@9"])
    walk = versions.lineage.walk("ab@1")
    assert {node.id for node in walk.nodes if node.kind == "version"} == {"ab@1", "a@1", "b@1"}
    assert {node.id for node in walk.nodes if node.kind == "origin"} == {"base:tiny", "c@9"}
    down = versions.lineage.walk("5" * 64, "down")
    assert {node.id for node in down.nodes if node.kind == "version"} == {"a@1", "b@1", "ab@1"}
    assert {node.id for node in versions.lineage.walk("a@1", "down").nodes if node.kind == "version"} == {"a@1", "ab@1"}


def test_adapter_file_of_a_version_is_a_start(versions, register):
    version = register(versions, b"weights", alias_request="staging")
    nodes = versions.lineage.walk(version.sha256, "down").nodes
    assert [(node.id, node.label) for node in nodes if node.kind == "version"] == [("zorb@1", "staging")]
    up = versions.lineage.walk("zorb@staging", subjects=True)
    assert versions.lineage.walk("zorb@latest", subjects=True) == up
    assert "5" * 64 in {node.id for node in up.nodes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"clip_t": float("nan")}}, "clip_t = nan"),
        ({"metrics": {"deep": {"list": [1.0, float("inf")]}}}, "deep.list.1 = inf"),
        ({"curves": {"loss": [(0, float("nan"))]}}, "numbers are not finite"),
        ({"params": {"rate": float("nan")}}, "JSON cannot hold"),
        ({"card": {"set": {1}}}, "JSON cannot hold"),
        ({"name": "../evil"}, "invalid adapter name"),
        ({"name": "Zorb"}, "invalid adapter name"),
        ({"name": "-rf"}, "invalid adapter name"),
        ({"name": "x" * 64}, "invalid adapter name"),
        ({"alias_request": "latest"}, "invalid alias"),
        ({"alias_request": "v3"}, "invalid alias"),
        ({"alias_request": "3"}, "invalid alias"),
        ({"alias_request": "a.b"}, "invalid alias"),
    ],
)
def test_refused_registration_leaves_nothing(versions, register, changes, message):
    with pytest.raises(VersionError, match=message):
        register(versions, b"weights", **changes)
    assert versions.list() == ()


def test_file_that_the_artifact_lacks_is_refused(versions):
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"x"})
    with pytest.raises(VersionError, match=r"other\.safetensors"):
        versions.register("zorb", artifact, "other.safetensors")


def test_damaged_artifact_is_not_registered(versions):
    artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"x", "training.json": b"{}"})
    blob = versions.store.blobs.path(versions.store.files(artifact)["training.json"].sha256)
    blob.write_bytes(b"[]")
    with pytest.raises(DamagedBlob):
        versions.register("zorb", artifact)
    assert versions.list() == ()


def test_version_is_never_served_with_other_bytes(versions, register, tmp_path):
    version = register(versions, b"weights")
    blob = versions.store.blobs.path(version.sha256)
    blob.write_bytes(b"weightz")
    for read in (lambda: versions.get("zorb"), lambda: versions.checkout_adapter(version, tmp_path / "out")):
        with pytest.raises(DamagedBlob, match=version.sha256):
            read()
    blob.unlink()
    with pytest.raises(MissingBlob):
        versions.get("zorb")
    assert versions.show("zorb") == version
    assert not (tmp_path / "out").exists()


def test_version_whose_row_names_other_bytes_is_not_served(versions, register):
    version = register(versions, b"weights")
    with pytest.raises(DamagedBlob, match="zorb@1"):
        versions.read_adapter(dataclasses.replace(version, sha256="0" * 64))


def test_unknown_names_and_versions_are_refused_with_the_nearest(versions, register):
    register(versions, b"weights", alias_request="staging")
    with pytest.raises(UnknownName, match="did you mean 'zorb'"):
        versions.show("zorp")
    with pytest.raises(UnknownVersion, match="staging"):
        versions.show("zorb", "production")
    with pytest.raises(UnknownVersion, match="1 to 1"):
        versions.show("zorb", 2)


def test_mlflow_shows_what_was_registered(synced, register):
    from mlflow import MlflowClient

    version = register(synced, b"weights", alias_request="staging", params={"rank": 8, "long": "x" * 9000, "of": [1]})
    client = MlflowClient(synced.home.mlflow_url, synced.home.mlflow_url)
    entry = client.get_model_version_by_alias("zorb", "staging")
    assert (int(entry.version), entry.tags["loraline.sha256"]) == (1, version.sha256)
    run = client.get_run(version.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["clip_t.difference"] == 0.01
    assert run.data.params["rank"] == "8"
    assert run.data.params["of"] == "[1]"
    assert len(run.data.params["long"]) == 6000
    assert len(run.data.tags["loraline.param.long"]) == 8000
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")] == [
        (0, 1),
        (1, 0.5),
    ]
    listed = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert listed == {"adapter", "documents", "pictures", "record.json"}


def test_patterns_in_a_recipe_are_shown_under_names_that_mlflow_accepts(synced, register):
    from mlflow import MlflowClient

    patterns = {"overrides.unet.*.to_q.rank": 4, "overrides.unet.?.to_q.rank": 8, r"layers.re:(a|b)\.c": 1e-4}
    version = register(synced, b"weights", params={"rank": 8, **patterns})
    run = MlflowClient(synced.home.mlflow_url, synced.home.mlflow_url).get_run(version.mlflow_run_id)
    assert run.data.params["rank"] == "8"
    shown = {key: value for key, value in run.data.params.items() if key.startswith(("overrides.", "layers."))}
    assert sorted(shown.values()) == ["0.0001", "4", "8"]
    assert all(key.startswith(("overrides.unet._.to_q.rank-", "layers.re:_a_b__.c-")) for key in shown)


def test_mlflow_downloads_production_by_name(good, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        mlflow.set_tracking_uri(good.home.mlflow_url)
        mlflow.set_registry_uri(good.home.mlflow_url)
        folder = mlflow.artifacts.download_artifacts("models:/zorb@production", dst_path=str(tmp_path / "out"))
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    listed = [path.name for path in Path(folder).iterdir()]
    assert {name: (tmp_path / "out" / name).read_bytes() for name in listed} == {
        "adapter.safetensors": b"first weights"
    }
    assert not (tmp_path / "mlruns").exists()


class Faulty:
    """An MLflow client whose n-th call fails, before or after its work; it records the names of its calls."""

    def __init__(self, client, fault, after):
        self.client, self.fault, self.after, self.calls = client, fault, after, []

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def call(*arguments, **settings):
            self.calls.append(name)
            is_fault = len(self.calls) == self.fault
            try:
                return method(*arguments, **settings) if self.after or not is_fault else None
            finally:
                if is_fault:  # also if the call itself fails: MLflow has no such model yet
                    raise OSError(f"interrupted in {name}")

        return call


@pytest.fixture(scope="module")
def unsynced(place_home, fresh_template, register, tmp_path_factory):
    """Returns a copy of a home with a version in staging that MLflow does not have yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
        versions = Versions(place_home(fresh_template))
        register(versions, b"weights", alias_request="staging")
        versions.close()
    return shutil.copytree(versions.home.path, tmp_path_factory.mktemp("unsynced") / "home")


@pytest.fixture
def sync_with_fault(place_home, unsynced, caplog):
    """Returns a function that opens a copy of `unsynced` with a failing MLflow client; it returns home and calls."""
    open_client = mlflow_writer.open_client

    def run(fault=0, after=False):
        home, clients = place_home(unsynced), []

        def faulty(client_home):
            clients.append(Faulty(open_client(client_home), fault, after))
            return clients[-1]

        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlflow_writer, "open_client", faulty)
            versions = Versions(home)
            assert versions.is_synced() == (fault == 0)
            assert ("interrupted in" in caplog.text) == (fault > 0)
            assert versions.show("zorb", "staging").version == 1
            versions.close()
        return home, clients[0].calls

    return run


def assert_next_command_syncs(home):
    versions = Versions(home)
    assert versions.is_synced()
    versions.close()
    assert fsck(home, grace=0) == []


def test_sync_interrupted_after_any_write_is_completed(sync_with_fault):
    """Interrupts after writes only: a call that reads leaves the state of the write before it."""
    _, calls = sync_with_fault()
    writes = [number for number, name in enumerate(calls, 1) if not name.startswith(("get_", "search_"))]
    assert len(writes) > 8
    for fault in writes:
        home, completed = sync_with_fault(fault, after=True)
        assert completed == calls[:fault]
        assert_next_command_syncs(home)


@pytest.mark.nightly
@pytest.mark.parametrize("after", [False, True])
def test_sync_interrupted_at_any_call_is_completed(sync_with_fault, after):
    _, calls = sync_with_fault()
    for fault in range(1, len(calls) + 1):
        home, _ = sync_with_fault(fault, after)
        assert_next_command_syncs(home)


def test_full_sync_repairs_a_changed_mlflow(good):
    client = MlflowWriter(good.home, good.store)
    client.set_alias("zorb", "staging", 1)
    run = good.show("zorb", 2).mlflow_run_id
    copy = next(good.home.mlflow_artifacts.rglob(f"{run}/artifacts/adapter/adapter.safetensors"))
    copy.write_bytes(b"evil")
    assert len(fsck(good.home)) == 2
    good.sync(full=True)
    assert fsck(good.home, grace=0) == []


def test_foreign_version_in_mlflow_is_an_error_and_nothing_is_lost(good, register):
    client = MlflowWriter(good.home, good.store)._client
    client.create_model_version("zorb", source="file:///elsewhere")
    with pytest.raises(MlflowError, match="which another program changed"):
        register(good, b"new")
    assert [version.version for version in good.list()] == [1, 2, 3]
    good.home.mlflow_db.unlink()
    good.sync()
    assert fsck(good.home, grace=0) == []


def test_running_sync_does_not_block_readers(versions, register, monkeypatch):
    register(versions, b"weights")
    monkeypatch.undo()
    with versions.home.lock("mlflow"):
        reader = Versions(versions.home)
        assert [version.ref for version in reader.list()] == ["zorb@1"]
        assert not reader.is_synced()
        with pytest.raises(Timeout):
            reader.sync(timeout=0)
        reader.close()


AT_ONCE = """
import os, sys, traceback
import mlflow.store.model_registry.sqlalchemy_store, mlflow.store.tracking.sqlalchemy_store
from mlflow import MlflowClient
from registry.home import Home
from registry.versions.versions import Versions
wait, go = os.pipe()
children = []
for number in range(3):
    if child := os.fork():
        children.append(child)
        continue
    status = 1
    try:
        os.close(go)
        os.read(wait, 1)
        versions = Versions(Home.open(sys.argv[1]))
        artifact = versions.store.put_files("adapter", {"adapter.safetensors": b"%d" % number})
        print(versions.register("zorb", artifact, passed=True, alias_request="staging").version, flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)
os.close(go)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) > 0)
"""


def test_processes_registering_at_once_on_a_fresh_home_lose_nothing(empty_home, spawn):
    """One process imports MLflow and forks the others, which start at the same time."""
    child = spawn(AT_ONCE, empty_home.path)
    out, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors
    assert sorted(map(int, out.split())) == [1, 2, 3]
    versions = Versions(empty_home)
    contents = {versions.read_adapter(version).decode() for version in versions.list()}
    versions.close()
    assert contents == {"0", "1", "2"}
    assert fsck(empty_home, grace=0) == []


def test_mlflow_database_is_created_atomically(empty_home, monkeypatch):
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def die(_self, url, _artifacts):
        Path(url.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise OSError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "__init__", die)
        with pytest.raises(MlflowError):
            MlflowWriter(empty_home, open_store(empty_home))
    assert not empty_home.mlflow_db.exists()
    assert list(empty_home.path.glob(".*")) == []
