"""A weight that is replaced by another one, as control adapters replace those of norms; no kind to train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, kinds


@dataclass(frozen=True, eq=False)
class ReplacementDelta(Delta):
    """What brings a weight to a value, whatever the base has there: `W' = W + multiplier * (value - W)`.

    Attributes:
        value: In the shape of the weight.
    """

    kind: ClassVar[str] = "replacement"
    value: Tensor

    @property
    def alpha(self) -> None:
        """None: nothing scales the value but the multiplier."""
        return

    @property
    def rank(self) -> None:
        """None: the value has no inner dimension."""
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
        """The weight itself, in float32: nothing is replaced."""
        return cls(weight.detach().to("cpu", torch.float32, copy=True))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of `value`; alpha means nothing here."""
        return cls(factors["value"])

    def factors(self) -> dict[str, Tensor]:
        """`value`."""
        return {"value": self.value}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """A delta of another value."""
        return type(self)(factors["value"])

    def delta_weight(self, base: Tensor) -> Tensor:
        """`value - base` in float32 (float64 for a float64 base)."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        return self.value.to(dtype).reshape(base.shape) - base.to(dtype)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """The same delta with the value in the number of dimensions that this weight has."""
        return type(self)(self.value.reshape(tuple(weight_shape)))

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """An empty value, or one of another shape than the weight."""
        shape = list(self.value.shape)
        if self.value.dim() == 0 or self.value.numel() == 0:
            yield Issue("value", f"the shape is {shape}", "the shape of a weight, not empty", DAMAGED)
        elif weight_shape is not None and [n for n in shape if n != 1] != [n for n in weight_shape if n != 1]:
            yield Issue("value", f"the shape is {shape}", f"{list(weight_shape)}, that of the base's weight", _OTHER)


_OTHER = OTHER_BASE

kinds.add(ReplacementDelta.kind, ReplacementDelta)
