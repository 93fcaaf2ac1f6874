"""DARE: random drop and rescale, alone or before TIES' sign election (Yu et al. 2024, arXiv 2311.03099, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import FiniteFloat

from lora_engine.merging.methods.method import Elementwise
from lora_engine.merging.spec import Density, MergeOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Dare(MergeOptions):
    """DARE (Yu et al. 2024): drops random elements, rescales the rest, and sums.

    Attributes:
        density: Probability that an element is kept.
    """

    method: Literal["dare"] = "dare"
    density: Density = 0.5


class DareTies(MergeOptions):
    """DARE's drop, then TIES' sign election and mean.

    Attributes:
        density: Probability that an element is kept.
        scale: Factor of the result.
    """

    method: Literal["dare-ties"] = "dare-ties"
    density: Density = 0.5
    scale: FiniteFloat = 1.0


def dare(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Returns the weighted sum of the deltas after a random drop in each.

    Args:
        deltas: Dense deltas of one shape.
        weights: One per delta.
        density: Probability that an element is kept.
        generators: One per delta.
    """
    import torch

    return torch.stack(_sparse(deltas, weights, density, generators)).sum(0)


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Merges as `dare`, with TIES' sign election and mean instead of the sum, times `scale`."""
    from lora_engine.merging.prune import agreed_mean

    return scale * agreed_mean(_sparse(deltas, weights, density, generators))


def _sparse(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, generators: Sequence[torch.Generator]
) -> list[Tensor]:
    from lora_engine.merging.prune import keep_randomly

    return [
        weight * keep_randomly(delta, density, generator)
        for delta, weight, generator in zip(deltas, weights, generators, strict=True)
    ]


DARE = Elementwise(spec=Dare, title="random drop and rescale, then the sum", merge=dare, draws=True)
DARE_TIES = Elementwise(spec=DareTies, title="DARE's drop, then TIES' election and mean", merge=dare_ties, draws=True)
