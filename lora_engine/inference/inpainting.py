"""Prepares an image and its mask for inpainting as A1111's web UI does, and pastes what was drawn into the original.

The engine takes an image and a mask of the size that is drawn. `prepare_inpainting` makes them: it scales, blurs the
mask, fills what is hidden, and cuts out the region around the mask, which `PreparedImage.restore` puts back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from lora_engine.data.crops import Box
from lora_engine.errors import SettingsError

ResizeMode = Literal["stretch", "crop", "fill"]
_FILL_BLURS = (256, 64, 16, 16, 4, 4, 4, 4, 2, 2, 0)
"""Radii in pixels of the blurs that fill a hidden region, each painted over the ones before; those of A1111."""


@dataclass(frozen=True)
class InpaintSettings:
    """How an image and its mask are prepared.

    Attributes:
        size: (height, width) in pixels of what is drawn.
        resize: `stretch` ignores the ratio of the sides, `crop` cuts what is too long, `fill` repeats the border.
        blur: Standard deviation of the mask's blur in pixels.
        fills: True fills the masked part with the colors around it; False keeps its content.
        only_masked: True draws only the region around the mask, at `size`, and pastes it into the original.
        padding: Pixels around the mask that belong to the region.
        inverts: True draws the dark parts of the mask.
    """

    size: tuple[int, int]
    resize: ResizeMode = "stretch"
    blur: float = 4.0
    fills: bool = False
    only_masked: bool = False
    padding: int = 0
    inverts: bool = False


@dataclass(frozen=True)
class PreparedImage:
    """An image and a mask of the drawn size, and what is needed to paste the result.

    Attributes:
        image: The image to start from, RGB.
        mask: Its mask, gray; parts of 128 or more are drawn. None draws all.
        original: The whole image, RGB.
        region: The drawn region of the original (left, top, right, bottom); None is all of it.
        blurred: The mask of the original, gray, as it is blended; None without a region.
    """

    image: Image.Image
    mask: Image.Image | None
    original: Image.Image
    region: Box | None = None
    blurred: Image.Image | None = None

    def restore(self, drawn: Image.Image) -> Image.Image:
        """Returns the original with the drawn region, blended by the mask; without a region, the drawn image."""
        if self.region is None or self.blurred is None:
            return drawn
        left, top, right, bottom = self.region
        patch = drawn.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        result = self.original.copy()
        result.paste(patch, self.region, self.blurred.crop(self.region))
        return result


def prepare_inpainting(image: Image.Image, mask: Image.Image | None, settings: InpaintSettings) -> PreparedImage:
    """Returns an image and its mask as they are drawn.

    Args:
        image: The image.
        mask: Its mask, gray: light parts are drawn. None draws all.
        settings: The settings.

    Raises:
        SettingsError: The mask has another size, or no light part that a region can enclose.
    """
    image = image.convert("RGB")
    if mask is None:
        return PreparedImage(_scale(image, settings), None, image)
    if mask.size != image.size:
        raise SettingsError(
            f"the mask has {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}",
            remedy="use a mask of the image's size",
        )
    mask = mask.convert("L").point(lambda value: 255 if value > 128 else 0)
    if settings.inverts:
        mask = ImageOps.invert(mask)
    if settings.blur > 0:
        mask = mask.filter(ImageFilter.GaussianBlur(settings.blur))
    if not settings.only_masked:
        scaled, small = _scale(image, settings), _scale(mask, settings)
        return PreparedImage(_hide(scaled, small) if settings.fills else scaled, small, image)
    region = find_region(mask, settings.padding, settings.size)
    wanted = (settings.size[1], settings.size[0])
    part, hidden = (each.crop(region).resize(wanted, Image.Resampling.LANCZOS) for each in (image, mask))
    return PreparedImage(_hide(part, hidden) if settings.fills else part, hidden, image, region, mask)


def find_region(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """Returns the region around the light parts of a mask, extended to the ratio of a size where the image has room.

    Args:
        mask: Gray; all that is not 0 is enclosed.
        padding: Pixels on each side.
        size: (height, width).

    Raises:
        SettingsError: The mask is empty.
    """
    box = mask.getbbox()
    if box is None:
        raise SettingsError("the mask is empty", allowed="a mask with light parts, which are drawn")
    left, top = max(box[0] - padding, 0), max(box[1] - padding, 0)
    right, bottom = min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    ratio = size[1] / size[0]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _extend(top, bottom, round((right - left) / ratio), mask.height)
    else:
        left, right = _extend(left, right, round((bottom - top) * ratio), mask.width)
    return left, top, right, bottom


def _extend(first: int, last: int, length: int, limit: int) -> tuple[int, int]:
    """Returns an interval extended on both sides to a length, moved into [0, limit] and cut where that is shorter."""
    length = max(min(length, limit), last - first)
    start = min(max(first - (length - (last - first)) // 2, 0), limit - length)
    return start, start + length


def _scale(image: Image.Image, settings: InpaintSettings) -> Image.Image:
    size, method = (settings.size[1], settings.size[0]), Image.Resampling.LANCZOS
    if settings.resize == "stretch":
        return image.resize(size, method)
    if settings.resize == "crop":
        return ImageOps.fit(image, size, method)
    inner = ImageOps.contain(image, size, method)
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    sides = [(top, size[1] - inner.height - top), (left, size[0] - inner.width - left), (0, 0)]
    pixels = np.asarray(inner)
    return Image.fromarray(np.pad(pixels, sides[: pixels.ndim], mode="edge"))


def _hide(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns an image whose masked part has the colors around it, blurred more with the distance."""
    visible = image.convert("RGBA")
    visible.putalpha(ImageChops.invert(mask))
    premultiplied = visible.convert("RGBa")
    result = Image.new("RGBA", image.size)
    for radius in _FILL_BLURS:
        result.alpha_composite(premultiplied.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA"))
    return result.convert("RGB")
