"""Runs where the plug-in is installed: its entries are found, and one pipeline uses all of them.

`tests/test_plugins.py` runs this file, with the laws, in a process of its own.
"""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flows.spec import load_spec
from lora_engine.adapters import kinds
from lora_engine.catalog.formats import FORMATS
from lora_engine.catalog.kinds import KINDS
from lora_engine.compute import threads
from lora_engine.data.captioners import CAPTIONERS
from lora_engine.errors import InterruptedRun
from lora_engine.evaluation.metrics import METRICS
from lora_engine.families import families
from lora_engine.families.proof import recognize_family
from lora_engine.formats import codecs, read_adapter
from lora_engine.merging.methods import METHODS
from lora_engine.registries import Plugin
from lora_engine.training.methods import methods
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from registry.entities import ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.step import STEPS
from tests.flows.commands import say
from tests.flows.shared import draw_noise, trained_here

__all__ = ["trained_here"]
PLUGIN = Plugin("loraline-example", "1.0")
ENTRIES = {
    "example-scale": KINDS,
    "example-file": FORMATS,
    "example_net": families,
    "example-median": METHODS,
    "example-mirror": methods,
    "example_sharpness": METRICS,
    "example-names": CAPTIONERS,
    "example-list": STEPS,
}
USERS = {"captions", "list", "adapter", "merged", "report", "exports", "portable"}
"""The steps of the pipeline that use an entry of the plug-in or an adapter of its kind."""


@pytest.mark.parametrize("name", ENTRIES)
def test_the_example_has_its_entry(name: str) -> None:
    assert ENTRIES[name].plugin(name) == PLUGIN
    builtin = next(iter(ENTRIES[name]))
    assert ENTRIES[name].plugin(builtin) is None


def test_the_example_names_its_delta_and_its_codec() -> None:
    assert kinds["example-scale"].kind == "example-scale"
    assert codecs["example-file"].name == "example-file"


def test_the_family_of_the_example_is_proven_by_its_table() -> None:
    assert recognize_family({"stages_3_mix_qkv": (1920, 640)}).families == ("example_net",)
    assert recognize_family({"stages_20_mix_qkv": (1920, 640)}).families == ()


def test_a_pipeline_uses_every_entry_of_the_example_but_the_family(
    tmp_path: Path, trained_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, home = Path(shutil.copy(Path(__file__).with_name("pipeline.yaml"), tmp_path)), tmp_path / "home"
    (tmp_path / "images").mkdir()
    for index in range(4):
        draw_noise(tmp_path / "images" / f"red-dot-{index}.png", index)
    outcomes = json.loads(say("run", spec, "--json", home=home))["outcomes"]

    opened = Home.open(home)
    with closing(Lineage(opened.lineage_url)) as lineage:
        executions = {name: lineage.last_execution("example", name) for name in outcomes}
    used = {name: execution.settings.get("plugins") for name, execution in executions.items() if execution}
    assert used == {name: {PLUGIN.name: PLUGIN.version} if name in USERS else None for name in outcomes}

    files = {name: opened.work / name for name in ("list", "report", "exports", "adapter")}
    store = open_store(opened)
    for name, folder in files.items():
        store.checkout(ArtifactRef(**outcomes[name]["ref"]), folder)
    assert "red-dot-1.png: zorb red dot 1" in (files["list"] / "captions.txt").read_text()
    assert json.loads((files["report"] / "report.json").read_bytes())["metrics"]["example_sharpness"]["n"] > 0
    exported, _ = read_adapter(files["exports"] / "example-file")
    assert exported == read_adapter(files["adapter"])[0]
    assert {delta.kind for delta in exported.modules.values()} == {"example-scale"}

    # The law of every training method: an interrupted run resumes to the same bytes.
    store.checkout(ArtifactRef(**outcomes["captions"]["ref"]), opened.work / "dataset")
    settings = load_spec(spec).steps["adapter"].narrow(TrainSettings)
    assert settings.method.name == "example-mirror"
    steps: list[int] = []
    arguments = settings, "tiny", opened.work / "dataset", opened.work / "out", opened.work / "work"
    with pytest.raises(InterruptedRun), threads(1):
        train(*arguments, progress=lambda done, *_: steps.append(done), stop=lambda: 2 in steps)
    with threads(1):
        train(*arguments)
    trained = (files["adapter"] / "adapter.safetensors").read_bytes()
    assert (opened.work / "out" / "adapter.safetensors").read_bytes() == trained

    # An imported adapter of the plug-in's kind.
    statements = ("--name", "scale", "--base", "tiny", "--license", "CC0-1.0")
    say("import", files["exports"] / "example-file", *statements, home=home)
    portable = tmp_path / "portable.yaml"
    portable.write_text("name: portable\nsteps: {export: {uses: convert, adapter: scale@1, to: [loraline]}}\n")
    say("run", portable, home=home)

    assert all(step["cached"] for step in json.loads(say("plan", spec, "--json", home=home)))
    assert all(step["cached"] for step in json.loads(say("plan", portable, "--json", home=home)))
    for name, registry in ENTRIES.items():
        monkeypatch.setitem(registry._plugins, name, Plugin(PLUGIN.name, "1.1"))
    reasons = {step["name"]: step["reason"] for step in json.loads(say("plan", spec, "--json", home=home))}
    assert reasons["captions"] == "loraline-example: 1.0 -> 1.1"
    assert reasons["prepared"] == "cached"
    (step,) = json.loads(say("plan", portable, "--json", home=home))
    assert step["reason"] == "loraline-example: 1.0 -> 1.1"
