"""DELLA: random drop by magnitude, sign election, mean (Deep et al. 2024, arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, FiniteFloat, model_validator

from lora_engine.merging.methods.method import Elementwise
from lora_engine.merging.spec import Density, MergeOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Della(MergeOptions):
    """DELLA (Deep et al. 2024): keeps larger elements of a row with higher probability; then as TIES.

    Attributes:
        density: Mean probability that an element is kept.
        window: Difference of the probabilities of the largest and the smallest element of a row.
        scale: Factor of the result.
    """

    method: Literal["della"] = "della"
    density: Density = 0.5
    window: FiniteFloat = Field(default=0.2, ge=0.0, lt=1.0)
    scale: FiniteFloat = 1.0

    @model_validator(mode="after")
    def _probabilities_are_valid(self) -> Della:
        if self.density - self.window / 2 <= 0.0 or self.density + self.window / 2 > 1.0:
            low, high = self.density - self.window / 2, self.density + self.window / 2
            raise ValueError(
                f"density {self.density} and window {self.window} give probabilities from {low:g} to {high:g}; "
                "they must be above 0 and at most 1"
            )
        return self


def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    window: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Drops random elements of each delta by `keep_probabilities`, rescales, and returns the `agreed_mean`.

    Args:
        deltas: Dense deltas of one shape.
        weights: One per delta.
        density: Mean probability that an element is kept.
        window: Difference of the probabilities of the largest and the smallest element of a row.
        scale: Factor of the result.
        generators: One per delta.
    """
    from lora_engine.merging.prune import agreed_mean, keep_randomly

    sparse = [
        weight * keep_randomly(delta, keep_probabilities(delta, density, window), generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]
    return scale * agreed_mean(sparse)


def keep_probabilities(delta: Tensor, density: float, window: float) -> Tensor:
    """Returns the keep probability of each element, linear in its magnitude rank within the row (MagPrune)."""
    import torch

    rows = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs()[None]
    length = rows.shape[1]
    order = rows.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=delta.device).expand_as(order))
    even = ranks.to(delta.dtype) / max(length - 1, 1) if length > 1 else torch.full_like(rows, 0.5)
    return (density + window * (even - 0.5)).reshape(delta.shape)


DELLA = Elementwise(spec=Della, title="drop by magnitude, then TIES' election and mean", merge=della, draws=True)
