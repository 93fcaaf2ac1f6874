"""Spherical interpolation of two deltas (Shoemake 1985), with separate interpolation of the norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lora_engine.errors import SettingsError
from lora_engine.merging.methods.method import Combination, Gram
from lora_engine.merging.methods.sums import interpolate, require_none_negative
from lora_engine.merging.spec import MergeOptions


class Slerp(MergeOptions):
    """Spherical interpolation of two adapters, module by module; the weights define the position on the arc."""

    method: Literal["slerp"] = "slerp"


def slerp(weights: Sequence[float], gram: Gram) -> list[float]:
    """Returns coefficients of the point on the arc between two deltas, at the second weight's share (Shoemake 1985).

    Directions are interpolated along the arc, and norms linearly. Parallel, opposite and zero deltas have no unique
    arc, and are interpolated linearly.

    Raises:
        SettingsError: The number of weights is not two, a weight is negative, or both are 0.
    """
    if len(weights) != 2:
        raise SettingsError(f"slerp of {len(weights)} adapters", allowed="two", remedy="merge two adapters at a time")
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


SLERP = Combination(
    spec=Slerp,
    title="spherical interpolation of two adapters",
    coefficients=slerp,
    adapters=2,
    sees_deltas=True,
    normalizes=True,
)
