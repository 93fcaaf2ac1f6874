"""The policy for consent, from the file of consents over training and promotion to the recall of what lapsed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_engine.files import sha256_file
from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.commands import loraline_here, say

pytestmark = pytest.mark.usefixtures("prefect_server", "trained_here")

TRAIN = """\
name: try
base: tiny
seed: 7
steps:
  photos:   {{uses: ingest, images: images/, consent: consent.yaml{policy}}}
  prepared: {{uses: preprocess, dataset: photos, resolution: 32}}
  captions: {{uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}}
  adapter:  {{uses: train, dataset: captions, method: finetune, rank: 2, steps: {steps}}}
  release:  {{uses: register, adapter: adapter, name: stars}}
"""
COMPLETE = {f"{index}.png": {"basis": "own", "person_depicted": False} for index in range(2)}
EXPIRED = {"basis": "own", "person": "no", "expiry": "2020-12-31"}
OPTED_OUT = {"rights": "own", "person": "no", "opt-out": "ai.txt/2026-05-01/opted-out"}

Write = Callable[..., Path]


@pytest.fixture
def write(pipeline: Callable[..., Path]) -> Write:
    """Returns a function that writes the pipeline file, with a file of consents of two images."""

    def make(policy: str | None = None, steps: int = 1, **stated: object) -> Path:
        setting = f", consent_policy: {policy}" if policy else ""
        path = pipeline(TRAIN.format(policy=setting, steps=steps), images=2)
        entries = COMPLETE | {f"{name[1:]}.png": columns for name, columns in stated.items()}
        (path.parent / "consent.yaml").write_text(json.dumps(entries))
        return path

    return make


def warnings_of_steps(home: Path) -> dict[str, list[str]]:
    lineage = Lineage(Home.open(home).lineage_url)
    warned = {entry.step: entry.environment.get("warnings", []) for entry in lineage.executions() if entry.output}
    lineage.close()
    return {step: texts for step, texts in warned.items() if texts}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (EXPIRED, "1 image with consent that expired on 2020-12-31: 1.png"),
        (OPTED_OUT, "1 image of an owner who opted out: 1.png"),
        ({"owner": "Ada"}, "1 image without a legal basis (column `rights`): 1.png"),
    ],
)
def test_strict_refuses_before_training(write: Write, home: Path, columns: dict[str, str], reason: str) -> None:
    run = loraline_here("run", write("strict", _1=columns), home=home)
    assert run.returncode == 1
    assert f"the consent policy is strict, and the dataset has {reason}" in run.stderr
    lineage = Lineage(Home.open(home).lineage_url)
    assert [entry.step for entry in lineage.executions() if entry.output] == []
    lineage.close()


def test_the_home_refuses_what_was_ingested_before_and_promotes_nothing_of_it(write: Write, home: Path) -> None:
    path = write(_1=EXPIRED)
    say("run", path, home=home)
    expired = "the dataset has 1 image with consent that expired on 2020-12-31: 1.png"
    assert warnings_of_steps(home) == {"photos": [expired], "adapter": [expired]}
    promoted = say("promote", "stars@1", "--to", "canary", "--reason", "r", home=home)
    assert "warning: 1 image with consent that expired on 2020-12-31: 1.png" in promoted
    events = json.loads(say("log", "stars", "--json", home=home))
    assert events[-1]["details"]["warnings"] == ["1 image with consent that expired on 2020-12-31: 1.png"]

    (home / "policy.yaml").write_text("consent: strict\n")
    write(steps=2, _1=EXPIRED)
    run = loraline_here("run", path, home=home)
    assert run.returncode == 1
    assert "step 'adapter'" in run.stderr
    refused = loraline_here("promote", "stars@1", "--to", "beta", "--reason", "r", home=home)
    assert refused.returncode == 1
    assert "1 image with consent that expired on 2020-12-31" in refused.stderr
    export = loraline_here("export", "stars@canary", "--to", "kohya", "-o", path.with_name("x"), home=home)
    assert export.returncode == 1
    assert "does not meet the policy of 'canary'" in export.stderr

    (home / "policy.yaml").write_text("consent: 'off'\n")
    assert "warning" not in say("promote", "stars@1", "--to", "beta", "--reason", "r", home=home)


def test_an_owner_who_opts_out_later_takes_the_versions_back(write: Write, home: Path, tmp_path: Path) -> None:
    path = write("strict")
    say("run", path, home=home)
    assert warnings_of_steps(home) == {}
    say("promote", "stars@1", "--to", "canary", "--reason", "r", home=home)
    nothing = json.loads(say("recall", "--reason", "check", "--json", home=home))
    assert (nothing["images"], nothing["recalled"]) == ([], [])

    digest = sha256_file(path.parent / "images" / "0.png")
    later = tmp_path / "later.csv"
    later.write_text(f"image,opt_out\n{digest},ai.txt/2026-11-30/opted-out\n")
    recall = ("recall", "--consent", later, "--reason", "list of November", "--policy", "withdraw")
    assert "would revoke  1 images" in say(*recall, "--dry-run", home=home)
    report = json.loads(say(*recall, "--json", home=home))
    assert report["versions"] == ["stars@1"]
    assert report["aliases"] == {"stars@canary": 1}
    assert [impact["taken_back"] for impact in report["recalled"]] == [{"stars@canary": None}]
    assert "WITHDRAWN" in say("show", "stars@1", home=home)
    assert json.loads(say(*recall, "--json", home=home))["images"] == []
    manifest = json.loads(say("plan", path, "--json", home=home))
    assert next(step["reason"] for step in manifest if step["name"] == "photos") == "revocations changed"


def test_a_revoked_base_is_refused_before_training_with_the_reason(write: Write, home: Path) -> None:
    path = write()
    say("run", path, home=home)
    say("revoke", "tiny", "--reason", "scraped without consent", home=home)
    write(steps=2)
    run = loraline_here("run", path, home=home)
    assert run.returncode == 1
    assert "step 'adapter'" in run.stderr
    assert "its base 'tiny' was revoked by" in run.stderr
    assert "scraped without consent" in run.stderr


def test_a_renewed_consent_recalls_nothing(write: Write, home: Path, tmp_path: Path) -> None:
    path = write("off", _1=EXPIRED)
    say("run", path, home=home)
    assert warnings_of_steps(home) == {}
    renewed = tmp_path / "renewed.yaml"
    renewed.write_text("1.png: {rights: own, expires: 2099-01-01}\n")
    folder = path.parent / "images"
    with_renewal = say("recall", "--reason", "r", "--consent", renewed, "--images", folder, "--dry-run", home=home)
    assert "would revoke  0 images" in with_renewal
    assert "would revoke  1 images" in say("recall", "--reason", "r", "--dry-run", home=home)
