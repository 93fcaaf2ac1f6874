"""Faces of generated images are counted and compared: an image without one is a result, of several the best counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lora_engine.data.faces import Face, find_faces
from lora_engine.data.pixels import to_pixels
from lora_engine.evaluation.identity import FaceMatch, crop_face, embed_faces, match_faces

COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def portrait(*colors: str) -> Image.Image:
    """Returns an image with a colored square in the place of each face."""
    image = Image.new("RGB", (300, 100), "white")
    for index, color in enumerate(colors):
        image.paste(COLORS[color], (100 * index + 10, 10, 100 * index + 90, 90))
    return image


def squares(image: Image.Image) -> list[Face]:
    centers = [(100.0 * index + 50, 50.0) for index in range(3)]
    return [
        Face((x - 20, y - 20, x + 20, y + 20), 0.9, ((x - 10, y), (x + 10, y)))
        for x, y in centers
        if image.getpixel((int(x), int(y))) != (255, 255, 255)
    ]


def mean_color(pixels: Tensor) -> Tensor:
    return F.normalize(pixels.mean(dim=(2, 3)) + 1.0, dim=1)


def test_the_most_similar_face_counts_and_no_face_is_a_result() -> None:
    real = embed_faces([portrait("red"), portrait("red")], mean_color, squares)
    drawn = [portrait("red"), portrait("blue"), portrait(), portrait("blue", "red")]
    matches = match_faces(drawn, real, mean_color, squares)
    assert [match.faces for match in matches] == [1, 1, 0, 2]
    assert matches[0].similarity == pytest.approx(1.0, abs=1e-6)
    assert matches[1].similarity < 0.5
    assert matches[2] == FaceMatch(0, 0.0)
    assert matches[3].similarity == pytest.approx(1.0, abs=1e-6)


def test_real_images_with_several_faces_or_none_do_not_count() -> None:
    real = embed_faces([portrait("red", "blue"), portrait(), portrait("blue")], mean_color, squares)
    assert real.shape == (1, 3)
    assert embed_faces([portrait(), portrait("red", "blue")], mean_color, squares).shape[0] == 0


def test_a_crop_is_level_and_centered() -> None:
    pixels = np.full((300, 300, 3), 255, dtype=np.uint8)
    # Two eyes on a line that falls to the right by 30 degrees around (150, 150).
    eyes = [(150 + s * 30 * math.cos(math.radians(30)), 150 + s * 30 * math.sin(math.radians(30))) for s in (-1, 1)]
    for x, y in eyes:
        pixels[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4] = 0
    crop = crop_face(Image.fromarray(pixels), Face((100, 100, 200, 200), 0.9, (eyes[0], eyes[1])))
    dark = np.argwhere(np.asarray(crop.convert("L")) < 128)
    halves = [dark[dark[:, 1] < crop.width / 2].mean(axis=0), dark[dark[:, 1] > crop.width / 2].mean(axis=0)]
    assert abs(halves[0][0] - halves[1][0]) < 2
    assert (halves[0] + halves[1]) / 2 == pytest.approx([crop.height / 2] * 2, abs=2)


def test_the_face_of_a_photograph_matches_itself_and_a_cup_of_coffee_has_none() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    person, coffee = (Image.fromarray(image) for image in (data.astronaut(), data.coffee()))

    def thumbnails(pixels: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(pixels, 8).flatten(1), dim=1)

    real = embed_faces([person], thumbnails)
    turned = person.rotate(12, Image.Resampling.BICUBIC)
    same, other = match_faces([turned, coffee], real, thumbnails)
    assert (same.faces, other) == (1, FaceMatch(0, 0.0))
    # Without leveling, the turned face is a different image.
    box = Face(find_faces(turned)[0].box, 0.9, ((0.0, 0.0), (1.0, 0.0)))
    unleveled = float(thumbnails(to_pixels(crop_face(turned, box))[None])[0] @ real[0])
    assert same.similarity > max(0.9, unleveled)
    assert torch.isfinite(real).all()
