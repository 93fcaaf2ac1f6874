"""Tests the verbs on rights: revoke, lift, withdraw, delete, restore, unalias, log; and rights in promote and show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.pipeline import run_pipeline
from flows.spec import load_spec
from lora_engine.data.manifest import Manifest
from lora_engine.files import sha256_file
from registry.entities import AdapterVersion, Execution, Subject, now
from registry.errors import Conflict, GoneVersion, Refused
from registry.home import Home
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tests.flows.conftest import PREPARE

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}
IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png", "source": "face.png"}
ONE, TWO = "1" * 64, "2" * 64

Command = Callable[..., Result]


@pytest.fixture
def loraline(home: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Returns a function that runs a verb in this process, without MLflow, and raises unexpected errors."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    monkeypatch.setenv("LORALINE_HOME", str(home))
    monkeypatch.setenv("LORALINE_ACTOR", "ada@lab")
    monkeypatch.setenv("COLUMNS", "300")

    def call(*arguments: object, fails: type[Exception] | None = None) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if fails is None and result.exception is not None:
            raise result.exception
        assert fails is None or isinstance(result.exception, fails), result.exception
        return result

    return call


@pytest.fixture
def register(home: Path, loraline: Command) -> Callable[..., AdapterVersion]:
    def make(
        content: bytes, image: str = ONE, consent: str = "C-1", base: str = "tiny", **rights: str
    ) -> AdapterVersion:
        versions = Versions(Home.open(home))
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run("stars", {})
        entry = IMAGE | {"sha256": image, "consent": consent, "rights": {"license": "cc-by-4.0", **rights}}
        dataset = store.put_files("manifest", {"manifest.json": json.dumps({"pictures": [entry]}).encode()})
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        ingest = Execution(f"{run.id}-i", run.id, "i", "ingest", "1", f"{run.id}-i", output=dataset, started_at=now())
        subjects = [Subject(image, "picture", "p"), Subject(consent, "consent", "c")]
        lineage.log_execution(ingest, contents=store.files(dataset), subjects=subjects)
        settings = {"settings": {"base": base}}
        train = Execution(run.id, run.id, "t", "train", "1", run.id, settings, {"dataset": dataset}, adapter)
        lineage.log_execution(train, contents=store.files(adapter))
        lineage.finish_run(run.id, "COMPLETED")
        version = versions.register(
            "stars", adapter, run_id=run.id, gates=[GATE], passed=True, alias_request="staging", actor="bot"
        )
        versions.close()
        return version

    return make


def adapter_bytes(tmp_path: Path, scale: float) -> bytes:
    import torch
    from safetensors.torch import load_file, save_file

    from lora_engine.adapters import Adapter, LoraDelta
    from lora_engine.formats import write_adapter

    delta = LoraDelta(down=torch.ones(1, 4), up=torch.full((4, 1), 3.0), alpha=1.0)
    path = tmp_path / f"{scale}.safetensors"
    write_adapter(path, Adapter(modules={"unet.layer": delta}))
    # Our own writer refuses NaN.
    save_file(
        {name: tensor * scale if (tensor == 3).all() else tensor for name, tensor in load_file(path).items()}, path
    )
    return path.read_bytes()


def test_a_revocation_from_the_dry_run_to_the_lift(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, 1.0), image=TWO, consent="C-2")
    register(adapter_bytes(tmp_path, 2.0))
    for number in (1, 2):
        loraline("promote", f"stars@{number}", "--to", "production", "--reason", "good")
    dry = json.loads(loraline("revoke", "C-1", "--reason", "asked", "--dry-run", "--json").stdout)
    assert dry["versions"] == ["stars@2"]
    assert dry["event"] is None
    text = loraline("revoke", "C-1", "--reason", "asked").stdout
    assert "stars@production -> version 2: STILL POINTS AT IT" in text
    loraline("promote", "stars@2", "--to", "canary", "--reason", "r", fails=Refused)
    text = loraline("revoke", "C-1", "--reason", "asked", "--policy", "withdraw").stdout
    assert "stars@production -> version 2: rolled back to version 1" in text
    shown = loraline("show", "stars@2").stdout
    assert "WITHDRAWN" in shown
    assert "consent 'C-1'" in shown
    loraline("export", "stars@2", "--to", "kohya", "-o", tmp_path / "x", fails=GoneVersion)
    assert "restored: stars@2" in loraline("lift", "C-1", "--reason", "a mistake").stdout
    events = json.loads(loraline("log", "--json").stdout)
    assert [event["action"] for event in events if event["subject"] == "C-1"][-2:] == ["lift", "restore"]
    assert {event["actor"] for event in events if event["action"] not in {"stage"}} == {"ada@lab"}


def test_a_wrong_policy_is_refused_before_anything_happens(loraline: Command, home: Path) -> None:
    Home.open(home)
    loraline("revoke", "C-1", "--reason", "r", "--policy", "burn", fails=SpecError)
    assert json.loads(loraline("log", "--json").stdout) == []


def test_deleting_and_restoring_from_the_command_line(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, 1.0))
    loraline("delete", "stars@1", "--reason", "bad", fails=Refused)
    loraline("withdraw", "stars@1", "--reason", "bad")
    loraline("delete", "stars@1", "--reason", "bad")
    assert json.loads(loraline("list", "--json").stdout) == []
    (listed,) = json.loads(loraline("list", "--all", "--json").stdout)
    assert (listed["version"], listed["state"]) == (1, "DELETED")
    loraline("promote", "stars@1", "--to", "canary", "--reason", "r", fails=GoneVersion)
    loraline("restore", "stars@1", "--reason", "after all")
    assert [event["action"] for event in json.loads(loraline("log", "stars", "--json").stdout)] == [
        "stage",
        "refuse",
        "remove",
        "withdraw",
        "delete",
        "restore",
    ]


def test_the_log_shows_who_moved_what_when_and_against_which_reasons(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, 1.0), base="gone/base")
    loraline("promote", "stars@1", "--to", "production", "--reason", "r", fails=Refused)
    loraline("promote", "stars@1", "--to", "production", "--reason", "ours by contract", "--override")
    loraline("unalias", "stars@production", "--reason", "off")
    loraline("rollback", "stars", "--reason", "on")
    number = json.loads(loraline("log", "stars", "--alias", "production", "--json").stdout)[1]["seq"]
    loraline("unalias", "stars@production", "--reason", "off")
    loraline("rollback", "stars", "--to-event", number, "--reason", "as it was")
    text = loraline("log", "stars").stdout
    for word in (
        "ada@lab",
        "override",
        "ours by contract (against: no license is known for base 'gone/base'",
        "remove",
    ):
        assert word in text
    actions = [
        event["action"] for event in json.loads(loraline("log", "stars", "--alias", "production", "--json").stdout)
    ]
    assert actions == ["refuse", "override", "remove", "rollback", "remove", "rollback"]


def test_an_invalid_adapter_is_refused_with_its_problem_despite_override(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, float("nan")))
    for options in ((), ("--override",)):
        refused = loraline("promote", "stars@1", "--to", "canary", "--reason", "r", *options, fails=Refused)
        assert "not a valid adapter" in str(refused.exception)
    register(adapter_bytes(tmp_path, 1.0))
    loraline("promote", "stars@2", "--to", "canary", "--reason", "r")


def test_promote_prints_what_it_resolved_and_refuses_another_version_than_the_reviewed_one(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    first = register(adapter_bytes(tmp_path, 1.0))
    promote = ("promote", "stars@staging", "--to", "canary", "--reason", "reviewed", "--expect")
    text = loraline(*promote, first.sha256[:12]).stdout
    assert text.splitlines()[0] == f"stars@staging is stars@1, sha256 {first.sha256[:16]}"
    second = register(adapter_bytes(tmp_path, 2.0))
    for reviewed in (1, first.sha256):
        refused = str(loraline(*promote, reviewed, fails=Conflict).exception)
        assert f"stars@2 (sha256 {second.sha256[:16]}), not stars@1 (sha256 {first.sha256[:16]})" in refused
    moved = json.loads(loraline(*promote, 2, "--json").stdout)
    assert (moved["ref"], moved["resolved"], moved["sha256"]) == ("stars@staging", "stars@2", second.sha256)
    assert (moved["event"]["alias"], moved["event"]["before"], moved["event"]["after"]) == ("canary", 1, 2)
    back = json.loads(loraline("rollback", "stars", "--alias", "canary", "--json").stdout)
    assert (back["action"], back["before"], back["after"]) == ("rollback", 2, 1)


@pytest.mark.parametrize("reference", ["withdraw stars@staging", "unalias stars@staging", "delete stars"])
def test_verbs_that_take_out_of_use_refuse_another_version_than_the_reviewed_one(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path, reference: str
) -> None:
    first, second = (register(adapter_bytes(tmp_path, value)) for value in (1.0, 2.0))
    if reference == "delete stars":
        loraline("unalias", "stars@staging", "--reason", "off")
    before = loraline("log", "stars", "--json").stdout
    verb = (*reference.split(), "--reason", "reviewed", "--expect")
    for reviewed in (1, first.sha256):
        refused = str(loraline(*verb, reviewed, fails=Conflict).exception)
        assert f"stars@2 (sha256 {second.sha256[:16]}), not stars@1 (sha256 {first.sha256[:16]})" in refused
    assert loraline("log", "stars", "--json").stdout == before
    event = json.loads(loraline(*verb, second.sha256[:12], "--json").stdout)
    assert event["name"] == "stars"
    assert (event["before"] if event["action"] == "remove" else event["after"]) == 2


def test_show_prints_rights_and_their_sources(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, 1.0))
    rights = json.loads(loraline("show", "stars@1", "--json").stdout)["rights"]
    assert rights["terms"]["licenses"] == ["Apache-2.0", "CC-BY-4.0"]
    assert {source["what"] for source in rights["sources"]} == {"base tiny", "1 image under cc-by-4.0"}
    assert rights["table"]["note"] == "not legal advice"
    assert rights["pictures"]["signs_of_generation"] == "no evidence"
    text = loraline("show", "stars@1").stdout
    assert "attribution" in text
    assert "1 image under cc-by-4.0" in text


def test_the_same_image_with_an_expired_consent_in_another_dataset_is_refused(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    content = adapter_bytes(tmp_path, 1.0)
    promote = ("promote", "stars@1", "--to", "production", "--reason", "good")
    register(content)
    loraline(*promote)
    loraline("unalias", "stars@production", "--reason", "again")
    # The same images and captions give the same bytes, so this is the same version.
    assert register(content, consent="C-2", expires="2020-01-01").version == 1
    refused = str(loraline(*promote, fails=Refused).exception)
    assert "1 image with consent that expired on 2020-01-01: face.png" in refused
    assert "Not allowed: commercial use" not in loraline("card", "stars@1").stdout
    register(adapter_bytes(tmp_path, 2.0), scope="train")
    assert "- Not allowed: commercial use\n" in loraline("card", "stars@2").stdout


def test_an_export_is_logged_and_listed_by_a_revocation(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(adapter_bytes(tmp_path, 1.0))
    out = tmp_path / "out.safetensors"
    loraline("export", "stars@1", "--to", "loraline", "-o", out)
    impact = json.loads(loraline("revoke", ONE, "--reason", "r", "--json").stdout)
    (entry,) = [export for export in impact["exports"] if "version" in export]
    assert entry["files"] == [{"file": str(out), "sha256": sha256_file(out)}]


@pytest.mark.usefixtures("prefect_server")
def test_the_next_run_of_the_same_pipeline_excludes_a_revoked_image(
    pipeline: Callable[..., Path], home: Path, loraline: Command
) -> None:
    path = pipeline(PREPARE)
    opened = Home.open(home)

    def used() -> tuple[list[str], list[str]]:
        result = run_pipeline(load_spec(path), opened)
        store = Versions(opened).store
        manifest = Manifest.model_validate_json(store.read(result.outcomes["captions"].ref, "manifest.json"))
        return [image.source for image in manifest.pictures], sorted(result.changed)

    everything = [f"{index}.png" for index in range(4)]
    assert used() == (everything, ["captions", "photos", "prepared"])
    loraline("revoke", path.parent / "images" / "2.png", "--reason", "asked")
    planned = {step["name"]: step for step in json.loads(loraline("plan", path, "--json").stdout)}
    assert planned["photos"]["reason"] == "revocations changed"
    assert used() == (["0.png", "1.png", "3.png"], ["captions", "photos", "prepared"])
    assert used() == (["0.png", "1.png", "3.png"], [])
    loraline("lift", path.parent / "images" / "2.png", "--reason", "a mistake")
    assert used() == (everything, [])
