"""Masks as weights of the loss: those that lie beside pictures, and random ones for inpainting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.batches import Batch
from lora_engine.training.examples import Example, Size
from lora_engine.training.specs.methods import Inpainting, Mask

_HELD = 4096
_STROKES = 4


def mask_weights(mask: Tensor, size: Size, settings: Mask) -> Tensor:
    """How much each element of the latents counts: (m + floor)^temperature.

    Args:
        mask: float32 [n, 1, height, width] in pixels, 0 to 1; 1 counts in full.
        size: (height, width) of the latents; m is the mask's mean over the pixels that an element stands for.
        settings: See `Mask`.

    Returns:
        float32 [n, 1, *size]. The weight stands before the squared error: it is not squared with it.
    """
    weights = (F.interpolate(mask.float(), size, mode="area") + settings.floor) ** settings.temperature
    if settings.normalise:
        # A mask that is black everywhere stays so.
        weights = weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights


def masked_by(settings: Mask) -> Callable[[Batch, int], Batch]:
    """What gives the rows of pictures with masks their weights; all other rows count whole."""

    @lru_cache(maxsize=_HELD)
    def row(bare: Example, size: Size) -> Tensor:
        mask = bare.mask_pixels()
        return torch.ones(1, *size) if mask is None else mask_weights(mask[None], size, settings)[0]

    def transform(batch: Batch, number: int) -> Batch:
        del number
        height, width = batch.latents.shape[-2:]
        weights = torch.ones(len(batch.latents), 1, height, width)
        for place, example in enumerate(batch.examples[: batch.instances]):
            # Captions may differ from batch to batch; masks do not go by them.
            weights[place] = row(replace(example, caption=""), (height, width))
        return with_weights(batch, weights)

    return transform


def with_weights(batch: Batch, weights: Tensor) -> Batch:
    """The batch with weights [n, 1, height, width] on top of those that it has."""
    here = weights.to(batch.latents.device)
    return replace(batch, weights=here if batch.weights is None else batch.weights * here)


def random_mask(size: Size, settings: Inpainting, generator: torch.Generator) -> Tensor:
    """A random mask of a picture: everything, a box, or a few thick strokes.

    Args:
        size: (height, width) in pixels.
        settings: How often which, and how large.
        generator: Where it comes from; one mask takes the same number of draws whatever it becomes.

    Returns:
        float32 [1, height, width], 1 where the picture is hidden, else 0.
    """
    kind, form = torch.rand(2, generator=generator).tolist()
    box = torch.rand(4, generator=generator).tolist()
    points = torch.rand(_STROKES + 1, 2, generator=generator)
    thickness, count = torch.rand(2, generator=generator).tolist()
    if kind < settings.whole:
        return torch.ones(1, *size)
    if form >= settings.strokes:
        return _box(size, box, settings)
    used = points[: 2 + int(count * _STROKES)]
    return _strokes(size, used, 0.05 + 0.1 * thickness)


def _box(size: Size, draws: list[float], settings: Inpainting) -> Tensor:
    mask = torch.zeros(1, *size)
    spans = []
    for side, share, place in zip(size, draws[:2], draws[2:], strict=True):
        smallest, largest = sorted((settings.smallest, settings.largest))
        length = max(1, round(side * (smallest + share * (largest - smallest))))
        first = int(place * (side - length + 1))
        spans.append(slice(first, first + length))
    mask[:, spans[0], spans[1]] = 1.0
    return mask


def _strokes(size: Size, points: Tensor, thickness: float) -> Tensor:
    # A line of segments; a pixel is hidden that lies nearer to one than the brush is thick.
    height, width = size
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    here = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    mask = torch.zeros(size, dtype=torch.bool)
    for start, end in pairwise(points):
        along = end - start
        share = ((here - start) @ along / along.square().sum().clamp(min=1e-12)).clamp(0.0, 1.0)
        mask |= (here - (start + share[..., None] * along)).norm(dim=-1) <= thickness
    return mask[None].float()
