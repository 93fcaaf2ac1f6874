"""Replaces a weight by a value, as control adapters do for norms. Not a trainable kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReplacementDelta(Delta):
    """The difference between a fixed value and the weight: `W' = W + multiplier * (value - W)`.

    Attributes:
        value: The new weight, in the shape of the weight.
    """

    kind: ClassVar[str] = "replacement"
    value: Tensor

    @property
    def alpha(self) -> None:
        """None: the kind has no alpha."""
        return

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
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
        """Creates a delta with the weight itself as the value, in float32: no change."""
        return cls(weight.detach().to("cpu", torch.float32, copy=True))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `value`; ignores alpha."""
        return cls(factors["value"])

    def factors(self) -> dict[str, Tensor]:
        """Returns `value`."""
        return {"value": self.value}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with another value."""
        return type(self)(factors["value"])

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `value - base` in float32 (float64 for a float64 base)."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        return self.value.to(dtype).reshape(base.shape) - base.to(dtype)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with the value in the number of dimensions of this weight."""
        return type(self)(self.value.reshape(tuple(weight_shape)))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields an empty value, and a value whose shape is not that of the weight."""
        shape = list(self.value.shape)
        if self.value.dim() == 0 or self.value.numel() == 0:
            yield Issue("value", f"the shape is {shape}", "the shape of a weight, not empty", DAMAGED)
        elif weight_shape is not None and [n for n in shape if n != 1] != [n for n in weight_shape if n != 1]:
            yield Issue(
                "value", f"the shape is {shape}", f"{list(weight_shape)}, that of the base's weight", OTHER_BASE
            )
