"""The validation loss: the same pictures, noise and timesteps whenever it is taken, so that two numbers compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Conditioner, Example
from lora_engine.training.methods import BatchTransform, predict
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
    dressing: BatchTransform | None = None,
) -> list[float]:
    """The denoising loss of each picture with its caption, averaged over a fixed grid.

    Args:
        base: With whatever is attached to it.
        latents: The latents of an example.
        conditioner: The conditioning of captions.
        examples: The pictures.
        seed: Of the noise, which is drawn by the picture's digest and not by its place.
        timesteps: How many timesteps, in the middles of equal parts of the schedule.
        dressing: What the method puts on a batch, such as masks; asked with a number that the picture's digest gives.
    """
    grid = timestep_grid(base.noise, timesteps)
    losses: list[float] = []
    for example in examples:
        clean = latents(example)
        noise = torch.randn(timesteps, *clean.shape, generator=generator(seed, "validation", example.digest))
        batch = Batch(
            latents=clean.expand(timesteps, *clean.shape).to(base.device),
            noise=noise.to(base.device),
            timesteps=grid.to(base.device),
            conditioning=conditioner([example.caption], example.size).index([0] * timesteps).to(base.device),
            instances=timesteps,
            examples=(example,) * timesteps,
        )
        if dressing is not None:
            batch = dressing(batch, int(example.digest[:8], 16))
        predicted, target = predict(base, batch)
        losses.append(F.mse_loss(predicted, target).item())
    return losses
