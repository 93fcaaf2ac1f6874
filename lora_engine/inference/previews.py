"""Small images of unfinished latents.

A base with the published autoencoder of its family gets a linear approximation of it, one pixel per latent, which takes
no time. Other bases, as the embedded one, are decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.families import families

_PUBLISHED = (128, 256, 512, 512)
"""Widths of the autoencoders for which the factors were fitted."""


@torch.no_grad()
def preview_latents(base: BaseModel, latents: Tensor) -> Tensor:
    """Returns unfinished images, float32 [n, 3, height, width] in [-1, 1]; NaN and Inf become gray.

    Args:
        base: The base.
        latents: Scaled latents [n, channels, height, width], as a sampler has them.
    """
    vae: Any = base.vae  # type: ignore[attr-defined]
    is_published = tuple(vae.config.block_out_channels) == _PUBLISHED
    factors = families[base.family].latent_colors if is_published and base.family in families else None
    if factors is None or len(factors) != latents.shape[1]:
        pixels = base.decode_latents(latents)
    else:
        table = torch.tensor(factors, dtype=torch.float32, device=latents.device)
        pixels = torch.einsum("nchw,cr->nrhw", latents.float(), table)
    return pixels.float().nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0).cpu()
