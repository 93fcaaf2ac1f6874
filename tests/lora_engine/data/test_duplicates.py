"""Copies of an image that were encoded, resized, mirrored or cropped are never split between training and held out."""

from __future__ import annotations

import io
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.duplicates import Matches, Print, find_groups, find_kin, find_same, take_print
from lora_engine.data.ingest import ingest
from lora_engine.data.spec import IngestSettings
from tests.lora_engine.data.conftest import make_image

NAMES = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "rocket.jpg")
ZORB = Path(__file__).parents[3] / "examples" / "zorb" / "images"


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    opened = []
    for name in NAMES:
        with (files("skimage") / "data" / name).open("rb") as file:
            opened.append(Image.open(file).convert("RGB"))
    return opened


def encoded(image: Image.Image, kind: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    left, top = round(image.width * 0.025), round(image.height * 0.025)
    return image.crop((left, top, image.width - left, image.height - top))


TWINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG": lambda image: encoded(image, "JPEG", 30),
    "WebP": lambda image: encoded(image, "WEBP", 60),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a quarter, JPEG": lambda image: encoded(image.resize((image.width // 4, image.height // 4)), "JPEG", 75),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": cropped,
    "cropped and mirrored": lambda image: cropped(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def pairs(matches: Iterator[Matches]) -> list[tuple[int, int]]:
    return [(first, other) for first, others in matches for other in others.tolist()]


@pytest.mark.parametrize("change", TWINS)
def test_the_twin_of_a_photograph_is_its_kin_and_of_no_other(photographs: list[Image.Image], change: str) -> None:
    prints = [take_print(image) for image in photographs]
    twins = [take_print(TWINS[change](image)) for image in photographs]
    assert pairs(find_kin(prints + twins)) == [(index, index + len(NAMES)) for index in range(len(NAMES))]


def test_only_equal_images_are_the_same(photographs: list[Image.Image]) -> None:
    astronaut, chelsea = (take_print(photographs[index]) for index in (0, 2))
    half, crop = (take_print(TWINS[change](photographs[0])) for change in ("half", "cropped"))
    assert pairs(find_same([astronaut, chelsea, half, crop])) == [(0, 2)]
    assert pairs(find_kin([astronaut, chelsea, half, crop])) == [(0, 2), (0, 3), (2, 3)]


def test_parts_of_photographs_are_not_kin(photographs: list[Image.Image]) -> None:
    quarters = [
        image.crop(
            (x * image.width // 2, y * image.height // 2, (x + 1) * image.width // 2, (y + 1) * image.height // 2)
        )
        for image in photographs
        for x in (0, 1)
        for y in (0, 1)
    ]
    assert len(quarters) == 28
    assert pairs(find_kin([take_print(quarter) for quarter in quarters])) == []


def test_drawings_that_differ_in_color_are_not_kin() -> None:
    drawings = [Image.open(path).convert("RGB") for path in sorted(ZORB.glob("*.png"))]
    assert len(drawings) == 24
    assert find_groups([take_print(drawing) for drawing in drawings]) == [[index] for index in range(24)]


def test_kin_of_kin_are_one_group(photographs: list[Image.Image]) -> None:
    image = photographs[0]
    prints = [take_print(part) for part in (image, photographs[1], cropped(image), cropped(cropped(image)))]
    assert (0, 2) in pairs(find_kin(prints))
    assert find_groups(prints) == [[0, 2, 3], [1]]
    assert find_groups([]) == []


def random_print(random: np.random.Generator) -> Print:
    fine, coarse = (random.integers(0, 256, shape, dtype=np.uint8) for shape in ((2, 32), (8, 8)))
    return Print(fine, coarse, np.full(3, 128.0), False)


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_the_memory_of_a_comparison_does_not_grow_with_the_number_of_pairs(count: int) -> None:
    random = np.random.default_rng(0)
    scene = random_print(random)
    others = [random_print(random) for _ in range(count // 10)]
    tracemalloc.start()
    try:
        groups = find_groups([scene] * (count - len(others)) + others)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(map(len, groups)) == [1] * len(others) + [count - len(others)]
    # The hashes take 128 bytes of an image, and a row of comparisons less; a pair took 150 bytes of a set.
    assert peak < 2_000 * count


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_no_twin_is_split(images: Path, tmp_path: Path, photographs: list[Image.Image], fraction: float) -> None:
    for number, image in enumerate(photographs):
        small = image.resize((160, 140))
        small.save(images / f"{number}.png")
        for change in ("mirrored", "cropped"):
            TWINS[change](small).save(images / f"{number} {change}.jpg", quality=90)
    manifest = ingest(images, tmp_path / "out", IngestSettings(heldout=fraction))
    splits = [{e.split for e in manifest.pictures if e.source[0] == str(number)} for number in range(len(NAMES))]
    assert all(len(split) == 1 for split in splits)
    heldout = len(manifest.of_split("heldout"))
    assert round(21 * fraction) <= heldout <= round(21 * fraction) + 2


def test_a_folder_of_one_subject_is_split_with_a_warning(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    smooth = Image.fromarray(np.asarray(make_image(8, 8))).resize((160, 160), Image.Resampling.BICUBIC)
    for quality in (95, 80, 60):
        smooth.save(images / f"{quality}.jpg", quality=quality)
    with caplog.at_level(logging.WARNING):
        manifest = ingest(images, tmp_path / "out", IngestSettings(heldout=0.4))
    assert len(manifest.of_split("heldout")) == 1
    assert "pairs of images are the same but for encoding or size, first" in caplog.text
    assert "all images show nearly the same" in caplog.text
