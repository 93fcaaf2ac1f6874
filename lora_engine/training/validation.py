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
from lora_engine.training.examples import Conditioner, Example
from lora_engine.training.methods import BatchTransform
from lora_engine.training.objective import timestep_grid

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
    """
    losses: list[float] = []
    for example in examples:
        batch = validation_batch(base, latents(example), example, conditioner, seed, timesteps)
        if transform is not None:
            batch = transform(batch, int(example.digest[:8], 16))
        predicted, target = predict(base, batch)
        losses.append(F.mse_loss(predicted, target).item())
    return losses


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
        conditioning=conditioner([example.caption], example.size).index([0] * timesteps).to(base.device),
        instances=timesteps,
        examples=(example,) * timesteps,
    )
