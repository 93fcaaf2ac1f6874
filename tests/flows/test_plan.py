"""Tests that a run reads everything once, and that it shows the current state of versions and aliases."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import huggingface_hub
import pytest

import tasks.digests
from flows.pipeline import run_pipeline
from flows.spec import load_spec
from flows.summary import summarize
from flows.template import write_pipeline
from lora_engine.errors import DataError
from lora_engine.files import sha256_file
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from registry.store.local import LocalBlobs
from tasks.digests import digest_path
from tasks.execution import execute
from tasks.job import prepare_job
from tasks.operations.changes import show_value
from tasks.progress import StepEvent, listening
from tests.flows.commands import loraline_here, say
from tests.flows.made import run_line
from tests.flows.shared import Trained

pytestmark = pytest.mark.usefixtures("trained_here")

Write = Callable[..., Path]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the reads of each blob of the store and each file of the user."""
    counted: Counter[str] = Counter()

    def counting(read: Callable[[LocalBlobs, str], object]) -> Callable[[LocalBlobs, str], object]:
        def count(blobs: LocalBlobs, digest: str) -> object:
            counted[digest] += 1
            return read(blobs, digest)

        return count

    def count_file(path: Path) -> str:
        counted[str(path)] += 1
        return sha256_file(path)

    for name in ("open", "actual_digest"):
        monkeypatch.setattr(LocalBlobs, name, counting(getattr(LocalBlobs, name)))
    monkeypatch.setattr(tasks.digests, "sha256_file", count_file)
    return counted


def test_a_cached_run_and_its_summary_read_each_artifact_and_each_file_of_the_user_once(
    trained: Trained, reads: Counter[str]
) -> None:
    spec = load_spec(trained.spec)
    list(summarize(spec, trained.home, run_pipeline(spec, trained.home)))  # renders report and exports
    reads.clear()
    result = run_pipeline(spec, trained.home)
    facts = dict(summarize(spec, trained.home, result))
    assert facts["steps"] == "0 ran, 7 cached"
    images = [str(path) for path in (trained.spec.parent / "images").iterdir()]
    assert images
    # Preprocessing keeps images of the right size, so two steps may have the same output.
    artifacts = Counter(outcome.ref.sha256 for outcome in result.outcomes.values())
    assert {*images, *artifacts} <= set(reads)
    assert {name: count for name, count in reads.items() if count != artifacts.get(name, 1)} == {}


@pytest.mark.usefixtures("prefect_server")
def test_a_run_reuses_and_records_the_cached_results_of_its_plan(
    pipeline: Write, home: Path, reads: Counter[str]
) -> None:
    path, opened = pipeline(), Home.open(home)
    run_line_without_versions(path, opened)
    reads.clear()
    result = run_pipeline(load_spec(path, ["captions.trigger=other"]), opened)
    assert [name for name, outcome in result.outcomes.items() if not outcome.cached] == ["captions"]
    photos = result.outcomes["photos"].ref.sha256
    assert reads[photos] == 1
    with closing(Lineage(opened.lineage_url)) as lineage:
        states = {execution.step: execution.status for execution in lineage.executions(lineage.runs()[0].id)}
    assert states == {"photos": "CACHED", "prepared": "CACHED", "captions": "COMPLETED"}


def run_line_without_versions(path: Path, home: Home) -> None:
    spec = load_spec(path)
    with closing(Lineage(home.lineage_url)) as lineage:
        run = lineage.start_run(spec.name, spec.source)
        outputs = {}
        for name, step in spec.steps.items():
            inputs = {field: (outputs[target],) for field, target, _ in step.references()}
            outputs[name] = execute(prepare_job(name, step, spec.folder), inputs, home, run.id).ref
        lineage.finish_run(run.id, "COMPLETED")


