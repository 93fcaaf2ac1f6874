"""Methods whose result is a linear combination: they give one coefficient an adapter and never see an element.

Each is a pure function of the weights and of the Gram matrix of the deltas (lengths and angles), so that the result of
LoRA adapters is exact: their factors side by side, each with its coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from lora_engine.errors import SettingsError

Gram = Callable[[], Tensor]
"""Gives the inner products of the deltas, `[n, n]` in float64; asked only by the methods that need it."""


def linear(weights: Sequence[float], gram: Gram) -> list[float]:
    """The weights themselves: the weighted sum."""
    return list(weights)


def interpolate(weights: Sequence[float], gram: Gram) -> list[float]:
    """The weights divided by their sum.

    Raises:
        SettingsError: They add up to 0.
    """
    total = math.fsum(weights)
    if abs(total) < 1e-12:
        raise SettingsError("the weights add up to 0", allowed="a sum other than 0", remedy="choose other weights")
    return [weight / total for weight in weights]


def require_none_negative(weights: Sequence[float]) -> None:
    """Does nothing where no weight is below 0.

    Raises:
        SettingsError: One is.
    """
    for weight in weights:
        if weight < 0:
            raise SettingsError(f"the weight {weight!r}", allowed="0 or more", remedy="choose another weight or method")
