"""Drops elements of a dense delta: the smallest ones, or random ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """Sets all but the share `density` of the largest elements to zero; keeps all ties."""
    count = delta.numel()
    dropped = count - max(1, round(density * count))
    if dropped <= 0:
        return delta
    sizes = delta.abs()
    least = sizes.flatten().kthvalue(dropped + 1).values
    return torch.where(sizes >= least, delta, torch.zeros_like(delta))


def keep_randomly(delta: Tensor, probabilities: Tensor | float, generator: torch.Generator) -> Tensor:
    """Keeps elements randomly and divides them by their probability, which preserves the expectation.

    Args:
        delta: Dense delta of any shape.
        probabilities: Keep probabilities in (0, 1], one for all elements or one per element.
        generator: A generator on the CPU.
    """
    drawn = torch.rand(delta.shape, generator=generator, dtype=torch.float32).to(delta.device)
    return torch.where(drawn < probabilities, delta / probabilities, torch.zeros_like(delta))


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Returns the weighted sum of the deltas, each reduced to its largest elements."""
    pruned = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return torch.stack(pruned).sum(0)
