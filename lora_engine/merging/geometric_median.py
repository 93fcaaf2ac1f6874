"""The geometric median of deltas: the point with the smallest sum of distances, which outliers hardly move."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lora_engine.merging.combinations import Gram, interpolate, require_none_negative


def geometric_median(weights: Sequence[float], gram: Gram, *, tolerance: float, iterations: int) -> list[float]:
    """Coefficients of the point with the smallest weighted sum of distances to the deltas (Weiszfeld 1937).

    Args:
        weights: Of the distances; none below 0, and one above.
        gram: The distances follow from it, so that no iteration touches a delta.
        tolerance: Ends the iteration when the sum falls by less than this share.
        iterations: At most so many.

    Raises:
        SettingsError: A weight below 0, or none above.
    """
    require_none_negative(weights)
    masses = torch.tensor(weights, dtype=torch.float64)
    place = torch.tensor(interpolate(weights, gram), dtype=torch.float64)
    inner = gram()
    # No nearer to a delta than rounding can tell.
    nearest = 1e-9 * float(inner.diagonal().max().clamp(min=0).sqrt())
    objective = math.inf
    for _ in range(iterations):
        apart = place[None, :] - torch.eye(len(weights), dtype=torch.float64)
        distances = ((apart @ inner) * apart).sum(1).clamp(min=0).sqrt()
        found = float((masses * distances).sum())
        if nearest == 0.0 or objective - found <= tolerance * found:
            break
        objective = found
        pulls = masses / distances.clamp(min=nearest)
        place = pulls / pulls.sum()
    return [float(share) for share in place]
