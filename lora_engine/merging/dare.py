"""DARE: drop by chance and rescale, alone or before TIES' election (Yu et al. 2024, arXiv 2311.03099, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.merging.prune import keep_by_chance
from lora_engine.merging.ties import agreed_mean


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """The weighted sum of the deltas, each thinned out by chance.

    Args:
        deltas: Dense, of one shape.
        weights: One a delta.
        density: The chance of an element to stay.
        generators: One a delta.
    """
    return torch.stack(_thinned(deltas, weights, density, generators)).sum(0)


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """The same with TIES' election of signs and mean in the place of the sum; `scale` multiplies the result."""
    return scale * agreed_mean(_thinned(deltas, weights, density, generators))


def _thinned(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    return [
        weight * keep_by_chance(delta, density, generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]
