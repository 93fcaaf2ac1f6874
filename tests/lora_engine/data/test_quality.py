"""The heuristics for JPEG blocks and text: their error rates on photographs, and what they leave alone."""

from __future__ import annotations

import io
from importlib.resources import files

import pytest
from PIL import Image, ImageDraw, ImageFont

from lora_engine.data.quality import FIXES, find_flaws
from tests.lora_engine.data.conftest import make_image

PHOTOGRAPHS = (
    "coffee.png",
    "camera.png",
    "astronaut.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "hubble_deep_field.jpg",
    "brick.png",
    "gravel.png",
    "grass.png",
    "moon.png",
    "retina.jpg",
    "ihc.png",
    "rocket.jpg",
    "coins.png",
    "chelsea.png",
    "cell.png",
    "clock_motion.png",
)
BLOCKS, TEXT = "JPEG blocks", "perhaps text or a watermark"


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    pytest.importorskip("skimage")
    images = {}
    for name in PHOTOGRAPHS:
        with (files("skimage") / "data" / name).open("rb") as file:
            images[name] = Image.open(file).convert("RGB")
    return images


def compress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def label(image: Image.Image, opacity: int) -> Image.Image:
    layer = Image.new("RGBA", image.size, (0, 0, 0, 0))
    font = ImageFont.load_default(28 * image.width / 512)
    place = (image.width * 0.04, image.height * 0.9)
    ImageDraw.Draw(layer).text(place, "© John Smith Photography 2024", font=font, fill=(255, 255, 255, opacity))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def flawed(images: list[Image.Image], flaw: str) -> int:
    return sum(flaw in find_flaws(image) for image in images)


def test_the_false_rates_on_photographs_are_those_that_are_stated(photographs: dict[str, Image.Image]) -> None:
    found = {name: {*find_flaws(image)} & {BLOCKS, TEXT} for name, image in photographs.items()}
    assert {name: flaws for name, flaws in found.items() if flaws} == {
        "moon.png": {BLOCKS},
        "camera.png": {TEXT},
        "motorcycle_left.png": {TEXT},
    }


def test_jpeg_blocks_are_found_by_quality(photographs: dict[str, Image.Image]) -> None:
    images = list(photographs.values())
    found = [flawed([compress(image, quality) for image in images], BLOCKS) for quality in (10, 20, 30, 75)]
    assert found[0] == 17
    assert found[1] >= 14
    assert found[2] >= 12
    assert found[3] <= 1


def test_jpeg_blocks_are_found_after_a_crop_but_not_after_a_resize(photographs: dict[str, Image.Image]) -> None:
    damaged = compress(photographs["chelsea.png"], 10)
    assert flawed([damaged.crop((3, 5, damaged.width, damaged.height))], BLOCKS) == 1
    assert flawed([damaged.resize((300, 200), Image.Resampling.LANCZOS)], BLOCKS) == 0


@pytest.mark.parametrize("opacity", [255, 140])
def test_lines_of_text_are_found(photographs: dict[str, Image.Image], opacity: int) -> None:
    calm = [image for name, image in photographs.items() if name not in {"camera.png", "motorcycle_left.png"}]
    assert flawed([label(image, opacity) for image in calm], TEXT) >= 9


def test_small_images_and_noise_are_not_judged() -> None:
    assert flawed([make_image(64, 64, 1), make_image(300, 300, 2)], BLOCKS) == 0
    assert flawed([make_image(64, 64, 1), make_image(300, 300, 2)], TEXT) == 0
    assert flawed([label(make_image(100, 100, 3), 255)], TEXT) == 0


def test_every_flaw_has_a_remedy() -> None:
    images = [Image.new("RGB", (200, 200)), Image.new("RGB", (200, 200), "white"), make_image(9, 9).resize((200, 200))]
    flaws = {flaw for image in images for flaw in find_flaws(image)}
    assert len(flaws) == 4
    assert flaws <= {*FIXES}
