"""Chooses the part of an image that is kept: by place, contrast, mask, faces or at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.data.buckets import Sides
from lora_engine.data.faces import Face, find_faces
from lora_engine.data.preparation import Preparation
from lora_engine.data.preparation_spec import FaceCrop, RandomCrop, SubjectCrop
from lora_engine.errors import DataError
from lora_engine.registries import Registry

Box = tuple[int, int, int, int]
CROPS: Registry[Callable[[Image.Image, Sides], Box]] = Registry("crop")
_SUBJECT = 128
"""Least value of a mask that belongs to the subject."""


@dataclass(frozen=True)
class Window:
    """A square part of an image.

    Attributes:
        box: Left, top, right and bottom in pixels of the image, inside it.
        faces: Number of faces in the image; None if none were looked for.
        angle: Degrees to turn the image counterclockwise around the center of the box before the crop.
    """

    box: Box
    faces: int | None = None
    angle: float = 0.0

    def cut(self, image: Image.Image) -> Image.Image:
        """Returns the part of an image or mask."""
        if self.angle:
            left, top, right, bottom = self.box
            center = (left + right) / 2, (top + bottom) / 2
            image = image.rotate(self.angle, Image.Resampling.BICUBIC, center=center)
        return image.crop(self.box)

    def record(self, preparation: Preparation) -> Preparation:
        """Returns a record with the window."""
        return preparation.model_copy(
            update={"box": self.box, "faces": self.faces, "angle": self.angle if self.angle else None}
        )


def find_window(
    options: RandomCrop | SubjectCrop | FaceCrop, image: Image.Image, mask: Image.Image | None, least: int, digest: str
) -> Window:
    """Returns the square that is kept of an image.

    Args:
        options: The crop.
        image: RGB image.
        mask: Gray mask of its size; None if it has none.
        least: Least side in pixels; the image's shorter side is a limit above it.
        digest: Digest of the image, which random places depend on.

    Raises:
        DataError: The image shows no face, or several; or its mask marks nothing.
    """
    if isinstance(options, FaceCrop):
        return _face_window(options, image, least)
    if isinstance(options, SubjectCrop):
        return Window(_subject_box(options, image, mask, least))
    from lora_engine.seeds import derive_seed  # imports torch

    side = min(image.size)
    seed = derive_seed(options.seed, "crop", digest)
    left, top = (seed >> shift & 0x7FFFFFFF for shift in (0, 31))
    return Window(_square((left % (image.width - side + 1), top % (image.height - side + 1)), side))


def center_box(image: Image.Image, size: Sides) -> Box:
    """Returns the window of (width, height) in the center."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def salient_box(image: Image.Image, size: Sides) -> Box:
    """Returns the window of (width, height) with the highest gradient energy; ties go to the one nearest the center."""
    width, height = size
    energy = _gradient_energy(image)
    table = np.zeros((energy.shape[0] + 1, energy.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = energy.cumsum(axis=0).cumsum(axis=1)
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    tops, lefts = np.nonzero(sums == sums.max())
    middle = (sums.shape[0] - 1) / 2, (sums.shape[1] - 1) / 2
    nearest = int(np.argmin(np.abs(tops - middle[0]) + np.abs(lefts - middle[1])))
    left, top = int(lefts[nearest]), int(tops[nearest])
    return left, top, left + width, top + height


def _gradient_energy(image: Image.Image) -> NDArray[np.int64]:
    # Integers give the same sums, and the same window, on every machine.
    gray = np.asarray(image.convert("L"), dtype=np.int64)
    energy = np.zeros_like(gray)
    energy[:, 1:] += np.diff(gray, axis=1) ** 2
    energy[1:, :] += np.diff(gray, axis=0) ** 2
    return energy


def _subject_box(options: SubjectCrop, image: Image.Image, mask: Image.Image | None, least: int) -> Box:
    if mask is None:
        raise DataError("has no mask, which crop 'subject' needs", remedy="add one, set `mask`, or choose another crop")
    box = mask.point([255 * (value >= _SUBJECT) for value in range(256)]).getbbox()
    if box is None:
        raise DataError("its mask marks nothing, and crop 'subject' needs a subject")
    left, top, right, bottom = box
    side = max(right - left, bottom - top) * options.margin
    return _place(image, ((left + right) / 2, (top + bottom) / 2), side, least)


def _face_window(options: FaceCrop, image: Image.Image, least: int) -> Window:
    faces = find_faces(image, options.min_score)
    if not faces:
        raise DataError("shows no face, which crop 'face' needs")
    if len(faces) > 1 and options.several == "quarantine":
        raise DataError(f"shows {len(faces)} faces", allowed="one face, or `several: largest`")
    face = max(faces, key=lambda face: face.side)
    box = _place(image, face.center, face.side * options.margin, least)
    angle = _level_angle(face) if options.level else 0.0
    return Window(box, len(faces), angle if _stays_inside(box, angle, image.size) else 0.0)


def _place(image: Image.Image, center: tuple[float, float], side: float, least: int) -> Box:
    """Returns the square around a point, moved into the image."""
    length = min(max(math.ceil(side), least), *image.size)
    left, top = (
        min(max(0, round(middle - length / 2)), extent - length)
        for middle, extent in zip(center, image.size, strict=True)
    )
    return _square((left, top), length)


def _square(corner: tuple[int, int], side: int) -> Box:
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def _level_angle(face: Face) -> float:
    (x1, y1), (x2, y2) = face.eyes
    return round(math.degrees(math.atan2(y2 - y1, x2 - x1)), 1)


def _stays_inside(box: Box, angle: float, size: Sides) -> bool:
    """Returns True if a box that is turned around its center is inside an image."""
    left, top, right, bottom = box
    turn = math.radians(angle)
    reach = (right - left) / 2 * (abs(math.cos(turn)) + abs(math.sin(turn)))
    x, y = (left + right) / 2, (top + bottom) / 2
    return reach <= min(x, y, size[0] - x, size[1] - y)


CROPS.add("center", center_box)
CROPS.add("salient", salient_box)
