"""Methods whose coefficients depend on the weights alone: weighted sums and the weighted mean.

The result for LoRA adapters is exact: concatenated factors, scaled by the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from lora_engine.errors import SettingsError
from lora_engine.merging.methods.method import Combination, Gram
from lora_engine.merging.spec import MergeOptions


class Concatenate(MergeOptions):
    """The exact weighted sum by concatenated ranks. LoRA only."""

    method: Literal["concatenate"] = "concatenate"


class Linear(MergeOptions):
    """The exact weighted sum of adapters of any kinds."""

    method: Literal["linear"] = "linear"


class Interpolate(MergeOptions):
    """The weighted mean: the weights are divided by their sum."""

    method: Literal["interpolate"] = "interpolate"


class Svd(MergeOptions):
    """The weighted sum, then the best approximation at a rank."""

    method: Literal["svd"] = "svd"

    @model_validator(mode="after")
    def _needs_a_budget(self) -> Svd:
        if not self.compresses:
            raise ValueError("svd needs rank, energy or error")
        return self


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


CONCATENATE = Combination(
    spec=Concatenate, title="weighted sum, exact by concatenated ranks; LoRA only", coefficients=linear, lora_only=True
)
LINEAR = Combination(spec=Linear, title="weighted sum, exact, of any kinds", coefficients=linear)
INTERPOLATE = Combination(
    spec=Interpolate, title="weighted mean, exact, of any kinds", coefficients=interpolate, normalizes=True
)
SVD = Combination(spec=Svd, title="weighted sum, then the best approximation at a rank", coefficients=linear)
