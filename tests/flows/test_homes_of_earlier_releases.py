"""A home that release 0.1.0 wrote opens unchanged: versions, log, lineage, MLflow and the cache."""

from __future__ import annotations

import json
import shutil
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from flows.plan import plan_pipeline
from flows.spec import load_spec
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.tables import ExecutionRow
from registry.versions.promotion import read_log
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here, say

HOMES = Path(__file__).with_name("homes")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with tarfile.open(HOMES / "home-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "home"


def test_versions_aliases_and_the_log_are_read_and_every_byte_agrees(home: Path) -> None:
    with closing(Versions(Home.open(home))) as versions:
        first, second = versions.list("old")
        assert (first.aliases, second.state) == (("trial",), "WITHDRAWN")
        assert [event.action for event in read_log(versions)] == [
            "stage",
            "stage",
            "promote",
            "remove",
            "withdraw",
            "link",
        ]
        assert read_log(versions)[-1].details == {"linked": 5}, "its events got a hash chain"
        assert versions.read_adapter(first)
    assert "agrees" in say("fsck", home=home)
    shown = json.loads(say("show", "old@trial", "--json", home=home))
    assert shown["sha256"].startswith("c6fd65452854764c")
    assert "old@1" in say("lineage", "old@1", home=home)


@pytest.mark.usefixtures("prefect_server")
def test_only_evaluations_run_again_and_preparations_that_have_a_bound_now(home: Path, tmp_path: Path) -> None:
    for name in ("line.yaml", "images"):
        (shutil.copytree if (HOMES / name).is_dir() else shutil.copy)(HOMES / name, tmp_path / name)
    plan = plan_pipeline(load_spec(tmp_path / "line.yaml"), Home.open(home))
    reasons = {step.name: step.reason for step in plan.steps}
    assert reasons["photos"] == "cached"
    assert reasons["prepared"] == "revision of preprocess changed 2 -> 3"
    # It makes the same images, so what was made from them is found again.
    outcomes = json.loads(say("run", tmp_path / "line.yaml", "--json", home=home))["outcomes"]
    assert {name for name, outcome in outcomes.items() if outcome["cached"]} == {"photos", "captions", "adapter"}


def test_its_reports_of_the_earlier_format_are_still_shown(home: Path, tmp_path: Path) -> None:
    say("report", "old@1", "-o", tmp_path / "page.html", home=home)
    page = (tmp_path / "page.html").read_text()
    assert 'id="metrics"' in page
    assert 'class="notice"' not in page or "Measured on the training images" in page
    assert "validation_loss" in say("show", "old@1", home=home)


def test_it_takes_new_versions_and_stays_in_sync(home: Path) -> None:
    say("promote", "old@1", "--to", "candidate", "--reason", "compared with the new release", home=home)
    with closing(Versions(Home.open(home))) as versions:
        assert versions.show("old", "candidate").version == 1
        assert versions.is_synced()
    assert "agrees" in say("fsck", home=home)


def test_a_step_with_a_captioner_of_that_release_is_listed_and_reproduce_names_it(home: Path) -> None:
    with closing(Lineage(Home.open(home).lineage_url)) as lineage, lineage.database.write() as session:
        for row in session.scalars(select(ExecutionRow).where(ExecutionRow.step == "captions")):
            settings = json.loads(json.dumps(row.settings))
            settings["settings"]["captioner"] = "interrogator"
            row.settings = settings
    assert "old" in say("list", "--all", home=home)
    assert "captions" in say("lineage", "old@1", home=home)
    refused = loraline_here("reproduce", "old@1", home=home)
    assert refused.returncode != 0
    assert (
        "the settings of step 'captions' are no longer valid (Input should be 'files' or 'template')" in refused.stderr
    )
