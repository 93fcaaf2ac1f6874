"""Class images that preserve nothing are noticed, and ordinary ones are not."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.class_images import GIVEN, Likeness, find_odd, read_class_image
from lora_engine.data.ingest import ingest
from lora_engine.data.quality import find_flaws
from lora_engine.data.spec import IngestSettings


def smooth(seed: int, side: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def odd(images: list[Image.Image], likeness: Likeness | None = None) -> list[str]:
    read = [read_class_image(f"{index}.png", image) for index, image in enumerate(images)]
    return list(find_odd(read, GIVEN, likeness))


@pytest.mark.parametrize("side", [32, 64, 300])
def test_different_images_are_not_odd(side: int) -> None:
    assert odd([smooth(seed, side) for seed in range(40)]) == []
    assert odd([]) == []


def test_images_of_one_color_and_repeated_ones_are_counted_and_named() -> None:
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    copy = smooth(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert odd([smooth(0), smooth(1), black, copy, white, black]) == [
        "3 of 6 class images are nearly of one color or very dark, first 2.png; remove or replace them",
        "1 of 6 class images show the same as another, first 3.png; remove or replace them",
    ]


def test_a_drawing_on_white_is_not_odd() -> None:
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste((200, 30, 30), (20, 20, 32, 32))
    assert "very bright" in find_flaws(drawing)
    assert odd([smooth(0), drawing]) == []


def test_images_unlike_their_class_are_named_by_their_likeness() -> None:
    images = [smooth(seed) for seed in range(8)]
    own = [0.5, 0.52, 0.48, 0.51, 0.1, 0.49, 0.5, 0.53]
    assert odd(images, Likeness("a dog", own, [0.0] * 8)) == [
        "1 of 8 class images are less like 'a dog' than the others, first 4.png; remove or replace them"
    ]
    assert odd(images, Likeness("a dog", [0.5, *own[1:4], 0.5, *own[5:]], [0.0] * 8)) == []
    assert odd(images, Likeness("a dog", own, [0.9] * 8)) == [
        "the 8 class images are less like 'a dog' than like any image; remove or replace them"
    ]


def test_ingest_names_odd_class_images_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("10_sks dog", "1_dog"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for seed in range(4):
            smooth(seed + (10 if folder == "1_dog" else 0)).save(tmp_path / "images" / folder / f"{seed}.png")
        Image.new("RGB", (64, 64), (0, 0, len(folder))).save(tmp_path / "images" / folder / "black.png")
    with caplog.at_level(logging.WARNING):
        ingest(tmp_path / "images", tmp_path / "out", IngestSettings())
    assert [text for text in caplog.messages if "class images" in text] == [
        "1 of 5 class images are nearly of one color or very dark, first 1_dog/black.png; remove or replace them"
    ]
