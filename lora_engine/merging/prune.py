"""Dropping elements of a dense delta: the smallest ones, or by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The delta with all but its `density` largest elements at zero; of equal ones all stay."""
    count = delta.numel()
    dropped = count - max(1, round(density * count))
    if dropped <= 0:
        return delta
    sizes = delta.abs()
    least = sizes.flatten().kthvalue(dropped + 1).values
    return torch.where(sizes >= least, delta, torch.zeros_like(delta))


def keep_by_chance(delta: Tensor, chances: Tensor | float, generator: torch.Generator) -> Tensor:
    """Each element with its chance, divided by it, so that the expectation stays; else zero.

    Args:
        delta: Of any shape.
        chances: In (0, 1], one for all or one an element.
        generator: On the CPU.
    """
    drawn = torch.rand(delta.shape, generator=generator, dtype=torch.float32).to(delta.device)
    return torch.where(drawn < chances, delta / chances, torch.zeros_like(delta))


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """The weighted sum of the deltas, each with its largest elements alone."""
    kept = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return torch.stack(kept).sum(0)
