"""TIES: trim, elect signs, average what agrees (Yadav et al. 2023, arXiv 2306.01708, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import FiniteFloat

from lora_engine.merging.methods.method import Elementwise
from lora_engine.merging.spec import Density, MergeOptions

if TYPE_CHECKING:
    from torch import Tensor


class Ties(MergeOptions):
    """TIES (Yadav et al. 2023): trim, elect signs, mean of the elements that agree.

    Attributes:
        density: Share of the largest elements that the trim keeps, per adapter and module.
        scale: Factor of the result (lambda in the paper).
    """

    method: Literal["ties"] = "ties"
    density: Density = 0.2
    scale: FiniteFloat = 1.0


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, scale: float) -> Tensor:
    """Trims each delta to its largest elements, and returns the `agreed_mean` of the weighted deltas.

    A weight scales its delta before the sign election: a negative weight votes for the opposite sign.

    Args:
        deltas: Dense deltas of one shape.
        weights: One per delta.
        density: Share of the elements that the trim keeps.
        scale: Factor of the result; lambda in the paper.
    """
    from lora_engine.merging.prune import agreed_mean, keep_largest

    trimmed = [weight * keep_largest(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    return scale * agreed_mean(trimmed)


TIES = Elementwise(spec=Ties, title="trim, elect signs, mean of the elements that agree", merge=ties)
