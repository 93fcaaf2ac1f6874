"""Images and masks prepared for inpainting as A1111 does: regions, scaling, filling, pasting."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lora_engine.errors import SettingsError
from lora_engine.inference.inpainting import InpaintSettings, find_region, prepare_inpainting


def mask_of(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Returns a mask of (width, height) that is light in a box."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


@pytest.fixture
def photo() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("box", "padding", "size", "region"),
    [
        ((20, 20, 30, 30), 0, (32, 32), (20, 20, 30, 30)),
        ((20, 20, 30, 30), 4, (32, 32), (16, 16, 34, 34)),
        ((20, 20, 40, 30), 0, (32, 32), (20, 15, 40, 35)),
        ((20, 20, 30, 40), 0, (32, 32), (15, 20, 35, 40)),
        ((0, 0, 20, 10), 0, (32, 32), (0, 0, 20, 20)),
        ((54, 38, 64, 48), 8, (32, 64), (28, 30, 64, 48)),
        ((0, 20, 64, 22), 0, (32, 32), (0, 0, 64, 48)),
    ],
)
def test_a_region_encloses_the_mask_with_padding_in_the_ratio_of_the_size(
    box: tuple[int, int, int, int], padding: int, size: tuple[int, int], region: tuple[int, int, int, int]
) -> None:
    assert find_region(mask_of((64, 48), box), padding, size) == region


def test_only_the_masked_region_changes_and_the_result_has_the_size_of_the_original(photo: Image.Image) -> None:
    mask = mask_of(photo.size, (20, 20, 30, 30))
    prepared = prepare_inpainting(photo, mask, InpaintSettings((32, 32), blur=0, only_masked=True, padding=4))
    assert prepared.image.size == (32, 32)
    assert prepared.region == (16, 16, 34, 34)
    result = np.asarray(prepared.restore(Image.new("RGB", (32, 32), "red")))
    original = np.asarray(photo)
    inside = np.asarray(mask) > 0
    assert result.shape == original.shape
    assert np.array_equal(result[~inside], original[~inside])
    assert (result[inside] == (255, 0, 0)).all()


def test_a_blurred_mask_blends_the_result_into_the_original(photo: Image.Image) -> None:
    mask = mask_of(photo.size, (20, 16, 44, 32))
    prepared = prepare_inpainting(photo, mask, InpaintSettings((32, 32), blur=2, only_masked=True))
    red = np.asarray(prepared.restore(Image.new("RGB", (32, 32), "red")), dtype=int)
    original = np.asarray(photo, dtype=int)
    assert (red[24, 32] == (255, 0, 0)).all()
    edge = red[24, 20, 1] / max(original[24, 20, 1], 1)
    assert 0.2 < edge < 0.8
    assert np.array_equal(red[0], original[0])


def test_a_hidden_part_gets_the_colors_around_it() -> None:
    image = Image.new("RGB", (64, 64), (10, 200, 30))
    image.paste((255, 0, 255), (24, 24, 40, 40))
    mask = mask_of((64, 64), (22, 22, 42, 42))
    filled = prepare_inpainting(image, mask, InpaintSettings((64, 64), blur=0, fills=True)).image
    assert np.abs(np.asarray(filled, dtype=int) - (10, 200, 30)).max() <= 8
    kept = prepare_inpainting(image, mask, InpaintSettings((64, 64), blur=0)).image
    assert kept.getpixel((32, 32)) == (255, 0, 255)


def test_an_inverted_mask_draws_the_dark_parts(photo: Image.Image) -> None:
    mask = mask_of(photo.size, (0, 0, 32, 48))
    prepared = prepare_inpainting(photo, mask, InpaintSettings((48, 64), blur=0, inverts=True))
    assert prepared.mask is not None
    assert np.asarray(prepared.mask)[:, :32].max() == 0
    assert np.asarray(prepared.mask)[:, 32:].min() == 255


def test_an_image_is_stretched_or_cut_or_its_border_repeated() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 10, 20))
    drawn = {
        mode: np.asarray(prepare_inpainting(image, None, InpaintSettings((40, 40), resize=mode)).image)[:, :, 0]
        for mode in ("stretch", "crop", "fill")
    }
    assert all(pixels.shape == (40, 40) for pixels in drawn.values())
    assert [int((pixels[20] < 128).sum()) for pixels in drawn.values()] == [10, 0, 10]
    # The border of a filled image repeats its first and last rows.
    assert np.array_equal(drawn["fill"][0], drawn["fill"][10])
    assert np.array_equal(drawn["fill"][39], drawn["fill"][29])


def test_a_mask_that_is_empty_or_of_another_size_is_refused(photo: Image.Image) -> None:
    with pytest.raises(SettingsError, match="the mask is empty"):
        prepare_inpainting(photo, Image.new("L", photo.size, 0), InpaintSettings((32, 32), only_masked=True))
    with pytest.raises(SettingsError, match="the mask has 8 x 8 pixels, the image 64 x 48"):
        prepare_inpainting(photo, Image.new("L", (8, 8), 255), InpaintSettings((32, 32)))
