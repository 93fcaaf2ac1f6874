"""Evaluations against production and other versions, as pipeline files and verbs give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.plan import Plan, plan_pipeline
from flows.spec import load_spec
from lora_engine.errors import SettingsError
from registry.entities import ArtifactRef
from registry.errors import UnknownVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from registry.versions.versions import Versions
from tasks.errors import SpecError
from tasks.execution import execute
from tasks.operations.promote import compare_metrics
from tests.flows.commands import loraline_here, say
from tests.flows.conftest import draw_noise
from tests.flows.made import bring_in, write_random

PIPELINE = """\
name: zorb
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.5}
  captions: {uses: caption, dataset: photos, captioner: template, trigger: sks, class_word: star}
  report:
    uses: evaluate
    adapter: ADAPTER
    dataset: captions
    seeds: 1
    steps: 1
    against: [production]
    gates: {validation_loss: {max: 0.5, against: production, missing: skip}, clip_t: {min: -1.0}}
  release:  {uses: register, adapter: ADAPTER, report: report}
"""
SLOT = "{max: 0.5, against: production, missing: skip}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a home with zorb@1 and zorb@2, which are no alias's, and other@1."""
    folder = tmp_path_factory.mktemp("compared")
    home = Home.open(folder / "home")
    for seed, name in enumerate(("zorb", "zorb", "other")):
        bring_in(home, write_random(folder / f"{seed}.safetensors", seed), name)
    return home


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    (folder / "images").mkdir()
    for index in range(4):
        draw_noise(folder / "images" / f"{index}.png", index)
    return folder


def plan_of(text: str, home: Home, images: Path) -> Plan:
    (images / "line.yaml").write_text(text)
    return plan_pipeline(load_spec(images / "line.yaml"), home)


def run_planned(text: str, home: Home, images: Path) -> dict[str, ArtifactRef]:
    """Runs the steps of a plan in this process; returns the outputs by step."""
    plan, lineage = plan_of(text, home, images), Lineage(home.lineage_url)
    run = lineage.start_run("zorb", plan.source)
    outputs: dict[str, ArtifactRef] = {}
    for step in plan.steps:
        inputs = {
            role: tuple(outputs[source] if isinstance(source, str) else source for source in sources)
            for role, sources in step.sources.items()
        }
        outputs[step.name] = execute(step.job, inputs, home, run.id).ref
    lineage.finish_run(run.id, "COMPLETED")
    lineage.close()
    return outputs


def report_of(text: str, home: Home, images: Path) -> dict[str, Any]:
    ref = run_planned(text, home, images)["report"]
    content: dict[str, Any] = json.loads(open_store(home).read(ref, "report.json"))
    return content


def test_a_version_is_compared_with_production_and_promoting_it_does_not_evaluate_it_again(
    home: Home, images: Path
) -> None:
    first = PIPELINE.replace("ADAPTER", "zorb@1")
    alone = report_of(first, home, images)
    assert alone["absent"] == {"production": "there is no zorb@production"}
    assert [gate["metric"] for gate in alone["gates"]] == ["clip_t"], "a skipped gate is none of those that passed"
    assert alone["skipped_gates"] == ["gate validation_loss against production: there is no zorb@production"]
    say("report", "zorb@3", "-o", images / "page.html", home=home.path)
    assert "Not compared with production: there is no zorb@production." in (images / "page.html").read_text()
    say("promote", "zorb@3", "--to", "production", "--reason", "x", "--override", home=home.path)
    assert {step.reason for step in plan_of(first, home, images).steps} == {"cached"}

    second = PIPELINE.replace("ADAPTER", "zorb@2")
    compared = report_of(second, home, images)
    assert compared["absent"] == {}
    assert compared["against"] == {"production": {"sha256": Versions(home).show("zorb", 3).sha256}}
    metrics, against = compared["metrics"], compared["comparisons"]["production"]
    assert metrics.keys() == against.keys()
    assert against["validation_loss"]["other"] == alone["metrics"]["validation_loss"]["adapter"]
    assert against["validation_loss"]["adapter"] == metrics["validation_loss"]["adapter"]
    assert [(gate["metric"], gate["against"]) for gate in compared["gates"]] == [
        ("clip_t", "base"),
        ("validation_loss", "production"),
    ]
    newest = Versions(home).show("zorb").version
    say("promote", f"zorb@{newest}", "--to", "production", "--reason", "x", "--override", home=home.path)
    assert {step.reason for step in plan_of(second, home, images).steps} == {"cached"}, (
        "compared with the version before"
    )


