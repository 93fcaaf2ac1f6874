"""`loraline generate` from images, under masks, enlarged, and with each engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.evidence import read_evidence
from lora_engine.files import sha256_file
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, copy_trained

TAG = "a zorb <lora:small@1:0.8>"


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("generate") / "trained")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Returns an image of 48 x 40 pixels, red on the left and blue on the right."""
    picture = Image.new("RGB", (48, 40), (220, 30, 30))
    picture.paste((30, 30, 220), (24, 0, 48, 40))
    picture.save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Returns its mask: the right half is drawn."""
    picture = Image.new("L", (48, 40))
    picture.paste(255, (24, 0, 48, 40))
    picture.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def generate(small: Trained, folder: Path, *more: object, prompt: str = TAG) -> tuple[np.ndarray, dict[str, str]]:
    say("generate", prompt, "-o", folder, "-n", 1, "--steps", 4, *more, home=small.home.path)
    with Image.open(folder / "0.png") as drawn:
        drawn.load()
        return np.asarray(drawn.convert("RGB"), dtype=int), dict(drawn.text)  # type: ignore[attr-defined]


def test_an_image_drawn_from_an_image_resembles_it_by_its_strength(small: Trained, tmp_path: Path, image: Path) -> None:
    original = np.asarray(Image.open(image), dtype=int)
    distances = {}
    for strength in (0.25, 1.0):
        drawn, texts = generate(small, tmp_path / str(strength), "--image", image, "--strength", strength)
        assert drawn.shape == original.shape
        distances[strength] = np.abs(drawn - original).mean()
        source = json.loads(texts["loraline"])["source"]
        assert source == {"sha256": sha256_file(image), "strength": strength, "mask_sha256": None}
        assert f"Denoising strength: {strength:g}" in texts["parameters"]
    assert distances[0.25] < distances[1.0]


def test_a_mask_keeps_the_pixels_that_it_leaves_out(small: Trained, tmp_path: Path, image: Path, mask: Path) -> None:
    drawn, texts = generate(small, tmp_path / "out", "--image", image, "--mask", mask)
    original = np.asarray(Image.open(image), dtype=int)
    assert np.array_equal(drawn[:, :24], original[:, :24])
    assert np.abs(drawn[:, 24:] - original[:, 24:]).max() > 0
    assert json.loads(texts["loraline"])["source"]["mask_sha256"] == sha256_file(mask)
    assert any("composite" in sign for sign in read_evidence(tmp_path / "out" / "0.png", tmp_path))


def test_an_image_has_the_size_that_is_asked_for(small: Trained, tmp_path: Path, image: Path) -> None:
    wide, texts = generate(small, tmp_path / "wide", "--size", "48x32")
    assert wide.shape[:2] == (32, 48)
    assert "Size: 48x32" in texts["parameters"]
    assert generate(small, tmp_path / "fitted", "--image", image, "--size", "32")[0].shape[:2] == (32, 32)


def test_an_enlarged_image_is_drawn_again(small: Trained, tmp_path: Path) -> None:
    drawn, texts = generate(small, tmp_path / "out", "--enlarge", 1.5, "--enlarged-strength", 0.5)
    assert drawn.shape[:2] == (48, 48)
    assert json.loads(texts["loraline"])["enlarged"] == [1.5, 0.5]
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires upscaler: Lanczos" in texts["parameters"]
    plain = Image.fromarray(generate(small, tmp_path / "plain")[0].astype(np.uint8))
    only_scaled = np.asarray(plain.resize((48, 48), Image.Resampling.LANCZOS), dtype=int)
    assert np.abs(drawn - only_scaled).max() > 8


def test_merged_and_attached_adapters_give_the_same_image(small: Trained, tmp_path: Path) -> None:
    images = [generate(small, tmp_path / engine, "--engine", engine)[0] for engine in ("merged", "attached", "auto")]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.array_equal(images[0], images[2])  # the embedded base has 32-bit weights


def test_strength_can_be_an_axis_of_a_grid(small: Trained, tmp_path: Path, image: Path) -> None:
    say(
        *("generate", TAG, "-o", tmp_path / "grid", "--steps", 4, "--image", image, "-x", "strength=0.25,1"),
        home=small.home.path,
    )
    alone, _ = generate(small, tmp_path / "alone", "--image", image, "--strength", 0.25)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid" / "00-00.png"), dtype=int), alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0x5"], "size '0x5'"),
        (["--size", "33x32"], "33 pixels"),
        (["--image", "IMAGE", "--strength", "0"], "strength is 0"),
        (["--mask", "IMAGE"], "a mask needs an image"),
        (["--image", "IMAGE", "--mask", "SMALL"], "the mask has 8 x 8 pixels"),
        (["--image", "missing.png"], "missing.png"),
        (["--enlarge", "9"], "enlarged by 9"),
        (["--enlarge", "1.5", "--enlarged-strength", "2"], "strength is 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    small: Trained, tmp_path: Path, image: Path, arguments: list[str], message: str
) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    files = {"IMAGE": str(image), "SMALL": str(tmp_path / "small.png")}
    given = [files.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    refused = loraline_here("generate", TAG, "-o", out, "-n", 1, "--steps", 1, *given, home=small.home.path)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert not out.exists()
