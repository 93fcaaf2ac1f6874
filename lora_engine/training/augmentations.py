"""The looks of a picture: as it is, mirrored, in other colours. They are few and fixed, so that latents can be kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.seeds import generator
from lora_engine.training.specs.captions import Captions, Colours

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Rotating the colours of YIQ around the grey axis is how hue is turned without a detour over HSV's corners.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True)
class Augmentation:
    """One look.

    Attributes:
        mirrored: Left to right.
        brightness: Factor on the values.
        contrast: Factor on the distance from the mean grey.
        saturation: Factor on the colours' distance from grey.
        hue: Turn in full circles.
    """

    mirrored: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0

    def key(self) -> dict[str, Any]:
        """What a cache's key says of it; nothing of the look that changes nothing."""
        return {} if self == PLAIN else {"look": asdict(self)}

    def apply(self, pixels: Tensor) -> Tensor:
        """Pixels [3, height, width] in [-1, 1] in this look, clipped to that range; in float64 between."""
        if self == Augmentation(mirrored=self.mirrored):
            return pixels.flip(-1) if self.mirrored else pixels
        values = (pixels.double() + 1.0) / 2.0
        weights = torch.tensor(_GREY, dtype=torch.float64).view(3, 1, 1)
        values = (values * self.brightness).clamp(0.0, 1.0)
        mean = (values * weights).sum(dim=0).mean()
        values = ((values - mean) * self.contrast + mean).clamp(0.0, 1.0)
        grey = (values * weights).sum(dim=0, keepdim=True)
        values = ((values - grey) * self.saturation + grey).clamp(0.0, 1.0)
        if self.hue:
            values = torch.einsum("ij,jhw->ihw", _turn(self.hue), values).clamp(0.0, 1.0)
        found = (values * 2.0 - 1.0).to(pixels.dtype)
        return found.flip(-1) if self.mirrored else found

    def mirror(self, mask: Tensor) -> Tensor:
        """A mask [..., width] that belongs to a picture in this look."""
        return mask.flip(-1) if self.mirrored else mask


PLAIN = Augmentation()


def augmentations_of(settings: Captions, seed: int) -> tuple[Augmentation, ...]:
    """All looks that a picture may have; the first is the picture as it is.

    The same for every picture, so that a run's cache is (1 + variants) times as large, and twice that with `flip`.
    """
    shades = [PLAIN, *(_color_variant(settings.colours, seed, number) for number in range(_variants(settings.colours)))]
    mirrors = (False, True) if settings.flip else (False,)
    return tuple(
        Augmentation(
            mirrored, augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue
        )
        for mirrored in mirrors
        for augmentation in shades
    )


def _variants(colours: Colours | None) -> int:
    return colours.variants if colours is not None else 0


def _color_variant(colours: Colours | None, seed: int, number: int) -> Augmentation:
    if colours is None:
        return PLAIN
    drawn = (torch.rand(4, generator=generator(seed, "shade", number), dtype=torch.float64) * 2 - 1).tolist()
    return Augmentation(
        False,
        1 + drawn[0] * colours.brightness,
        1 + drawn[1] * colours.contrast,
        1 + drawn[2] * colours.saturation,
        drawn[3] * colours.hue,
    )


def _turn(hue: float) -> Tensor:
    to_yiq = torch.tensor(_TO_YIQ, dtype=torch.float64)
    angle = torch.tensor(hue * 2 * torch.pi, dtype=torch.float64)
    turned = torch.eye(3, dtype=torch.float64)
    turned[1, 1] = turned[2, 2] = angle.cos()
    turned[1, 2], turned[2, 1] = -angle.sin(), angle.sin()
    found: Tensor = torch.linalg.inv(to_yiq) @ turned @ to_yiq
    return found
