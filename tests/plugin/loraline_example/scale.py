"""The `Delta` of the kind `example-scale`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lora_engine.adapters import Delta, Issue


@dataclass(frozen=True, eq=False)
class ScaleDelta(Delta):
    """One number per output: W' = (1 + s) * W by rows."""

    kind: ClassVar[str] = "example-scale"
    scale: Tensor  # [out]

    @property
    def alpha(self) -> None:
        """None: the kind has no alpha."""
        return

    @property
    def rank(self) -> None:
        """None: the kind has no rank."""
        return

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
    ) -> Self:
        """Creates a difference of zero."""
        return cls(torch.zeros(weight.shape[0]))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `scale`."""
        return cls(factors["scale"])

    def factors(self) -> dict[str, Tensor]:
        """Returns `scale`."""
        return {"scale": self.scale}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with another scale."""
        return type(self)(factors["scale"])

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns the definition, in float32 or wider, in the shape of the weight."""
        rows = self.scale.to(torch.promote_types(base.dtype, torch.float32))
        return rows.reshape(-1, *(1 for _ in base.shape[1:])) * base

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields errors that a file may contain."""
        shape = list(self.scale.shape)
        if self.scale.dim() != 1:
            yield Issue("scale", f"the shape is {shape}", "[out]", "save the adapter again")
        elif weight_shape is not None and self.scale.shape[0] != weight_shape[0]:
            yield Issue("scale", f"the shape is {shape}", f"[{weight_shape[0]}]", "name its base")
