"""Factor keys of GLoRA, which LyCORIS has stored in two orders: first the down factors as `1`, later the up factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta
from lora_engine.formats.key_layout import LYCORIS_KEYS, TableFactorKeys

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"input_up": "a1.weight", "input_down": "a2.weight", "up": "b1.weight", "down": "b2.weight"}
_SWAPPED = {"input_up": "input_down", "input_down": "input_up", "up": "down", "down": "up"}


@dataclass(frozen=True)
class OrderedKeys(TableFactorKeys):
    """The order of LyCORIS 2 and later is written; shapes identify the older one, which A1111 alone expects."""

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        factors = {self.factor(name): tensor for name, tensor in tensors.items()}
        swapped = {_SWAPPED[name]: tensor for name, tensor in factors.items()}
        # If a square weight allows both orders, the rank is the smaller side.
        if _rank_of(swapped) < _rank_of(factors):
            factors = swapped
        return super().read({self.names[name]: tensor for name, tensor in factors.items()}, alpha)


def _rank_of(factors: Mapping[str, Tensor]) -> float:
    """Returns the rank of `input_up @ input_down` and `up @ down`; infinity if these do not exist with one rank."""
    if any(factor.dim() < 2 for factor in factors.values()):
        return math.inf
    ranks = {factors["up"].shape[1], factors["down"].shape[0]}
    ranks |= {factors["input_up"].shape[1], factors["input_down"].shape[0]}
    return ranks.pop() if len(ranks) == 1 else math.inf


LYCORIS_KEYS.add(OrderedKeys("glora", _NAMES))
