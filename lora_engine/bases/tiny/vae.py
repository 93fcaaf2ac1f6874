"""The embedded base's autoencoder: its shape, its training and the latents of the training pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lora_engine.bases.tiny import pictures, world
from lora_engine.bases.tiny.fitting import Peers, Schedule, fit

LATENT_CHANNELS = 16
LATENT_SIZE = 8
_BATCH = 24


def build_vae() -> Any:
    """An untrained `AutoencoderKL`: 32-px pictures to 16 x 8 x 8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIZE,
    )


def train_vae(drawings: Tensor, schedule: Schedule, *, seed: int, peers: Peers) -> Any:
    """Trains an autoencoder on uint8 drawings and sets its scaling factor, so that latents have unit deviation.

    The loss is L1 + MSE / 2 + L1 of the picture's gradients / 2 (edges matter most to the eye) + a faint KL term.
    """
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    rng = np.random.default_rng([seed, peers.rank])

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(drawings), _BATCH // peers.count))
        pixels = pictures.to_pixels(drawings[chosen]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        error = restored - pixels
        edges = _gradient_error(error, vertical=True) + _gradient_error(error, vertical=False)
        kl = posterior.kl().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)
        return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 1.6e-3 * kl

    fit("vae", vae.parameters(), loss, schedule, peers=peers)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / float(encode_drawings(vae, drawings[:2000], scaled=False).std()))
    return vae


def _gradient_error(error: Tensor, *, vertical: bool) -> Tensor:
    # The gradient is linear, so the gradient of the error is the error of the gradient.
    return error.diff(dim=2 if vertical else 3).abs().mean()


@torch.no_grad()
def encode_drawings(vae: Any, drawings: Tensor, *, scaled: bool = True) -> Tensor:
    """Latents (posterior means, float32 [n, 16, 8, 8]) of uint8 drawings, times the scaling factor if `scaled`."""
    means = [vae.encode(pictures.to_pixels(part)).latent_dist.mode() for part in drawings.split(250)]
    factor = float(vae.config.scaling_factor) if scaled else 1.0
    return torch.cat(means).contiguous() * factor


@torch.no_grad()
def measure_psnr(vae: Any, drawings: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 drawings after encoding and decoding."""
    pixels = pictures.to_pixels(drawings)
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return 10 * math.log10(4 / float((restored - pixels).square().mean()))
