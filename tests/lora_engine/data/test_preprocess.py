from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from lora_engine.data.crops import CROPS
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.preprocess import preprocess, to_square
from lora_engine.data.spec import Buckets, IngestSettings, PreprocessSettings
from lora_engine.framing import Framing

Add = Callable[..., Path]


def corner_detail(width: int, height: int, left: int, top: int) -> Image.Image:
    values = np.full((height, width, 3), 128, dtype=np.uint8)
    values[top : top + 8, left : left + 8] = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    return Image.fromarray(values)


@pytest.mark.parametrize("crop", ["center", "salient"])
@pytest.mark.parametrize(("width", "height"), [(40, 32), (7, 300), (16, 16), (1, 1), (333, 100)])
def test_every_size_becomes_the_target_square(crop: str, width: int, height: int) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert to_square(Image.fromarray(noise), 16, crop).size == (16, 16)


def test_salient_keeps_the_detail_that_center_crops() -> None:
    image = corner_detail(96, 32, 84, 12)
    assert np.asarray(to_square(image, 32, "salient")).std() > 10
    assert np.asarray(to_square(image, 32, "center")).std() == 0


@pytest.mark.parametrize(("width", "height"), [(96, 32), (32, 96), (64, 64)])
def test_salient_equals_center_without_contrast(width: int, height: int) -> None:
    flat = Image.new("RGB", (width, height), (9, 9, 9))
    assert CROPS["salient"](flat, (32, 32)) == CROPS["center"](flat, (32, 32))


def test_an_image_of_the_target_size_is_unchanged() -> None:
    image = corner_detail(32, 32, 3, 3)
    assert np.array_equal(np.asarray(to_square(image, 32, "center")), np.asarray(image))


def test_preprocess_keeps_names_captions_and_quarantine(
    images: Path, tmp_path: Path, add_image: Callable[..., Path]
) -> None:
    add_image("a.png", width=50, height=90, caption="a star")
    (images / "b.png").write_text("no")
    before = ingest(images, tmp_path / "one", IngestSettings())
    after = preprocess(tmp_path / "one", tmp_path / "two", PreprocessSettings(resolution=24, crop="salient"))
    assert after == Manifest.load(tmp_path / "two")
    assert after.quarantined == before.quarantined
    image = after.pictures[0]
    assert (image.file, image.sha256, image.caption) == (
        before.pictures[0].file,
        before.pictures[0].sha256,
        "a star",
    )
    assert (image.width, image.height) == open_image(tmp_path / "two" / image.file).size == (24, 24)


@pytest.mark.parametrize("resolution", [0, 8, 33, 5000])
def test_an_unusable_resolution_is_refused(resolution: int) -> None:
    with pytest.raises(ValidationError, match="resolution"):
        PreprocessSettings(resolution=resolution)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "30000 x 4 pixels are too small for 256 x 256, enlarged at most 2 times"),
        ({"enlarge": 63}, "30000 x 4 pixels are too small for 256 x 256, enlarged at most 63 times"),
        (
            {"crop": "bucket", "buckets": {"enlarge": 64}},
            "30000 x 4 pixels are too elongated: they would be resized to 960000 x 128",
        ),
    ],
)
def test_an_elongated_image_is_quarantined_and_the_others_are_used(
    images: Path, tmp_path: Path, add_image: Add, settings: dict[str, object], reason: str
) -> None:
    add_image("good.png", width=256, height=200)
    add_image("ribbon.png", width=30_000, height=4)
    ingest(images, tmp_path / "one", IngestSettings())
    wanted = PreprocessSettings.model_validate({"resolution": 256, **settings})
    manifest = preprocess(tmp_path / "one", tmp_path / "two", wanted)
    assert [image.source for image in manifest.pictures] == ["good.png"]
    assert manifest.quarantined[0].source == "ribbon.png"
    assert reason in manifest.quarantined[0].reason


