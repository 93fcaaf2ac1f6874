"""Tests that what leaves by our verbs and comes back keeps its parents, its terms and its revocations."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine.files import sha256_file
from lora_engine.formats import Card, read_bundle, write_adapter
from lora_engine.formats.safetensors_io import read_header
from registry.errors import PromotionError, RightsError
from registry.home import Home
from registry.versions.promotion import read_log
from registry.versions.revocation import revoke
from registry.versions.versions import Versions
from tasks.operations import import_adapter as importing
from tasks.operations.import_adapter import import_adapter
from tasks.operations.import_request import ImportRequest
from tests.flows.commands import loraline_here, say
from tests.flows.made import bring_in, random_adapter, write_random


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


@pytest.fixture
def opened(home: Path, tmp_path: Path) -> Home:
    """Returns a home with `nc@1`, which forbids commercial use, and `free@1`."""
    opened = Home.open(home)
    bring_in(opened, write_random(tmp_path / "nc.safetensors", 0), "nc", license_id="CC-BY-NC-4.0")
    bring_in(opened, write_random(tmp_path / "free.safetensors", 1), "free")
    return opened


def imported(home: Home, path: Path, *more: object, license_id: str = "MIT") -> CompletedProcess[str]:
    options = ["--name", "back", "--base", "tiny", "--license", license_id, *more]
    return loraline_here("import", path, *options, home=home.path)


def facts_of(home: Home, ref: str) -> dict[str, Any]:
    return dict(json.loads(say("show", ref, "--json", home=home.path)))


def without_header(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    tensors = load_file(source)
    save_file({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, target, {"format": "pt"})
    return target


def test_the_original_file_and_every_export_of_it_keep_their_terms(opened: Home, tmp_path: Path) -> None:
    paths = [tmp_path / "nc.safetensors"]
    for form in ("kohya", "diffusers", "peft"):
        paths.append(tmp_path / (form if form == "peft" else f"{form}.safetensors"))
        say("export", "nc@1", "--to", form, "-o", paths[-1], home=opened.path)
    paths.append(without_header(tmp_path / "kohya.safetensors", tmp_path / "bare.safetensors"))
    for path in paths:
        refused = imported(opened, path)
        assert refused.returncode == 1, path
        assert "does not allow commercial use" in refused.stderr, path
    assert [version.ref for version in Versions(opened).list()] == ["free@1", "nc@1"]
    accepted = imported(opened, paths[-1], license_id="CC-BY-NC-4.0")
    assert "made from  nc@1" in accepted.stdout
    assert facts_of(opened, "back@1")["rights"]["commercial"] is False
    with closing(Versions(opened)) as versions:
        assert revoke(versions, "nc@1", reason="r", dry_run=True).versions == ("back@1", "nc@1")
        refusals = [event for event in read_log(versions) if event.action == "refuse"]
    assert len(refusals) == len(paths)
    assert refusals[0].subject == sha256_file(paths[0])


def test_what_verbs_made_of_a_version_or_a_file_is_found_again(opened: Home, tmp_path: Path) -> None:
    steps = {
        "merged": ("merge", "nc@1", "free@1:0.5"),
        "smaller": ("resize", tmp_path / "merged.safetensors", "--rank", "1"),
        "half": ("convert", tmp_path / "smaller.safetensors", "--to", "kohya", "--dtype", "float16"),
        "named": ("resize", "nc@1", "--rank", "1"),
        "converted": ("convert", "nc@1", "--to", "peft"),
        "of a folder": ("merge", tmp_path / "converted", "free@1"),
    }
    for name, arguments in steps.items():
        path = tmp_path / (name if name == "converted" else f"{name}.safetensors")
        say(*arguments, "-o", path, home=opened.path)
        refused = imported(opened, path)
        assert (refused.returncode, "does not allow commercial use" in refused.stderr) == (1, True), name
    bare = without_header(tmp_path / "half.safetensors", tmp_path / "bare.safetensors")
    assert imported(opened, bare, license_id="CC-BY-NC-4.0").returncode == 0
    with closing(Versions(opened)) as versions:
        report = revoke(versions, "nc@1", reason="r", policy="withdraw")
    assert report.versions == ("back@1", "nc@1")
    assert sorted(entry["verb"] for entry in report.results) == [
        "convert",
        "convert",
        "merge",
        "merge",
        "resize",
        "resize",
    ]
    revoked = imported(opened, tmp_path / "merged.safetensors", license_id="CC-BY-NC-4.0")
    assert (revoked.returncode, "version nc@1" in revoked.stderr) == (1, True)


def test_lineage_follows_a_parent_that_a_verb_made(opened: Home, tmp_path: Path) -> None:
    say("merge", "nc@1", "free@1:0.5", "-o", tmp_path / "merged.safetensors", home=opened.path)
    assert imported(opened, tmp_path / "merged.safetensors", license_id="CC-BY-NC-4.0").returncode == 0
    parents = facts_of(opened, "back@1")["parents"]
    (parent,) = [text for text in parents if text.startswith("result of merge artifact:")]
    nodes = json.loads(say("lineage", "back@1", "--json", home=opened.path))["nodes"]
    kinds = {node["id"]: node["kind"] for node in nodes}
    assert kinds[parent.partition("artifact:")[2]] == "artifact"
    assert "origin" not in {kind for node, kind in kinds.items() if node == parent}
    assert [node["label"] for node in nodes if node["kind"] == "execution" and "merge" in node["label"]]


def test_a_model_with_a_fused_adapter_and_what_is_extracted_from_it_are_made_from_it(
    opened: Home, tmp_path: Path
) -> None:
    from lora_engine.bases.tiny import folder

    say("fuse", folder(), "nc@1", "-o", tmp_path / "fused", home=opened.path)
    extract = ("extract", tmp_path / "fused", "--base", folder(), "--rank", "2", "--targets", "*attn*")
    say(*extract, "-o", tmp_path / "out.safetensors", home=opened.path)
    assert "does not allow commercial use" in imported(opened, tmp_path / "out.safetensors").stderr


def test_an_override_needs_a_reason_is_logged_and_leaves_the_inherited_terms(opened: Home, tmp_path: Path) -> None:
    path = tmp_path / "nc.safetensors"
    with pytest.raises(PromotionError, match="without a reason"):
        import_adapter(opened, path, ImportRequest("back", "tiny", "MIT", override=True))
    assert imported(opened, path, "--override", "--reason", "contract 12").returncode == 0
    shown = facts_of(opened, "back@1")
    assert (shown["card"]["license"], shown["parents"]) == ("MIT", ["base:tiny", "nc@1"])
    assert shown["rights"]["commercial"] is False
    with closing(Versions(opened)) as versions:
        event = read_log(versions)[-1]
    assert (event.action, event.reason, event.details["parents"]) == ("import", "contract 12", ["nc@1"])
    assert "CC-BY-NC-4.0" in event.details["overridden"][0]


def test_a_version_gets_the_parents_that_become_known_later_and_no_child_becomes_its_parent(
    opened: Home, tmp_path: Path
) -> None:
    path = write_random(tmp_path / "late.safetensors", 5)
    bring_in(opened, path, "back")
    again = bring_in(opened, path, "again", license_id="Apache-2.0")
    assert again.parents == ("back@1",)
    assert bring_in(opened, path, "back").parents == ()
    assert facts_of(opened, "back@1")["parents"] == ["base:tiny"]


def test_headers_name_parents_by_digest_only_and_unknown_ones_are_kept(opened: Home, tmp_path: Path) -> None:
    original = sha256_file(tmp_path / "nc.safetensors")
    claims = {
        "honest": [f"a title sha256:{original}"],
        "unknown": [f"x sha256:{'e' * 64}"],
        "lie": ["nc@1", "sha256:nonsense", 7],
    }
    for seed, (name, parents) in enumerate(claims.items()):
        path = tmp_path / f"{name}.safetensors"
        write_adapter(path, random_adapter(20 + seed), card=Card(recipe={"parents": parents}))
    assert "made from nc@1" in imported(opened, tmp_path / "honest.safetensors").stderr
    unknown = imported(opened, tmp_path / "unknown.safetensors")
    assert "is unknown here" in unknown.stderr
    assert facts_of(opened, "back@1")["parents"] == ["base:tiny", f"x sha256:{'e' * 64}"]
    assert bring_in(opened, tmp_path / "lie.safetensors", "lie").parents == ()


def test_an_input_that_was_unknown_when_a_verb_ran_counts_once_it_is_known(opened: Home, tmp_path: Path) -> None:
    unknown = write_random(tmp_path / "unknown.safetensors", 40)
    say("merge", "free@1", unknown, "-o", tmp_path / "merged.safetensors", home=opened.path)
    bring_in(opened, unknown, "known", license_id="CC-BY-NC-4.0")
    assert "made from known@1" in imported(opened, tmp_path / "merged.safetensors").stderr


def test_a_header_with_a_stricter_license_is_a_warning(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "a.safetensors", 30, card=Card(license="CC-BY-NC-4.0"))
    assert "the header states 'CC-BY-NC-4.0', which does not allow commercial use" in imported(opened, path).stderr
    assert "warning" not in imported(opened, path, license_id="CC-BY-NC-4.0").stderr.replace("UserWarning", "")


@pytest.mark.parametrize("policy", ["warn", "refuse", "ignore"])
def test_similar_content_is_reported_and_the_policy_decides(opened: Home, tmp_path: Path, policy: str) -> None:
    (opened.path / "policy.yaml").write_text(f"similar: {policy}\nsimilarity: 0.9\n")
    cast = without_header(tmp_path / "nc.safetensors", tmp_path / "cast.safetensors", torch.bfloat16)
    done = imported(opened, cast)
    assert done.returncode == (1 if policy == "refuse" else 0)
    assert ("nc@1" in done.stderr) is (policy != "ignore")
    assert "free@1" not in done.stderr
    if policy == "warn":
        assert "resembles nc@1 (similarity 1.00)" in done.stderr
        with closing(Versions(opened)) as versions:
            assert read_log(versions)[-1].details["similar"].keys() == {"nc@1"}


def test_a_blocked_digest_is_refused_before_anything_is_written(opened: Home, tmp_path: Path) -> None:
    path = write_random(tmp_path / "bad.safetensors", 9)
    said = say("revoke", sha256_file(path), "--reason", "r", home=opened.path)
    assert "nothing here has it" in said
    with pytest.raises(RightsError, match=f"digest {sha256_file(path)[:12]}"):
        bring_in(opened, path, "back")
    assert len(Versions(opened).list()) == 2
    say("lift", sha256_file(path)[:10], "--reason", "r", home=opened.path)
    assert bring_in(opened, path, "back").is_new


def test_a_revocation_between_the_check_and_the_registration_counts(
    opened: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = importing.judge_import

    def judge_then_revoke(versions: Versions, *arguments: Any) -> Any:
        findings = judge(versions, *arguments)
        revoke(versions, "nc@1", reason="just now", policy="withdraw")
        return findings

    monkeypatch.setattr(importing, "judge_import", judge_then_revoke)
    result = bring_in(opened, tmp_path / "nc.safetensors", "back", license_id="CC-BY-NC-4.0", alias="trial")
    assert (result.version.state, result.version.aliases) == ("WITHDRAWN", ())
    with closing(Versions(opened)) as versions:
        actions = [event.action for event in read_log(versions) if event.name == "back"]
    assert actions == ["withdraw", "refuse", "import"]


def test_verbs_work_on_files_without_a_home_and_create_none(tmp_path: Path) -> None:
    path = write_random(tmp_path / "a.safetensors", 0)
    say("resize", path, "--rank", "1", "-o", tmp_path / "out.safetensors", home=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert read_bundle(tmp_path / "out.safetensors").card.recipe["resized"]["rank"] == 1
    assert "loraline.card" in read_header(tmp_path / "out.safetensors")[1]
