from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lora_engine.data.caption import caption
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import read_mask
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
from lora_engine.errors import DataError

Add = Callable[..., Path]


def add_mask(path: Path, width: int = 40, height: int = 32, left: int = 10) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = np.zeros((height, width), dtype=np.uint8)
    values[:, left:] = 255
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize("name", ["a.mask.png", "masks/a.png", "masks/a.webp", "a.MASK.PNG"])
def test_a_mask_is_recorded_with_its_image(images: Path, tmp_path: Path, add_image: Add, name: str) -> None:
    add_image("a.jpg")
    add_image("b.png")
    add_mask(images / name)
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    first, second = manifest.pictures
    assert first.mask == f"masks/{first.sha256[:16]}.png"
    assert second.mask is None
    assert manifest.quarantined == ()
    mask = open_image(tmp_path / "out" / first.mask)
    assert mask.size == (40, 32)
    values = read_mask(tmp_path / "out" / first.mask)
    assert values.shape == (1, 32, 40)
    if name.endswith("webp"):
        assert values.mean() == pytest.approx(0.75, abs=0.02)
    else:
        assert torch.equal(values[0, 0], (torch.arange(40) >= 10).float())


def test_masks_of_a_subfolder_belong_to_that_subfolder(images: Path, tmp_path: Path, add_image: Add) -> None:
    for folder in ("one", "two"):
        add_image(f"{folder}/a.png")
    add_mask(images / "one" / "masks" / "a.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [image.mask is not None for image in manifest.pictures] == [True, False]


@pytest.mark.parametrize(
    ("break_mask", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "its mask a.mask.png is broken"),
        (lambda path: path.write_text("no"), "its mask a.mask.png is not a readable image"),
        (lambda path: add_mask(path, width=41), "its mask a.mask.png has 41 x 32 pixels; allowed: the size of the i"),
        (lambda path: add_mask(path.parent / "masks" / "a.png"), "has 2 masks: a.mask.png, masks/a.png"),
    ],
)
def test_an_image_with_an_unusable_mask_is_quarantined(
    images: Path, tmp_path: Path, add_image: Add, break_mask: Callable[[Path], Any], reason: str
) -> None:
    add_image("a.png")
    add_image("b.png")
    break_mask(add_mask(images / "a.mask.png"))
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [image.source for image in manifest.pictures] == ["b.png"]
    reasons = {item.source: item.reason for item in manifest.quarantined}
    assert reasons["a.png"].startswith(reason)
    assert "no used image" in reasons["a.mask.png"]
    assert not (tmp_path / "out" / "masks").exists()


def test_a_mask_without_an_image_is_quarantined(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png")
    add_mask(images / "masks" / "b.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [image.source for image in manifest.pictures] == ["a.png"]
    assert [item.source for item in manifest.quarantined] == ["masks/b.png"]


@pytest.mark.parametrize("crop", ["center", "salient", "bucket"])
@pytest.mark.parametrize(("width", "height"), [(80, 40), (36, 50), (20, 18)])
def test_a_mask_is_cropped_and_resized_like_its_image(
    images: Path, tmp_path: Path, crop: str, width: int, height: int
) -> None:
    # Image and mask have the same white box, and must agree after any crop.
    values = np.zeros((height, width), dtype=np.uint8)
    values[height // 4 : height // 2, width // 2 :] = 255
    Image.fromarray(values).convert("RGB").save(images / "a.png")
    Image.fromarray(values).save(images / "a.mask.png")
    ingest(images, tmp_path / "one", IngestSettings())
    buckets = {"step": 8, "enlarge": 4.0} if crop == "bucket" else None
    settings = PreprocessSettings.model_validate({"resolution": 32, "crop": crop, "buckets": buckets})
    (image,) = preprocess(tmp_path / "one", tmp_path / "two", settings).pictures
    assert image.mask is not None
    pixels = np.asarray(open_image(tmp_path / "two" / image.file).convert("L"), dtype=int)
    mask = np.asarray(open_image(tmp_path / "two" / image.mask).convert("L"), dtype=int)
    assert pixels.shape == mask.shape == (image.height, image.width)
    assert (pixels > 128).any()
    # The filters differ by less than a pixel at the edges of the box.
    assert ((pixels > 128) == (mask > 128)).mean() > 0.98
    shifted = np.roll(mask, (4, 4), axis=(0, 1))
    assert ((pixels > 128) == (shifted > 128)).mean() < 0.95


def test_caption_keeps_masks_and_repeats(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png", caption="a star")
    add_mask(images / "a.mask.png")
    ingest(images, tmp_path / "one", IngestSettings(repeats={"*": 3}))
    (image,) = caption(tmp_path / "one", tmp_path / "two", CaptionSettings()).pictures
    assert image.repeats == 3
    assert image.mask is not None
    assert (tmp_path / "two" / image.mask).read_bytes() == (tmp_path / "one" / image.mask).read_bytes()
    (tmp_path / "two" / image.mask).unlink()
    with pytest.raises(DataError, match="1 of 2 images are missing, first masks/"):
        Manifest.load(tmp_path / "two")


def test_folder_names_set_the_repeats(images: Path, tmp_path: Path, add_image: Add) -> None:
    for name in ("plain.png", "10_face/a.png", "10_face/3_close/b.png", "10_face/rest/c.png", "x10_y/d.png"):
        add_image(name)
    manifest = ingest(images, tmp_path / "out", IngestSettings(repeats="folders"))
    repeats = {image.source: image.repeats for image in manifest.pictures}
    assert repeats == {
        "plain.png": 1,
        "10_face/a.png": 10,
        "10_face/3_close/b.png": 3,
        "10_face/rest/c.png": 10,
        "x10_y/d.png": 1,
    }
    default = ingest(images, tmp_path / "default", IngestSettings())
    assert {image.repeats for image in default.pictures} == {1}


def test_images_in_a_folder_with_an_invalid_number_are_quarantined(
    images: Path, tmp_path: Path, add_image: Add
) -> None:
    add_image("a.png")
    add_image("0_none/b.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings(repeats="folders"))
    assert [item.source for item in manifest.quarantined] == ["0_none/b.png"]
    assert "sets 0 repeats" in manifest.quarantined[0].reason


def test_patterns_set_the_repeats_and_the_last_match_wins(images: Path, tmp_path: Path, add_image: Add) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        add_image(name)
    settings = IngestSettings(repeats={"*.png": 2, "sub/*": 5, "b.png": 4})
    manifest = ingest(images, tmp_path / "out", settings)
    assert {image.source: image.repeats for image in manifest.pictures} == {"a.png": 2, "b.png": 4, "sub/c.png": 5}
    with pytest.raises(DataError, match=r"the pattern 'd\.png'"):
        ingest(images, tmp_path / "other", IngestSettings(repeats={"d.png": 2}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("repeats", [{"a": 0}, {"a": 10_001}, "names"])
def test_invalid_repeats_are_refused(repeats: Any) -> None:
    with pytest.raises(ValidationError, match="repeats"):
        IngestSettings(repeats=repeats)
