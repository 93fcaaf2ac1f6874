"""Images to start from: drawn again from partial noise (SDEdit, Meng et al. 2021), as a whole or only under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.data.pixels import to_pixels
from lora_engine.errors import SettingsError


@dataclass(frozen=True)
class SourceImage:
    """An image to start from.

    Attributes:
        pixels: float32 [3, height, width] in [-1, 1].
        strength: Share of the denoising steps that run, above 0 to 1; 1 starts from noise alone.
        mask: float32 [1, height, width] in [0, 1]; what is 0.5 or more is drawn, the rest is kept. None draws all.
        is_enlarged: True if it was drawn and enlarged; tags and edits have values of their own for this second pass.
    """

    pixels: Tensor
    strength: float
    mask: Tensor | None = None
    is_enlarged: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.strength <= 1.0:
            raise SettingsError(f"strength is {self.strength:g}", allowed="a number above 0, up to 1")
        if self.mask is not None and not bool((self.mask >= 0.5).any()):
            raise SettingsError("the mask is empty", allowed="a mask with light parts, which are drawn")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def start(self, base: BaseModel, rows: int) -> Start:
        """Returns what the denoising of that many images starts from."""
        latents = base.encode_images(self.pixels[None])
        mask = None
        if self.mask is not None and not base.inpaints:
            mask = F.interpolate((self.mask[None] >= 0.5).float(), latents.shape[-2:]).to(latents.device)
        return Start(latents.expand(rows, -1, -1, -1), self.strength, mask)

    def conditioning(self, base: BaseModel) -> Conditioning | None:
        """Returns the mask for an inpainting base, one row; None for other bases."""
        if not base.inpaints:
            return None
        mask = torch.ones(1, 1, *self.size) if self.mask is None else (self.mask[None] >= 0.5).float()
        return base.encode_mask(mask.to(base.device), self.pixels[None].to(base.device))

    def keep_unmasked(self, images: Tensor) -> Tensor:
        """Returns images [n, 3, height, width] with the pixels of the source where the mask is dark."""
        if self.mask is None:
            return images
        return torch.where(self.mask[None] >= 0.5, images, self.pixels[None])


@dataclass(frozen=True)
class Start:
    """What denoising starts from, instead of noise alone.

    Attributes:
        latents: Scaled latents [n, channels, height, width].
        strength: Share of the steps that run.
        mask: [1, 1, height, width] of 0 and 1; where it is 0, each step returns to the noisy source. None: nowhere.
    """

    latents: Tensor
    strength: float
    mask: Tensor | None

    def first_step(self, steps: int) -> int:
        """Returns the number of the first step that runs, from 0; at least one runs."""
        return steps - min(max(int(steps * self.strength), 1), steps)

    def noisy(self, scheduler: object, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns the latents with the noise of a timestep."""
        steps = timestep.reshape(1)
        if hasattr(scheduler, "scale_noise"):  # flow matching
            result: Tensor = scheduler.scale_noise(self.latents, steps, noise)
        else:
            result = scheduler.add_noise(self.latents, noise, steps)  # type: ignore[attr-defined]
        return result

    def blend(self, latents: Tensor, scheduler: object, noise: Tensor, following: Sequence[Tensor]) -> Tensor:
        """Returns latents with the source, noisy as before the next step, where the mask is 0."""
        if self.mask is None:
            return latents
        source = self.noisy(scheduler, noise, following[0]) if len(following) else self.latents
        return self.mask * latents + (1.0 - self.mask) * source


def fit_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scales an image and crops its center to (height, width).

    Returns:
        float32 [3, height, width] in [-1, 1].
    """
    return to_pixels(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS))


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """Scales and crops a mask as `fit_image` does its image.

    Returns:
        float32 [1, height, width] in [0, 1].
    """
    return (fit_image(mask.convert("L").convert("RGB"), size)[:1] + 1.0) / 2.0
