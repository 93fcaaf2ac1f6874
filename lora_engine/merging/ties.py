"""TIES: trim, elect signs, merge those that agree (Yadav et al. 2023, arXiv 2306.01708, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.merging.prune import keep_largest


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, scale: float) -> Tensor:
    """Trims each delta to its largest elements, then `agreed_mean` of the weighted ones.

    A weight scales its delta before the vote, so that a weight below 0 votes for the opposite sign.

    Args:
        deltas: Dense, of one shape.
        weights: One a delta.
        density: Share of the elements that the trim keeps.
        scale: Of the result; lambda in the paper.
    """
    trimmed = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return scale * agreed_mean(trimmed)


def agreed_mean(deltas: Sequence[Tensor]) -> Tensor:
    """In each place the mean of the elements whose sign is that of the sum (section 4.2); zeros do not count."""
    stacked = torch.stack(list(deltas))
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
