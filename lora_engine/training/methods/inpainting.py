"""Inpainting: hides a part of each image. Bases with a mask input are conditioned on the mask."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, FiniteFloat

from lora_engine.training.methods.context import BatchTransform, Method, MethodContext
from lora_engine.training.specs.methods import Mask, MethodSpec, Share

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.bases.base import BaseModel
    from lora_engine.training.batches import Batch
    from lora_engine.training.examples import Example
    from lora_engine.training.phases import Phase
    from lora_engine.training.spec import TrainSettings


class Inpainting(MethodSpec):
    """Inpainting: hides a part of each image and weights the error there more than around it.

    Bases with a mask in their input see the image without that part. Others learn from the weights alone.

    Attributes:
        masks: `random` draws boxes and strokes; `given` uses the images' own masks; `mixed` uses each half of the time,
            and random masks for images without one.
        strokes: Share of the random masks that are strokes; the others are boxes.
        whole: Share of the random masks that hide everything, so that the base can still generate from nothing.
        smallest: Smallest share of a side that a box covers.
        largest: Largest share of a side that a box covers.
        surroundings: Weight of the error outside the mask.
    """

    hides_parts: ClassVar[bool] = True
    name: Literal["inpainting"] = "inpainting"
    masks: Literal["random", "given", "mixed"] = "random"
    strokes: Share = 0.5
    whole: Share = 0.1
    smallest: FiniteFloat = Field(default=0.25, gt=0.0, le=1.0)
    largest: FiniteFloat = Field(default=0.9, gt=0.0, le=1.0)
    surroundings: Share = 0.1
    mask: None = None


def add_mask_conditioning(base: BaseModel, batch: Batch, masks: Tensor) -> Batch:
    """Returns the batch with the masks in the conditioning of an inpainting base; other bases ignore them.

    Args:
        base: The base.
        batch: Batch with an example for each row.
        masks: [n, 1, height, width] in pixels, 1 where the image is hidden.
    """
    import torch

    if not base.inpaints:
        return batch
    pixels = torch.stack([example.pixels() for example in batch.examples])
    with torch.no_grad():
        tensors = base.encode_mask(masks.to(base.device), pixels.to(base.device))
    return replace(batch, conditioning=batch.conditioning.with_tensors(tensors))


def inpainting_transform(base: BaseModel, settings: Inpainting, seed: int) -> BatchTransform:
    """Returns a transform that hides a part of each image and weights the errors, seeded per batch number."""
    import torch

    from lora_engine.seeds import generator
    from lora_engine.training.masks import mask_weights, random_mask, with_weights

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


def _options(settings: TrainSettings) -> Inpainting:
    if not isinstance(settings.method, Inpainting):
        raise TypeError("the settings have another method than inpainting")
    return settings.method


def _phases(context: MethodContext) -> list[Phase]:
    from lora_engine.training.denoising import denoising_phase

    settings = context.settings
    transform = inpainting_transform(context.base, _options(settings), settings.seed)
    return [denoising_phase(context, "inpainting", transforms=[transform])]


def _validation(base: BaseModel, settings: TrainSettings) -> BatchTransform | None:
    if not base.inpaints:
        return None
    from lora_engine.seeds import derive_seed

    return inpainting_transform(base, _options(settings), derive_seed(settings.seed, "validation"))


INPAINTING = Method(Inpainting, "the part of each image under a mask", _phases, _validation)