@pytest.mark.parametrize("crop", ["center", "salient"])
def test_an_elongated_image_is_cropped_before_it_is_enlarged(
    images: Path, tmp_path: Path, add_image: Add, crop: str
) -> None:
    path = add_image("ribbon.png", width=30_000, height=4)
    add_image("ribbon.mask.png", width=30_000, height=4)
    ingest(images, tmp_path / "one", IngestSettings())
    wanted = PreprocessSettings.model_validate({"resolution": 256, "enlarge": 64, "crop": crop})
    manifest = preprocess(tmp_path / "one", tmp_path / "two", wanted)
    assert [(image.width, image.height) for image in manifest.pictures] == [(256, 256)]
    prepared = open_image(tmp_path / "two" / manifest.pictures[0].file)
    assert open_image(tmp_path / "two" / str(manifest.pictures[0].mask)).size == prepared.size == (256, 256)
    if crop == "center":
        center = open_image(path).crop((14_998, 0, 15_002, 4))
        assert np.array_equal(prepared, center.resize((256, 256), Image.Resampling.BICUBIC))


def test_enlarge_belongs_to_squares() -> None:
    with pytest.raises(ValidationError, match=r"enlarge belongs to squares; set buckets\.enlarge for crop 'bucket'"):
        PreprocessSettings(resolution=64, crop="bucket", enlarge=2)


def framings(out: Path) -> list[Framing | None]:
    return [image.framing for image in Manifest.load(out).pictures]


@pytest.mark.parametrize("crop", ["center", "salient", "bucket"])
def test_a_framing_says_which_pixels_of_the_resized_image_are_kept(
    images: Path, tmp_path: Path, add_image: Add, crop: Literal["center", "salient", "bucket"]
) -> None:
    add_image("wide.png", width=90, height=40)
    ingest(images, tmp_path / "one", IngestSettings())
    buckets = Buckets(step=8) if crop == "bucket" else None
    settings = PreprocessSettings(resolution=32, crop=crop, buckets=buckets, original_sizes=True)
    image = preprocess(tmp_path / "one", tmp_path / "two", settings).pictures[0]
    framing = image.framing
    assert framing is not None
    assert framing.original == (40, 90)
    assert framing.size == (image.height, image.width)
    assert framing.resized != framing.size
    height, width = framing.resized
    resized = open_image(tmp_path / "one" / image.file).resize((width, height), Image.Resampling.LANCZOS)
    box = (framing.left, framing.top, framing.left + image.width, framing.top + image.height)
    kept = np.asarray(resized.crop(box))
    assert np.array_equal(kept, np.asarray(open_image(tmp_path / "two" / image.file)))
    assert not np.array_equal(kept, np.asarray(resized.crop((0, 0, image.width, image.height))))


def test_a_mirrored_image_has_the_offset_of_the_mirrored_crop() -> None:
    framing = Framing(original=(40, 90), resized=(32, 72), top=0, left=10, size=(32, 32))
    assert framing.mirrored().left == 30
    assert framing.mirrored().mirrored() == framing


def test_without_original_sizes_a_manifest_has_the_bytes_of_earlier_releases(
    images: Path, tmp_path: Path, add_image: Add
) -> None:
    add_image("a.png", width=50, height=90)
    ingest(images, tmp_path / "one", IngestSettings())
    preprocess(tmp_path / "one", tmp_path / "two", PreprocessSettings(resolution=24))
    assert framings(tmp_path / "two") == [None]
    assert "framing" not in (tmp_path / "two" / "manifest.json").read_text()


def test_a_second_preprocess_keeps_the_first_original(images: Path, tmp_path: Path, add_image: Add) -> None:
    add_image("a.png", width=100, height=50)
    ingest(images, tmp_path / "one", IngestSettings())
    preprocess(tmp_path / "one", tmp_path / "two", PreprocessSettings(resolution=48, original_sizes=True))
    preprocess(tmp_path / "two", tmp_path / "three", PreprocessSettings(resolution=24, original_sizes=True))
    assert framings(tmp_path / "two") == [Framing(original=(50, 100), resized=(48, 96), top=0, left=24, size=(48, 48))]
    assert framings(tmp_path / "three") == [
        Framing(original=(50, 100), resized=(24, 48), top=0, left=12, size=(24, 24))
    ]


def test_a_framing_outside_of_its_image_is_refused() -> None:
    with pytest.raises(ValidationError, match="32 x 32 pixels at row 0, column 41 does not fit into 32 x 72"):
        Framing(original=(40, 90), resized=(32, 72), top=0, left=41, size=(32, 32))
