"""Stable Diffusion and XL for inpainting: a UNet that also reads a mask and the picture without what is under it.

Source of the computations: the inpainting pipelines of diffusers; a parity test holds them to it. A base of four
channels that is only ever drawn on under a mask is none of these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.sd import StableDiffusion
from lora_engine.bases.sdxl import StableDiffusionXL
from lora_engine.bases.source import BaseSource
from lora_engine.errors import SettingsError


def load(source: BaseSource, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Loads a base of one of these families; see `load_base`."""
    cls = InpaintingXL if source.family == "sdxl-inpainting" else Inpainting
    return cls(source, device, dtype)


class Inpainting(StableDiffusion):
    """As `StableDiffusion`; `predict` needs what `encode_mask` gives, beside the text."""

    inpaints = True

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Conditioning:
        """See `BaseModel`."""
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != pixels.shape[2:]:
            raise SettingsError(
                f"the mask has shape {list(mask.shape)} and the pictures {list(pixels.shape)}",
                allowed="[n, 1, height, width] and [n, 3, height, width]",
            )
        there = (mask >= 0.5).to(self.device, torch.float32)
        _, height, width = self.latent_shape((mask.shape[2], mask.shape[3]))
        masked = self.encode_images(pixels.to(self.device, torch.float32) * (1 - there))
        return Conditioning({"mask": F.interpolate(there, (height, width)), "masked": masked})

    def _entering(self, noisy: Tensor, conditioning: Conditioning) -> Tensor:
        if not {"mask", "masked"} <= set(conditioning.tensors):
            raise SettingsError(
                f"the base {self.name!r} is made for inpainting and needs a mask",
                remedy="join what `encode_mask` gives to the text's conditioning, or choose a base without mask",
            )
        return torch.cat([noisy, conditioning["mask"], conditioning["masked"]], dim=1)

    def _reads(self) -> Mapping[str, int]:
        latents = int(self.vae.config.latent_channels)
        return {"latents": latents, "mask": 1, "masked latents": latents}


class InpaintingXL(Inpainting, StableDiffusionXL):
    """As `StableDiffusionXL`, with the mask of `Inpainting`."""
