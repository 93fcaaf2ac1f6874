"""LoHa: delta = alpha / rank * (up1 @ down1) * (up2 @ down2), with an elementwise product of the two matrices.

FedPara (arXiv 2108.06098, proposition 2) as in LyCORIS (arXiv 2309.14859, section 3); with cores in Tucker form
(proposition 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.lora import LoraDelta, alpha_issues, check_rank
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp

_MATRICES = ("up1", "down1", "up2", "down2")


@dataclass(frozen=True, eq=False)
class LohaDelta(Delta):
    """A difference whose rank may be the square of the inner dimension.

    Attributes:
        up1, up2: `[out, r]`; with cores `[r, out]`.
        down1, down2: `[r, in]`, for a convolution `[r, in / groups * k * k]`; with cores `[r, in / groups]`.
        alpha: The scale is `alpha / r`.
        core1, core2: Tucker cores `[r, r, k, k]`, both or neither.
    """

    kind: ClassVar[str] = "loha"
    reads_base: ClassVar[bool] = False
    up1: Tensor
    down1: Tensor
    up2: Tensor
    down2: Tensor
    alpha: float
    core1: Tensor | None = None
    core2: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension of each of the two products."""
        return self.down1.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        tucker: bool = False,
    ) -> Self:
        """Creates a delta as LyCORIS does: normal, `up1` and cores with std 0.1, both `down` with std 1, `up2` zero.

        `alpha` None or 0 means `rank`. With `tucker`, k x k convolutions get cores.
        """
        check_rank(rank, weight)
        out, inner, *kernel = weight.shape
        has_cores = tucker and math.prod(kernel) > 1
        columns = inner if has_cores else inner * math.prod(kernel)
        up = (rank, out) if has_cores else (out, rank)

        def normal(std: float, *shape: int) -> Tensor:
            return torch.empty(shape).normal_(
                0.0, std, generator=generator
            )  # not `nn.init`: see `fill_kaiming_uniform`

        up1, down1, down2 = normal(0.1, *up), normal(1.0, rank, columns), normal(1.0, rank, columns)
        delta = cls(up1, down1, torch.zeros(up), down2, float(alpha or rank))
        if not has_cores:
            return delta
        return replace(delta, core1=normal(0.1, rank, rank, *kernel), core2=normal(0.1, rank, rank, *kernel))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from the four matrices and optional cores; `alpha` None means the rank (scale 1)."""
        down = factors["down1"]
        default = float(down.shape[0]) if down.dim() else 1.0
        return cls(**factors, alpha=default if alpha is None else alpha)

    def factors(self) -> dict[str, Tensor]:
        """Returns the four matrices, and the cores if there are any."""
        factors = {name: getattr(self, name) for name in (*_MATRICES, "core1", "core2")}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same alpha."""
        return type(self).from_factors(factors, self.alpha)

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `scale * (up1 @ down1) * (up2 @ down2)` in float32 (float64 for a float64 base), shaped as `base`."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        first = _product(self.up1, self.down1, self.core1, dtype)
        second = _product(self.up2, self.down2, self.core2, dtype)
        return (first * second).mul(self.scale).reshape(base.shape)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns the output, computed as a LoRA of rank r * r if that costs less than the dense delta."""
        rows, columns = base_weight.shape[0], base_weight[0].numel()
        if self.core1 is not None or self.rank**2 * (rows + columns) >= rows * columns:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        lora = self.as_lora(base_weight.shape)
        return lora.forward(x, out, base_weight, base_bias, op, multiplier)

    def as_lora(self, weight_shape: Sequence[int]) -> LoraDelta:
        """Returns exactly the same difference as a LoRA of rank r * r; for deltas without cores.

        The entry (i, j) of the delta is the sum over p and q of `up1[i, p] up2[i, q] down1[p, j] down2[q, j]`.
        """
        up = (self.up1.unsqueeze(2) * self.up2.unsqueeze(1)).flatten(1)
        down = (self.down1.unsqueeze(1) * self.down2.unsqueeze(0)).flatten(0, 1)
        ones = (1 for _ in weight_shape[2:])
        down = down.reshape(-1, *weight_shape[1:])
        return LoraDelta(down, up.reshape(*up.shape, *ones), self.scale * down.shape[0])

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with matrices of two dimensions, for every layer type."""
        return self.with_factors({name: f.flatten(1) if name in _MATRICES else f for name, f in self.factors().items()})

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields ranks or sizes that disagree, a missing core, an invalid alpha, and shapes that do not fit."""
        yield from alpha_issues(self.alpha)
        for name, factor in self.factors().items():
            dims = (4,) if name.startswith("core") else (2, 4)
            if factor.dim() not in dims or 0 in factor.shape:
                allowed = f"{' or '.join(map(str, dims))} dimensions, none empty"
                yield Issue(name, f"the shape is {list(factor.shape)}", allowed, DAMAGED)
                return
        if (self.core1 is None) != (self.core2 is None):
            single = "core2" if self.core1 is None else "core1"
            yield Issue(single, "the other core is missing", "both cores or neither", DAMAGED)
            return
        yield from self._disagreements()
        if weight_shape is not None:
            yield from self._misfits(tuple(weight_shape))

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the delta as a matrix; with cores, columns without the kernel."""
        return self.up1.flatten(1).shape[0 if self.core1 is None else 1], self.down1[0].numel()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight; a kernel without cores is in the columns."""
        return self.sides if self.core1 is None else (*self.sides, *self.core1.shape[2:])

    def _disagreements(self) -> Iterator[Issue]:
        rank, (rows, columns) = self.rank, self.sides
        up, down = ((rows, rank) if self.core1 is None else (rank, rows)), (rank, columns)
        for name, shape in {"up1": up, "down1": down, "up2": up, "down2": down}.items():
            factor: Tensor = getattr(self, name)
            if tuple(factor.flatten(1).shape) != shape:
                yield Issue(name, f"the shape is {list(factor.shape)}", f"{list(shape)}, to match the others", DAMAGED)
        for name, core in (("core1", self.core1), ("core2", self.core2)):
            if core is not None and tuple(core.shape[:2]) != (rank, rank):
                yield Issue(name, f"the shape is {list(core.shape)}", f"[{rank}, {rank}, k, k]", DAMAGED)

    def _misfits(self, shape: tuple[int, ...]) -> Iterator[Issue]:
        rows, columns = self.sides
        if rows != shape[0]:
            allowed = f"{shape[0]} rows for the base's weight {list(shape)}"
            yield Issue("up1", f"the shape is {list(self.up1.shape)}", allowed, OTHER_BASE)
        inputs = math.prod(shape[1:]) if self.core1 is None else math.prod(shape[1:2])
        if columns != inputs:
            allowed = f"[{self.rank}, {inputs}] for the base's weight {list(shape)}"
            yield Issue("down1", f"the shape is {list(self.down1.shape)}", allowed, OTHER_BASE)
        for name, core in (("core1", self.core1), ("core2", self.core2)):
            if core is not None and tuple(core.shape[2:]) != shape[2:]:
                allowed = f"the kernel {list(shape[2:])} of the base's weight {list(shape)}"
                yield Issue(name, f"the shape is {list(core.shape)}", allowed, OTHER_BASE)


def _product(up: Tensor, down: Tensor, core: Tensor | None, dtype: torch.dtype) -> Tensor:
    up, down = up.flatten(1).to(dtype), down.flatten(1).to(dtype)
    if core is None:
        return up @ down
    return torch.einsum("mp,mr...->pr...", up, torch.einsum("mn...,nr->mr...", core.to(dtype), down))
