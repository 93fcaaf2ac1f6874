import pytest

from registry.entities import Execution, now
from registry.errors import GoneVersion, PromotionError, Refused
from registry.maintenance.fsck import fsck
from registry.store.artifacts import open_store
from registry.versions.deletion import delete, restore, withdraw
from registry.versions.mlflow_writer import MlflowWriter
from registry.versions.projections import replay
from registry.versions.promotion import history, promote, remove


def state(versions, number, name="zorb"):
    return versions.show(name, number).state


@pytest.mark.parametrize("act", [withdraw, delete])
def test_withdrawal_and_deletion_require_a_reason(versions, register, act):
    register(versions, b"1")
    with pytest.raises(PromotionError, match="without a reason"):
        act(versions, "zorb", 1, reason=" ")
    assert state(versions, 1) == "ACTIVE"


@pytest.mark.parametrize("act", [withdraw, delete])
def test_a_withdrawn_or_deleted_version_cannot_be_read_and_every_error_names_the_event(
    versions, register, act, tmp_path
):
    version = register(versions, b"1")
    register(versions, b"2")
    act(versions, "zorb", 1, reason="a face in it", actor="ada@lab")
    for use in (
        lambda: versions.get("zorb", 1),
        lambda: versions.read_adapter(version),
        lambda: versions.checkout_adapter(version, tmp_path / "out"),
        lambda: promote(versions, "zorb", 1, "production", reason="r"),
        lambda: promote(versions, "zorb", 1, "production", reason="r", override=True),
    ):
        with pytest.raises(GoneVersion, match=r"zorb@1: was (withdrawn|deleted) by ada@lab on .*\(a face in it\)"):
            use()
    assert versions.get("zorb", 2).version == 2
    assert versions.show("zorb", 1).sha256 == version.sha256


def test_a_deleted_version_keeps_its_number_and_leaves_the_list(versions, register):
    for content in (b"1", b"2"):
        register(versions, content)
    delete(versions, "zorb", 2, reason="r")
    assert [version.version for version in versions.list()] == [1]
    assert [version.version for version in versions.list(deleted=True)] == [1, 2]
    assert versions.show("zorb").version == 1
    assert register(versions, b"3").version == 3


def test_registering_a_deleted_version_again_does_not_restore_it(versions, register):
    register(versions, b"1")
    delete(versions, "zorb", 1, reason="r")
    with pytest.raises(GoneVersion, match="loraline restore zorb@1"):
        register(versions, b"1", alias_request="staging")
    restore(versions, "zorb", 1, reason="after all")
    assert register(versions, b"1").version == 1


def test_the_version_in_production_is_kept(versions, register):
    register(versions, b"1")
    promote(versions, "zorb", 1, "production", reason="r")
    for act in (withdraw, delete):
        with pytest.raises(Refused, match="'production' points at it"):
            act(versions, "zorb", 1, reason="r")
    assert state(versions, 1) == "ACTIVE"
    remove(versions, "zorb", "production", reason="r")
    delete(versions, "zorb", 1, reason="r")
    assert state(versions, 1) == "DELETED"


def test_a_staged_version_is_deleted_in_two_steps(versions, register):
    register(versions, b"1", alias_request="staging")
    with pytest.raises(Refused, match="'staging' points at it"):
        delete(versions, "zorb", 1, reason="r")
    event = withdraw(versions, "zorb", 1, reason="first")
    assert event.details["aliases"] == ["staging"]
    assert versions.show("zorb", 1).aliases == ()
    delete(versions, "zorb", 1, reason="then")
    actions = [event.action for event in history(versions, "zorb")]
    assert actions == ["stage", "refuse", "remove", "withdraw", "delete"]
    assert replay(history(versions, "zorb")) == {}


def merge_of(versions, register, *parents, content=b"merged", named=True):
    """Registers a version merged from others: by their names, or only by the artifacts that the step read."""
    run = versions.lineage.start_run("merge", {})
    adapter = versions.store.put_files("adapter", {"adapter.safetensors": content})
    inputs = {f"adapters.{index}": parent.artifact for index, parent in enumerate(parents)}
    merge = Execution(run.id, run.id, "m", "merge", "1", run.id, {}, inputs, adapter, started_at=now())
    versions.lineage.log_execution(merge, contents=versions.store.files(adapter))
    origins = [parent.ref for parent in parents] if named else []
    return versions.register("merged", adapter, parents=[*origins, "base:tiny"], gates=[GATE], passed=True)


GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}


@pytest.mark.parametrize("named", [True, False])
def test_an_ancestor_of_the_version_in_production_is_kept(versions, register, named):
    first = register(versions, b"1", report=None, passed=None, gates=[])
    child = merge_of(versions, register, first, named=named)
    grandchild = merge_of(versions, register, child, content=b"again", named=named)
    assert grandchild.ref == "merged@2"
    promote(versions, "merged", 2, "production", reason="r", override=True)
    for name in ("zorb", "merged"):
        with pytest.raises(Refused, match="merged@2, which has the protected alias 'production', was made from it"):
            delete(versions, name, 1, reason="r")
        withdraw(versions, name, 1, reason="out of use, and still kept")
        with pytest.raises(Refused, match="was made from it"):
            delete(versions, name, 1, reason="r")
    remove(versions, "merged", "production", reason="r")
    delete(versions, "zorb", 1, reason="r")


def test_an_ancestor_of_a_staged_version_is_deleted_in_two_steps(versions, register):
    first = register(versions, b"1")
    merge_of(versions, register, first)
    promote(versions, "merged", 1, "staging", reason="r")
    with pytest.raises(Refused, match="withdraw it first"):
        delete(versions, "zorb", 1, reason="r")
    withdraw(versions, "zorb", 1, reason="r")
    delete(versions, "zorb", 1, reason="r")


def test_the_same_bytes_under_another_name_do_not_block_deletion(versions, register):
    first = register(versions, b"1")
    versions.register("other", first.artifact, parents=["base:tiny"], gates=[GATE], passed=True)
    promote(versions, "other", 1, "production", reason="r")
    delete(versions, "zorb", 1, reason="r")
    assert versions.get("other", "production").sha256 == first.sha256


def test_a_version_is_restored_if_its_bytes_are_intact(versions, register):
    version = register(versions, b"1")
    with pytest.raises(Refused, match="is in use"):
        restore(versions, "zorb", 1, reason="r")
    for act in (withdraw, delete):
        act(versions, "zorb", 1, reason="r")
    restore(versions, "zorb", 1, reason="r")
    assert versions.get("zorb", 1).sha256 == version.sha256
    delete(versions, "zorb", 1, reason="r")
    versions.store.blobs.path(version.sha256).unlink()
    with pytest.raises(Refused, match="are gone"):
        restore(versions, "zorb", 1, reason="r")
    with pytest.raises(GoneVersion):
        delete(versions, "zorb", 1, reason="twice")


def test_mlflow_loses_files_and_aliases_of_a_deleted_version_and_shows_its_state(synced, register):
    for content in (b"1", b"2"):
        register(synced, content)
    promote(synced, "zorb", 1, "canary", reason="r")
    withdraw(synced, "zorb", 1, reason="r")
    client = MlflowWriter(synced.home, open_store(synced.home))._client
    entry = client.get_model_version("zorb", "1")
    assert (entry.tags["loraline.state"], list(entry.aliases)) == ("WITHDRAWN", [])
    copies = list(synced.home.mlflow_artifacts.rglob("adapter.safetensors"))
    assert len(copies) == 2
    delete(synced, "zorb", 1, reason="r")
    assert client.get_model_version("zorb", "1").tags["loraline.state"] == "DELETED"
    (copy,) = synced.home.mlflow_artifacts.rglob("adapter.safetensors")
    assert copy.read_bytes() == b"2"
    assert len(list(synced.home.mlflow_artifacts.rglob("model-card.html"))) == 1, "its documents contain images"
    assert synced.is_synced()
    assert fsck(synced.home, grace=0) == []
    restore(synced, "zorb", 1, reason="r")
    assert client.get_model_version("zorb", "1").tags["loraline.state"] == "ACTIVE"
    assert len(list(synced.home.mlflow_artifacts.rglob("adapter.safetensors"))) == 2
