"""Tests deliveries to folders: promotion, rollback, withdrawal, revocation, layouts and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_engine.files import sha256_file
from lora_engine.formats import read_bundle, read_embeddings, write_adapter
from lora_engine.formats.embeddings import FIRST, Embedding
from registry.home import Home
from registry.versions.promotion import read_log
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, copy_trained


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


@pytest.fixture
def target(trained: Trained, tmp_path: Path) -> Path:
    """Returns the folder of a target for `small@production`, which points at `small@1`."""
    folder = tmp_path / "loras"
    folder.mkdir()
    write_targets(trained.home, {"name": "web-ui", "to": str(folder), "layout": "comfyui"})
    promote(trained, 1)
    return folder


def write_targets(home: Home, *targets: dict[str, Any], **settings: Any) -> None:
    (home.path / "delivery.yaml").write_text(yaml.safe_dump({"targets": list(targets), **settings}))


def promote(trained: Trained, number: int, alias: str = "production") -> None:
    say("promote", f"small@{number}", "--to", alias, "--reason", "test", home=trained.home.path)


def add_version(trained: Trained, **stated: object) -> int:
    """Registers the adapter of `small@1` with other bytes, and statements in its card, as the next version."""
    versions = Versions(trained.home)
    first = versions.show("small", 1)
    files = {name: versions.store.read(first.artifact, name) for name in versions.store.files(first.artifact)}
    number = len(versions.list("small")) + 1
    artifact = versions.store.put_files("adapter", {**files, "more.json": str(number).encode()})
    gates = {"gates": first.gates, "passed": True, "metrics": first.metrics, "report": first.report}
    version = versions.register("small", artifact, first.adapter_path, card={**first.card, **stated}, **gates)
    versions.close()
    return version.version


def deliver(trained: Trained, *options: str, code: int = 0) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = json.loads(say("deliver", *options, "--json", home=trained.home.path, code=code))
    return reports


def actions(reports: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(change["action"], change["version"]) for report in reports for change in report["changes"]]


def manifest_of(folder: Path, name: str = "small.loraline.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_bytes())
    return content


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in names(folder)}


def test_a_promoted_version_is_delivered_once(trained: Trained, target: Path) -> None:
    assert actions(deliver(trained, "--dry-run")) == [("deliver", 1)]
    assert names(target) == set()
    assert actions(deliver(trained)) == [("deliver", 1)]
    assert names(target) == {"small.safetensors", "small.png", "small.loraline.json"}
    manifest = manifest_of(target)
    log = read_log(Versions(trained.home))
    (move,) = (event for event in log if event.alias == "production")
    assert (manifest["state"], manifest["name"], manifest["version"]) == ("delivered", "small", 1)
    assert (manifest["sha256"], manifest["event"]) == (trained.version().sha256, move.seq)
    assert manifest["files"]["small.safetensors"]["sha256"] == sha256_file(target / "small.safetensors")
    (export,) = (event.details for event in log if event.action == "export")
    assert export["delivery"] == {"target": "web-ui", "to": str(target), "event": move.seq}
    before = state_of(target)
    assert actions(deliver(trained)) == []
    assert state_of(target) == before
    assert len(read_log(Versions(trained.home))) == len(log)


def test_a_file_that_was_removed_by_hand_is_delivered_again(trained: Trained, target: Path) -> None:
    deliver(trained)
    (target / "small.safetensors").unlink()
    assert actions(deliver(trained)) == [("deliver", 1)]
    assert (target / "small.safetensors").is_file()


def test_promotion_and_rollback_replace_the_file(trained: Trained, target: Path) -> None:
    deliver(trained)
    add_version(trained)
    promote(trained, 2)
    assert actions(deliver(trained)) == [("deliver", 2)]
    assert manifest_of(target)["version"] == 2
    say("rollback", "small", home=trained.home.path)
    assert actions(deliver(trained)) == [("deliver", 1)]
    assert manifest_of(target)["version"] == 1
    promote(trained, 2)
    say("rollback", "small", home=trained.home.path)
    assert actions(deliver(trained)) == [("confirm", 1)], "the same version needs the number of the newer event only"


def test_a_removed_alias_and_a_withdrawn_version_are_recalled(trained: Trained, target: Path) -> None:
    deliver(trained)
    say("unalias", "small@production", "--reason", "test", home=trained.home.path)
    say("withdraw", "small@1", "--reason", "test", home=trained.home.path)
    assert actions(deliver(trained)) == [("recall", 1)]
    assert names(target) == {"small.loraline.json"}
    manifest = manifest_of(target)
    assert (manifest["state"], manifest["reason"]) == ("withdrawn", "small@1 was withdrawn")
    assert read_log(Versions(trained.home))[-1].action == "recall"
    assert actions(deliver(trained)) == []
    say("restore", "small@1", "--reason", "test", home=trained.home.path)
    promote(trained, 1)
    assert actions(deliver(trained)) == [("deliver", 1)]
    assert "small.safetensors" in names(target)


@pytest.mark.parametrize("policy", ["flag", "withdraw"])
def test_a_revocation_recalls_the_version_and_delivers_the_one_before(
    trained: Trained, target: Path, policy: str
) -> None:
    deliver(trained)
    add_version(trained)
    promote(trained, 2)
    deliver(trained)
    say("revoke", "small@2", "--reason", "test", "--policy", policy, home=trained.home.path)
    done = deliver(trained)
    if policy == "flag":
        assert actions(done) == [("recall", 2), ("refuse", 2)]
        assert names(target) == {"small.loraline.json"}
        say("lift", "small@2", "--reason", "test", home=trained.home.path)
        assert actions(deliver(trained)) == [("deliver", 2)]
    else:
        assert actions(done) == [("recall", 2), ("deliver", 1)]
        assert manifest_of(target)["version"] == 1


def test_an_older_event_does_not_replace_a_newer_delivery(trained: Trained, target: Path, tmp_path: Path) -> None:
    old = copy_trained(trained.home.path.parent, tmp_path / "old")
    add_version(trained)
    promote(trained, 2)
    deliver(trained)
    (report,) = deliver(old, code=1)
    (change,) = report["changes"]
    assert "restore the newest backup" in change["error"]
    assert manifest_of(target)["version"] == 2


def test_a_version_that_moved_while_it_was_built_is_not_delivered(
    trained: Trained, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.operations.deliver as module

    deliver(trained)
    add_version(trained)
    promote(trained, 2)
    build = module.build_layout

    def build_slowly(*arguments: Any) -> list[str]:
        say("rollback", "small", home=trained.home.path)
        return build(*arguments)

    monkeypatch.setattr(module, "build_layout", build_slowly)
    (report,) = deliver(trained, code=1)
    assert "moved meanwhile" in report["changes"][0]["error"]
    assert manifest_of(target)["version"] == 1


def test_a1111_gets_a_preview_and_the_metadata_of_its_card(trained: Trained, target: Path) -> None:
    write_targets(trained.home, {"name": "a1111", "to": str(target), "layout": "a1111"})
    deliver(trained)
    assert names(target) == {"small.safetensors", "small.preview.png", "small.json", "small.loraline.json"}
    metadata = json.loads((target / "small.json").read_bytes())
    assert (metadata["activation text"], metadata["preferred weight"]) == ("zorb", 1.0)
    assert "sd version" not in metadata, "the base is neither SD 1 nor SDXL"
    assert (target / "small.preview.png").read_bytes().startswith(b"\x89PNG")
    promote(trained, add_version(trained, recommended="0.2@0,0.7@1:curve=cosine"))
    deliver(trained)
    metadata = json.loads((target / "small.json").read_bytes())
    assert metadata["preferred weight"] == 0.7, "the largest of a schedule, which A1111 cannot hold"


def test_the_hub_layout_is_a_repository_that_diffusers_loads(trained: Trained, target: Path) -> None:
    write_targets(trained.home, {"name": "hub", "to": str(target), "layout": "huggingface"})
    deliver(trained)
    folder = target / "small"
    card = (folder / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["base_model"], matter["instance_prompt"]) == ("tiny", "zorb ring")
    assert {"text-to-image", "diffusers"} <= set(matter["tags"])
    for entry in matter["widget"]:
        assert (folder / entry["output"]["url"]).read_bytes().startswith(b"\x89PNG")
    assert matter["widget"]
    from diffusers import StableDiffusionPipeline

    state, _ = StableDiffusionPipeline.lora_state_dict(folder)
    assert any(key.startswith("unet.") for key in state)
    assert manifest_of(folder, "loraline.json")["files"].keys() >= {"small/README.md"}


def test_earlier_versions_are_kept_as_declared(trained: Trained, target: Path) -> None:
    entry = {"name": "many", "to": str(target), "layout": "comfyui", "file": "{name}/v{version}.safetensors"}
    write_targets(trained.home, entry | {"keep": 2})
    for number in (1, 2, 3):
        if number > 1:
            add_version(trained)
            promote(trained, number)
        deliver(trained)
    assert {name for name in names(target) if name.endswith("tensors")} == {
        "small/v2.safetensors",
        "small/v3.safetensors",
    }
    assert actions(deliver(trained)) == []


def test_an_alias_whose_version_misses_its_policy_is_not_delivered(trained: Trained, target: Path) -> None:
    policy = trained.home.path / "policy.yaml"
    policy.write_text("aliases: {production: {needs_signature: true}}\n")
    error = deliver(trained, code=1)[0]["changes"][0]["error"]
    assert "small@1 may not be used: it is not signed" in error
    assert list(target.iterdir()) == []
    policy.unlink()
    assert actions(deliver(trained)) == [("deliver", 1)]


def test_files_of_others_are_not_replaced_and_links_are_not_followed(
    trained: Trained, target: Path, tmp_path: Path
) -> None:
    (target / "small.safetensors").write_bytes(b"mine")
    assert "Loraline did not deliver it" in deliver(trained, code=1)[0]["changes"][0]["error"]
    assert (target / "small.safetensors").read_bytes() == b"mine"
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "sub").symlink_to(outside)
    entry = {"name": "web-ui", "to": str(target), "layout": "comfyui", "file": "sub/{name}.safetensors"}
    write_targets(trained.home, entry)
    assert "outside of the output" in deliver(trained, code=1)[0]["problems"][0]
    assert names(outside) == set()
    (target / "sub").unlink()
    assert actions(deliver(trained)) == [("deliver", 1)]


def add_token_version(trained: Trained) -> None:
    """Registers the adapter of `small@1` with a learned token as the next version."""
    versions = Versions(trained.home)
    first = versions.show("small", 1)
    files = {name: versions.store.read(first.artifact, name) for name in versions.store.files(first.artifact)}
    with versions.home.temporary_folder(first.size) as folder:
        adapter = folder / first.adapter_path
        versions.checkout_adapter(first, adapter)
        bundle = read_bundle(adapter)
        token = Embedding("mark", {FIRST: torch.full((1, 4), float(len(versions.list("small"))))})
        write_adapter(adapter, bundle.adapter, card=bundle.card, embeddings=[token])
        artifact = versions.store.put_files("adapter", {**files, first.adapter_path: adapter.read_bytes()})
    gates = {"gates": first.gates, "passed": True, "metrics": first.metrics, "report": first.report}
    versions.register("small", artifact, first.adapter_path, card=first.card, **gates)
    versions.close()


def test_the_file_of_a_token_replaces_nothing_of_others_and_stays_while_a_version_has_it(
    trained: Trained, target: Path
) -> None:
    settings = {"name": "web-ui", "to": str(target), "layout": "a1111", "file": "{name}-v{version}.safetensors"}
    write_targets(trained.home, {**settings, "keep": 1})
    add_token_version(trained)
    add_token_version(trained)
    promote(trained, 2)
    (target / "mark.safetensors").write_bytes(b"of someone else")
    (report,) = deliver(trained, code=1)
    (change,) = report["changes"]
    assert "mark.safetensors exists, and no delivery of small brought it" in change["error"]
    assert names(target) == {"mark.safetensors"}
    assert (target / "mark.safetensors").read_bytes() == b"of someone else"
    (target / "mark.safetensors").unlink()
    deliver(trained)
    promote(trained, 3)
    assert set(actions(deliver(trained))) == {("deliver", 3), ("remove", 2)}
    assert {"small-v3.safetensors", "mark.safetensors"} <= names(target)
    assert "small-v2.safetensors" not in names(target)
    (token,) = read_embeddings(target / "mark.safetensors")
    assert torch.equal(token.vectors[FIRST], torch.full((1, 4), 2.0))


def test_a_manifest_cannot_make_a_recall_delete_other_files(trained: Trained, target: Path, tmp_path: Path) -> None:
    deliver(trained)
    victim = tmp_path / "victim"
    victim.write_bytes(b"alive")
    manifest = manifest_of(target)
    manifest["files"]["../victim"] = {"sha256": "0" * 64, "size": 5}
    (target / "small.loraline.json").write_text(json.dumps(manifest))
    say("unalias", "small@production", "--reason", "test", home=trained.home.path)
    assert "manifest is damaged" in deliver(trained, code=1)[0]["error"]
    assert victim.exists()


def test_a_target_that_vanished_fails_and_the_others_are_delivered(trained: Trained, target: Path) -> None:
    gone = {"name": "gone", "to": str(target / "missing"), "layout": "comfyui"}
    write_targets(trained.home, gone, {"name": "web-ui", "to": str(target), "layout": "comfyui"})
    first, second = deliver(trained, code=1)
    assert "does not exist" in first["error"]
    assert not (target / "missing").exists(), "it may be a disk that is not mounted"
    assert not second["problems"]
    (target / "missing").mkdir()
    assert actions(deliver(trained, "--target", "gone")) == [("deliver", 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../{name}.safetensors"}, "no relative path"),
        ({"file": "/{name}.safetensors"}, "no relative path"),
        ({"file": "a.safetensors"}, "has no {name}"),
        ({"file": "{name.__class__}.safetensors"}, "may have {name} and {version} only"),
        ({"file": "{name"}, "is no template"),
        ({"file": "{name}.pt"}, "does not end in .safetensors"),
        ({"keep": 2}, "needs {version}"),
        ({"keep": 10**30}, "keep"),
        ({"layout": "invoke"}, "layout"),
        ({"alias": "v1"}, "invalid alias"),
        ({"mode": 1}, "mode"),
    ],
)
def test_a_wrong_target_is_refused_with_its_line(
    trained: Trained, target: Path, change: dict[str, Any], message: str
) -> None:
    write_targets(trained.home, {"name": "web-ui", "to": str(target), "layout": "comfyui"} | change)
    done = loraline_here("deliver", home=trained.home.path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "delivery.yaml:" in done.stderr
    assert names(target) == set()


def test_an_unknown_target_is_named_with_the_nearest(trained: Trained, target: Path) -> None:
    done = loraline_here("deliver", "--target", "web-iu", home=trained.home.path)
    assert (done.returncode, "web-ui" in done.stderr) == (2, True)
