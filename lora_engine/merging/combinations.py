"""Merge methods that return a linear combination: one coefficient per adapter.

Each is a pure function of the weights and of the Gram matrix of the deltas (norms and angles). The result for LoRA
adapters is thus exact: concatenated factors, scaled by the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lora_engine.errors import SettingsError

Gram = Callable[[], Tensor]
"""Computes the inner products of the deltas, `[n, n]` in float64; called only by methods that need them."""


def linear(weights: Sequence[float], gram: Gram) -> list[float]:
    """Returns the weights, for the weighted sum."""
    return list(weights)


def interpolate(weights: Sequence[float], gram: Gram) -> list[float]:
    """Returns the weights divided by their sum.

    Raises:
        SettingsError: The sum is 0.
    """
    total = math.fsum(weights)
    if abs(total) < 1e-12:
        raise SettingsError("the weights add up to 0", allowed="a sum other than 0", remedy="choose other weights")
    return [weight / total for weight in weights]


def require_none_negative(weights: Sequence[float]) -> None:
    """Raises `SettingsError` if a weight is negative.

    Raises:
        SettingsError: A weight is below 0.
    """
    for weight in weights:
        if weight < 0:
            raise SettingsError(f"the weight {weight!r}", allowed="0 or more", remedy="choose another weight or method")
