"""MLflow works after a home was moved or copied."""

import shutil
from pathlib import Path

from registry.home import Home
from registry.maintenance.fsck import fsck
from registry.versions.rewrite_uris import rewrite_artifact_uris
from registry.versions.versions import Versions


def download(home, folder):
    """Downloads production with MLflow's own client."""
    import mlflow

    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        mlflow.set_tracking_uri(home.mlflow_url)
        mlflow.set_registry_uri(home.mlflow_url)
        path = mlflow.artifacts.download_artifacts("models:/zorb@production", dst_path=str(folder))
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    return (Path(path) / "adapter.safetensors").read_bytes()


def test_moved_home_serves_production_by_name(filled_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "another folder" / "home"
    moved.parent.mkdir()
    filled_home.path.rename(moved)
    home = Home.open(moved)
    assert fsck(home, grace=0) != []  # MLflow still has the old paths
    versions = Versions(home)
    assert versions.is_synced()
    versions.close()
    assert fsck(home, grace=0) == []
    assert not filled_home.path.exists()
    assert download(home, tmp_path / "out") == b"first weights"


def test_pages_of_a_moved_home_show_its_files(filled_home, tmp_path):
    from mlflow import MlflowClient

    before = Versions(filled_home).show("zorb", "production")
    filled_home.path.rename(tmp_path / "moved")
    home = Home.open(tmp_path / "moved")
    Versions(home).close()
    client = MlflowClient(home.mlflow_url, home.mlflow_url)
    listed = {entry.path for entry in client.list_artifacts(before.mlflow_run_id)}
    assert {"adapter", "pictures"} <= listed
    run = client.get_run(before.mlflow_run_id)
    assert run.info.artifact_uri.startswith(home.mlflow_artifacts.as_uri())
    # A manually created run is stored in the home, too.
    manual = client.create_run(run.info.experiment_id)
    assert manual.info.artifact_uri.startswith(home.mlflow_artifacts.as_uri())


def test_copy_of_a_home_is_independent_of_the_original(filled_home, tmp_path, register):
    shutil.copytree(filled_home.path, tmp_path / "copy")
    copy = Home.open(tmp_path / "copy")
    versions = Versions(copy)
    register(versions, b"only in the copy", alias_request="staging")
    versions.close()
    assert fsck(copy, grace=0) == []
    assert fsck(filled_home, grace=0) == []
    shutil.rmtree(filled_home.path)
    assert fsck(copy, grace=0) == []
    assert download(copy, tmp_path / "out") == b"first weights"


def test_only_our_own_uris_are_rewritten(filled_home):
    from mlflow import MlflowClient

    client = MlflowClient(filled_home.mlflow_url, filled_home.mlflow_url)
    external = client.create_experiment("elsewhere", artifact_location="file:///elsewhere/zorb")
    similar = client.create_experiment("alike", artifact_location=f"{filled_home.mlflow_artifacts.as_uri()}-too/alike")
    moved = rewrite_artifact_uris(filled_home.mlflow_url, ["zorb"], "file:///new")
    assert moved["model_versions.source"] == 2
    assert client.get_experiment(external).artifact_location == "file:///elsewhere/zorb"
    assert client.get_experiment(similar).artifact_location.endswith("-too/alike")
    assert rewrite_artifact_uris(filled_home.mlflow_url, ["zorb"], "file:///new") == {}
    rewrite_artifact_uris(filled_home.mlflow_url, ["zorb"], filled_home.mlflow_artifacts.as_uri())
    assert fsck(filled_home, grace=0) == []


def test_home_that_was_not_moved_rewrites_nothing(good, register, monkeypatch):
    def fail(*_arguments):
        raise AssertionError("nothing moved")

    monkeypatch.setattr("registry.versions.mlflow_writer.rewrite_artifact_uris", fail)
    register(good, b"more")
    assert good.is_synced()
