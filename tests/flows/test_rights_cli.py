"""The verbs on rights: revoke, lift, withdraw, delete, restore, unalias, log, and what promote and show say of them."""

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
from registry.errors import GoneVersion, Refused
from registry.home import Home
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tests.flows.conftest import PREPARE

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}
PICTURE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png", "source": "face.png"}
ONE, TWO = "1" * 64, "2" * 64

Command = Callable[..., Result]


@pytest.fixture
def loraline(home: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls a verb in this process, without MLflow; an error is raised unless it is expected."""
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
    def make(content: bytes, picture: str = ONE, consent: str = "C-1", base: str = "tiny") -> AdapterVersion:
        versions = Versions(Home.open(home))
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run("stars", {})
        entry = PICTURE | {"sha256": picture, "consent": consent, "rights": {"license": "cc-by-4.0"}}
        dataset = store.put_files("manifest", {"manifest.json": json.dumps({"pictures": [entry]}).encode()})
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        taken = Execution(f"{run.id}-i", run.id, "i", "ingest", "1", f"{run.id}-i", output=dataset, started_at=now())
        held = [Subject(picture, "picture", "p"), Subject(consent, "consent", "c")]
        lineage.record(taken, contents=store.files(dataset), subjects=held)
        told = {"settings": {"base": base}}
        made = Execution(run.id, run.id, "t", "train", "1", run.id, told, {"dataset": dataset}, adapter)
        lineage.record(made, contents=store.files(adapter))
        lineage.finish_run(run.id, "COMPLETED")
        version = versions.register(
            "stars", adapter, run_id=run.id, gates=[GATE], passed=True, alias_request="staging", actor="bot"
        )
        versions.close()
        return version

    return make


def sound(tmp_path: Path, scale: float) -> bytes:
    import torch

    from lora_engine.adapters import Adapter, LoraDelta
    from lora_engine.formats import write_adapter

    delta = LoraDelta(down=torch.ones(1, 4), up=torch.full((4, 1), scale), alpha=1.0)
    path = tmp_path / f"{scale}.safetensors"
    write_adapter(path, Adapter(modules={"unet.layer": delta}))
    return path.read_bytes()


def test_a_recall_from_the_command_line_from_the_dry_run_to_the_lift(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(sound(tmp_path, 1.0), picture=TWO, consent="C-2")
    register(sound(tmp_path, 2.0))
    for number in (1, 2):
        loraline("promote", f"stars@{number}", "--to", "production", "--reason", "good")
    dry = json.loads(loraline("revoke", "C-1", "--reason", "asked", "--dry-run", "--json").stdout)
    assert dry["versions"] == ["stars@2"]
    assert dry["event"] is None
    told = loraline("revoke", "C-1", "--reason", "asked").stdout
    assert "stars@production -> version 2: STILL POINTS AT IT" in told
    loraline("promote", "stars@2", "--to", "canary", "--reason", "r", fails=Refused)
    told = loraline("revoke", "C-1", "--reason", "asked", "--policy", "withdraw").stdout
    assert "stars@production -> version 2: taken back to version 1" in told
    shown = loraline("show", "stars@2").stdout
    assert "WITHDRAWN" in shown
    assert "consent 'C-1'" in shown
    loraline("export", "stars@2", "--to", "kohya", "-o", tmp_path / "x", fails=GoneVersion)
    assert "in use again: stars@2" in loraline("lift", "C-1", "--reason", "a mistake").stdout
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
    register(sound(tmp_path, 1.0))
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
        "remove",
        "withdraw",
        "delete",
        "restore",
    ]


def test_the_log_shows_who_moved_what_when_and_against_which_reasons(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(sound(tmp_path, 1.0), base="gone/base")
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
        "ours by contract (against: no licence is known for base 'gone/base'",
        "remove",
    ):
        assert word in text
    actions = [
        event["action"] for event in json.loads(loraline("log", "stars", "--alias", "production", "--json").stdout)
    ]
    assert actions == ["refuse", "override", "remove", "rollback", "remove", "rollback"]


def test_an_adapter_that_is_not_sound_is_refused_with_what_is_wrong_and_no_override_helps(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(sound(tmp_path, float("nan")))
    for more in ((), ("--override",)):
        refused = loraline("promote", "stars@1", "--to", "canary", "--reason", "r", *more, fails=Refused)
        assert "not a sound adapter" in str(refused.exception)
    register(sound(tmp_path, 1.0))
    loraline("promote", "stars@2", "--to", "canary", "--reason", "r")


def test_show_says_what_is_allowed_and_where_that_comes_from(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(sound(tmp_path, 1.0))
    rights = json.loads(loraline("show", "stars@1", "--json").stdout)["rights"]
    assert rights["terms"]["licenses"] == ["Apache-2.0", "CC-BY-4.0"]
    assert {source["what"] for source in rights["sources"]} == {"base tiny", "1 picture under cc-by-4.0"}
    assert rights["table"]["note"] == "not legal advice"
    assert rights["pictures"]["signs_of_generation"] == "no evidence"
    text = loraline("show", "stars@1").stdout
    assert "attribution" in text
    assert "1 picture under cc-by-4.0" in text


def test_an_export_is_logged_and_found_by_a_recall(
    loraline: Command, register: Callable[..., AdapterVersion], tmp_path: Path
) -> None:
    register(sound(tmp_path, 1.0))
    out = tmp_path / "out.safetensors"
    loraline("export", "stars@1", "--to", "loraline", "-o", out)
    reach = json.loads(loraline("revoke", ONE, "--reason", "r", "--json").stdout)
    (entry,) = [each for each in reach["exports"] if "version" in each]
    assert entry["files"] == [{"file": str(out), "sha256": sha256_file(out)}]


@pytest.mark.usefixtures("prefect_server")
def test_the_next_run_of_the_same_pipeline_leaves_a_revoked_picture_out(
    pipeline: Callable[..., Path], home: Path, loraline: Command
) -> None:
    path = pipeline(PREPARE)
    opened = Home.open(home)

    def used() -> tuple[list[str], list[str]]:
        result = run_pipeline(load_spec(path), opened)
        store = Versions(opened).store
        manifest = Manifest.model_validate_json(store.read(result.outcomes["captions"].ref, "manifest.json"))
        return [each.source for each in manifest.pictures], sorted(result.changed)

    everything = [f"{index}.png" for index in range(4)]
    assert used() == (everything, ["captions", "photos", "prepared"])
    loraline("revoke", path.parent / "images" / "2.png", "--reason", "asked")
    planned = {step["name"]: step for step in json.loads(loraline("plan", path, "--json").stdout)}
    assert planned["photos"]["reason"] == "other images or consents are revoked"
    assert used() == (["0.png", "1.png", "3.png"], ["captions", "photos", "prepared"])
    assert used() == (["0.png", "1.png", "3.png"], [])
    loraline("lift", path.parent / "images" / "2.png", "--reason", "a mistake")
    assert used() == (everything, [])
