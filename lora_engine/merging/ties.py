"""TIES: trim, elect signs, average what agrees (Yadav et al. 2023, arXiv 2306.01708, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.merging.prune import keep_largest


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, scale: float) -> Tensor:
    """Trims each delta to its largest elements, and returns the `agreed_mean` of the weighted deltas.

    A weight scales its delta before the sign election: a negative weight votes for the opposite sign.

    Args:
        deltas: Dense deltas of one shape.
        weights: One per delta.
        density: Share of the elements that the trim keeps.
        scale: Factor of the result; lambda in the paper.
    """
    trimmed = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return scale * agreed_mean(trimmed)


def agreed_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Returns, per element, the mean of the nonzero values with the sign of the sum (section 4.2)."""
    stacked = torch.stack(list(deltas))
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
