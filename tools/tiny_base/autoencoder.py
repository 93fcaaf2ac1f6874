"""Trains the autoencoder of the embedded base and encodes the training scenes for diffusion."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import write_safetensors
from tools.tiny_base.images import render, to_pixels
from tools.tiny_base.peers import average_gradients, join
from tools.tiny_base.stage import BuildSettings, anneal, replace_folder
from tools.tiny_base.world import SIZE, scenes

LATENTS = "latents.safetensors"
SCENES_SEED = 1
"""Seed of the training scenes of autoencoder and diffusion; the latents follow their order."""

_log = logging.getLogger(__name__)

_BATCH = 12
_RATE = 2e-3
_POLISH_RATE = 1e-3
_POLISH_NOISE = 0.03
_CHANNELS = 16
_ENCODE_BATCH = 250


def build_autoencoder() -> Any:
    """Builds an untrained `AutoencoderKL`: 32 x 32 pixels to 8 x 8 latents of 16 channels; fewer lose the shapes."""
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
    """Runs one of the two processes of the training; see `peers`.

    Rank 0 writes `vae/`, the latents of the training scenes, and then `vae.json` into `work`.
    """
    with join(work) as rank:
        torch.manual_seed(0)
        images = render(scenes(SCENES_SEED, settings.scenes))
        vae = build_autoencoder()
        _fit(vae, images, settings.vae_steps, rank)
        latents = _encode(vae.eval(), images)
        _polish(vae.train(), images, latents, settings.polish_steps, rank)
        if rank == 0:
            _finish(vae.eval(), latents, work)


def _fit(vae: Any, images: Tensor, steps: int, rank: int) -> None:
    rng = np.random.default_rng([0, rank])

    def loss() -> tuple[Tensor, Tensor]:
        return _loss(vae, to_pixels(images[torch.from_numpy(rng.integers(0, len(images), _BATCH))]))

    _minimize("vae", list(vae.parameters()), loss, steps, _RATE)


def _polish(vae: Any, images: Tensor, latents: Tensor, steps: int, rank: int) -> None:
    """Continues the training of the decoder with a frozen encoder: sharper images, unchanged latents.

    Adds a little noise to the latents, because those from diffusion are not exact either.
    """
    rng, generator = np.random.default_rng([1, rank]), torch.Generator().manual_seed(rank)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    scale = vae.config.scaling_factor

    def loss() -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(rng.integers(0, len(images), _BATCH))
        noisy = latents[rows] + _POLISH_NOISE * torch.randn(latents[rows].shape, generator=generator)
        pixels = to_pixels(images[rows])
        return _difference(vae.decode(noisy / scale).sample, pixels)

    _minimize("decoder", trained, loss, steps, _POLISH_RATE)


def _minimize(
    name: str, parameters: list[nn.Parameter], loss_of: Callable[[], tuple[Tensor, Tensor]], steps: int, rate: float
) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    for step in range(steps):
        anneal(optimizer, rate, step, steps)
        loss, error = loss_of()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1)
        optimizer.step()
        if dist.get_rank() == 0 and step % 100 == 0:
            _log.info("%s: step %d of %d, loss %.4f, %.1f dB", name, step, steps, loss.item(), decibel(error))


def decibel(error: Tensor) -> float:
    """Returns the PSNR in dB of images in [-1, 1] from the error of every pixel."""
    return 10 * math.log10(4 / error.square().mean().item())


@torch.no_grad()
def reconstruction_error(vae: Any, pixels: Tensor) -> Tensor:
    """Returns the error of every pixel after encoding (to the mode) and decoding images in [-1, 1]."""
    restored: Tensor = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return restored.clamp(-1, 1) - pixels


def _loss(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(pixels).latent_dist
    loss, error = _difference(vae.decode(posterior.sample()).sample, pixels)
    kl = posterior.kl().mean() / (_CHANNELS * 64)
    return loss + 1e-4 * _CHANNELS * kl, error


def _difference(restored: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the loss and the error of every pixel."""
    error = restored - pixels
    # The gradient term keeps edges sharp; without it they are soft.
    edges = _slope(restored, pixels, -2) + _slope(restored, pixels, -1)
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges, error.detach()


def _slope(restored: Tensor, pixels: Tensor, axis: int) -> Tensor:
    return (restored.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean()


@torch.no_grad()
def _encode(vae: Any, images: Tensor) -> Tensor:
    """Returns the scaled latents (posterior modes) of the images; sets the scale in the autoencoder."""
    parts = [to_pixels(part) for part in torch.split(images, _ENCODE_BATCH)]
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
    # Diffusion expects values of unit variance.
    vae.register_to_config(scaling_factor=1 / latents[:2000].std().item())
    return latents * float(vae.config.scaling_factor)


def _finish(vae: Any, latents: Tensor, work: Path) -> None:
    psnr = decibel(reconstruction_error(vae, to_pixels(render(scenes(99, 256, "any")))))
    replace_folder(work / "vae", lambda folder: vae.save_pretrained(folder, safe_serialization=True))
    write_safetensors(work / LATENTS, {"latents": latents.half()}, {})
    result = {"psnr": psnr, "scale": vae.config.scaling_factor}
    atomic_write(work / "vae.json", json.dumps(result).encode())
    _log.info("vae: %.1f dB on unseen images", psnr)
