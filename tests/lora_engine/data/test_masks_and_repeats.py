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


@pytest.mark.parametrize("place", ["a.mask.png", "masks/a.png", "masks/a.webp", "a.MASK.PNG"])
def test_a_mask_beside_a_picture_goes_with_it(images: Path, tmp_path: Path, add_image: Add, place: str) -> None:
    add_image("a.jpg")
    add_image("b.png")
    add_mask(images / place)
    found = ingest(images, tmp_path / "out", IngestSettings())
    first, second = found.pictures
    assert first.mask == f"masks/{first.sha256[:16]}.png"
    assert second.mask is None
    assert found.quarantined == ()
    mask = open_image(tmp_path / "out" / first.mask)
    assert mask.size == (40, 32)
    values = read_mask(tmp_path / "out" / first.mask)
    assert values.shape == (1, 32, 40)
    if place.endswith("webp"):
        assert values.mean() == pytest.approx(0.75, abs=0.02)
    else:
        assert torch.equal(values[0, 0], (torch.arange(40) >= 10).float())


def test_masks_of_a_subfolder_belong_to_that_subfolder(images: Path, tmp_path: Path, add_image: Add) -> None:
    for folder in ("one", "two"):
        add_image(f"{folder}/a.png")
    add_mask(images / "one" / "masks" / "a.png")
    found = ingest(images, tmp_path / "out", IngestSettings())
    assert [picture.mask is not None for picture in found.pictures] == [True, False]


@pytest.mark.parametrize(
    ("break_mask", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "its mask a.mask.png is broken"),
        (lambda path: path.write_text("no"), "its mask a.mask.png is not a picture"),
        (lambda path: add_mask(path, width=41), "its mask a.mask.png has 41 x 32 pixels; allowed: those of the pict"),
        (lambda path: add_mask(path.parent / "masks" / "a.png"), "has 2 masks: a.mask.png, masks/a.png"),
    ],
)
def test_a_picture_whose_mask_cannot_be_used_is_quarantined(
    images: Path, tmp_path: Path, add_image: Add, break_mask: Callable[[Path], Any], reason: str
) -> None:
    add_image("a.png")
    add_image("b.png")
    break_mask(add_mask(images / "a.mask.png"))
    found = ingest(images, tmp_path / "out", IngestSettings())
    assert [picture.source for picture in found.pictures] == ["b.png"]
    reasons = {item.source: item.reason for item in found.quarantined}
    assert reasons["a.png"].startswith(reason)
    assert "no picture that is used" in reasons["a.mask.png"]
    assert not (tmp_path / "out" / "masks").exists()


def test_a_mask_without_a_picture_is_never_trained_on(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png")
    add_mask(images / "masks" / "b.png")
    found = ingest(images, tmp_path / "out", IngestSettings())
    assert [picture.source for picture in found.pictures] == ["a.png"]
    assert [item.source for item in found.quarantined] == ["masks/b.png"]


@pytest.mark.parametrize("crop", ["center", "salient", "bucket"])
@pytest.mark.parametrize(("width", "height"), [(80, 40), (36, 50), (20, 18)])
def test_a_mask_is_cropped_and_resized_as_its_picture(
    images: Path, tmp_path: Path, crop: str, width: int, height: int
) -> None:
    # Image and mask show the same white box; wherever the crop falls, they must still agree.
    values = np.zeros((height, width), dtype=np.uint8)
    values[height // 4 : height // 2, width // 2 :] = 255
    Image.fromarray(values).convert("RGB").save(images / "a.png")
    Image.fromarray(values).save(images / "a.mask.png")
    ingest(images, tmp_path / "one", IngestSettings())
    buckets = {"step": 8, "enlarge": 4.0} if crop == "bucket" else None
    settings = PreprocessSettings.model_validate({"resolution": 32, "crop": crop, "buckets": buckets})
    (picture,) = preprocess(tmp_path / "one", tmp_path / "two", settings).pictures
    assert picture.mask is not None
    pixels = np.asarray(open_image(tmp_path / "two" / picture.file).convert("L"), dtype=int)
    mask = np.asarray(open_image(tmp_path / "two" / picture.mask).convert("L"), dtype=int)
    assert pixels.shape == mask.shape == (picture.height, picture.width)
    assert (pixels > 128).any()
    # The filters differ at the edges of the box, by less than a pixel's worth.
    assert ((pixels > 128) == (mask > 128)).mean() > 0.98
    shifted = np.roll(mask, (4, 4), axis=(0, 1))
    assert ((pixels > 128) == (shifted > 128)).mean() < 0.95


def test_caption_carries_masks_and_repeats_on(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png", caption="a star")
    add_mask(images / "a.mask.png")
    ingest(images, tmp_path / "one", IngestSettings(repeats={"*": 3}))
    (picture,) = caption(tmp_path / "one", tmp_path / "two", CaptionSettings()).pictures
    assert picture.repeats == 3
    assert picture.mask is not None
    assert (tmp_path / "two" / picture.mask).read_bytes() == (tmp_path / "one" / picture.mask).read_bytes()
    (tmp_path / "two" / picture.mask).unlink()
    with pytest.raises(DataError, match="1 of 2 pictures are missing, first masks/"):
        Manifest.load(tmp_path / "two")


def test_folders_say_how_often_their_pictures_come_up(images: Path, tmp_path: Path, add_image: Add) -> None:
    for name in ("plain.png", "10_face/a.png", "10_face/3_close/b.png", "10_face/rest/c.png", "x10_y/d.png"):
        add_image(name)
    found = ingest(images, tmp_path / "out", IngestSettings(repeats="folders"))
    repeats = {picture.source: picture.repeats for picture in found.pictures}
    assert repeats == {
        "plain.png": 1,
        "10_face/a.png": 10,
        "10_face/3_close/b.png": 3,
        "10_face/rest/c.png": 10,
        "x10_y/d.png": 1,
    }
    untold = ingest(images, tmp_path / "untold", IngestSettings())
    assert {picture.repeats for picture in untold.pictures} == {1}


def test_a_folder_with_no_sensible_number_is_left_out_and_said(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png")
    add_image("0_none/b.png")
    found = ingest(images, tmp_path / "out", IngestSettings(repeats="folders"))
    assert [item.source for item in found.quarantined] == ["0_none/b.png"]
    assert "asks for 0 repeats" in found.quarantined[0].reason


def test_patterns_say_how_often_pictures_come_up_and_the_last_counts(
    images: Path, tmp_path: Path, add_image: Add
) -> None:
    for name in ("a.png", "b.png", "sub/c.png"):
        add_image(name)
    settings = IngestSettings(repeats={"*.png": 2, "sub/*": 5, "b.png": 4})
    found = ingest(images, tmp_path / "out", settings)
    assert {picture.source: picture.repeats for picture in found.pictures} == {"a.png": 2, "b.png": 4, "sub/c.png": 5}
    with pytest.raises(DataError, match=r"repeats names 'd\.png'"):
        ingest(images, tmp_path / "other", IngestSettings(repeats={"d.png": 2}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("repeats", [{"a": 0}, {"a": 10_001}, "names"])
def test_repeats_that_mean_nothing_are_refused(repeats: Any) -> None:
    with pytest.raises(ValidationError, match="repeats"):
        IngestSettings(repeats=repeats)
