"""DELLA: drop by chances that follow the magnitude, elect signs, mean (Deep et al. 2024, arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.merging.prune import keep_by_chance
from lora_engine.merging.ties import agreed_mean


def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    window: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Thins out each delta by `keeping_chances`, rescales by them, and takes the mean of those that agree.

    Args:
        deltas: Dense, of one shape.
        weights: One a delta.
        density: The mean chance of an element to stay.
        window: The difference of chances between the largest and the smallest element of a row.
        scale: Of the result.
        generators: One a delta.
    """
    thinned = [
        weight * keep_by_chance(delta, keeping_chances(delta, density, window), generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]
    return scale * agreed_mean(thinned)


def keeping_chances(delta: Tensor, density: float, window: float) -> Tensor:
    """The chance of each element to stay: rising evenly with its place by magnitude among its row (MagPrune)."""
    rows = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs()[None]
    length = rows.shape[1]
    order = rows.argsort(dim=1, stable=True)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=delta.device).expand_as(order))
    even = places.to(delta.dtype) / max(length - 1, 1) if length > 1 else torch.full_like(rows, 0.5)
    return (density + window * (even - 0.5)).reshape(delta.shape)
