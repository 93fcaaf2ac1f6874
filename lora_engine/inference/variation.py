"""Noise of seeds, variations of it, and noise of one size in another, as in A1111's web UI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.step_weights import write_number

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = re.compile(r"([0-9]{1,18}):([0-9]{0,9}\.?[0-9]{0,9})")


@dataclass(frozen=True)
class NoiseVariation:
    """Noise of another seed that is mixed into that of an image.

    Attributes:
        seed: Its seed; of further images, it counts up and the seed of the image does not.
        strength: Its share, 0 to 1; 0 changes nothing.
    """

    seed: int
    strength: float

    def __post_init__(self) -> None:
        if self.seed < 0 or not 0.0 <= self.strength <= 1.0:
            raise SettingsError(
                f"the variation has seed {self.seed} and strength {self.strength:g}",
                allowed="a seed of 0 or more, and a strength from 0 to 1",
            )

    def __str__(self) -> str:
        """Returns `SEED:STRENGTH`, which `parse` reads."""
        return f"{self.seed}:{write_number(self.strength)}"

    @classmethod
    def parse(cls, text: str) -> NoiseVariation:
        """Reads `SEED:STRENGTH`.

        Raises:
            SettingsError: It is not that.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None or match[2] in {"", "."}:
            raise SettingsError(f"variation {text[:40]!r}", allowed="SEED:STRENGTH, such as 7:0.2")
        return cls(int(match[1]), float(match[2]))


def draw_varied(
    shape: tuple[int, int, int],
    seed: int,
    variation: NoiseVariation | None,
    seed_shape: tuple[int, int, int] | None = None,
) -> Tensor:
    """Returns the standard normal noise of an image; the same as `draw_noise` without a variation and another shape.

    Args:
        shape: Of the latents: channels, height, width.
        seed: Seed of the image.
        variation: What is mixed in.
        seed_shape: Shape of the latents whose noise is put into the middle, so that an image of another size resembles
            one of that size; None takes the shape.
    """
    from lora_engine.inference.generate import draw_noise

    inner = seed_shape or shape
    noise = draw_noise(inner, seed)
    if variation is not None and variation.strength > 0.0:
        noise = interpolate_noise(noise, draw_noise(inner, variation.seed), variation.strength)
    if inner == shape:
        return noise
    outer = draw_noise(shape, seed)
    target, source = zip(*(_overlap(outer.shape[axis], noise.shape[axis]) for axis in (1, 2)), strict=True)
    outer[:, target[0], target[1]] = noise[:, source[0], source[1]]
    return outer


def interpolate_noise(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Returns the spherical interpolation of two noises [channels, height, width], column by column as A1111 does."""
    import torch

    cosine = (first / first.norm(dim=1, keepdim=True) * (second / second.norm(dim=1, keepdim=True))).sum(1)
    if float(cosine.mean()) > 0.9995:
        return (1.0 - share) * first + share * second
    angle = torch.acos(cosine.clamp(-1.0, 1.0))
    sine = torch.sin(angle)
    return (torch.sin((1.0 - share) * angle) / sine).unsqueeze(1) * first + (torch.sin(share * angle) / sine).unsqueeze(
        1
    ) * second


def _overlap(outer: int, inner: int) -> tuple[slice, slice]:
    """Returns where the middle of an axis is in an outer and in an inner tensor."""
    margin = (outer - inner) // 2
    length = inner if margin >= 0 else inner + 2 * margin
    start, skipped = max(margin, 0), max(-margin, 0)
    return slice(start, start + length), slice(skipped, skipped + length)
