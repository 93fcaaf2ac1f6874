"""`loraline train IMAGES --auto` chooses every setting, and records the evidence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from flows.spec import load_spec
from flows.template import write_pipeline
from lora_engine.formats import read_bundle
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from tasks.errors import SpecError
from tests.flows.commands import loraline_here, say

IMAGES = Path(__file__).parents[2] / "examples" / "zorb" / "images"


def test_one_line_writes_a_pipeline_of_automatic_settings(tmp_path: Path, home: Path) -> None:
    (tmp_path / "images").mkdir()
    done = loraline_here("train", tmp_path / "images", home=home)
    assert done.returncode == 2
    assert "add --trigger WORD, or --auto" in done.stderr
    path = write_pipeline(tmp_path / "images", "sks", "thing", auto=True)
    adapter = yaml.safe_load(path.read_text())["steps"]["adapter"]
    automatic = {name for name, value in adapter.items() if value == "auto"}
    assert automatic == {"rank", "targets", "learning_rate", "steps"} | ({"precision"} & automatic)
    assert load_spec(path).steps["adapter"].model_dump()["schedule"]["name"] == "constant"


def test_a_given_number_of_steps_and_an_initial_adapter_stay(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "parent.safetensors"
    file.write_bytes(b"only its path matters here")
    path = write_pipeline(tmp_path / "images", "sks", "thing", auto=True, steps=50, init=str(file))
    adapter = load_spec(path).steps["adapter"].model_dump()
    assert (adapter["steps"], adapter["rank"], adapter["schedule"]["name"]) == (50, 8, "cosine")
    assert adapter["learning_rate"] == adapter["targets"] == "auto"
    text = path.read_text().replace("rank: 8   ", "rank: auto")
    path.write_text(text)
    with pytest.raises(SpecError, match="rank auto cannot start from an adapter"):
        load_spec(path)


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_a_run_chooses_the_settings_and_records_the_evidence(tmp_path: Path, home: Path) -> None:
    # Eight held-out images are the fewest of which half is left for the evaluation.
    (tmp_path / "images").mkdir()
    for image in sorted(IMAGES.glob("*.png"))[:16]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, tmp_path / "images")
    training = {
        "uses": "train",
        "dataset": "captions",
        "method": "finetune",
        "batch": 2,
        "steps": 4,
        **dict.fromkeys(("rank", "learning_rate", "targets"), "auto"),
        "best_checkpoint": {"every": 2},
    }
    steps = {
        "photos": {"uses": "ingest", "images": "images/", "heldout": 0.5},
        "prepared": {"uses": "preprocess", "dataset": "photos", "resolution": 32},
        "captions": {"uses": "caption", "dataset": "prepared", "captioner": "files", "trigger": "zorb"},
        "adapter": training,
    }
    path = tmp_path / "auto.yaml"
    path.write_text(yaml.safe_dump({"name": "auto", "base": "tiny", "steps": steps}, sort_keys=False))
    outcomes = json.loads(say("run", path, "--json", home=home))["outcomes"]
    store, ref = open_store(Home(home)), ArtifactRef(**outcomes["adapter"]["ref"])
    record = json.loads(store.read(ref, "training.json"))
    assert set(record["automatic"]) == {"targets", "learning_rate", "rank"}
    assert record["chosen"]["from"] == [2, 4]
    # Half of the eight held-out images are left for the evaluation.
    assert len(record["chosen"]["on"]) == 4
    (tmp_path / "adapter.safetensors").write_bytes(store.read(ref, "adapter.safetensors"))
    recipe = read_bundle(tmp_path / "adapter.safetensors").card.recipe
    assert recipe["rank"] == record["automatic"]["rank"]["chosen"]
    assert recipe["learning_rate"] == record["automatic"]["learning_rate"]["chosen"]
    assert recipe["done"]["best_checkpoint"]["among"] == 2
