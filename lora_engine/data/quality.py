"""Notices images that train badly: blurred, of one color, dark, bright, small, with JPEG blocks, with text.

All are heuristics on the gray values; the error rates are those on photographs of scikit-image and their quarters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLURRED = 0.01
"""Least variance of the Laplacian over that of the image, at 512 pixels: 14 photographs of scikit-image have 0.034 to
3.6, and 12 of them 0.0014 to 0.01 after a Gaussian blur of 2 pixels."""
FLAT, DARK, BRIGHT = 4.0, 16.0, 240.0
"""Least standard deviation, and least and largest mean, of the gray values, of 255."""
BLOCKS = 0.3
"""Least excess of the steps between 8-pixel blocks over other steps: 1 of 17 photographs has more (the moon, whose file
has such blocks), and 100 % of them at JPEG quality 10, 84 % at 20, 69 % at 30, 6 % at 75."""
TEXT_STEP, TEXT_CHANGES = 24, 10
"""Least step of the gray values, and least number of changes between rising and falling ones in 64 pixels of a line of
text: 3 of 85 photographs and quarters have one; a line of white text is found in 67 % of 72, opaque or not."""
_WORK, _LEAST, _CENTER = 512, 128, 1024
_WINDOW, _STRIDE = 64, 16
_LINE, _MARGIN = (5, 40), 6
"""Heights of a line of text, and of the rows above and below of which one is empty; pixels of the reduced image."""
FIXES: Mapping[str, str] = {
    "nearly of one color": "remove them",
    "blurred": "replace them by sharp ones, or remove them",
    "very dark": "brighten or remove them",
    "very bright": "darken or remove them",
    "JPEG blocks": "take the originals, not copies of low quality",
    "perhaps text or a watermark": "crop it away, mask it, or say it in the caption",
}
"""Flaw -> what to do about it."""


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
    if min(image.size) >= _LEAST:
        if _blockiness(image) > BLOCKS:
            yield "JPEG blocks"
        if _has_text(values):
            yield "perhaps text or a watermark"
    if mean < DARK:
        yield "very dark"
    elif mean > BRIGHT:
        yield "very bright"


def _laplacian(values: NDArray[np.float64]) -> NDArray[np.float64]:
    laplacian: NDArray[np.float64] = (
        4 * values[1:-1, 1:-1] - values[:-2, 1:-1] - values[2:, 1:-1] - values[1:-1, :-2] - values[1:-1, 2:]
    )
    return laplacian


def _blockiness(image: Image.Image) -> float:
    """Returns by how much steps on one line in eight exceed the others; the lesser of columns and rows."""
    width, height = (min(side, _CENTER) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    gray = np.asarray(image.crop((left, top, left + width, top + height)).convert("L"), dtype=np.float64)
    excesses = []
    for values in (gray, gray.T):
        # Edges of objects are bounded, or few of them would decide.
        steps = np.minimum(np.abs(np.diff(values, axis=1)), 32.0).mean(axis=0)
        phases = np.array([steps[phase::8].mean() for phase in range(8)])
        others = np.delete(phases, phases.argmax()).mean()
        excesses.append(float((phases.max() - others) / (others + 2.0)))
    return min(excesses)


def _has_text(values: NDArray[np.float64]) -> bool:
    """Returns True if a band of rows changes often between light and dark, with calm rows above and below."""
    steps = np.diff(values, axis=1)
    signs = np.where(steps > TEXT_STEP, 1, np.where(steps < -TEXT_STEP, -1, 0))
    columns = np.arange(signs.shape[1])
    last = np.maximum.accumulate(np.where(signs != 0, columns, -1), axis=1)
    before = np.concatenate([np.full((len(signs), 1), -1), last[:, :-1]], axis=1)
    earlier = np.where(before >= 0, np.take_along_axis(signs, np.maximum(before, 0), axis=1), signs)
    changes = np.cumsum((signs != 0) & (signs != earlier), axis=1)
    starts = range(0, signs.shape[1] - _WINDOW + 1, _STRIDE)
    return any(_has_line(changes[:, start + _WINDOW - 1] - changes[:, start]) for start in starts)


def _has_line(changes: NDArray[np.int64]) -> bool:
    busy = changes >= TEXT_CHANGES
    busy[1:-1] |= busy[:-2] & busy[2:]  # one calm row inside of a line
    edges = np.flatnonzero(np.diff(np.concatenate([[False], busy, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        above, below = changes[max(0, start - _MARGIN) : start], changes[end : end + _MARGIN]
        is_line = _LINE[0] <= end - start <= _LINE[1] and len(above) and len(below)
        if is_line and above.min() <= 1 and below.min() <= 1:
            return True
    return False
