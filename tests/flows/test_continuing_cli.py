"""Tests longer trainings, trainings that start from an adapter, and saved adapters, through pipelines and verbs."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from flows.plan import plan_pipeline
from flows.spec import load_spec
from flows.template import write_pipeline
from lora_engine.formats import read_bundle
from registry.lineage.record import Lineage
from tasks.errors import SpecError
from tasks.execution import execute
from tasks.job import Outcome
from tests.flows.commands import loraline_here, say
from tests.flows.made import bring_in, run_line, write_random
from tests.flows.shared import Trained, draw_noise

pytestmark = pytest.mark.usefixtures("trained_here")

CHILD = """\
name: child
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.5}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: zorb, class_word: ring}
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 3, steps: 2, init: INIT, save_every: 1}
  release:  {uses: register, adapter: adapter}
"""


def planned(trained: Trained, *changes: str) -> dict[str, dict[str, object]]:
    arguments = [part for change in changes for part in ("--set", f"adapter.{change}")]
    steps = json.loads(say("plan", trained.spec, *arguments, "--json", home=trained.home.path))
    return {step["name"]: step for step in steps}


def train(trained: Trained, *changes: str, force: bool = False) -> Outcome:
    """Executes the train step of the pipeline alone, with changes of its settings."""
    spec = load_spec(trained.spec, [f"adapter.{change}" for change in changes])
    step = next(step for step in plan_pipeline(spec, trained.home).steps if step.name == "adapter")
    with closing(Lineage(trained.home.lineage_url)) as lineage:
        run = lineage.start_run(spec.name, spec.source)
        try:
            return execute(step.job, step.inputs, trained.home, run.id, force=force)
        finally:
            lineage.finish_run(run.id, "COMPLETED")


def test_settings_without_effect_leave_everything_cached_and_plans_say_what_is_missing(trained: Trained) -> None:
    samples = 'samples={"every": 3, "prompts": ["a ring"]}'
    steps = planned(trained, "validate_every=2", "save_every=3", "checkpoint_every=7", samples)
    assert all(step["cached"] for step in steps.values())
    reason = str(steps["adapter"]["reason"])
    assert "validate_every: 0 -> 2" in reason
    assert "checkpoint_every" not in reason  # nothing in the result shows it
    assert "save_every: 0 -> 3" in reason
    assert "--force adapter" in reason
    shown = say("plan", trained.spec, "--set", "adapter.save_every=3", home=trained.home.path)
    assert "made with save_every: 0 -> 3: --force adapter repeats it" in shown
    assert planned(trained)["adapter"]["reason"] == "cached"


def test_results_under_the_keys_of_earlier_releases_stay_cached(trained: Trained) -> None:
    # Until 0.3, keys had the value of checkpoint_every, which is 3 here.
    spec = load_spec(trained.spec)
    step = next(step for step in plan_pipeline(spec, trained.home).steps if step.name == "adapter")
    earlier = step.job.earlier_key(step.inputs)
    assert earlier not in (None, step.job.key(step.inputs))
    with closing(sqlite3.connect(trained.home.path / "lineage.db")) as connection:
        changed = connection.execute("UPDATE executions SET key = ? WHERE uses = 'train'", [earlier]).rowcount
        connection.commit()
    assert changed == 1
    assert planned(trained)["adapter"]["reason"] == "cached"
    assert "adoptable" in str(planned(trained, "checkpoint_every=4")["adapter"]["reason"])


def test_plans_say_that_steps_begin_again_and_why(trained: Trained) -> None:
    reason = str(planned(trained, "rank=3")["adapter"]["reason"])
    assert "begins at step 0, not at step 12 of the last run (rank: the factors have another shape" in reason
    assert "`then` adds steps at other rates" in str(planned(trained, "steps=20")["adapter"]["reason"])


def test_more_steps_continue_from_the_last_state_with_the_digest_of_a_whole_run(trained: Trained) -> None:
    constant = ("schedule=constant", "save_every=1")
    train(trained, "steps=2", *constant)
    then = '{"steps": 1, "learning_rate": 1e-4}'
    longer = (*constant, "steps=4", f"then=[{then}]")
    assert str(planned(trained, *longer)["adapter"]["reason"]).endswith("continues from step 2")
    continued = train(trained, *longer)
    assert not continued.cached
    whole = train(trained, *longer, force=True)
    assert whole.ref == continued.ref
    longest = (*constant, "steps=4", f'then=[{then}, {{"steps": 2}}]')
    assert "continues from step 5" in str(planned(trained, *longest)["adapter"]["reason"])


@pytest.fixture
def child(trained: Trained) -> Callable[[str], Trained]:
    def write(init: str) -> Trained:
        path = trained.spec.with_name("child.yaml")
        path.write_text(CHILD.replace("INIT", init))
        return Trained(trained.home, path)

    return write


def test_a_child_names_its_parent_has_its_rights_and_its_saved_adapters_can_be_used(
    trained: Trained, child: Callable[[str], Trained], tmp_path: Path
) -> None:
    home = trained.home.path
    parent = bring_in(trained.home, write_random(tmp_path / "one.safetensors", 1), "one", license_id="CC-BY-NC-4.0")
    run_line(child("one@1").spec, trained.home)
    shown = json.loads(say("show", "child", "--json", home=home))
    assert any("sha256:" in parent for parent in shown["parents"])
    assert "CC-BY-NC-4.0" in shown["rights"]["terms"]["licenses"]
    assert not shown["rights"]["commercial"]
    assert parent.version.artifact.sha256 in say("lineage", "child@1", "--json", home=home)
    assert [entry["step"] for entry in shown["saved"]] == [1, 2]
    assert "saved at step" in say("show", "child", home=home)
    out = tmp_path / "out"
    out.mkdir()
    say("export", "child@1", "--to", "loraline", "--step", 1, "-o", out, home=home)
    file = out / "child-v1-step1.safetensors"
    assert read_bundle(file).card.recipe["saved"] == {"step": 1, "validation_loss": None}
    named = ("import", file, "--name", "early", "--base", "tiny", "--license")
    assert "not accepted" in loraline_here(*named, "MIT", home=home).stderr
    say(*named, "Apache-2.0 AND CC-BY-NC-4.0", home=home)
    say("generate", f"a zorb <lora:{file}:1>", "-o", tmp_path / "images", "-n", 1, "--steps", 1, home=home)
    refused = loraline_here("export", "child@1", "--to", "kohya", "--step", 3, "-o", out, home=home)
    assert refused.returncode == 2
    assert "no adapter of child@1 was saved at step 3" in refused.stderr
    assert "Allowed: 1, 2" in refused.stderr


def test_a_file_that_is_not_registered_can_be_continued_and_leaves_the_rights_unknown(
    trained: Trained, child: Callable[[str], Trained], tmp_path: Path
) -> None:
    file = write_random(trained.spec.with_name("parent.safetensors"), 1)
    version = run_line(child("parent.safetensors").spec, trained.home)
    rights = json.loads(say("show", version.ref, "--json", home=trained.home.path))["rights"]
    assert not rights["commercial"]
    assert any("adapter file that is not registered" in source["what"] for source in rights["sources"])
    spec = load_spec(trained.spec.with_name("child.yaml"))
    assert all(step.cached for step in plan_pipeline(spec, trained.home).steps)
    write_random(file, 2)
    assert not next(s for s in plan_pipeline(spec, trained.home).steps if s.name == "adapter").cached


@pytest.mark.parametrize(
    ("init", "problem"),
    [("nowhere", "names no step"), ("missing.safetensors", "does not exist"), ("photos", "produces a manifest")],
)
def test_an_initial_adapter_that_does_not_exist_is_refused_with_its_line(
    child: Callable[[str], Trained], init: str, problem: str
) -> None:
    with pytest.raises(SpecError, match=problem) as refusal:
        load_spec(child(init).spec)
    assert "child.yaml:8" in refusal.value.where


def test_train_takes_epochs_an_adapter_and_class_words_with_spaces(tmp_path: Path, home: Path) -> None:
    (tmp_path / "images").mkdir()
    draw_noise(tmp_path / "images" / "0.png", 0)
    file = write_random(tmp_path / "parent.safetensors", 1)

    def start(*arguments: object) -> str:
        words = ("--trigger", "sks", "--class", "golden retriever")
        done = loraline_here("train", tmp_path / "images", *words, *arguments, home=home)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "greater than or equal to 1" in start("--steps", "0")
    assert "epochs such as" in start("--steps", "ten")
    assert "neither a file nor a registered adapter" in start("--init", tmp_path / "none.safetensors")
    assert not list(tmp_path.glob("*.yaml"))
    path = write_pipeline(tmp_path / "images", "sks", "golden retriever", steps="2 epochs", init=str(file))
    adapter, captions = (load_spec(path).steps[name].model_dump() for name in ("adapter", "captions"))
    assert (adapter["steps"], adapter["init"], captions["class_word"]) == ("2 epochs", str(file), "golden retriever")
