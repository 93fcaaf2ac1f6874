"""`loraline adopt` takes over what release 0.1.0 recorded under other cache keys; `plan` says which results and why."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from lora_engine.catalog.kinds import KINDS
from lora_engine.files import sha256_bytes
from registry.entities import Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.tables import ExecutionRow
from tasks.step import STEPS
from tests.flows.commands import say

HOMES = Path(__file__).with_name("homes")
LINE = ("photos", "prepared", "captions", "adapter")
"""The steps whose work is as in that release; the fixture sets the revision of preprocess, which has a bound since."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(STEPS._entries, "preprocess", replace(STEPS["preprocess"], revision=2, revisions=None))
    with tarfile.open(HOMES / "home-0.1.0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copy(HOMES / "line.yaml", tmp_path)
    shutil.copytree(HOMES / "images", tmp_path / "images")
    return tmp_path / "home"


def change_records(home: Path, steps: Sequence[str], change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the recorded settings of steps, and gives their executions the keys of another scheme."""
    with closing(Lineage(Home.open(home).lineage_url)) as lineage, lineage.database.write() as session:
        for row in session.scalars(select(ExecutionRow).where(ExecutionRow.step.in_(steps))):
            settings = json.loads(json.dumps(row.settings))
            change(settings)
            row.settings, row.key = settings, sha256_bytes(f"other {row.key}".encode())


def forget_options(settings: dict[str, Any]) -> None:
    """Leaves out options as if the release had not had them."""
    options = settings["settings"]
    options.pop("max_pixels", None)
    options.pop("guidance", None)
    options.get("running", {}).pop("attention", None)


def planned(verb: str, home: Path, *options: str) -> dict[str, dict[str, Any]]:
    """Returns the steps that `plan` or `adopt` prints for the last pipeline of the home."""
    steps = json.loads(say(verb, home.parent / "line.yaml", "--json", "--set", "adapter.steps=3", *options, home=home))
    return {step["name"]: step for step in steps}


def last(home: Path, step: str, *, status: str | None = None) -> Execution:
    """Returns the latest execution of a step, or the latest with a status."""
    with closing(Lineage(Home.open(home).lineage_url)) as lineage:
        executions = [execution for execution in lineage.executions() if execution.step == step]
    return [execution for execution in executions if status in (None, execution.status)][-1]


def test_every_result_is_adopted_with_a_record_of_its_origin_and_nothing_runs(home: Path) -> None:
    before = {step: last(home, step, status="COMPLETED") for step in LINE}
    change_records(home, LINE, forget_options)
    plan = planned("plan", home)
    assert [step["cached"] for step in plan.values()] == [False] * 6
    added = plan["photos"]["reason"].rpartition("at the same revision; options that were added since have their ")[2]
    assert {"layout", "max_pixels"} <= set(added.removeprefix("defaults: ").split(", "))
    assert plan["photos"]["adoption"] == before["photos"].id
    line = home.parent / "line.yaml"
    assert f"`loraline adopt {line}` takes the adoptable results over" in say("plan", line, home=home)

    adopted = planned("adopt", home)
    assert {name: adopted[name]["adoption"] for name in LINE} == {name: before[name].id for name in LINE}
    assert "running.attention" in adopted["adapter"]["reason"]
    again = planned("plan", home)
    assert all(again[name]["cached"] and again[name]["adoption"] is None for name in LINE)
    for name in LINE:
        record, old = last(home, name), before[name]
        assert (record.status, record.output, record.inputs) == ("ADOPTED", old.output, old.inputs)
        origin = record.settings["adopted"]
        assert (origin["execution"], origin["run"]) == (old.id, old.run_id)
        assert origin["key"] != record.key
    # What made the adapter is the execution of that release, not the adoption.
    upstream = {node["id"] for node in json.loads(say("lineage", "old@2", "--json", home=home))["nodes"]}
    assert before["adapter"].id in upstream
    assert last(home, "adapter").id not in upstream
    run = last(home, "adapter").run_id
    say("lineage", run, "--down", "--openlineage", home.parent / "events.jsonl", home=home)
    events = [json.loads(line) for line in (home.parent / "events.jsonl").read_text().splitlines()]
    facets = [event["run"]["facets"]["loraline_execution"] for event in events if event["eventType"] == "COMPLETE"]
    assert {facet["settings"]["adopted"]["execution"] for facet in facets} >= {before["adapter"].id}


def test_a_revision_that_was_raised_is_named_and_its_results_are_not_adopted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_records(home, LINE, forget_options)
    monkeypatch.setitem(STEPS._entries, "train", replace(STEPS["train"], revision=4, revisions=None))
    adopted = planned("adopt", home)
    assert [name for name, step in adopted.items() if step["cached"]] == ["photos", "prepared", "captions"]
    assert adopted["adapter"]["reason"] == "revision of train changed 2 -> 4"
    assert adopted["report"]["reason"] == "takes from adapter, which will run"


def test_a_raised_revision_of_a_kind_runs_the_steps_with_adapters_of_that_kind_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS._entries, "lokr", replace(KINDS["lokr"], revision=1))
    monkeypatch.setitem(KINDS._entries, "lora", replace(KINDS["lora"], revision=1))
    plan = planned("plan", home)
    assert plan["captions"]["cached"]
    assert plan["adapter"]["reason"] == "revision of adapter kind lora changed 0 -> 1"


CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "settings": (("--set", "adapter.rank=2"), "rank: 1 -> 2"),
    "resolution": (("--set", "prepared.resolution=64"), "resolution: 32 -> 64"),
    "inputs": (("--set", "adapter.dataset=prepared"), "dataset: input changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_give_another_result_is_not_adopted(change: str, home: Path) -> None:
    change_records(home, LINE, forget_options)
    options, reason = CHANGES[change]
    adopted = planned("adopt", home, *options)
    (changed,) = [step for step in adopted.values() if not step["cached"] and not step["reason"].startswith("takes")]
    assert changed["reason"] == reason
    assert changed["adoption"] is None


RECORDS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "file": (
        "photos",
        lambda settings: settings["files"].update(images="0" * 64),
        "images: the content of images/ changed",
    ),
    "file that is not set": (
        "photos",
        lambda settings: settings["files"].update(consent="0" * 64),
        "consent: not set any more",
    ),
    "base": (
        "adapter",
        lambda settings: settings["base"].update(fingerprint="0" * 64),
        "base: tiny (000000000000) -> tiny (",
    ),
    "revocation": ("photos", lambda settings: settings.update(excluded=["0" * 64]), "revocations changed"),
    "plug-in": ("adapter", lambda settings: settings.update(plugins={"other": "1.0"}), "other: 1.0 -> unset"),
    "option that is gone": ("adapter", lambda settings: settings["settings"].update(gone=1), "gone: 1 -> unset"),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_result_of_other_circumstances_is_not_adopted(record: str, home: Path) -> None:
    step, change, reason = RECORDS[record]
    change_records(home, [step], change)
    assert planned("adopt", home)[step]["reason"].startswith(reason)
    assert last(home, step).status != "ADOPTED"


def test_a_damaged_result_is_not_adopted(home: Path) -> None:
    change_records(home, ["adapter"], forget_options)
    assert planned("plan", home)["adapter"]["adoption"] is not None
    digest = json.loads(say("show", "old@2", "--json", home=home))["sha256"]
    (blob,) = (home / "store" / "blobs" / digest[:2]).glob("*")
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    adapter = planned("adopt", home)["adapter"]
    assert (adapter["adoption"], adapter["cached"]) == (None, False)
