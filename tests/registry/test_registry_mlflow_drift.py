"""Changes that others make in MLflow: readers report them, the next command that writes restores them."""

import hashlib
import socket
from contextlib import closing

import pytest
from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry.maintenance.fsck import fsck
from registry.versions.mlflow_drift import find_drift
from registry.versions.mlflow_tables import read_tables
from registry.versions.promotion import promote
from registry.versions.versions import Versions


def run_of(versions, number=1):
    return versions.show("zorb", number).mlflow_run_id


def rename_and_promote(client, versions):
    client.rename_registered_model("zorb", "mine")
    client.set_registered_model_alias("mine", "production", "2")


def recreate(client, versions):
    client.delete_registered_model("zorb")
    client.create_registered_model("zorb")


def hide(client, versions):
    client.delete_experiment(client.get_experiment_by_name("zorb").experiment_id)


CHANGES = {
    "alias added": (
        lambda c, v: c.set_registered_model_alias("zorb", "champion", "2"),
        "zorb@champion: points at version 2 instead of no version",
    ),
    "alias moved": (
        lambda c, v: c.set_registered_model_alias("zorb", "production", "2"),
        "zorb@production: points at version 2 instead of version 1",
    ),
    "alias removed": (
        lambda c, v: c.delete_registered_model_alias("zorb", "production"),
        "zorb@production: points at no version instead of version 1",
    ),
    "tag edited": (
        lambda c, v: c.set_model_version_tag("zorb", "1", "loraline.passed", "no"),
        "zorb@1: the tag 'loraline.passed' is 'no' instead of 'yes'",
    ),
    "digest edited": (
        lambda c, v: c.set_model_version_tag("zorb", "1", "loraline.sha256", "0"),
        "zorb@1: the tag 'loraline.sha256' is '0' instead of",
    ),
    "tag added": (
        lambda c, v: c.set_model_version_tag("zorb", "1", "loraline.license", "mit"),
        "zorb@1: the tag 'loraline.license' is 'mit' instead of missing",
    ),
    "tag removed": (
        lambda c, v: c.delete_model_version_tag("zorb", "2", "loraline.state"),
        "zorb@2: the tag 'loraline.state' is missing instead of 'ACTIVE'",
    ),
    "tag of a run edited": (
        lambda c, v: c.set_tag(run_of(v), "loraline.sha256", "0"),
        "zorb@1: the tag 'loraline.sha256' of its run is '0' instead of",
    ),
    "tag of a run removed": (
        lambda c, v: c.delete_tag(run_of(v), "loraline.passed"),
        "zorb@1: the tag 'loraline.passed' of its run is missing instead of 'yes'",
    ),
    "stage set": (
        lambda c, v: c.transition_model_version_stage("zorb", "2", "Production"),
        "zorb@2: has the stage 'Production', which the registry does not use",
    ),
    "first version deleted": (
        lambda c, v: c.delete_model_version("zorb", "1"),
        "zorb@1: MLflow does not have this version",
    ),
    "last version deleted": (
        lambda c, v: c.delete_model_version("zorb", "2"),
        "zorb@2: MLflow does not have this version",
    ),
    "registered model deleted": (
        lambda c, v: c.delete_registered_model("zorb"),
        "zorb@2: MLflow does not have this version",
    ),
    "registered model recreated": (recreate, "zorb@1: MLflow does not have this version"),
    "registered model renamed": (
        lambda c, v: c.rename_registered_model("zorb", "mine"),
        "zorb@1: MLflow does not have this version",
    ),
    "registered model renamed, alias moved": (rename_and_promote, "zorb@1: MLflow does not have this version"),
    "run deleted": (lambda c, v: c.delete_run(run_of(v)), "zorb@1: its run is deleted"),
    "experiment deleted": (hide, "zorb@2: its run is deleted"),
}
"""What a user changes with MLflow's client, and how it is reported."""


@pytest.fixture
def client(good):
    return MlflowClient(tracking_uri=good.home.mlflow_url, registry_uri=good.home.mlflow_url)