def test_reasons_are_in_the_words_of_the_pipeline_file(pipeline: Write, home: Path) -> None:
    path, opened = pipeline(), Home.open(home)
    run_line_without_versions(path, opened)
    planned = say("plan", path, "--set", "captions.trigger=other", home=home)
    assert "trigger: sks -> other" in planned
    with closing(Lineage(opened.lineage_url)) as lineage:
        (photos,) = (execution.output for execution in lineage.executions() if execution.step == "photos")
    assert photos is not None
    blob = next(iter(open_store(opened).files(photos).values()))
    (opened.store / "blobs" / blob.sha256[:2] / blob.sha256).unlink()
    planned = say("plan", path, home=home)
    assert f"the cached result is damaged: the bytes with digest {blob.sha256} are gone" in planned
    assert "Problem(" not in planned


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unset"),
        ("crop: x", "crop: x"),
        ("", '""'),
        (True, "true"),
        (0.5, "0.5"),
        (["a", None], '["a", null]'),
        ({"name": "lokr"}, '{"name": "lokr"}'),
    ],
)
def test_a_changed_value_is_shown_as_a_pipeline_file_has_it(value: object, text: str) -> None:
    assert show_value(value) == text


def test_a_cached_run_shows_where_the_alias_is_now(trained: Trained) -> None:
    home = trained.home.path
    assert "staging -> small@1" in say("run", trained.spec, home=home)
    longer = trained.spec.with_name("longer.yaml")
    longer.write_text(trained.spec.read_text().replace("steps: 12", "steps: 4"))
    run_line(longer, trained.home)
    assert "staging points at small@2" in say("run", trained.spec, home=home)

    say("withdraw", "small@1", "--reason", "wrong images", home=home)
    withdrawn = say("run", trained.spec, home=home)
    assert "WITHDRAWN" in withdrawn
    assert "(wrong images)" in withdrawn
    assert "staging points at small@2" in withdrawn
    assert "loraline promote" not in withdrawn

    say("delete", "small@1", "--reason", "by request", home=home)
    deleted = say("run", trained.spec, home=home)
    assert "DELETED" in deleted
    assert "(by request)" in deleted
    assert "loraline promote" not in deleted
    (release,) = json.loads(say("run", trained.spec, "--json", home=home))["versions"].values()
    assert (release["state"], release["alias_version"]) == ("DELETED", 2)


def test_an_evaluation_without_gates_is_not_called_passed(trained: Trained) -> None:
    home = trained.home.path
    assert "passed" in say("show", "small@1", home=home)
    trained.spec.write_text(trained.spec.read_text().replace("gates: {validation_loss: {max: 10.0}}", "gates: {}"))
    assert run_line(trained.spec, trained.home).version == 2
    for verb in (["run", trained.spec], ["show", "small@2"], ["list"]):
        assert "none set" in say(*verb, home=home)
    assert "passed" not in say("show", "small@2", home=home)


def test_a_refused_alias_fails_the_cached_run_too_until_the_version_may_have_it(trained: Trained) -> None:
    home = trained.home.path
    trained.spec.write_text(trained.spec.read_text().replace("max: 10.0", "max: -10.0"))
    run_line(trained.spec, trained.home)
    refused = say("run", trained.spec, home=home, code=1)
    assert "FAILED" in refused
    assert "staging points at small@1; small@2 was refused: " in refused
    assert "validation_loss" in refused


def test_a_step_whose_files_change_while_it_runs_fails_and_leaves_nothing_cached(pipeline: Write, home: Path) -> None:
    spec, opened = load_spec(pipeline()), Home.open(home)

    def change(event: StepEvent) -> None:
        if event.kind == "started":
            (spec.folder / "images" / "late.png").write_bytes((spec.folder / "images" / "0.png").read_bytes())

    job = prepare_job("photos", spec.steps["photos"], spec.folder)
    with closing(Lineage(opened.lineage_url)) as lineage:
        run = lineage.start_run(spec.name, spec.source)
        with listening(change), pytest.raises(DataError, match="changed while it ran"):
            execute(job, {}, opened, run.id)
        assert lineage.find_cached(job.key({})) is None
        # The same job again: its digests are outdated, so the files are read again.
        outcome = execute(job, {}, opened, run.id)
        assert lineage.find_cached(job.key({})) is None
        (completed,) = (step for step in lineage.executions(run.id) if step.status == "COMPLETED")
    assert completed.settings["files"]["images"] == digest_path(spec.folder / "images").sha256
    assert b"late.png" in outcome.summary


