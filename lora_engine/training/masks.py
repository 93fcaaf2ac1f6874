"""Masks as loss weights: the masks of the dataset, and random ones for inpainting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.batches import Batch
from lora_engine.training.examples import Example, ImageSize
from lora_engine.training.specs.methods import Mask

if TYPE_CHECKING:
    from lora_engine.training.methods.inpainting import Inpainting

_CACHE_SIZE = 4096
_STROKES = 4


def mask_weights(mask: Tensor, size: ImageSize, settings: Mask) -> Tensor:
    """Returns the loss weight of each element of the latents: (m + floor)^temperature.

    Args:
        mask: float32 [n, 1, height, width] in pixels, 0 to 1; 1 counts in full.
        size: (height, width) of the latents; m is the mask's mean over the pixels of an element.
        settings: See `Mask`.

    Returns:
        float32 [n, 1, *size]. The weight multiplies the squared error; it is not squared with it.
    """
    weights = (F.interpolate(mask.float(), size, mode="area") + settings.floor) ** settings.temperature
    if settings.normalise:
        # The clamp keeps an all-zero mask at zero.
        weights = weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights


def mask_transform(settings: Mask) -> Callable[[Batch, int], Batch]:
    """Returns a transform that weights the rows of images with masks; all other rows have weight 1."""

    @lru_cache(maxsize=_CACHE_SIZE)
    def row(example: Example, size: ImageSize) -> Tensor:
        mask = example.mask_pixels()
        return torch.ones(1, *size) if mask is None else mask_weights(mask[None], size, settings)[0]

    def transform(batch: Batch, number: int) -> Batch:
        del number
        height, width = batch.latents.shape[-2:]
        weights = torch.ones(len(batch.latents), 1, height, width)
        for index, example in enumerate(batch.examples[: batch.instances]):
            # Captions vary from batch to batch; without them, examples share a cache entry.
            weights[index] = row(replace(example, caption=""), (height, width))
        return with_weights(batch, weights)

    return transform


def with_weights(batch: Batch, weights: Tensor) -> Batch:
    """Returns the batch with its weights multiplied by weights [n, 1, height, width]."""
    on_device = weights.to(batch.latents.device)
    return replace(batch, weights=on_device if batch.weights is None else batch.weights * on_device)


def random_mask(size: ImageSize, settings: Inpainting, generator: torch.Generator) -> Tensor:
    """Returns a random mask of an image: everything, a box, or a few thick strokes.

    Args:
        size: (height, width) in pixels.
        settings: Shares and sizes of the shapes.
        generator: CPU generator; each mask takes the same number of draws, whatever its shape.

    Returns:
        float32 [1, height, width], 1 where the image is hidden, else 0.
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


def _box(size: ImageSize, draws: list[float], settings: Inpainting) -> Tensor:
    mask = torch.zeros(1, *size)
    spans = []
    for side, share, position in zip(size, draws[:2], draws[2:], strict=True):
        smallest, largest = sorted((settings.smallest, settings.largest))
        length = max(1, round(side * (smallest + share * (largest - smallest))))
        first = int(position * (side - length + 1))
        spans.append(slice(first, first + length))
    mask[:, spans[0], spans[1]] = 1.0
    return mask


def _strokes(size: ImageSize, points: Tensor, thickness: float) -> Tensor:
    # A polyline; pixels closer to a segment than the brush thickness are hidden.
    height, width = size
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    pixels = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
    mask = torch.zeros(size, dtype=torch.bool)
    for start, end in pairwise(points):
        along = end - start
        share = ((pixels - start) @ along / along.square().sum().clamp(min=1e-12)).clamp(0.0, 1.0)
        mask |= (pixels - (start + share[..., None] * along)).norm(dim=-1) <= thickness
    return mask[None].float()