def served(client, alias="production"):
    """Returns the bytes that `models:/zorb@production` serves."""
    entry = client.get_model_version_by_alias("zorb", alias)
    (file,) = client.list_artifacts(entry.run_id, "adapter")
    return entry.version, entry.source, file.file_size


@pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_mlflow_is_reported_by_readers_and_restored_by_the_next_command_that_writes(
    good, client, change, caplog
):
    alter, difference = CHANGES[change]
    before, production = read_tables(good.home.mlflow_url), served(client)
    assert find_drift(good.home, good.lineage.database) == []
    alter(client, good)
    content = hashlib.sha256(good.home.mlflow_db.read_bytes()).digest()

    caplog.clear()
    with closing(Versions(good.home)) as reader:
        reader.show("zorb", "production")
    assert difference in caplog.text
    assert "the next command that writes restores it" in caplog.text
    problems = [f"{problem.where}: {problem.what}" for problem in fsck(good.home, grace=0)]
    assert any(difference in problem for problem in problems), problems
    assert hashlib.sha256(good.home.mlflow_db.read_bytes()).digest() == content, "a reader wrote to MLflow"

    with closing(Versions(good.home)) as writer:
        promote(writer, "zorb", 1, "production", reason="it is already")
    assert "; restoring it" in caplog.text
    assert read_tables(good.home.mlflow_url) == before
    assert served(client) == production


def test_what_others_write_beside_our_tags_and_models_stays(good, client):
    client.set_model_version_tag("zorb", "1", "reviewed", "yes")
    client.set_tag(run_of(good), "team", "x")
    client.create_registered_model("other")
    client.create_model_version("other", source="file:///x")
    client.set_registered_model_alias("other", "production", "1")
    assert find_drift(good.home, good.lineage.database) == []
    client.set_model_version_tag("zorb", "1", "loraline.passed", "no")
    good.sync()
    assert client.get_model_version("zorb", "1").tags["reviewed"] == "yes"
    assert client.get_run(run_of(good)).data.tags["team"] == "x"
    assert client.get_model_version_by_alias("other", "production").version == 1


def test_an_alias_on_a_version_of_another_program_is_removed_although_its_number_cannot_be_restored(
    good, client, caplog
):
    """Another program deletes the registered model, and creates one of the same name with its own files."""
    recreate(client, good)
    for _ in range(2):
        client.create_model_version("zorb", source="file:///elsewhere")
    client.set_registered_model_alias("zorb", "production", "1")
    with closing(Versions(good.home)) as versions:
        versions.try_sync()
    assert "which another program changed" in caplog.text
    assert read_tables(good.home.mlflow_url).aliases == {}


def test_a_change_by_the_registry_is_never_reported_as_drift(good, register):
    """Another process compares before each commit, to either database, that registration and promotion make."""
    drifts, comparing = [], []

    def compare(_connection):
        if not comparing:
            comparing.append(True)
            drifts.append(find_drift(good.home, good.lineage.database))
            comparing.clear()

    event.listen(Engine, "commit", compare)
    try:
        register(good, b"third weights", alias_request="staging")
        promote(good, "zorb", 3, "production", reason="r")
    finally:
        event.remove(Engine, "commit", compare)
    assert len(drifts) > 5
    assert all(drift == [] for drift in drifts)


def test_a_server_that_never_answers_is_waited_for_for_seconds_and_asked_once(good, monkeypatch, caplog):
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("LORALINE_MLFLOW_URL", f"postgresql+psycopg://ada:hunter2@{address}/x")
        monkeypatch.setenv("LORALINE_MLFLOW_TIMEOUT", "2")
        for _ in range(3):
            good.show("zorb")
            good.list()
        assert caplog.text.count("MLflow's database cannot be used (connection timeout") == 1
        # Another database is a new target, which a command fills.
        Versions(good.home).close()
        assert caplog.text.count("MLflow's database cannot be used (connection timeout") == 2
    assert "hunter2" not in caplog.text
