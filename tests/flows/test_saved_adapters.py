"""Tests that pipelines name adapters that a training saved on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.spec import load_spec
from lora_engine.errors import DataError
from lora_engine.formats import read_bundle
from registry.home import Home
from tasks.errors import SpecError
from tasks.steps.saved import Saved
from tests.flows.commands import say
from tests.flows.conftest import PREPARE
from tests.flows.made import run_line
from tests.flows.shared import training_here

Write = Callable[..., Path]
SAVING = (
    PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 4, batch: 2, save_every: 2}
  early:    {uses: evaluate, adapter: adapter@step-2, dataset: captions, seeds: 1, steps: 1, max_pictures: 1}
  mean:     {uses: merge, adapters: [adapter@step-2, adapter], weights: [0.5, 0.5], method: linear}
  release:  {uses: register, adapter: adapter@step-2, report: early}
"""
)


@pytest.mark.usefixtures("trained_here")
def test_a_saved_adapter_is_evaluated_merged_and_registered(pipeline: Write, home: Path, tmp_path: Path) -> None:
    path = pipeline(SAVING)
    spec = load_spec(path)
    assert isinstance(spec.steps["adapter@step-2"], Saved)
    names = list(spec.steps)
    assert names.index("adapter") < names.index("adapter@step-2") < names.index("early")
    version = run_line(path, Home.open(home))
    say("export", "try@1", "--to", "loraline", "-o", tmp_path / "early.safetensors", home=home)
    assert read_bundle(tmp_path / "early.safetensors").card.recipe["saved"]["step"] == 2
    planned = json.loads(say("plan", path, "--json", home=home))
    assert {step["name"]: step["cached"] for step in planned} == dict.fromkeys(spec.steps, True)
    lineage = json.loads(say("lineage", version.ref, "--json", home=home))
    assert "saved" in json.dumps(lineage)
    say("reproduce", version.ref, home=home)


def test_a_step_of_its_own_has_the_same_key(pipeline: Write) -> None:
    own = SAVING.replace("  early:", "  mine:     {uses: saved, adapter: adapter, at: 2}\n  early:")
    steps = load_spec(pipeline(own)).steps
    assert steps["mine"] == steps["adapter@step-2"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("adapter: adapter@step-2, dataset", "adapter: adapter@step-3, dataset", "multiples of save_every 2 up to 4"),
        ("adapter: adapter@step-2, dataset", "adapter: adapter@step-6, dataset", "multiples of save_every 2 up to 4"),
        (", save_every: 2", "", "set save_every in a train step, such as save_every: 2"),
        ("adapter: adapter@step-2, dataset", "adapter: captions@step-2, dataset", "saves no adapter at step 2"),
    ],
)
def test_a_step_without_a_saved_adapter_is_refused(pipeline: Write, before: str, after: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(pipeline(SAVING.replace(before, after)))
    assert message in str(caught.value)
    assert "pipeline.yaml:9" in caught.value.where or before == ", save_every: 2"


def test_a_name_that_is_no_step_of_the_file_is_still_a_registered_adapter(pipeline: Write) -> None:
    spec = load_spec(pipeline(SAVING.replace("[adapter@step-2, adapter]", "[other@step-2, adapter]")))
    assert "other@step-2" not in spec.steps


def test_a_training_that_saved_nothing_is_refused_with_what_to_do(pipeline: Write, home: Path) -> None:
    text = SAVING.replace("save_every: 2", "save_every: 2 epochs").replace("step-2", "step-3")
    with training_here(), pytest.raises(DataError) as caught:
        run_line(pipeline(text), Home.open(home))
    assert "no adapter of 'adapter' was saved at step 3" in str(caught.value)
    assert "Allowed: 4" in str(caught.value)
