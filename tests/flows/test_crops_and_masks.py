"""Crops, masks and enlargement through pipeline files and the verb `dataset`: real faces, models in keys, training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.manifest import Manifest
from lora_engine.files import canonical_json
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from tests.flows.commands import loraline_here, say
from tests.support.photographs import photograph
from tests.support.untrained_vision import write_clipseg, write_segformer, write_swin2sr

PORTRAITS = """\
name: portraits
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/, heldout: 0.5}
  prepared:
    uses: preprocess
    dataset: photos
    resolution: 32
    crop: {name: face, several: largest}
    mask: {name: faces, feather: 1}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: woman}
  adapter:
    uses: train
    dataset: captions
    method: {name: finetune, mask: {floor: 0.1}}
    rank: 2
    steps: 2
    batch: 1
    validate_every: 1
"""
MODELS = """\
name: models
base: tiny
steps:
  photos:   {uses: ingest, images: images/, alpha: mask, background: "#808080", masks: drawn/}
  prepared:
    uses: preprocess
    dataset: photos
    resolution: 64
    crop: {name: random, seed: 3}
    mask: {name: text, prompt: a cup, model: models/clipseg, threshold: 0.0}
    upscale: {name: swin2sr, model: ./models/swin}
"""


@pytest.fixture
def portraits(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    photograph("astronaut.png").save(tmp_path / "images" / "a.png")
    photograph("camera.png").save(tmp_path / "images" / "b.png")
    photograph("chelsea.png").save(tmp_path / "images" / "cat.png")
    spec = tmp_path / "portraits.yaml"
    spec.write_text(PORTRAITS)
    return spec


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "drawn").mkdir()
    sizes = {"a": (48, 40), "b": (44, 50)}
    for name, size in sizes.items():
        photograph("coffee.png").resize(size).save(tmp_path / "images" / f"{name}.png")
    Image.new("L", sizes["b"], 200).save(tmp_path / "drawn" / "b.png")
    write_clipseg(tmp_path / "models" / "clipseg")
    write_swin2sr(tmp_path / "models" / "swin")
    spec = tmp_path / "models.yaml"
    spec.write_text(MODELS)
    return spec


def manifest_of(home: Path, outcome: dict[str, Any]) -> Manifest:
    store = open_store(Home.open(home))
    return Manifest.model_validate_json(store.read(ArtifactRef(**outcome["ref"]), "manifest.json"))


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_faces_are_cropped_masked_and_trained_on(portraits: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    said = say("run", portraits, home=home)
    assert "prepared: 2 images; 2 with 1 face; 2 masks of faces" in re.sub(r" +", " ", said)
    assert "cat.png: shows no face, which crop 'face' needs" in said
    outcomes = json.loads(say("run", portraits, "--json", home=home))["outcomes"]
    assert all(outcome["cached"] for outcome in outcomes.values())
    manifest = manifest_of(home, outcomes["prepared"])
    assert [(image.width, image.height, image.mask is not None) for image in manifest.pictures] == [(32, 32, True)] * 2
    store = open_store(Home.open(home))
    record = json.loads(store.read(ArtifactRef(**outcomes["adapter"]["ref"]), "training.json"))
    assert [step for step, _ in record["validation_loss"]] == [0, 1, 2]


@pytest.mark.usefixtures("prefect_server")
def test_models_enter_keys_and_records_by_content(models: Path, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", models.parent
    assert "2 images; 1 masks of text 'a cup' (clipseg); 2 enlarged up to" in say("run", models, home=home)
    first = json.loads(say("run", models, "--json", home=home))["outcomes"]["prepared"]
    assert first["cached"]
    manifest = manifest_of(home, first)
    a, b = manifest.pictures
    assert a.preparation is not None
    assert b.preparation is not None
    assert (a.preparation.mask, b.preparation.mask) == ("text 'a cup' (clipseg)", None)
    assert a.preparation.upscaler == b.preparation.upscaler == "swin2sr (swin)"
    moved = models.read_text().replace("models/clipseg", str((folder / "moved").resolve()))
    (folder / "models" / "clipseg").rename(folder / "moved")
    models.write_text(moved)
    assert json.loads(say("run", models, "--json", home=home))["outcomes"]["prepared"]["cached"]
    write_clipseg(folder / "moved", seed=1)
    assert not json.loads(say("run", models, "--json", home=home))["outcomes"]["prepared"]["cached"]
    models.write_text(moved.replace("a cup", "the cup"))
    assert "run" in say("plan", models, home=home).split("prepared")[1].split("\n")[0]


@pytest.mark.usefixtures("prefect_server")
def test_a_background_is_masked(models: Path, tmp_path: Path) -> None:
    write_segformer(tmp_path / "models" / "segformer")
    option = "prepared.mask={name: background, model: ./models/segformer, threshold: 0.0, expand: 2, feather: 1.5}"
    assert "1 masks of background (segformer)" in say("run", models, "--set", option, home=tmp_path / "home")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prepared.crop=fase", "prepared.crop is 'fase'. Allowed: bucket, center, face, random, salient, subject."),
        ("prepared.crop={name: face, margn: 2}", "Allowed: level, margin, min_score, name, several."),
        ("prepared.crop={margin: 2}", "prepared.crop.name is missing. Fix: add name: ..."),
        ("prepared.mask=text", "'prepared.mask.text.prompt' is missing"),
        ("prepared.mask={name: text, prompt: a, model: ./none}", "'./none': neither a folder nor a hub id"),
        ("prepared.upscale=sharp", "Allowed: bicubic, lanczos, swin2sr."),
        ("photos.background=red", "photos.background is 'red'"),
        ("photos.masks=nowhere/", "photos.masks is 'nowhere/', which does not exist"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    models: Path, tmp_path: Path, option: str, message: str
) -> None:
    run = loraline_here("run", models, "--set", option, home=tmp_path / "home")
    assert run.returncode != 0
    assert "started" not in run.stderr
    assert message in re.sub(r"\s+", " ", run.stderr).replace(str(tmp_path.resolve()) + "/", "./")


def test_a_model_with_code_of_its_own_is_refused(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "clipseg" / "config.json"
    file.write_bytes(canonical_json(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))
    run = loraline_here("run", models, home=tmp_path / "home")
    assert run.returncode == 1
    assert "brings code of its own (auto_map in config.json), which is not run" in run.stderr


def test_the_preview_shows_prepared_images_and_masks(portraits: Path, tmp_path: Path) -> None:
    page, images = tmp_path / "sheet.html", portraits.parent / "images"
    arguments = ("--resolution", 64, "--crop", "face", "--mask", "{name: faces, minimum: 0.1}")
    facts = json.loads(say("dataset", images, *arguments, "-o", page, "--json", home=tmp_path / "home"))
    assert facts["prepared"] == "2 images; 2 with 1 face; 2 masks of faces; 1 enlarged up to 1.00 times by bicubic" or (
        facts["prepared"] == "2 images; 2 with 1 face; 2 masks of faces"
    )
    assert [item["source"] for item in facts["quarantined"]] == ["cat.png"]
    text = page.read_text()
    assert text.count('alt="prepared, red is left out"') == 2
    assert text.count("1 face, mask of faces") == 2
    assert "shows no face" in text.split("Not used")[1]
    assert re.findall(r'(?:src|href)="(?!data:image/)', text) == []
    assert not (tmp_path / "home").exists()


def test_the_preview_shows_masks_of_files_without_preparation(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    photograph("coffee.png").save(tmp_path / "images" / "a.png")
    mask = np.zeros((400, 600), dtype=np.uint8)
    mask[100:300, 200:400] = 255
    Image.fromarray(mask).save(tmp_path / "images" / "a-masklabel.png")
    photograph("rocket.jpg").save(tmp_path / "images" / "b.png")
    Image.new("L", photograph("rocket.jpg").size).save(tmp_path / "images" / "b.mask.png")
    page = tmp_path / "sheet.html"
    shown = say("dataset", tmp_path / "images", "-o", page, home=tmp_path / "home")
    assert page.read_text().count("<img ") == 4
    assert re.findall(r"^flaw +(.*)", shown, re.MULTILINE) == ["b.png: its mask is black: nothing of it counts"]


def test_the_preview_needs_a_resolution_to_prepare(portraits: Path, tmp_path: Path) -> None:
    run = loraline_here("dataset", portraits.parent / "images", "--crop", "face", home=tmp_path / "home")
    assert (run.returncode, "crop needs a resolution. Fix: set --resolution" in run.stderr) == (1, True)
