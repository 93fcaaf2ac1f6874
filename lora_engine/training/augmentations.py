"""Image augmentations: mirroring and color variants. Their number is fixed, so latents can be cached."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.seeds import generator
from lora_engine.training.specs.captions import Captions, ColorJitter

_GRAY = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Hue rotates around the gray axis of YIQ, which is smooth, unlike HSV.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Augmentation:
    """One augmentation.

    Attributes:
        mirrored: Mirrors left to right.
        brightness: Factor on the values.
        contrast: Factor on the distance from the mean gray.
        saturation: Factor on the colors' distance from gray.
        hue: Hue rotation; full circles.
    """

    mirrored: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def key(self) -> dict[str, Any]:
        """Returns the augmentation's part of a cache key; empty for the identity."""
        return {} if self == UNCHANGED else {"look": asdict(self)}

    def apply(self, pixels: Tensor) -> Tensor:
        """Returns pixels [3, height, width] in [-1, 1], augmented and clipped; computes in float64."""
        if self == Augmentation(mirrored=self.mirrored):
            return pixels.flip(-1) if self.mirrored else pixels
        values = (pixels.double() + 1.0) / 2.0
        weights = torch.tensor(_GRAY, dtype=torch.float64).view(3, 1, 1)
        values = (values * self.brightness).clamp(0.0, 1.0)
        mean = (values * weights).sum(dim=0).mean()
        values = ((values - mean) * self.contrast + mean).clamp(0.0, 1.0)
        gray = (values * weights).sum(dim=0, keepdim=True)
        values = ((values - gray) * self.saturation + gray).clamp(0.0, 1.0)
        if self.hue:
            values = torch.einsum("ij,jhw->ihw", _hue_rotation(self.hue), values).clamp(0.0, 1.0)
        augmented = (values * 2.0 - 1.0).to(pixels.dtype)
        return augmented.flip(-1) if self.mirrored else augmented

    def mirror(self, mask: Tensor) -> Tensor:
        """Returns a mask [..., width], mirrored like the image."""
        return mask.flip(-1) if self.mirrored else mask


UNCHANGED = Augmentation()


def augmentations_of(settings: Captions, seed: int) -> tuple[Augmentation, ...]:
    """Returns all augmentations of an image; the first is the identity.

    They are the same for every image. A run's cache is (1 + variants) times as large, and twice that with `flip`.
    """
    variants = [
        UNCHANGED,
        *(_color_variant(settings.colours, seed, number) for number in range(_variants(settings.colours))),
    ]
    mirrors = (False, True) if settings.flip else (False,)
    return tuple(
        Augmentation(
            mirrored, augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
        )
        for mirrored in mirrors
        for augmentation in variants
    )


def _variants(colours: ColorJitter | None) -> int:
    return colours.variants if colours is not None else 0


def _color_variant(colours: ColorJitter | None, seed: int, number: int) -> Augmentation:
    if colours is None:
        return UNCHANGED
    draws = (torch.rand(4, generator=generator(seed, "shade", number), dtype=torch.float64) * 2 - 1).tolist()
    return Augmentation(
        False,
        1 + draws[0] * colours.brightness,
        1 + draws[1] * colours.contrast,
        1 + draws[2] * colours.saturation,
        draws[3] * colours.hue,
    )


def _hue_rotation(hue: float) -> Tensor:
    to_yiq = torch.tensor(_TO_YIQ, dtype=torch.float64)
    angle = torch.tensor(hue * 2 * torch.pi, dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[1, 1] = rotation[2, 2] = angle.cos()
    rotation[1, 2], rotation[2, 1] = -angle.sin(), angle.sin()
    matrix: Tensor = torch.linalg.inv(to_yiq) @ rotation @ to_yiq
    return matrix
