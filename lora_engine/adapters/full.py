"""Full deltas: the dense difference of a weight, a bias or both. The only trainable kind for norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class FullDelta(Delta):
    """A dense difference, on every type of layer.

    Attributes:
        diff: Added to the weight, in its shape and unscaled; None means no change.
        bias: `[out]`, added to the bias, unscaled; None means no change.
    """

    kind: ClassVar[str] = "full"
    reads_base: ClassVar[bool] = False
    diff: Tensor | None = None
    bias: Tensor | None = None

    @property
    def alpha(self) -> None:
        """None: only the multiplier scales the difference."""
        return

    @property
    def rank(self) -> None:
        """None: the difference has no inner dimension."""
        return

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """The shape of the weight; None if only the bias differs."""
        return None if self.diff is None else tuple(self.diff.shape)

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        train_bias: bool = False,
    ) -> Self:
        """Creates a delta of zeros; `train_bias` adds a bias difference for layers that have a bias."""
        bias_diff = None if bias is None or not train_bias else torch.zeros(bias.shape)
        return cls(torch.zeros(weight.shape), bias_diff)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `diff`, `bias` or both; ignores alpha."""
        return cls(factors.get("diff"), factors.get("bias"))

    def factors(self) -> dict[str, Tensor]:
        """Returns `diff` and `bias`, without those that are None."""
        factors = {"diff": self.diff, "bias": self.bias}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors."""
        return replace(self, diff=factors.get("diff"), bias=factors.get("bias"))

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `diff` (zeros if None) in float32 (float64 for a float64 base), in the shape of `base`."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        return torch.zeros_like(base, dtype=dtype) if self.diff is None else self.diff.to(dtype).reshape(base.shape)

    def delta_bias(self, bias: Tensor | None) -> Tensor | None:
        """Returns the factor `bias` in float32 or wider; None if there is none."""
        return None if self.bias is None else self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns `out` plus the output of the layer with the difference as its weight."""
        dtype = x.dtype if x.is_floating_point() else out.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.diff is None and bias is not None and op.other is None:
            change = bias.reshape(-1, *(1 for _ in range(op.dims)))  # constant over the input: no layer needed
        else:
            diff = torch.zeros_like(base_weight) if self.diff is None else self.diff.reshape(base_weight.shape)
            change = op(x, diff.to(dtype), bias)
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with `diff` in the number of dimensions of this weight."""
        return self if self.diff is None else replace(self, diff=self.diff.reshape(tuple(weight_shape)))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields missing or empty factors, a bias of the wrong length, and shapes that do not fit the weight."""
        if self.diff is None and self.bias is None:
            yield Issue("diff", "the delta has neither a weight nor a bias difference", "one or both", DAMAGED)
        for name, factor in self.factors().items():
            allowed = "one dimension, not empty" if name == "bias" else "the shape of a weight, not empty"
            if factor.dim() == 0 or factor.numel() == 0 or (name == "bias" and factor.dim() > 1):
                yield Issue(name, f"the shape is {list(factor.shape)}", allowed, DAMAGED)
                return
        shape = self.diff.shape if weight_shape is None and self.diff is not None else weight_shape
        if self.bias is not None and shape is not None and tuple(self.bias.shape) != (shape[0],):
            allowed = f"[{shape[0]}], one value for each output of the weight {list(shape)}"
            yield Issue("bias", f"the shape is {list(self.bias.shape)}", allowed, OTHER_BASE)
        if self.diff is not None and weight_shape is not None and not _same_layer(self.diff.shape, weight_shape):
            allowed = f"{list(weight_shape)}, that of the base's weight"
            yield Issue("diff", f"the shape is {list(self.diff.shape)}", allowed, OTHER_BASE)


def _same_layer(first: Sequence[int], second: Sequence[int]) -> bool:
    """Returns True if the shapes are equal, or one is linear and the other the same with a 1 x 1 kernel."""
    short, long = sorted((tuple(first), tuple(second)), key=len)
    return long == short or (len(short) == 2 and long == (*short, 1, 1))
