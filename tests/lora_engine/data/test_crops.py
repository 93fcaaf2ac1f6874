"""Crops at random, around the subject of a mask and around faces; enlargement; what the manifest records."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.errors import DataError, SettingsError
from tests.support.photographs import photograph
from tests.support.untrained_vision import write_clipseg, write_swin2sr

Add = Callable[..., Path]


@pytest.fixture
def prepare(images: Path, tmp_path: Path) -> Callable[..., Manifest]:
    """Ingests the folder and prepares it; the result is in `prepared`."""

    def run(**settings: Any) -> Manifest:
        ingest(images, tmp_path / "ingested", IngestSettings())
        wanted = PreprocessSettings.model_validate({"resolution": 64, **settings})
        return preprocess(tmp_path / "ingested", tmp_path / "prepared", wanted)

    return run


def box_of(entry: ImageEntry) -> tuple[int, int, int, int]:
    assert entry.preparation is not None
    assert entry.preparation.box is not None
    return entry.preparation.box


def add_mask(images: Path, name: str, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(images / name)


def pasted(*faces: tuple[int, int], size: tuple[int, int] = (1024, 512)) -> Image.Image:
    canvas = Image.new("RGB", size, (90, 110, 120))
    for corner in faces:
        canvas.paste(photograph("astronaut.png"), corner)
    return canvas


def test_a_random_crop_is_recorded_and_depends_on_seed_and_image_only(
    images: Path, tmp_path: Path, add_image: Add, prepare: Callable[..., Manifest]
) -> None:
    paths = [add_image(f"{number}.png", width=400, height=100) for number in range(6)]
    manifest = prepare(crop="random")
    boxes = [box_of(entry) for entry in manifest.pictures]
    assert all(right - left == bottom - top == 100 for left, top, right, bottom in boxes)
    assert len({left for left, *_ in boxes}) > 3
    for path, entry, box in zip(paths, manifest.pictures, boxes, strict=True):
        expected = open_image(path).crop(box).resize((64, 64), Image.Resampling.LANCZOS)
        assert np.array_equal(open_image(tmp_path / "prepared" / entry.file), expected)
    assert prepare(crop="random") == manifest
    paths[0].unlink()
    assert [box_of(entry) for entry in prepare(crop="random").pictures] == boxes[1:]
    assert [box_of(entry) for entry in prepare(crop={"name": "random", "seed": 1}).pictures] != boxes[1:]


@pytest.mark.parametrize(
    ("subject", "margin", "expected"),
    [
        ((200, 50, 300, 150), 1.0, (200, 50, 300, 150)),
        ((200, 50, 300, 150), 1.5, (175, 25, 325, 175)),
        ((200, 90, 300, 110), 1.0, (200, 50, 300, 150)),
        ((0, 0, 100, 100), 1.5, (0, 0, 150, 150)),
        ((350, 150, 400, 200), 2.0, (300, 100, 400, 200)),
        ((40, 0, 360, 200), 1.0, (100, 0, 300, 200)),
        ((200, 100, 204, 104), 1.0, (186, 86, 218, 118)),
    ],
    ids=["tight", "margin", "square", "corner", "other corner", "wider than high", "at most enlarged twice"],
)
def test_a_subject_crop_shows_what_the_mask_marks(
    images: Path, add_image: Add, prepare: Callable[..., Manifest], subject: Any, margin: float, expected: Any
) -> None:
    add_image("a.png", width=400, height=200)
    add_mask(images, "a.mask.png", (400, 200), subject)
    (entry,) = prepare(crop={"name": "subject", "margin": margin}).pictures
    assert box_of(entry) == expected


def test_a_subject_crop_refuses_images_without_a_subject_by_name(
    images: Path, add_image: Add, prepare: Callable[..., Manifest]
) -> None:
    add_image("good.png", width=100, height=100)
    add_mask(images, "good.mask.png", (100, 100), (10, 10, 90, 90))
    add_image("black.png", width=100, height=100)
    add_mask(images, "black.mask.png", (100, 100), (0, 0, 0, 0))
    add_image("none.png", width=100, height=100)
    manifest = prepare(crop="subject")
    assert [entry.source for entry in manifest.pictures] == ["good.png"]
    assert {item.source: item.reason for item in manifest.quarantined} == {
        "black.png": "its mask marks nothing, and crop 'subject' needs a subject",
        "none.png": "has no mask, which crop 'subject' needs",
    }


def test_face_crops_show_one_face_and_count_them(
    images: Path, tmp_path: Path, prepare: Callable[..., Manifest]
) -> None:
    pasted((300, 0)).save(images / "one.png")
    pasted((0, 0), (512, 0)).save(images / "two.png")
    photograph("chelsea.png").save(images / "cat.png")
    manifest = prepare(crop={"name": "face", "margin": 2.0})
    (entry,) = manifest.pictures
    left, top, right, bottom = box_of(entry)
    assert (left + right) / 2 == pytest.approx(526, abs=12)
    assert (top + bottom) / 2 == pytest.approx(121, abs=12)
    assert right - left == pytest.approx(212, abs=20)
    assert entry.preparation is not None
    assert entry.preparation.faces == 1
    assert {item.source: item.reason for item in manifest.quarantined} == {
        "cat.png": "shows no face, which crop 'face' needs",
        "two.png": "shows 2 faces; allowed: one face, or `several: largest`",
    }
    assert manifest.describe_preparation() == "1 images; 1 with 1 face"
    larger = prepare(crop={"name": "face", "several": "largest"})
    assert sorted(e.preparation.faces for e in larger.pictures if e.preparation and e.preparation.faces) == [1, 2]


def test_a_leveled_face_has_level_eyes(images: Path, tmp_path: Path, prepare: Callable[..., Manifest]) -> None:
    from lora_engine.data.faces import find_faces

    turned = photograph("astronaut.png").rotate(20, Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))
    turned.save(images / "a.png")
    slopes = {}
    for level in (False, True):
        (entry,) = prepare(resolution=192, crop={"name": "face", "margin": 1.8, "level": level}).pictures
        (face,) = find_faces(open_image(tmp_path / "prepared" / entry.file))
        (x1, y1), (x2, y2) = face.eyes
        slopes[level] = abs(y2 - y1) / (x2 - x1)
    assert slopes[False] > 0.2
    assert slopes[True] < 0.1
    assert entry.preparation is not None
    assert entry.preparation.angle == pytest.approx(-17, abs=6)


def test_a_face_at_the_edge_is_not_leveled_into_black_corners(
    images: Path, tmp_path: Path, prepare: Callable[..., Manifest]
) -> None:
    turned = photograph("astronaut.png").rotate(20, Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))
    turned.crop((100, 60, 420, 380)).save(images / "a.png")
    (entry,) = prepare(crop={"name": "face", "margin": 3.0, "level": True}).pictures
    left, top, right, bottom = box_of(entry)
    expected = open_image(images / "a.png").crop((left, top, right, bottom)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(open_image(tmp_path / "prepared" / entry.file), expected)
    assert entry.preparation is not None
    assert entry.preparation.angle is None


def test_masks_are_cropped_with_their_images(images: Path, tmp_path: Path, prepare: Callable[..., Manifest]) -> None:
    rows, columns = np.mgrid[0:200, 0:300]
    values = ((rows + columns) % 256).astype(np.uint8)
    Image.fromarray(np.stack([values] * 3, axis=-1)).save(images / "a.png")
    Image.fromarray(values).save(images / "a.mask.png")
    for crop in ("random", "center"):
        (entry,) = prepare(crop=crop).pictures
        image = np.asarray(open_image(tmp_path / "prepared" / entry.file).convert("L"), dtype=int)
        mask = np.asarray(open_image(tmp_path / "prepared" / str(entry.mask)).convert("L"), dtype=int)
        # The two are shrunk with different filters, which differ at the jumps from 255 to 0.
        assert np.median(abs(image - mask)) <= 2


def test_enlarged_images_are_named_with_their_factor(
    add_image: Add, prepare: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    add_image("small.png", width=50, height=40)
    add_image("large.png", width=80, height=80)
    with caplog.at_level(logging.WARNING, "lora_engine.data.preprocess"):
        manifest = prepare()
    assert "1 of 2 images were enlarged: small.png 1.60 times" in caplog.text
    large, small = manifest.pictures
    assert large.preparation is None
    # The bytes of results of earlier releases stay.
    assert small.preparation is None
    assert "preparation" not in small.model_dump(mode="json")
    for crop in ({}, {"crop": "bucket", "buckets": {"step": 8}}):
        manifest = prepare(upscale="lanczos", **crop)
        small = manifest.pictures[1]
        assert small.preparation is not None
        assert small.preparation.upscaler == "lanczos"
        assert f"1 enlarged up to {small.preparation.scale:.2f} times by lanczos" in manifest.describe_preparation()


@pytest.mark.parametrize(("upscale", "filter_"), [("bicubic", "BICUBIC"), ("lanczos", "LANCZOS")])
def test_interpolation_is_what_the_settings_say(
    tmp_path: Path, add_image: Add, prepare: Callable[..., Manifest], upscale: str, filter_: str
) -> None:
    path = add_image("a.png", width=40, height=40)
    (entry,) = prepare(upscale=upscale).pictures
    expected = open_image(path).resize((64, 64), Image.Resampling[filter_])
    assert np.array_equal(open_image(tmp_path / "prepared" / entry.file), expected)


def test_a_model_enlarges_images(
    tmp_path: Path, add_image: Add, prepare: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_image("small.png", width=45, height=37)
    add_image("large.png", width=80, height=80)
    model = write_swin2sr(tmp_path / "swin")
    large, small = prepare(upscale={"name": "swin2sr", "model": str(model)}).pictures
    assert large.preparation is None
    assert small.preparation is not None
    assert (small.preparation.scale, small.preparation.upscaler) == (1.73, "swin2sr (swin)")
    first = (tmp_path / "prepared" / small.file).read_bytes()
    prepare(upscale={"name": "swin2sr", "model": str(model)})
    assert (tmp_path / "prepared" / small.file).read_bytes() == first
    prepare(upscale="lanczos")
    assert (tmp_path / "prepared" / small.file).read_bytes() != first


def test_tiles_equal_the_whole_image_away_from_their_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_engine.data import upscaling
    from lora_engine.data.preparation_spec import Swin2SR

    upscaler = upscaling.Upscaler(Swin2SR(model=str(write_swin2sr(tmp_path / "swin"))), "swin")
    image = photograph("astronaut.png").resize((50, 42))
    whole = np.asarray(upscaler(image), dtype=int)
    assert whole.shape == (84, 100, 3)
    monkeypatch.setattr(upscaling, "_TILE", 24)
    tiled = np.asarray(upscaler(image), dtype=int)
    assert tiled.shape == whole.shape
    assert np.mean(abs(tiled - whole) <= 1) > 0.95
    monkeypatch.setattr(upscaling, "_OVERLAP", 0)
    assert np.mean(abs(np.asarray(upscaler(image), dtype=int) - whole) <= 1) < np.mean(abs(tiled - whole) <= 1)


def test_models_that_cannot_enlarge_are_refused(
    tmp_path: Path, add_image: Add, prepare: Callable[..., Manifest]
) -> None:
    add_image("a.png")
    problems = {
        write_swin2sr(tmp_path / "same", factor=1): r"enlarges by a factor of 1.*Allowed: 2 and more",
        write_clipseg(tmp_path / "clipseg"): r"is a model of type 'clipseg'.*Allowed: swin2sr",
        tmp_path / "nothing": r"is not a model: it has no config\.json",
    }
    for folder, problem in problems.items():
        with pytest.raises(SettingsError, match=problem):
            prepare(upscale={"name": "swin2sr", "model": str(folder)})


def test_missing_weights_are_refused(tmp_path: Path, add_image: Add, prepare: Callable[..., Manifest]) -> None:
    from safetensors.torch import load_file, save_file

    add_image("a.png")
    file = write_swin2sr(tmp_path / "swin") / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "first_convolution" in name]:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SettingsError, match=r"2 weights are missing or of another shape, first .*first_convolution"):
        prepare(upscale={"name": "swin2sr", "model": str(file.parent)})


def test_an_image_too_small_for_a_window_is_quarantined(add_image: Add, prepare: Callable[..., Manifest]) -> None:
    add_image("a.png", width=30, height=300)
    with pytest.raises(DataError, match=r"a\.png: 30 x 30 pixels are too small for 64 x 64, enlarged at most 2 times"):
        prepare(crop="random")


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": "faces"},
        {"crop": {"name": "face", "margin": 0.5}},
        {"crop": {"name": "face", "margin": float("nan")}},
        {"crop": {"name": "random", "seed": -1}},
        {"crop": {"name": "center", "seed": 1}},
        {"crop": "face", "buckets": {}},
        {"upscale": "nearest"},
        {"upscale": {"name": "swin2sr", "model": ""}},
        {"upscale": {"name": "swin2sr", "model": "a\nb"}},
        {"mask": "text"},
        {"mask": {"name": "text", "prompt": "a\x00b"}},
        {"mask": {"name": "text", "prompt": " "}},
        {"mask": {"name": "faces", "minimum": 1.5}},
        {"mask": {"name": "faces", "feather": float("inf")}},
        {"mask": {"name": "files", "replace": True}},
        {"mask": "background"},
        {"mask": {"name": "background", "model": "m", "labels": []}},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PreprocessSettings.model_validate({"resolution": 64, **settings})


@pytest.mark.parametrize("name", ["center", "salient", "bucket"])
def test_crops_without_options_stay_names_in_settings(name: str) -> None:
    for written in (name, {"name": name}):
        settings = PreprocessSettings.model_validate({"resolution": 64, "crop": written})
        assert settings.model_dump(mode="json")["crop"] == settings.crop == name
    face = PreprocessSettings.model_validate({"resolution": 64, "crop": "face"})
    assert face == PreprocessSettings.model_validate(face.model_dump(mode="json"))
