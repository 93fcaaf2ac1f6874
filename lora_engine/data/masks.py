"""Makes the masks of images, and gives them their final form: inverted, widened, feathered, with a least weight."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from lora_engine.data.faces import Face, find_faces
from lora_engine.data.preparation_spec import BackgroundMask, FaceMask, MaskSetting, NoMask, TextMask


class Masker(Protocol):
    """Makes masks.

    Attributes:
        label: Name for records.
    """

    label: str

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the mask of an RGB image: gray, of its size."""


class FaceMasker:
    """Marks all faces with ellipses.

    Args:
        options: See `FaceMask`.
    """

    label = "faces"

    def __init__(self, options: FaceMask) -> None:
        self._options = options

    def __call__(self, image: Image.Image) -> Image.Image:
        """See `Masker`."""
        mask = Image.new("L", image.size)
        draw = ImageDraw.Draw(mask)
        for face in find_faces(image, self._options.min_score):
            draw.ellipse(_grown(face, self._options.margin), fill=255)
        return mask


def load_masker(options: MaskSetting, label: str) -> Masker | None:
    """Returns what makes the masks; None if masks are only those of the dataset.

    Args:
        options: The options; a model is a folder.
        label: Name of the model for records.

    Raises:
        SettingsError: A model cannot be loaded.
    """
    if isinstance(options, FaceMask):
        return FaceMasker(options)
    if isinstance(options, TextMask | BackgroundMask):
        from lora_engine.data.segmentation import BackgroundMasker, TextMasker

        return TextMasker(options, label) if isinstance(options, TextMask) else BackgroundMasker(options, label)
    return None


def finish_mask(mask: Image.Image, options: MaskSetting) -> Image.Image:
    """Returns a gray mask inverted, widened, feathered and raised to the least weight, in this order."""
    if isinstance(options, NoMask):
        return mask
    if options.invert:
        mask = ImageOps.invert(mask)
    if options.expand:
        mask = _widen(mask, options.expand)
    if options.feather:
        mask = mask.filter(ImageFilter.GaussianBlur(options.feather))
    least = round(255 * options.minimum)
    return mask.point([least + round(value * (255 - least) / 255) for value in range(256)]) if least else mask


def is_black(mask: Image.Image) -> bool:
    """Returns True if no pixel has any weight."""
    return mask.getbbox() is None


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns an RGB image for review, with red over what does not count."""
    red = Image.new("RGB", image.size, (230, 30, 30))
    dimmed = Image.blend(image.convert("RGB"), red, 0.6)
    return Image.composite(image.convert("RGB"), dimmed, mask.resize(image.size, Image.Resampling.BILINEAR))


def _widen(mask: Image.Image, pixels: int) -> Image.Image:
    """Returns the maximum over squares of 2 * pixels + 1."""
    values = np.pad(np.asarray(mask), pixels)
    for _ in range(2):
        width = 1  # of the windows that `values` has the maxima of
        while width < 2 * pixels + 1:
            shift = min(width, 2 * pixels + 1 - width)
            values = np.maximum(values[:-shift], values[shift:])
            width += shift
        values = values.T
    return Image.fromarray(np.ascontiguousarray(values))


def _grown(face: Face, margin: float) -> tuple[float, float, float, float]:
    left, top, right, bottom = face.box
    x, y = face.center
    width, height = (right - left) * margin / 2, (bottom - top) * margin / 2
    return x - width, y - height, x + width, y + height
