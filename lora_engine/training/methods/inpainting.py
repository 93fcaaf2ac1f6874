"""Inpainting: hides a part of each image. Bases with a mask input are conditioned on the mask."""

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


def add_mask_conditioning(base: BaseModel, batch: Batch, masks: Tensor) -> Batch:
    """Returns the batch with the masks in the conditioning of an inpainting base; other bases ignore them.

    Args:
        base: The base.
        batch: Batch with an example for each row.
        masks: [n, 1, height, width] in pixels, 1 where the image is hidden.
    """
    if not base.inpaints:
        return batch
    pixels = torch.stack([example.pixels() for example in batch.examples])
    with torch.no_grad():
        tensors = base.encode_mask(masks.to(base.device), pixels.to(base.device))
    return replace(batch, conditioning=batch.conditioning.with_tensors(tensors))


def inpainting_transform(base: BaseModel, settings: Inpainting, seed: int) -> BatchTransform:
    """Returns a transform that hides a part of each image and weights the errors, seeded per batch number."""

    def mask_of(example: Example, number: int, row: int) -> Tensor:
        draw = generator(seed, "mask", number, row)
        uses_given = settings.masks == "given" or (settings.masks == "mixed" and torch.rand(1, generator=draw) < 0.5)
        given = example.mask_pixels() if uses_given else None
        return random_mask(example.size, settings, draw) if given is None else (given >= 0.5).float()

    def transform(batch: Batch, number: int) -> Batch:
        masks = torch.stack([mask_of(example, number, row) for row, example in enumerate(batch.examples)])
        size = (batch.latents.shape[-2], batch.latents.shape[-1])
        # A linear blend: 1 under the mask, `surroundings` outside.
        hidden = mask_weights(masks, size, Mask())
        weights = settings.surroundings + (1.0 - settings.surroundings) * hidden
        return add_mask_conditioning(base, with_weights(batch, weights), masks)

    return transform


def _phases(context: MethodContext) -> list[Phase]:
    method = context.settings.method
    if not isinstance(method, Inpainting):
        raise TypeError("the settings have another method than inpainting")
    return [
        denoising_phase(
            context, "inpainting", transforms=[inpainting_transform(context.base, method, context.settings.seed)]
        )
    ]


methods.add("inpainting", Method(_phases))
