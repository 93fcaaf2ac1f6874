"""Planted copies of training images are found, whatever their encoding, and other drawings are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_engine.data.duplicates import take_print
from lora_engine.evaluation.copies import find_copies


def photograph(seed: int, side: int = 96) -> Image.Image:
    """Returns random colors with structure at every scale, like photographs."""
    draw, layers = np.random.default_rng(seed), np.zeros((side, side, 3))
    for cells, weight in ((4, 0.5), (12, 0.3), (32, 0.2)):
        noise = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers += weight * np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(layers.astype(np.uint8))


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_a_copy_is_found_after_encoding_scaling_and_mirroring() -> None:
    training = [photograph(seed) for seed in range(6)]
    drawings = [
        encoded(training[2], 60),
        photograph(100),
        training[4].resize((64, 64)),
        ImageOps.mirror(training[0]),
        photograph(101),
    ]
    found = find_copies([take_print(image) for image in drawings], [take_print(image) for image in training])
    assert found == {0: 2, 2: 4, 3: 0}


def test_copies_among_drawings_or_among_training_images_alone_are_none() -> None:
    same, others = take_print(photograph(7)), [take_print(photograph(seed)) for seed in (8, 9)]
    assert find_copies([same, same], others) == {}
    assert find_copies(others, [same, same]) == {}
    assert find_copies([], [same]) == find_copies([same], []) == {}


@pytest.mark.parametrize("change", ["invert", "other colors"])
def test_another_image_of_the_same_structure_is_no_copy(change: str) -> None:
    image = photograph(11)
    other = ImageOps.invert(image) if change == "invert" else Image.merge("RGB", image.split()[::-1])
    if change == "other colors":  # gray, so structure alone decides, and 60 levels redder
        image = ImageOps.grayscale(image).convert("RGB")
        other = Image.fromarray(np.clip(np.asarray(image) + np.array([60, 0, -60]), 0, 255).astype(np.uint8))
    assert find_copies([take_print(other)], [take_print(image)]) == {}