def test_digests_notice_every_change_of_a_folder_without_reading_it(tmp_path: Path, reads: Counter[str]) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a.txt").write_text("one")
    (folder / "link").symlink_to("below")
    digest = digest_path(folder)
    assert reads == {str(folder / "below" / "a.txt"): 1}
    assert digest.is_current(folder)

    def changes(change: Callable[[], object]) -> bool:
        change()
        return not digest.is_current(folder) and digest_path(folder).sha256 != digest.sha256

    reads.clear()
    digest.is_current(folder)
    assert not reads
    assert changes(lambda: (folder / "b.txt").write_text("new"))
    (folder / "b.txt").unlink()
    assert changes(lambda: (folder / "below" / "a.txt").write_text("two"))
    digest = digest_path(folder)
    (folder / "link").unlink()
    assert changes(lambda: (folder / "link").symlink_to("elsewhere"))
    assert not digest.is_current(tmp_path / "absent")


def test_plans_state_the_cost_of_automatic_settings(tmp_path: Path, home: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no image, and not read by a plan")
    path = write_pipeline(tmp_path / "images", "sks", "thing", auto=True)
    done = say("plan", path, "--json", home=home)
    for cost in ("at most 200 epochs", "5 short trainings", "0.5 times the steps", "6 ranks", "one backward pass"):
        assert cost in done, cost
    plain = write_pipeline(tmp_path / "images", "sks", "thing", name="plain")
    assert "short trainings" not in say("plan", plain, "--json", home=home)


UNDOWNLOADED = {
    "a base": ("base: tiny", "base: org/model@v1", "train", "org/model@v1"),
    "an autoencoder": ("steps: 2", "vae: org/vae, steps: 2", "train", "org/vae"),
    "a captioner": ("captioner: template", "captioner: {name: vlm, model: org/vlm}", "caption", "org/vlm"),
    "an embedder": ("seeds: 1", "embedder: org/clip", "evaluate", "org/clip"),
}
LINE = """\
name: stripes
base: tiny
steps:
  photos:   {uses: ingest, images: images/}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, steps: 2}
  report:   {uses: evaluate, adapter: adapter, dataset: captions, seeds: 1}
"""


@pytest.mark.parametrize("case", UNDOWNLOADED)
def test_a_plan_downloads_no_model_and_names_it(
    case: str, pipeline: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, uses, model = UNDOWNLOADED[case]
    path, home, asked = pipeline(LINE.replace(before, after)), tmp_path / "home", []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = huggingface_hub.snapshot_download

    def record(*arguments: object, local_files_only: bool, **settings: object) -> object:
        asked.append(local_files_only)
        return snapshot(*arguments, local_files_only=local_files_only, **settings)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    steps = json.loads(say("plan", path, "--json", home=home))
    named = {step["uses"] for step in steps if f"{model!r} is not on this machine, and a run" in step["reason"]}
    assert named == ({"train", "evaluate"} if case == "a base" else {uses})
    assert not any(step["cached"] for step in steps)
    say("adopt", path, home=home)
    say("resolve", path, home=home)
    say("deployments", path, "-o", tmp_path / "deploy.yaml", home=home)
    assert set(asked) == {True}
    run = loraline_here("run", path, home=home)
    assert (run.returncode > 0, False in asked) == (True, True)
    assert "is not in the local Hugging Face cache" in run.stderr
