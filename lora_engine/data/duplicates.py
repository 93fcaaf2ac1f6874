"""Finds images that show the same: re-encoded, resized, mirrored or slightly cropped copies.

Uses perceptual hashes: signs of the lowest frequencies of the gray image (Zauner 2010, "Implementation and Benchmarking
of Perceptual Image Hash Functions"). They ignore color, so the mean colors are compared too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
Matches = tuple[int, NDArray[np.intp]]
"""The index of an image, and the larger ones of the images that it is compared with and matches, ascending."""


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
        hashes = {"fine": self.fine.tobytes().hex(), "coarse": self.coarse.tobytes().hex()}
        return {**hashes, "color": self.color.tolist(), "is_small": self.is_small}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Print:
        """Returns the print of `to_json`."""
        fine, coarse = (np.frombuffer(bytes.fromhex(data[name]), dtype=np.uint8) for name in ("fine", "coarse"))
        return cls(
            fine.reshape(2, -1),
            coarse.reshape(-1, 8),
            np.array(data["color"], dtype=np.float64),
            bool(data["is_small"]),
        )


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


def find_groups(prints: Sequence[Print]) -> list[list[int]]:
    """Returns groups of kin images, as indices in ascending order; an image without kin is a group of its own.

    Kin are equal images, and crops of one another. What is kin of kin is in the same group.

    Args:
        prints: The prints of the images.
    """
    # The smallest index of each image's group. Arrays, as n images of one scene are n² / 2 pairs.
    labels = np.arange(len(prints))
    for first, others in find_kin(prints):
        for label in {*labels[others[labels[others] != labels[first]]].tolist()}:
            low, high = sorted((int(labels[first]), label))
            labels[labels == high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        groups[label].append(index)
    return list(groups.values())


def find_kin(prints: Sequence[Print], count: int | None = None) -> Iterator[Matches]:
    """Yields the images that have kin among those after them, in their order; takes n² comparisons.

    Args:
        prints: The prints of the images.
        count: Number of images at the front that are compared with those after them; None means all.
    """
    colors, fine = _colors(prints), _Hashes([entry.fine for entry in prints])
    coarse, large = _Hashes([entry.coarse for entry in prints]), _are_large(prints)
    for first in range(len(prints) if count is None else count):
        near = fine.match(first, SAME_BITS)
        if large[first]:
            near |= coarse.match(first, KIN_BITS) & large[first + 1 :]
        yield from _of_like_color(colors, first, near)


def find_same(prints: Sequence[Print], count: int | None = None) -> Iterator[Matches]:
    """Yields the images that are equal to one after them but for encoding, size or mirroring; see `find_kin`."""
    colors, fine = _colors(prints), _Hashes([entry.fine for entry in prints])
    for first in range(len(prints) if count is None else count):
        yield from _of_like_color(colors, first, fine.match(first, SAME_BITS))


def _colors(prints: Sequence[Print]) -> NDArray[np.float64]:
    return np.array([entry.color for entry in prints], dtype=np.float64)


def _are_large(prints: Sequence[Print]) -> NDArray[np.bool_]:
    return np.array([not entry.is_small for entry in prints], dtype=bool)


def _of_like_color(colors: NDArray[np.float64], first: int, near: NDArray[np.bool_]) -> Iterator[Matches]:
    """Yields the matches of an image, if it has any whose mean color is like its own."""
    others = np.flatnonzero(near) + first + 1
    others = others[np.abs(colors[others] - colors[first]).max(axis=1, initial=0.0) <= MAX_COLOR]
    if len(others):
        yield first, others


class _Hashes:
    """Compares the hashes of images.

    Args:
        prints: One array of bytes [views, bytes] per image; the bytes are a multiple of 8.
    """

    def __init__(self, prints: Sequence[NDArray[np.uint8]]) -> None:
        # [views, images, words]: the popcount of a word is as fast as that of a byte.
        self._views = np.stack(prints, axis=1).view(np.uint64) if prints else np.zeros((1, 0, 1), np.uint64)

    def match(self, first: int, limit: int) -> NDArray[np.bool_]:
        """Returns a truth value for each later image: its whole and a view of the first, or the reverse, are alike."""
        whole, views, rest = self._views[0], self._views, self._views[:, first + 1 :]
        near = np.zeros(rest.shape[1], dtype=bool)
        for view in range(len(views)):
            for pair in (whole[first + 1 :] ^ views[view, first], rest[view] ^ whole[first]):
                near |= np.bitwise_count(pair).sum(axis=1) <= limit
        return near


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
