"""Geometric median of deltas: the point with the smallest sum of distances, robust to outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lora_engine.merging.combinations import Gram, interpolate, require_none_negative


def geometric_median(weights: Sequence[float], gram: Gram, *, tolerance: float, iterations: int) -> list[float]:
    """Returns coefficients of the point with the smallest weighted sum of distances to the deltas (Weiszfeld 1937).

    Args:
        weights: Weights of the distances; none negative, and at least one positive.
        gram: Inner products, from which the distances follow.
        tolerance: Stop when the sum falls by less than this share.
        iterations: Maximum number of iterations.

    Raises:
        SettingsError: A weight is negative, or all are 0.
    """
    require_none_negative(weights)
    masses = torch.tensor(weights, dtype=torch.float64)
    shares = torch.tensor(interpolate(weights, gram), dtype=torch.float64)
    inner = gram()
    # The smallest distance that rounding can resolve.
    nearest = 1e-9 * float(inner.diagonal().max().clamp(min=0).sqrt())
    objective = math.inf
    for _ in range(iterations):
        offsets = shares[None, :] - torch.eye(len(weights), dtype=torch.float64)
        distances = ((offsets @ inner) * offsets).sum(1).clamp(min=0).sqrt()
        total = float((masses * distances).sum())
        if nearest == 0.0 or objective - total <= tolerance * total:
            break
        objective = total
        pulls = masses / distances.clamp(min=nearest)
        shares = pulls / pulls.sum()
    return [float(share) for share in shares]
