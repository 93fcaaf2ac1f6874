"""Tests pipelines of steps that need no model: ingest, preprocess, caption."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.pipeline import run_pipeline
from flows.plan import plan_pipeline
from flows.result import PipelineResult
from flows.spec import load_spec
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, InterruptedRun
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store
from tasks.progress import StepEvent, clear_stop, listening, request_stop
from tests.flows.conftest import PREPARE, draw_noise

Write = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("prefect_server")


def run(path: Path, home: Path, *overrides: str, force: tuple[str, ...] = ()) -> PipelineResult:
    return run_pipeline(load_spec(path, overrides), Home.open(home), force=force)


def ran(result: PipelineResult) -> list[str]:
    return [name for name, outcome in result.outcomes.items() if not outcome.cached]


def test_a_second_run_does_nothing_and_a_changed_value_runs_only_what_depends_on_it(
    pipeline: Write, home: Path
) -> None:
    path = pipeline()
    first = run(path, home)
    assert ran(first) == ["photos", "prepared", "captions"]

    second = run(path, home)
    assert ran(second) == []
    assert second.changed == {}
    assert [o.ref for o in second.outcomes.values()] == [o.ref for o in first.outcomes.values()]

    third = run(path, home, "captions.trigger=zorb")
    assert ran(third) == ["captions"]
    assert third.changed == {"captions": "trigger: sks -> zorb"}

    forced = run(path, home, force=("prepared",))
    assert ran(forced) == ["prepared"]
    assert forced.outcomes["prepared"].ref == first.outcomes["prepared"].ref


def test_a_new_image_runs_every_downstream_step(pipeline: Write, home: Path) -> None:
    path = pipeline()
    run(path, home)
    draw_noise(path.parent / "images" / "new.png", 99)
    result = run(path, home)
    assert ran(result) == ["photos", "prepared", "captions"]
    assert "the content of images/ changed" in result.changed["photos"]


@pytest.mark.parametrize("damage", ["delete", "flip"])
def test_a_damaged_blob_runs_its_producer_again_and_nothing_else(pipeline: Write, home: Path, damage: str) -> None:
    path = pipeline()
    first = run(path, home)
    store = Store(Home(home.absolute()).store)
    captions = first.outcomes["captions"].ref
    blob = home / "store" / store_path(store, store.files(captions)["manifest.json"].sha256, home)
    if damage == "delete":
        blob.unlink()
    else:
        content = bytearray(blob.read_bytes())
        content[10] ^= 1
        blob.write_bytes(content)

    planned = {step.name: step for step in plan_pipeline(load_spec(path), Home.open(home)).steps}
    assert "damaged" in planned["captions"].reason

    second = run(path, home)
    assert ran(second) == ["captions"]
    assert second.outcomes["captions"].ref == captions
    assert store.verify(captions) == []


def store_path(store: Store, digest: str, home: Path) -> Path:
    (path,) = (home / "store").rglob(digest)
    return path.relative_to(home / "store")


def test_one_broken_image_is_quarantined_and_the_run_continues(pipeline: Write, home: Path) -> None:
    path = pipeline()
    (path.parent / "images" / "broken.png").write_text("this is no image")
    result = run(path, home)
    store = Store(Home(home.absolute()).store)
    manifest = Manifest.model_validate_json(store.read(result.outcomes["captions"].ref, "manifest.json"))
    assert len(manifest.pictures) == 4
    assert [item.source for item in manifest.quarantined] == ["broken.png"]


def test_a_folder_of_broken_images_fails_with_their_number(pipeline: Write, home: Path) -> None:
    path = pipeline(images=0)
    for index in range(3):
        (path.parent / "images" / f"{index}.png").write_text("no")
    with pytest.raises(DataError, match="3"):
        run(path, home)
    lineage = Lineage(Home(home.absolute()).lineage_url)
    (failed,) = lineage.runs()
    assert failed.status == "FAILED"
    (execution,) = lineage.executions(failed.id)
    assert execution.status == "FAILED"
    assert execution.output is None
    assert "DataError" in str(execution.error)


def test_an_independent_step_is_finished_and_kept_when_another_fails(pipeline: Write, home: Path) -> None:
    path = pipeline(PREPARE + "  others:   {uses: ingest, images: broken/}\n")
    broken = path.parent / "broken"
    broken.mkdir()
    (broken / "x.png").write_text("no")
    with pytest.raises(DataError):
        run(path, home)
    planned = {step.name: step.cached for step in plan_pipeline(load_spec(path), Home.open(home)).steps}
    assert planned == {"photos": True, "prepared": True, "captions": True, "others": False}


def test_a_stop_between_steps_is_an_interruption_and_the_next_run_continues(pipeline: Write, home: Path) -> None:
    path = pipeline(PREPARE.replace("captioner: template", "captioner: files"))

    def stop_before_captions(event: StepEvent) -> None:
        if (event.step, event.kind) == ("prepared", "completed"):
            request_stop()

    try:
        with listening(stop_before_captions), pytest.raises(InterruptedRun):
            run(path, home)
    finally:
        clear_stop()
    lineage = Lineage(Home(home.absolute()).lineage_url)
    assert lineage.runs()[0].status == "INTERRUPTED"
    assert ran(run(path, home)) == ["captions"]


def test_lineage_leads_from_an_image_to_everything_made_from_it(pipeline: Write, home: Path) -> None:
    path = pipeline()
    result = run(path, home)
    store, lineage = Store(Home(home.absolute()).store), Lineage(Home(home.absolute()).lineage_url)
    manifest = Manifest.model_validate_json(store.read(result.outcomes["photos"].ref, "manifest.json"))
    down = {node.id for node in lineage.walk(manifest.pictures[0].sha256, "down").nodes}
    assert {outcome.ref.sha256 for outcome in result.outcomes.values()} <= down
    up = {node.id for node in lineage.walk(result.outcomes["captions"].ref.sha256, "up", subjects=True).nodes}
    assert {image.sha256 for image in manifest.pictures} <= up


def test_equal_work_in_two_homes_gives_equal_artifacts(pipeline: Write, tmp_path: Path) -> None:
    path = pipeline()
    first, second = run(path, tmp_path / "one"), run(path, tmp_path / "two")
    assert [o.ref for o in first.outcomes.values()] == [o.ref for o in second.outcomes.values()]
    shutil.rmtree(tmp_path / "two" / "store")
    assert ran(run(path, tmp_path / "two")) == ["photos", "prepared", "captions"]
