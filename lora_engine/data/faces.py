"""Finds faces in images, with the detector inside the package: no download, no further library."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_SCORE = 0.7
"""Least score of a face. On scikit-image's photographs, both faces have 0.77 and more, everything else 0.42 and less."""
_MAX_OVERLAP = 0.3
_Points = NDArray[np.float64]


@dataclass(frozen=True)
class Face:
    """A face in an image.

    Attributes:
        box: Left, top, right and bottom, in pixels of the image: eyebrows to chin. May reach beyond the image.
        score: Confidence of the detector, 0 to 1.
        eyes: Both eyes as (x, y) in pixels of the image, the left one in the image first.
    """

    box: tuple[float, float, float, float]
    score: float
    eyes: tuple[tuple[float, float], tuple[float, float]]

    @property
    def side(self) -> float:
        """The longer side of the box in pixels."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)

    @property
    def center(self) -> tuple[float, float]:
        """The center of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def find_faces(image: Image.Image, min_score: float = MIN_SCORE) -> tuple[Face, ...]:
    """Returns the faces in an RGB image, the most certain first.

    The image is shrunk to 192 pixels, so faces below about a tenth of its longer side are not found.

    Args:
        image: The image.
        min_score: Least score.
    """
    import torch

    from lora_engine.data.blazeface import GRID, SIDE, load_blazeface

    pixels, scale, offset = _letterbox(image, SIDE)
    with torch.inference_mode():
        points, logits = load_blazeface()(torch.from_numpy(pixels)[None])
    scores = torch.sigmoid(logits[0].double()).numpy()
    centers = (np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 2) + 0.5) * (SIDE / GRID)
    decoded = points[0].double().numpy()
    size = decoded[:, 1].copy()
    certain = (scores >= min_score) & (size > 0).all(axis=1)
    decoded += centers[:, None]
    decoded[:, 0], decoded[:, 1] = decoded[:, 0] - size / 2, decoded[:, 0] + size / 2
    merged = _merge((decoded[certain] - offset) / scale, scores[certain])
    return tuple(_face(points, score) for points, score in merged)


def _letterbox(image: Image.Image, side: int) -> tuple[NDArray[np.float32], float, _Points]:
    """Returns the pixels [3, side, side] in [-1, 1], the factor of the resize, and the offset of the image in them."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    left, top = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1.0)
    return pixels, scale, np.array([left, top], dtype=np.float64)


def _merge(points: _Points, scores: _Points) -> list[tuple[_Points, float]]:
    """Averages overlapping detections by score, as MediaPipe does, and gives each average the highest score of them."""
    merged = []
    order = np.argsort(-scores, kind="stable")
    while len(order):
        overlap = _overlaps(points[order[0]], points[order])
        same = order[overlap > _MAX_OVERLAP]
        merged.append((np.average(points[same], axis=0, weights=scores[same]), float(scores[order[0]])))
        order = order[overlap <= _MAX_OVERLAP]
    return merged


def _overlaps(first: _Points, others: _Points) -> _Points:
    """Returns intersection over union of a box and others; 1 for a box of no size and itself."""
    low, high = np.maximum(first[0], others[:, 0]), np.minimum(first[1], others[:, 1])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 1] - others[:, 0], axis=1)
    union = np.prod(first[1] - first[0]) + areas - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 1.0)


def _face(points: _Points, score: float) -> Face:
    (left, top), (right, bottom) = points[:2].tolist()
    first, second = sorted((x, y) for x, y in points[2:4].tolist())
    return Face((left, top, right, bottom), score, (first, second))
