"""The validation loss: always over the same images, noise and timesteps, so that values are comparable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.denoising import predict
from lora_engine.training.examples import Conditioner, Example, encode_captions
from lora_engine.training.masks import mask_weights
from lora_engine.training.methods import BatchTransform
from lora_engine.training.objective import timestep_grid
from lora_engine.training.specs.methods import Mask

TIMESTEPS = 8


@torch.no_grad()
def image_losses(
    base: BaseModel,
    latents: Callable[[Example], Tensor],
    conditioner: Conditioner,
    examples: Sequence[Example],
    *,
    seed: int = 0,
    timesteps: int = TIMESTEPS,
    transform: BatchTransform | None = None,
    mask: Mask | None = None,
) -> list[float]:
    """Returns the denoising loss of each image with its caption, averaged over a fixed grid of timesteps.

    Args:
        base: Base with everything attached.
        latents: Returns the latents of an example.
        conditioner: Encodes captions.
        examples: The images.
        seed: Noise seed; the noise depends on the image's digest, not on its position.
        timesteps: Number of timesteps, at the midpoints of equal parts of the schedule.
        transform: The method's batch transform, such as masks, called with a number from the image's digest; None is
            none.
        mask: Weights the errors by the images' masks and divides by the sum of the weights, so that losses with and
            without masks are comparable; an image without a mask counts in full, and one with a black mask has loss 0.
    """
    losses: list[float] = []
    for example in examples:
        batch = validation_batch(base, latents(example), example, conditioner, seed, timesteps)
        if transform is not None:
            batch = transform(batch, int(example.digest[:8], 16))
        predicted, target = predict(base, batch)
        losses.append(_loss(predicted, target, example, mask))
    return losses


def _loss(predicted: Tensor, target: Tensor, example: Example, mask: Mask | None) -> float:
    pixels = example.mask_pixels() if mask is not None else None
    if mask is None or pixels is None:
        return F.mse_loss(predicted, target).item()
    weights = mask_weights(pixels[None], (target.shape[-2], target.shape[-1]), mask).to(target.device)
    errors = (predicted.float() - target.float()).square().mean(dim=(0, 1))
    return ((errors * weights[0, 0]).sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)).item()


def validation_batch(
    base: BaseModel, clean: Tensor, example: Example, conditioner: Conditioner, seed: int, timesteps: int = TIMESTEPS
) -> Batch:
    """Returns an image at a fixed grid of timesteps, with noise from its digest.

    Args:
        base: The base.
        clean: The latents of the image.
        example: The image.
        conditioner: Encodes its caption.
        seed: Noise seed.
        timesteps: Number of timesteps, and of rows.
    """
    noise = torch.randn(timesteps, *clean.shape, generator=generator(seed, "validation", example.digest))
    return Batch(
        latents=clean.expand(timesteps, *clean.shape).to(base.device),
        noise=noise.to(base.device),
        timesteps=timestep_grid(base.noise, timesteps).to(base.device),
        conditioning=encode_captions(base, conditioner, [example.caption], [example]).index([0] * timesteps),
        instances=timesteps,
        examples=(example,) * timesteps,
    )
