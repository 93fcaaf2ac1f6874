"""Chooses aspect-ratio buckets: a few sizes of similar area for images of any shape.

Works on widths and heights only; opens no image. The idea is NovelAI's (2022): batches need one size, and a square crop
cuts off heads and feet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_engine.data.spec import Buckets

Sides = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """The resize and crop of an image for its bucket.

    Attributes:
        size: (width, height) of the bucket, in pixels.
        resized: (width, height) before the crop; no side is shorter than the bucket's.
        scale: `resized` divided by the image's own size; above 1 enlarges.
    """

    size: Sides
    resized: Sides
    scale: float


def bucket_sizes(resolution: int, buckets: Buckets) -> tuple[Sides, ...]:
    """Returns all (width, height) with both sides in range and an area of at most resolution^2.

    Each width has the greatest possible height, and each height the greatest width, in whole steps. The square is
    included if the resolution is a multiple of the step.
    """
    low, high = buckets.sides(resolution)
    sizes: set[Sides] = set()
    for side in range(low, high + 1, buckets.step):
        longest = min(high, resolution * resolution // side // buckets.step * buckets.step)
        if longest >= low:
            sizes |= {(side, longest), (longest, side)}
    return tuple(sorted(sizes))


def choose_bucket(image: Sides, sizes: tuple[Sides, ...], buckets: Buckets, resolution: int) -> Fit | None:
    """Returns the fit of an image into the bucket with the nearest aspect ratio.

    Ties go to the larger area, then to the larger width. An image that would be enlarged by more than
    `buckets.enlarge` gets a smaller size of its own shape, in whole steps.

    Args:
        image: (width, height) of the image.
        sizes: See `bucket_sizes`.
        buckets: The settings.
        resolution: See `PreprocessSettings`.

    Returns:
        The fit; None if the image is too small for every allowed size.
    """
    width, height = image
    shape = math.log(width / height)
    # Rounded: the last bits of the logarithm must not decide between two buckets.
    ranked = sorted(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 9), -s[0] * s[1], -s[0]))
    best = fit_into(image, ranked[0])
    if best.scale <= buckets.enlarge:
        return best
    low, _ = buckets.sides(resolution)
    limits = (int(side * buckets.enlarge) // buckets.step * buckets.step for side in image)
    smaller = tuple(min(limit, side) for limit, side in zip(limits, best.size, strict=True))
    return fit_into(image, (smaller[0], smaller[1])) if min(smaller) >= low else None


def fit_into(image: Sides, size: Sides) -> Fit:
    """Returns the fit of an image of (width, height) into a size: the least resize of the same shape that covers it."""
    scale = max(size[0] / image[0], size[1] / image[1])
    resized = (max(size[0], round(image[0] * scale)), max(size[1], round(image[1] * scale)))
    return Fit(size, resized, scale)
