"""Implements Stable Diffusion for inpainting: the UNet also reads a mask and the masked image.

Follows the inpainting pipelines of diffusers; a parity test compares the two. Bases with four input channels are not
inpainting bases.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import SettingsError
from lora_engine.families.sd.model import StableDiffusion


class InpaintingBase(StableDiffusion):
    """A `StableDiffusion` whose `predict` also needs the result of `encode_mask`."""

    inpaints = True

    def encode_mask(self, mask: Tensor, pixels: Tensor) -> Conditioning:
        """See `BaseModel`."""
        if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != pixels.shape[2:]:
            raise SettingsError(
                f"the mask has shape {list(mask.shape)} and the images {list(pixels.shape)}",
                allowed="[n, 1, height, width] and [n, 3, height, width]",
            )
        binary = (mask >= 0.5).to(self.device, torch.float32)
        _, height, width = self.latent_shape((mask.shape[2], mask.shape[3]))
        masked = self.encode_images(pixels.to(self.device, torch.float32) * (1 - binary))
        return Conditioning({"mask": F.interpolate(binary, (height, width)), "masked": masked})

    def _network_input(self, noisy: Tensor, conditioning: Conditioning) -> Tensor:
        if not {"mask", "masked"} <= set(conditioning.tensors):
            raise SettingsError(
                f"the inpainting base {self.name!r} needs a mask",
                remedy="add the result of `encode_mask` to the conditioning, or choose a base without mask",
            )
        return torch.cat([noisy, conditioning["mask"], conditioning["masked"]], dim=1)

    def _input_channels(self) -> Mapping[str, int]:
        latents = int(self.vae.config.latent_channels)
        return {"latents": latents, "mask": 1, "masked latents": latents}
