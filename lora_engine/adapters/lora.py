"""LoRA on linear and convolution layers: delta = alpha / rank * up @ down (Hu et al. 2021, equation 3).

On k x k convolutions this is LoCon: `down` has the kernel and `up` is 1 x 1 (LyCORIS, arXiv 2309.14859, section 3).
With `mid`, the kernel is in Tucker form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward, fill_kaiming_uniform
from lora_engine.errors import SettingsError
from lora_engine.lazy_torch import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp
    from lora_engine.adapters.low_rank import LowRankLinear


@dataclass(frozen=True, eq=False)
class LoraDelta(Delta):
    """A low-rank difference.

    Attributes:
        down: `[r, in]`, or for a convolution `[r, in / groups, k, k]`; a 1 x 1 convolution also accepts `[r, in]`.
        up: `[out, r]` or `[out, r, 1, 1]`. For an embedding `[tokens, r]`, with `down` `[r, width]`.
        alpha: The scale is `alpha / r`.
        mid: Tucker core `[r, r, k, k]`; `down` is then `[r, in]` or `[r, in, 1, 1]`.
        bias: `[out]`, added to the bias, unscaled.
    """

    kind: ClassVar[str] = "lora"
    reads_base: ClassVar[bool] = False
    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight; a 1 x 1 kernel may be missing."""
        if self.mid is not None:
            return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])
        return (self.up.shape[0], *self.down.shape[1:])

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
        """Creates a delta: `down` Kaiming uniform with a = sqrt(5), `up` zero. `alpha` None or 0 means `rank`.

        With `tucker`, k x k convolutions get a core, which is initialized like `down`.
        """
        check_rank(rank, weight)
        kernel = weight.shape[2:]
        has_core = tucker and math.prod(kernel) > 1
        down = torch.empty(rank, weight.shape[1], *(1 for _ in kernel)) if has_core else _empty_like(rank, weight)
        fill_kaiming_uniform(down, generator)
        mid = torch.empty(rank, rank, *kernel) if has_core else None
        if mid is not None:
            fill_kaiming_uniform(mid, generator)
        up = torch.zeros(weight.shape[0], rank, *(1 for _ in kernel))
        return cls(down, up, float(alpha or rank), mid)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `down`, `up` and optional `mid` and `bias`; `alpha` None means the rank (scale 1)."""
        down = factors["down"]
        default = float(down.shape[0]) if down.dim() else 1.0
        return cls(down, factors["up"], default if alpha is None else alpha, factors.get("mid"), factors.get("bias"))

    def factors(self) -> dict[str, Tensor]:
        """Returns `down`, `up`, and `mid` and `bias` if they are set."""
        factors = {"down": self.down, "up": self.up, "mid": self.mid, "bias": self.bias}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same alpha."""
        return replace(self, down=factors["down"], up=factors["up"], mid=factors.get("mid"), bias=factors.get("bias"))

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `scale * up @ down` in float32 (float64 for a float64 base), in the shape of `base`."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        down, up = self.down.flatten(1).to(dtype), self.up.flatten(1).to(dtype)
        if self.mid is None:
            return (up @ down).mul(self.scale).reshape(base.shape)
        core = torch.einsum("mn...,nr->mr...", self.mid.to(dtype), down)
        return torch.einsum("pm,mr...->pr...", up, core).mul(self.scale).reshape(base.shape)

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
        """Returns the output, computed with the factors and without the dense delta."""
        if op.groups > 1 or self.bias is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        if op.other is not None:  # an embedding: a norm's weight has no rank
            low = F.linear(op(x, self.up.to(out.dtype)), self.down.to(out.dtype).T)
            return torch.add(out, low, alpha=multiplier * self.scale)
        down, up = self.down, self.up
        if down.dtype != x.dtype:
            down = down.to(x.dtype)
        if up.dtype != x.dtype:
            up = up.to(x.dtype)
        if op.dims == 0:
            if down.dim() > 2 or up.dim() > 2:
                down, up = down.flatten(1), up.flatten(1)
            low = F.linear(F.linear(x, down), up)
        else:
            low = self._convolve(x, down, up, base_weight.shape, op)
        if low.dtype != out.dtype:
            low = low.to(out.dtype)
        return torch.add(out, low, alpha=multiplier * self.scale)

    def fused_forward(self, weight: Tensor, bias: Tensor | None, op: LayerOp) -> LowRankLinear | None:
        """Returns the fused forward for linear layers, None for others; see `low_rank`."""
        linear = op.dims == 0 and op.other is None and self.down.dim() == self.up.dim() == 2
        if not linear or self.mid is not None or self.bias is not None:
            return None
        from lora_engine.adapters.low_rank import LowRankLinear  # a subclass of torch's, which needs it

        return LowRankLinear(weight, bias, self.down, self.up, self.scale)

    def _convolve(self, x: Tensor, down: Tensor, up: Tensor, shape: Sequence[int], op: LayerOp) -> Tensor:
        up = up.reshape(shape[0], -1, 1, 1)
        if self.mid is None:
            return F.conv2d(op(x, down.reshape(-1, *shape[1:])), up)
        return F.conv2d(op(F.conv2d(x, down.reshape(-1, shape[1], 1, 1)), self.mid.to(x.dtype)), up)

    def without_core(self) -> Self:
        """Returns the delta with the Tucker core multiplied into `down`; rank and alpha do not change."""
        if self.mid is None:
            return self
        core, down = self.mid.float(), self.down.flatten(1).float()
        return replace(self, down=torch.einsum("mn...,nr->mr...", core, down).to(self.down.dtype), mid=None)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with factors of two dimensions for a linear layer, of four for a convolution."""
        down = self.down if self.mid is None else self.down.flatten(1)
        kernel = tuple(weight_shape[1:]) if self.mid is None else (weight_shape[1], *(1 for _ in weight_shape[2:]))
        ones = [1 for _ in weight_shape[2:]]
        return replace(self, down=down.reshape(-1, *kernel), up=self.up.reshape(self.up.shape[0], -1, *ones))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields ranks that disagree, invalid dimensions, an invalid alpha, and shapes that do not fit the weight."""
        yield from alpha_issues(self.alpha)
        for name, factor in self.factors().items():
            if factor.dim() not in ((1,) if name == "bias" else (2, 4)) or 0 in factor.shape:
                yield Issue(name, f"the shape is {list(factor.shape)}", "2 or 4 dimensions, none empty", DAMAGED)
                return
        if self.up.flatten(1).shape[1] != self.rank:
            problem = f"the shape is {list(self.up.shape)}, whose rank is not that of `down` {list(self.down.shape)}"
            yield Issue("up", problem, f"[out, {self.rank}] or [out, {self.rank}, 1, 1]", DAMAGED)
        elif self.mid is not None and (self.mid.dim() != 4 or tuple(self.mid.shape[:2]) != (self.rank, self.rank)):
            yield Issue("mid", f"the shape is {list(self.mid.shape)}", f"[{self.rank}, {self.rank}, k, k]", DAMAGED)
        elif self.bias is not None and self.bias.shape[0] != self.up.shape[0]:
            yield Issue("bias", f"the shape is {list(self.bias.shape)}", f"[{self.up.shape[0]}]", DAMAGED)
        elif weight_shape is not None:
            yield from self._misfits(tuple(weight_shape))

    def _misfits(self, shape: tuple[int, ...]) -> Iterator[Issue]:
        if self.up.shape[0] != shape[0]:
            allowed = f"{shape[0]} rows for the base's weight {list(shape)}"
            yield Issue("up", f"the shape is {list(self.up.shape)}", allowed, OTHER_BASE)
        inner = math.prod(shape[1:])
        fits: set[tuple[int, ...]] = {(self.rank, *shape[1:]), (self.rank, inner), (self.rank, inner, 1, 1)}
        if self.mid is not None:
            fits = {(self.rank, shape[1]), (self.rank, shape[1], 1, 1)}
            if tuple(self.mid.shape[2:]) != shape[2:]:
                allowed = f"the kernel {list(shape[2:])} of the base's weight {list(shape)}"
                yield Issue("mid", f"the shape is {list(self.mid.shape)}", allowed, OTHER_BASE)
        if tuple(self.down.shape) not in fits:
            allowed = f"{min(map(list, fits), key=len)} for the base's weight {list(shape)}"
            yield Issue("down", f"the shape is {list(self.down.shape)}", allowed, OTHER_BASE)


def alpha_issues(alpha: float) -> Iterator[Issue]:
    """Yields an alpha that is NaN or infinite. Zero switches the module off, a negative alpha inverts its change."""
    if not math.isfinite(alpha):
        yield Issue("alpha", f"alpha is {alpha!r}", "a finite number", "get a file with a valid alpha")


def check_rank(rank: int, weight: Tensor) -> None:
    """Raises `SettingsError` if a weight of this shape cannot have the rank.

    Raises:
        SettingsError: The rank is too large or below 1, or the weight is a vector (of a norm), which has no rank.
    """
    if weight.dim() < 2:
        raise SettingsError(
            f"a weight of shape {list(weight.shape)} has no rank",
            allowed="linear layers, convolutions and embeddings",
            remedy="leave the module out of the targets, or choose kind full for it",
        )
    largest = min(weight.shape[0], math.prod(weight.shape[1:]))
    if not 1 <= rank <= largest:
        raise SettingsError(
            f"rank {rank!r} is not valid for a weight of shape {tuple(weight.shape)}",
            allowed=f"1 to {largest}",
            remedy="lower the rank, or leave the module out of the targets",
        )


def _empty_like(rank: int, weight: Tensor) -> Tensor:
    return torch.empty(rank, *weight.shape[1:])
