"""Inpainting: a part of each picture is hidden; on bases with a mask in their input, the network is told which."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.examples import Example
from lora_engine.training.masks import mask_weights, random_mask, with_weights
from lora_engine.training.methods.context import BatchTransform, Method, MethodContext, methods
from lora_engine.training.methods.denoising import denoising_phase
from lora_engine.training.phases import Phase
from lora_engine.training.specs.methods import Inpainting, Mask


def hide(base: BaseModel, batch: Batch, masks: Tensor) -> Batch:
    """The batch with what an inpainting base is told of its masks; the same batch on any other base.

    Args:
        base: The base.
        batch: With an example for each row.
        masks: [n, 1, height, width] in pixels, 1 where the picture is hidden.
    """
    if not base.inpaints:
        return batch
    pixels = torch.stack([example.pixels() for example in batch.examples])
    with torch.no_grad():
        told = base.encode_mask(masks.to(base.device), pixels.to(base.device))
    return replace(batch, conditioning=batch.conditioning.with_tensors(told))


def hiding(base: BaseModel, settings: Inpainting, seed: int) -> BatchTransform:
    """What hides a part of each picture of a batch, and weighs the errors; by the seed and the batch's number."""

    def mask_of(example: Example, number: int, place: int) -> Tensor:
        draw = generator(seed, "mask", number, place)
        takes_given = settings.masks == "given" or (settings.masks == "mixed" and torch.rand(1, generator=draw) < 0.5)
        given = example.mask_pixels() if takes_given else None
        return random_mask(example.size, settings, draw) if given is None else (given >= 0.5).float()

    def transform(batch: Batch, number: int) -> Batch:
        masks = torch.stack([mask_of(example, number, place) for place, example in enumerate(batch.examples)])
        size = (batch.latents.shape[-2], batch.latents.shape[-1])
        # A linear blend: 1 under the mask, `surroundings` outside.
        inside = mask_weights(masks, size, Mask())
        weights = settings.surroundings + (1.0 - settings.surroundings) * inside
        return hide(base, with_weights(batch, weights), masks)

    return transform


def _phases(context: MethodContext) -> list[Phase]:
    method = context.settings.method
    if not isinstance(method, Inpainting):
        raise TypeError("these are the phases of inpainting alone")
    return [denoising_phase(context, "inpainting", dressings=[hiding(context.base, method, context.settings.seed)])]


methods.add("inpainting", Method(_phases))
