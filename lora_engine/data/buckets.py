"""Aspect-ratio buckets: the few sizes that pictures of any shape are brought to, all of about one area.

Arithmetic on widths and heights alone; no picture is opened here. The idea is NovelAI's (2022): batches need one size,
and a square crop cuts heads and feet off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_engine.data.spec import Buckets

Sides = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How a picture gets into its bucket.

    Attributes:
        size: (width, height) of the bucket, in pixels.
        resized: (width, height) that the picture is brought to first: no side is shorter than the bucket's.
        scale: `resized` over the picture's own size; above 1 enlarges.
    """

    size: Sides
    resized: Sides
    scale: float


def bucket_sizes(resolution: int, buckets: Buckets) -> tuple[Sides, ...]:
    """All (width, height) of which neither side leaves its range and the area stays within resolution^2.

    To each width the greatest height, and to each height the greatest width, both in whole steps; the square is among
    them where the resolution is a multiple of the step.
    """
    low, high = buckets.sides(resolution)
    found: set[Sides] = set()
    for side in range(low, high + 1, buckets.step):
        other = min(high, resolution * resolution // side // buckets.step * buckets.step)
        if other >= low:
            found |= {(side, other), (other, side)}
    return tuple(sorted(found))


def choose_bucket(picture: Sides, sizes: tuple[Sides, ...], buckets: Buckets, resolution: int) -> Fit | None:
    """The bucket of a picture: the one whose shape is nearest to its own, as a ratio.

    Among equally near ones the larger counts, then the wider. A picture that would be enlarged by more than
    `buckets.enlarge` goes into a smaller size of its own shape, in whole steps.

    Args:
        picture: Its (width, height).
        sizes: See `bucket_sizes`.
        buckets: The settings.
        resolution: See `PreprocessSettings`.

    Returns:
        How it gets there; None where it is too small for every size that is allowed.
    """
    width, height = picture
    shape = math.log(width / height)
    # Rounded: the logarithm's last bits must not choose between two buckets.
    ranked = sorted(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 9), -s[0] * s[1], -s[0]))
    best = fit_into(picture, ranked[0])
    if best.scale <= buckets.enlarge:
        return best
    low, _ = buckets.sides(resolution)
    limits = (int(side * buckets.enlarge) // buckets.step * buckets.step for side in picture)
    smaller = tuple(min(limit, side) for limit, side in zip(limits, best.size, strict=True))
    return fit_into(picture, (smaller[0], smaller[1])) if min(smaller) >= low else None


def fit_into(picture: Sides, size: Sides) -> Fit:
    """How a picture of (width, height) gets the least size that covers another, without a change of its shape."""
    scale = max(size[0] / picture[0], size[1] / picture[1])
    resized = (max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale)))
    return Fit(size, resized, scale)
