"""rsLoRA: LoRA whose scale is alpha / sqrt(rank) (arXiv 2312.03732, theorem 3.2).

It is a rule for the alpha of a new delta, not a separate form. The delta is a LoRA with `alpha * sqrt(rank)` as its
alpha (LyCORIS' convention), which code that reads alpha / rank interprets correctly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_engine.adapters.lora import LoraDelta

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RsLoraDelta(LoraDelta):
    """Creates LoRA deltas; has no instances."""

    @classmethod
    def create(  # type: ignore[override]
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        tucker: bool = False,
    ) -> LoraDelta:
        """Creates a LoRA of scale `alpha / sqrt(rank)`; `alpha` None or 0 means `rank`, for a scale of `sqrt(rank)`."""
        stored = float(alpha or rank) * math.sqrt(max(rank, 0))
        return LoraDelta.create(weight, bias, rank, stored, generator, tucker=tucker)
