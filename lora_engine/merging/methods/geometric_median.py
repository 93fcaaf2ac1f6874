"""Geometric median of deltas: the point with the smallest sum of distances, robust to outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, FiniteFloat

from lora_engine.merging.methods.method import Combination, Gram
from lora_engine.merging.methods.sums import interpolate, require_none_negative
from lora_engine.merging.spec import MergeOptions


class GeometricMedian(MergeOptions):
    """The point with the smallest sum of weighted distances to the adapters' deltas, module by module.

    Attributes:
        tolerance: Stop when the sum of distances falls by less than this share.
        iterations: Maximum number of iterations.
    """

    method: Literal["geometric-median"] = "geometric-median"
    tolerance: FiniteFloat = Field(default=1e-10, gt=0.0, lt=1.0)
    iterations: int = Field(default=200, ge=1, le=100_000)


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
    import torch

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


GEOMETRIC_MEDIAN = Combination(
    spec=GeometricMedian,
    title="point with the smallest sum of distances, robust to outliers",
    coefficients=geometric_median,
    sees_deltas=True,
    normalizes=True,
)
