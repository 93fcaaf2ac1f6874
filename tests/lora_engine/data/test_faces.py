"""The face detector: equal to the reference runtime, right on photographs, and on images of any size."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_engine.data.blazeface import FACE_WEIGHTS, GRID, POINTS, SIDE, BlazeFace, load_blazeface
from lora_engine.data.faces import find_faces, letterbox
from lora_engine.files import sha256_file
from tests.support.photographs import photograph

REFERENCE = json.loads(Path(__file__).with_name("blazeface_reference.json").read_text())


def detect(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, _, _ = letterbox(image, SIDE)
    with torch.inference_mode():
        points, logits = load_blazeface()(torch.from_numpy(pixels)[None])
    return points[0], logits[0]


@pytest.mark.parametrize("name", sorted(REFERENCE["images"]))
def test_the_network_gives_what_the_reference_runtime_gives(name: str) -> None:
    expected = REFERENCE["images"][name]
    points, logits = detect(photograph(name))
    assert points.shape == (GRID * GRID, POINTS, 2)
    anchors = expected["anchors"]
    assert logits[anchors].tolist() == pytest.approx(expected["logits"], abs=1e-4)
    assert points[anchors].flatten().tolist() == pytest.approx(
        [value for row in expected["points"] for value in row], abs=1e-3
    )
    assert logits.double().mean().item() == pytest.approx(expected["mean_logit"], abs=1e-4)
    assert points.double().mean().item() == pytest.approx(expected["mean_point"], abs=1e-4)


def test_other_weights_give_other_values() -> None:
    name, expected = "astronaut.png", REFERENCE["images"]["astronaut.png"]
    network = BlazeFace()
    network.load_state_dict(load_blazeface().state_dict())
    with torch.no_grad():
        network.decoder[0].inputs.weight.mul_(1.01)
        pixels, _, _ = letterbox(photograph(name), SIDE)
        _, logits = network.eval()(torch.from_numpy(pixels)[None])
    assert logits[0, expected["anchors"]].tolist() != pytest.approx(expected["logits"], abs=1e-4)


def test_the_weights_are_those_that_the_page_describes() -> None:
    page = FACE_WEIGHTS.with_name("README.md").read_text()
    assert REFERENCE["source_sha256"] in page
    assert sha256_file(FACE_WEIGHTS) in page


@pytest.mark.parametrize(
    ("name", "center", "side"), [("astronaut.png", (226, 121), 106), ("camera.png", (239, 160), 72)]
)
def test_a_face_in_a_photograph_is_found(name: str, center: tuple[int, int], side: int) -> None:
    (face,) = find_faces(photograph(name))
    assert face.score > 0.75
    assert face.center == pytest.approx(center, abs=3)
    assert face.side == pytest.approx(side, abs=3)
    assert all(face.box[0] < x < face.box[2] and face.box[1] < y < face.box[3] for x, y in face.eyes)


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "rocket.jpg", "coins.png", "motorcycle_left.png"])
def test_no_face_is_found_where_there_is_none(name: str) -> None:
    assert find_faces(photograph(name)) == ()


def test_faces_that_fill_the_frame_are_found_and_other_cut_outs_are_not() -> None:
    with (files("skimage") / "data" / "lfw_subset.npy").open("rb") as file:
        cut_outs = (np.load(file) * 255).astype(np.uint8)
    found = [len(find_faces(Image.fromarray(values).convert("RGB"))) for values in cut_outs[::5]]
    faces, others = found[:20], found[20:]
    assert faces.count(1) >= 16
    assert others == [0] * 20


def test_several_faces_are_all_found() -> None:
    image = photograph("astronaut.png")
    both = Image.new("RGB", (1024, 512))
    both.paste(image, (0, 0))
    both.paste(image, (512, 0))
    first, second = sorted(find_faces(both), key=lambda face: face.box)
    assert second.center[0] - first.center[0] == pytest.approx(512, abs=4)


def test_boxes_are_in_pixels_of_the_image() -> None:
    image = photograph("astronaut.png")
    (own,), (half,) = find_faces(image), find_faces(image.resize((256, 256), Image.Resampling.LANCZOS))
    assert np.multiply(half.box, 2) == pytest.approx(np.array(own.box), abs=6)
    shifted = Image.new("RGB", (512, 900))
    shifted.paste(image, (0, 388))
    (moved,) = find_faces(shifted)
    assert moved.center == pytest.approx((own.center[0], own.center[1] + 388), abs=6)


def test_eyes_follow_a_turn() -> None:
    angles = []
    for turn in (-15, 0, 15):
        (face,) = find_faces(photograph("astronaut.png").rotate(turn, Image.Resampling.BICUBIC))
        (x1, y1), (x2, y2) = face.eyes
        angles.append(math.degrees(math.atan2(y2 - y1, x2 - x1)))
    assert angles[0] - angles[1] == pytest.approx(15, abs=5)
    assert angles[2] - angles[1] == pytest.approx(-15, abs=5)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3), (191, 193)])
def test_every_size_is_searched(size: tuple[int, int]) -> None:
    assert find_faces(Image.new("RGB", size, (120, 130, 140))) == ()


def test_the_detector_leaves_the_global_generator_alone() -> None:
    load_blazeface.cache_clear()
    before = torch.random.get_rng_state()
    find_faces(Image.new("RGB", (64, 64)))
    assert torch.equal(torch.random.get_rng_state(), before)
