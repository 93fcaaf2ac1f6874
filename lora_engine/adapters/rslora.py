"""rsLoRA: LoRA whose scale is alpha / sqrt(rank) (arXiv 2312.03732, theorem 3.2).

It is a rule for a fresh delta's alpha, not a form of its own: what is made is LoRA with the alpha that says the same
(LyCORIS' convention), so that everything that reads alpha / rank reads it right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_engine.adapters.delta import kinds
from lora_engine.adapters.lora import LoraDelta


class RsLora(LoraDelta):
    """Makes LoRA deltas; has no instances of its own."""

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
        """A fresh LoRA of scale `alpha / sqrt(rank)`; `alpha` None or 0 means `rank`, so a scale of `sqrt(rank)`."""
        stored = float(alpha or rank) * math.sqrt(max(rank, 0))
        return LoraDelta.create(weight, bias, rank, stored, generator, tucker=tucker)


kinds.add("rslora", RsLora)
