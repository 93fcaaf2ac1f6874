"""Notices images that train badly: blurred, of one color, very dark or bright, smaller than the training size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLURRED = 0.01
"""Least variance of the Laplacian over that of the image, at 512 pixels: 14 photographs of scikit-image have 0.034 to
3.6, and 12 of them 0.0014 to 0.01 after a Gaussian blur of 2 pixels."""
FLAT, DARK, BRIGHT = 4.0, 16.0, 240.0
"""Least standard deviation, and least and largest mean, of the gray values, of 255."""
_WORK, _LEAST = 512, 128


def find_flaws(image: Image.Image, resolution: int | None = None) -> Iterator[str]:
    """Yields what is noticeable about an RGB image, in words; nothing about most images.

    Args:
        image: The image.
        resolution: Side of the training images in pixels; None leaves the size unjudged.
    """
    if resolution is not None and min(image.size) < resolution:
        yield f"smaller than {resolution} pixels"
    small = image.convert("L")
    small.thumbnail((_WORK, _WORK), Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float64)
    mean, deviation = values.mean(), values.std()
    if deviation < FLAT:
        yield "nearly of one color"
    elif min(image.size) >= _LEAST and _laplacian(values).var() < BLURRED * values.var():
        yield "blurred"
    if mean < DARK:
        yield "very dark"
    elif mean > BRIGHT:
        yield "very bright"


def _laplacian(values: NDArray[np.float64]) -> NDArray[np.float64]:
    laplacian: NDArray[np.float64] = (
        4 * values[1:-1, 1:-1] - values[:-2, 1:-1] - values[2:, 1:-1] - values[1:-1, :-2] - values[1:-1, 2:]
    )
    return laplacian
