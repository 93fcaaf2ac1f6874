"""Rows of a LoKr, for a part of a fused layer: the borders of the parts may be inside the blocks of the product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.lokr import LokrDelta
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class LokrRowsDelta(Delta):
    """Consecutive rows of a Kronecker product. The parts of one fused layer share the product's factors.

    Attributes:
        whole: The product for the fused layer.
        start: First row, from 0.
        stop: Row after the last.
    """

    kind: ClassVar[str] = "lokr-rows"
    reads_base: ClassVar[bool] = False
    whole: LokrDelta
    start: int
    stop: int

    @property
    def alpha(self) -> float:
        """That of the product."""
        return self.whole.alpha

    @property
    def rank(self) -> int | None:
        """That of the product."""
        return self.whole.rank

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
    ) -> Self:
        """Creates the second half of a product of twice as many rows; arguments as `LokrDelta.create`."""
        rows = weight.shape[0]
        fused = torch.empty(2 * rows, *weight.shape[1:], device="meta")
        return cls(LokrDelta.create(fused, None, rank, alpha, generator), rows, 2 * rows)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta of all rows from the factors of the product."""
        whole = LokrDelta.from_factors(factors, alpha)
        return cls(whole, 0, whole.sides[0])

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors of the product."""
        return self.whole.factors()

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns the same rows of a product with other tensors."""
        return replace(self, whole=self.whole.with_factors(factors))

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the delta as a matrix, as `LokrDelta.sides`."""
        return self.stop - self.start, self.whole.sides[1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight, as `LokrDelta.weight_shape`."""
        return (self.stop - self.start, *self.whole.weight_shape[1:])

    def blocks(self) -> tuple[LokrDelta, int]:
        """Returns the product of the blocks that have the rows, and the first row within them."""
        size = self.whole.right_sides[0]
        first, last = self.start // size, -(-self.stop // size)
        name = "left" if self.whole.left is not None else "left_up"
        factors = self.whole.factors()
        return self.whole.with_factors({**factors, name: factors[name][first:last]}), self.start - first * size

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns the rows in float32 (float64 for a float64 base), in the shape of `base`."""
        blocks, offset = self.blocks()
        shape = torch.empty(blocks.sides[0], *base.shape[1:], dtype=base.dtype, device="meta")
        return blocks.delta_weight(shape)[offset : offset + base.shape[0]]

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns the output, computed with the factors of the blocks that have the rows."""
        if op.groups > 1 or op.other is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        blocks, offset = self.blocks()
        weight = base_weight.new_empty(()).expand(blocks.sides[0], *base_weight.shape[1:])
        zero = out.new_zeros(())  # as `out`, it leaves the difference alone
        change = blocks.forward(x, zero, weight, None, op).narrow(-1 - op.dims, offset, base_weight.shape[0])
        return torch.add(out, change, alpha=multiplier)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with the product's right factor in the number of dimensions of this weight."""
        return replace(self, whole=self.whole.reshaped_for((self.whole.sides[0], *weight_shape[1:])))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields the issues of the product, rows that it does not have, and shapes that do not fit the weight."""
        fused = None if weight_shape is None else (self.whole.weight_shape[0], *weight_shape[1:])
        listed = list(self.whole.issues())
        yield from listed or self.whole.issues(fused)
        left = "left" if self.whole.left is not None else "left_up"
        if listed:
            return
        if not 0 <= self.start < self.stop <= self.whole.sides[0]:
            problem = f"the rows are {self.start} to {self.stop} of {self.whole.sides[0]}"
            yield Issue(left, problem, "rows of the product", DAMAGED)
        elif weight_shape is not None and self.stop - self.start != weight_shape[0]:
            allowed = f"{weight_shape[0]} rows for the base's weight {list(weight_shape)}"
            yield Issue(left, f"the product has {self.stop - self.start} rows", allowed, OTHER_BASE)
