"""Magnitude pruning: keeps the largest elements of each delta, and sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lora_engine.merging.methods.method import Elementwise
from lora_engine.merging.spec import Density, MergeOptions

if TYPE_CHECKING:
    from torch import Tensor


class MagnitudePrune(MergeOptions):
    """Keeps the largest elements of each adapter, and sums.

    Attributes:
        density: Share of the elements that are kept.
    """

    method: Literal["magnitude-prune"] = "magnitude-prune"
    density: Density = 0.5


def magnitude_prune(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """Returns the weighted sum of the deltas, each reduced to its largest elements."""
    import torch

    from lora_engine.merging.prune import keep_largest

    pruned = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return torch.stack(pruned).sum(0)


MAGNITUDE_PRUNE = Elementwise(
    spec=MagnitudePrune, title="sum of each adapter's largest elements", merge=magnitude_prune
)
