"""Compares the faces of generated images with those of real ones.

A detector finds the faces, which are leveled by the eyes, cropped and embedded. An image without a face is a result:
its similarity is 0, and the share of such images is reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lora_engine.data.faces import Face, find_faces
from lora_engine.data.pixels import to_pixels

MARGIN = 1.6
"""Side of a crop over the side of its face."""
_SIDE = 224

Detector = Callable[[Image.Image], Sequence[Face]]
"""Returns the faces in an RGB image."""
EmbedImages = Callable[[Tensor], Tensor]
"""Embeds images [n, 3, height, width] in [-1, 1] as float32 [n, d] of length 1."""


@dataclass(frozen=True)
class FaceMatch:
    """The faces in one generated image.

    Attributes:
        faces: Number of faces.
        similarity: Mean cosine of the most similar face with the real faces; 0 without a face.
    """

    faces: int
    similarity: float


def embed_faces(images: Sequence[Image.Image], embed: EmbedImages, detector: Detector = find_faces) -> Tensor:
    """Embeds the faces of real images: those of images with one face, since of several it is unknown which is meant.

    Args:
        images: RGB images.
        embed: The embedder.
        detector: Finds the faces.

    Returns:
        float32 [faces, d]; of no rows if no image has exactly one face.
    """
    crops = [crop_face(image, faces[0]) for image in images if len(faces := detector(image)) == 1]
    return _embed(crops, embed)


def match_faces(
    images: Sequence[Image.Image], real: Tensor, embed: EmbedImages, detector: Detector = find_faces
) -> list[FaceMatch]:
    """Compares the faces in each generated image with the real ones.

    Args:
        images: RGB images.
        real: The result of `embed_faces`; at least one row.
        embed: The same embedder.
        detector: The same detector.
    """
    found = [detector(image) for image in images]
    crops = [crop_face(image, face) for image, faces in zip(images, found, strict=True) for face in faces]
    similarities = (_embed(crops, embed) @ real.mean(dim=0)).tolist() if crops else []
    matches = []
    for faces in found:
        own, similarities = similarities[: len(faces)], similarities[len(faces) :]
        matches.append(FaceMatch(len(faces), max(own, default=0.0)))
    return matches


def crop_face(image: Image.Image, face: Face) -> Image.Image:
    """Returns the square around a face with its eyes level, 224 pixels; black beyond the image."""
    (left_x, left_y), (right_x, right_y) = face.eyes
    angle = math.degrees(math.atan2(right_y - left_y, right_x - left_x))
    level = image.rotate(angle, Image.Resampling.BICUBIC, center=face.center)
    (x, y), half = face.center, face.side * MARGIN / 2
    return level.transform(
        (_SIDE, _SIDE), Image.Transform.EXTENT, (x - half, y - half, x + half, y + half), Image.Resampling.BICUBIC
    )


def _embed(crops: Sequence[Image.Image], embed: EmbedImages) -> Tensor:
    return embed(torch.stack([to_pixels(crop) for crop in crops])) if crops else torch.empty(0, 1)
