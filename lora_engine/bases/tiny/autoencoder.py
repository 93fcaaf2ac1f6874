"""The autoencoder of the embedded base, and the latents of the training scenes, which diffusion is trained on."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_engine.bases.tiny.peers import average_gradients, join
from lora_engine.bases.tiny.pictures import render, to_pixels
from lora_engine.bases.tiny.stage import BuildSettings, anneal, replace_folder
from lora_engine.bases.tiny.world import SIZE, scenes
from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import write_safetensors

LATENTS = "latents.safetensors"
SCENES_SEED = 1
"""Of the training scenes of autoencoder and diffusion: the latents belong to these, in this order."""

_log = logging.getLogger(__name__)

_BATCH = 12
_RATE = 2e-3
_CHANNELS = 16
_ENCODED_AT_ONCE = 250


def build_autoencoder() -> Any:
    """An untrained `AutoencoderKL`: 32 x 32 pixels to 8 x 8 latents of 16 channels, as fewer lose the shapes."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def train(work: Path, settings: BuildSettings) -> None:
    """One of the two processes of the training; see `peers`.

    The first process writes `vae/`, the latents of the training scenes, and then `vae.json` into `work`.
    """
    with join(work) as rank:
        torch.manual_seed(0)
        pictures = render(scenes(SCENES_SEED, settings.scenes))
        vae = build_autoencoder()
        _fit(vae, pictures, settings.vae_steps, rank)
        if rank == 0:
            _finish(vae.eval(), pictures, work)


def _fit(vae: Any, pictures: Tensor, steps: int, rank: int) -> None:
    parameters = list(vae.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    rng = np.random.default_rng([0, rank])
    for step in range(steps):
        anneal(optimiser, _RATE, step, steps)
        pixels = to_pixels(pictures[torch.from_numpy(rng.integers(0, len(pictures), _BATCH))])
        loss, error = _loss(vae, pixels)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1)
        optimiser.step()
        if rank == 0 and step % 100 == 0:
            _log.info("vae: step %d of %d, loss %.4f, %.1f dB", step, steps, loss.item(), decibel(error))


def decibel(error: Tensor) -> float:
    """PSNR in dB of pictures in [-1, 1], from the error of every pixel."""
    return 10 * math.log10(4 / error.square().mean().item())


@torch.no_grad()
def reconstruction_error(vae: Any, pixels: Tensor) -> Tensor:
    """What encoding (to the mode) and decoding does to every pixel of pictures in [-1, 1]."""
    restored: Tensor = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return restored.clamp(-1, 1) - pixels


def _loss(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(pixels).latent_dist
    restored = vae.decode(posterior.sample()).sample
    error = restored - pixels
    # Without the gradients' part edges come out soft, and shapes are all edge.
    edges = _slope(restored, pixels, -2) + _slope(restored, pixels, -1)
    kl = posterior.kl().mean() / (_CHANNELS * 64)
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges + 1e-4 * _CHANNELS * kl, error.detach()


def _slope(restored: Tensor, pixels: Tensor, axis: int) -> Tensor:
    return (restored.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean()


@torch.no_grad()
def _finish(vae: Any, pictures: Tensor, work: Path) -> None:
    psnr = decibel(reconstruction_error(vae, to_pixels(render(scenes(99, 256, "any")))))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in _parts(pictures)])
    # Diffusion is built for values of unit variance.
    scale = 1 / latents[:2000].std().item()
    vae.register_to_config(scaling_factor=scale)
    replace_folder(work / "vae", lambda folder: vae.save_pretrained(folder, safe_serialization=True))
    write_safetensors(work / LATENTS, {"latents": (latents * scale).half()}, {})
    atomic_write(work / "vae.json", json.dumps({"psnr": psnr, "scale": scale}).encode())
    _log.info("vae: %.1f dB on pictures it has not seen", psnr)


def _parts(pictures: Tensor) -> list[Tensor]:
    return [to_pixels(part) for part in torch.split(pictures, _ENCODED_AT_ONCE)]
