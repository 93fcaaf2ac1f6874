"""DARE: random drop and rescale, alone or before TIES' sign election (Yu et al. 2024, arXiv 2311.03099, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.merging.prune import keep_randomly
from lora_engine.merging.ties import agreed_mean


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Returns the weighted sum of the deltas after a random drop in each.

    Args:
        deltas: Dense deltas of one shape.
        weights: One per delta.
        density: Probability that an element is kept.
        generators: One per delta.
    """
    return torch.stack(_sparse(deltas, weights, density, generators)).sum(0)


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Merges as `dare`, with TIES' sign election and mean instead of the sum, times `scale`."""
    return scale * agreed_mean(_sparse(deltas, weights, density, generators))


def _sparse(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    return [
        weight * keep_randomly(delta, density, generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]
