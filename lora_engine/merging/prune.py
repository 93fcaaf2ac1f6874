"""Works on elements of dense deltas: drops the smallest or random ones, and averages those that agree in sign."""

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


def agreed_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Returns, per element, the mean of the nonzero values with the sign of the sum (TIES, section 4.2)."""
    stacked = torch.stack(list(deltas))
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
