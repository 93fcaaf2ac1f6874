"""Spherical interpolation of two deltas (Shoemake 1985), with lengths interpolated on their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_engine.errors import SettingsError
from lora_engine.merging.combinations import Gram, interpolate, require_none_negative


def slerp(weights: Sequence[float], gram: Gram) -> list[float]:
    """The point on the arc between two deltas at the second's share of the weights (Shoemake 1985).

    Directions are interpolated along the arc and lengths linearly. Where the deltas are parallel, opposite or zero,
    there is no arc, and the straight line serves.

    Raises:
        SettingsError: Not two weights, a weight below 0, or both 0.
    """
    if len(weights) != 2:
        raise SettingsError(f"slerp of {len(weights)} adapters", allowed="two", remedy="merge them two by two")
    require_none_negative(weights)
    share = interpolate(weights, gram)[1]
    inner = gram()
    first, second = math.sqrt(float(inner[0, 0])), math.sqrt(float(inner[1, 1]))
    cosine = float(inner[0, 1]) / (first * second) if first * second else 1.0
    if abs(cosine) > 1 - 1e-9:
        return [1 - share, share]
    angle = math.acos(cosine)
    length = (1 - share) * first + share * second
    return [
        length * math.sin((1 - share) * angle) / (math.sin(angle) * first),
        length * math.sin(share * angle) / (math.sin(angle) * second),
    ]
