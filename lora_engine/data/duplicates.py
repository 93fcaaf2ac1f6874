"""Finds images that show the same: re-encoded, resized, mirrored or slightly cropped copies.

Uses perceptual hashes: signs of the lowest frequencies of the gray image (Zauner 2010, "Implementation and Benchmarking
of Perceptual Image Hash Functions"). They ignore color, so the mean colors are compared too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.data.images import open_image

VIEWS = (1.0, 0.95, 0.9, 0.8)
"""Central parts that are compared with other whole images, each also mirrored."""
SAME_BITS, KIN_BITS = 24, 8
"""Largest number of different bits of the fine hash (256 bits) of equal images, of the coarse one (64 bits) of kin."""
MAX_COLOR = 25.0
"""Largest distance of the mean colors of kin, per channel, of 255."""
SMALL = 128
"""Images with a shorter side have too few details for the coarse hash."""
_WORK = 512


@dataclass(frozen=True)
class Print:
    """What is compared of an image.

    Attributes:
        fine: 256 bits of the image and of its mirror image, as bytes [2, 32].
        coarse: 64 bits of each view, as bytes [views, 8]; the first is the image itself.
        color: Mean red, green and blue, 0-255.
        is_small: True if its shorter side is below `SMALL` pixels.
    """

    fine: NDArray[np.uint8]
    coarse: NDArray[np.uint8]
    color: NDArray[np.float64]
    is_small: bool

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON data."""
        hashes = {"fine": self.fine.tolist(), "coarse": self.coarse.tolist()}
        return {**hashes, "color": self.color.tolist(), "is_small": self.is_small}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Print:
        """Returns the print of `to_json`."""
        fine, coarse = (np.array(data[name], dtype=np.uint8) for name in ("fine", "coarse"))
        return cls(fine, coarse, np.array(data["color"], dtype=np.float64), bool(data["is_small"]))


def take_print(image: Image.Image) -> Print:
    """Returns the print of an RGB image; takes some ten milliseconds."""
    reduced = image.reduce(max(1, max(image.size) // _WORK))
    color = np.asarray(reduced, dtype=np.float64).mean(axis=(0, 1))
    gray = reduced.convert("L")
    views = [view for share in VIEWS for view in _with_mirror(_center(gray, share))]
    fine = np.stack([_hash(view, 16) for view in views[:2]])
    return Print(fine, np.stack([_hash(view, 8) for view in views]), color, min(image.size) < SMALL)


def group_files(files: Iterable[Path]) -> list[list[int]]:
    """Returns the groups of images that show the same or a part of it, as positions; see `find_groups`."""
    return find_groups([take_print(open_image(file)) for file in files])


def find_groups(prints: Sequence[Print], same: Collection[tuple[int, int]] | None = None) -> list[list[int]]:
    """Returns groups of kin images, as indices in ascending order; an image without kin is a group of its own.

    Kin are equal images, and crops of one another. What is kin of kin is in the same group.

    Args:
        prints: The prints of the images.
        same: The result of `find_same`, if it is at hand.
    """
    parents = list(range(len(prints)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    for first, second in find_kin(prints, same):
        low, high = sorted((root(first), root(second)))
        parents[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(prints)):
        groups[root(index)].append(index)
    return list(groups.values())


def find_kin(prints: Sequence[Print], same: Collection[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Returns the pairs of kin images, as indices, sorted; takes n² comparisons. Arguments as for `find_groups`."""
    same = set(find_same(prints) if same is None else same)
    coarse = _pairs([entry.coarse for entry in prints], KIN_BITS)
    near = {(a, b) for a, b in coarse if not (prints[a].is_small or prints[b].is_small)}
    return sorted(same | _of_like_color(prints, near))


def find_same(prints: Sequence[Print]) -> list[tuple[int, int]]:
    """Returns the pairs of images that are equal but for encoding, size or mirroring, as indices, sorted."""
    return sorted(_of_like_color(prints, _pairs([entry.fine for entry in prints], SAME_BITS)))


def _of_like_color(prints: Sequence[Print], pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    return {(a, b) for a, b in pairs if np.abs(prints[a].color - prints[b].color).max() <= MAX_COLOR}


def _pairs(prints: Sequence[NDArray[np.uint8]], limit: int) -> set[tuple[int, int]]:
    """Returns the pairs of images of which the whole of one differs from a view of the other in few bits."""
    found: set[tuple[int, int]] = set()
    if not prints:
        return found
    hashes = np.stack(prints)
    whole = hashes[:, 0]
    for view in range(hashes.shape[1]):
        for index, entry in enumerate(hashes[:, view]):
            bits = np.bitwise_count(whole ^ entry).sum(axis=1)
            found |= {(min(index, int(other)), max(index, int(other))) for other in np.flatnonzero(bits <= limit)}
    return {pair for pair in found if pair[0] != pair[1]}


def _hash(gray: Image.Image, size: int) -> NDArray[np.uint8]:
    side = 4 * size
    pixels = np.asarray(gray.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64)
    # The first rows of the matrix of the discrete cosine transform (type II).
    cosines = np.cos(np.pi / side * np.outer(np.arange(size), np.arange(side) + 0.5))
    low = cosines @ pixels @ cosines.T
    return np.packbits(low > np.median(low))


def _center(image: Image.Image, share: float) -> Image.Image:
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _with_mirror(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    return image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