def test_a_gate_against_a_withdrawn_version_fails_with_the_reason(home: Home, images: Path, tmp_path: Path) -> None:
    bring_in(home, write_random(tmp_path / "gone.safetensors", 5), "gone")
    say("withdraw", "gone@1", "--reason", "x", home=home.path)
    text = PIPELINE.replace("ADAPTER", "other@1").replace("[production]", "[gone@1]")
    report = report_of(text.replace(SLOT, "{max: 0.5, against: gone@1}"), home, images)
    assert "was withdrawn" in report["absent"]["gone@1"]
    assert report["passed"] is False
    assert report["reasons"] == [f"gate validation_loss against gone@1: {report['absent']['gone@1']}"]
    version = Versions(home).show("zorb")
    assert (version.passed, version.gate_status) == (False, "FAILED")
    completed = loraline_here("promote", version.ref, "--to", "staging", "--reason", "x", home=home.path)
    assert completed.returncode == 1
    assert report["reasons"][0] in completed.stderr


def test_a_version_is_compared_with_any_other_one(home: Home, images: Path) -> None:
    text = PIPELINE.replace("ADAPTER", "zorb@2").replace("[production]", "[other@1, zorb@1]")
    report = report_of(text.replace(SLOT, "{max: 9.0, against: other@1}"), home, images)
    assert list(report["comparisons"]) == ["other@1", "zorb@1"]
    assert [entry["files"].keys() for entry in report["images"]["entries"]] == [
        {"base", "candidate", "other@1", "zorb@1"}
    ] * len(report["images"]["entries"])
    assert report["samples"][0]["others"].keys() == {"other@1", "zorb@1"}
    first, second = (report["comparisons"][role]["clip_t"] for role in ("zorb@1", "other@1"))
    assert first["difference"] != second["difference"]
    say("report", "zorb", "-o", images / "others.html", home=home.path)
    assert "Against other@1." in (images / "others.html").read_text()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"against: [production]": "against: [base]"}, "name each version once, and not the base"),
        ({"against: [production]": "against: [a@1, a@1]"}, "name each version once"),
        ({"against: [production]": "against: []"}, "is against 'production'; allowed: base"),
        ({"against: [production]": "against: [nothing, production]"}, "which names no step"),
        ({SLOT: "{max: 0.5, of: adapter, against: production}"}, "own value is not a difference"),
        ({"dataset: captions\n": "dataset: captions\n    embedder: nowhere/of/all\n"}, "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    home: Home, images: Path, change: dict[str, str], problem: str
) -> None:
    text = PIPELINE.replace("ADAPTER", "zorb@1")
    for before, after in change.items():
        assert before in text
        text = text.replace(before, after)
    with pytest.raises((SpecError, SettingsError), match=problem):
        plan_of(text, home, images)


def test_a_version_that_never_existed_is_an_error(home: Home, images: Path) -> None:
    text = PIPELINE.replace("ADAPTER", "zorb@1").replace("[production]", "[zorb@99, production]")
    with pytest.raises(UnknownVersion):
        plan_of(text, home, images)


def test_gates_of_a_file_are_checked_too_and_its_content_is_in_the_key(home: Home, images: Path) -> None:
    text = PIPELINE.replace("ADAPTER", "zorb@1").replace("    seeds: 1\n", "    seeds: 1\n    gate_file: gates.yaml\n")
    (images / "gates.yaml").write_text("gates:\n  clip_t: {min: 2.0, of: adapter}\n")
    report = report_of(text, home, images)
    assert [(gate["metric"], gate["min"], gate["passed"]) for gate in report["gates"]] == [
        ("clip_t", -1.0, True),
        ("clip_t", 2.0, False),
        ("validation_loss", None, True),
    ]
    (images / "gates.yaml").write_text("gates:\n  clip_t: {least: 2.0}\n")
    assert "content of gates.yaml changed" in {s.name: s.reason for s in plan_of(text, home, images).steps}["report"]
    with pytest.raises(SettingsError, match=r"gates\.yaml:2:\d+: gates\.clip_t\.0\.least: Extra inputs"):
        run_planned(text, home, images)


def test_values_of_different_embedders_are_not_compared(home: Home) -> None:
    versions = Versions(home)
    plain = {"base": 0.1, "adapter": 0.5, "difference": 0.4, "interval": None, "n": 2, "better": "higher"}
    for number, embedder in ((1, "a" * 64), (2, "b" * 64)):
        artifact = versions.show("zorb", number).artifact
        metrics = {"clip_t": {**plain, "embedders": [embedder]}, "validation_loss": plain}
        versions.register("judged", artifact, metrics=metrics, passed=True, card={"license": "MIT"})
    say("promote", "judged@1", "--to", "production", "--reason", "x", "--override", home=home.path)
    compared = compare_metrics(versions, versions.show("judged", 2), "production")
    assert compared == {"clip_t": (None, 0.5), "validation_loss": (0.5, 0.5)}
    same = compare_metrics(versions, versions.show("judged", 1), "production")
    assert same == {"clip_t": (0.5, 0.5), "validation_loss": (0.5, 0.5)}
    difference = json.loads(say("diff", "judged@1", "judged@2", "--json", home=home.path))
    assert "clip_t: measured with different embedders, so its values are not compared" in difference["notes"]
    assert difference["metrics"] == []
