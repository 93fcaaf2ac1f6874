"""LoKr: delta = scale * kron(left, right), each factor dense or low-rank (LyCORIS, arXiv 2309.14859, section 3).

KronA (arXiv 2212.10650) is the case of two dense factors. On convolutions, the right factor has the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward, fill_kaiming_uniform
from lora_engine.adapters.lora import LoraDelta, alpha_issues, check_rank
from lora_engine.errors import SettingsError
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class LokrDelta(Delta):
    """A Kronecker product of `left` `[a, b]` and `right` `[c, d]`, for a weight `[a * c, b * d]`.

    Attributes:
        alpha: The scale is `alpha / r` if a factor is low-rank. If both are dense, the scale is 1 and alpha is 1,
            whatever the file has: some programs store 9999999999.
        left: Dense left factor; None means `left_up` `[a, r]` and `left_down` `[r, b]`.
        right: Dense right factor, for a convolution `[c, d, k, k]`; None means `right_up` `[c, r]` and `right_down`
            `[r, d]`, for a convolution `[r, d * k * k]`. With `right_core` `[r, r, k, k]` (Tucker), `right_up` is
            `[r, c]` and `right_down` `[r, d]`.
    """

    kind: ClassVar[str] = "lokr"
    reads_base: ClassVar[bool] = False
    alpha: float
    left: Tensor | None = None
    left_up: Tensor | None = None
    left_down: Tensor | None = None
    right: Tensor | None = None
    right_up: Tensor | None = None
    right_down: Tensor | None = None
    right_core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The inner dimension of the low-rank factors; None if both are dense."""
        return next((len(down) for down in (self.right_down, self.left_down) if down is not None and down.dim()), None)

    @property
    def scale(self) -> float:
        """`alpha / rank`; 1 if both factors are dense."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        factor: int = -1,
        full: bool = False,
        both: bool = False,
        tucker: bool = False,
    ) -> Self:
        """Creates a delta: Kaiming uniform with a = sqrt(5), except `right` or `right_down`, which is zero.

        Args:
            weight: Weight of the base; only its shape is read.
            bias: Ignored.
            rank: Inner dimension. A factor stays dense if the rank is half of its longer side or more.
            alpha: None or 0 means `rank`.
            generator: Draws the random factors.
            factor: See `factorize`.
            full: True keeps both factors dense.
            both: True also allows a low-rank left factor.
            tucker: True gives the right factor of a k x k convolution a core.
        """
        if rank < 1:
            raise SettingsError(f"rank {rank!r}", allowed="1 or more", remedy="choose a larger rank")
        check_rank(1, weight)
        (a, c), (b, d) = factorize(weight.shape[0], factor), factorize(weight.shape[1], factor)
        kernel = tuple(weight.shape[2:])
        factors: dict[str, Tensor] = {}
        if both and not full and rank < max(a, b) / 2:
            factors |= {"left_up": torch.empty(a, rank), "left_down": torch.empty(rank, b)}
        else:
            factors["left"] = torch.empty(a, b)
        if full or rank >= max(c, d) / 2:
            factors["right"] = torch.zeros(c, d, *kernel)
        elif tucker and math.prod(kernel) > 1:
            factors |= {"right_core": torch.empty(rank, rank, *kernel), "right_up": torch.empty(rank, c)}
            factors["right_down"] = torch.zeros(rank, d)
        else:
            factors |= {"right_up": torch.empty(c, rank), "right_down": torch.zeros(rank, d * math.prod(kernel))}
        for name, tensor in factors.items():
            if name not in ("right", "right_down"):
                fill_kaiming_uniform(tensor, generator)
        return cls.from_factors(factors, float(alpha or rank))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from the factors; `alpha` None means the rank (scale 1)."""
        delta = cls(1.0, **factors)
        rank = delta.rank
        return delta if rank is None else cls(float(rank) if alpha is None else alpha, **factors)

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors that are not None."""
        factors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "alpha"}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same alpha."""
        return type(self)(self.alpha, **factors)

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `scale * kron(left, right)` in float32 (float64 for a float64 base), in the shape of `base`."""
        dtype = torch.promote_types(base.dtype, torch.float32)
        right = self._dense_right(dtype).flatten(1)
        return torch.kron(self.dense_left(dtype), right).mul(self.scale).reshape(base.shape)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns the output, computed with the factors and without their product.

        With the channels as a matrix X `[b, d]`, `kron(left, right)` times the channels is `left @ X @ right.T`.
        """
        if op.groups > 1 or op.other is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        left = self.dense_left(x.dtype)
        inner = base_weight.shape[1] // left.shape[1]
        shape = (base_weight.shape[0] // left.shape[0], inner, *base_weight.shape[2:])
        grouped = x.reshape(*x.shape[:-1], -1, inner) if op.dims == 0 else x.reshape(-1, inner, *x.shape[-2:])
        part = self._apply_right(grouped, shape, op)
        if op.dims == 0:
            low = (left.to(part.dtype) @ part).flatten(-2)
        else:
            mixed = left.to(part.dtype) @ part.reshape(*x.shape[:-3], left.shape[1], -1)
            low = mixed.reshape(*x.shape[:-3], base_weight.shape[0], *part.shape[-2:])
        return torch.add(out, low.to(out.dtype), alpha=multiplier * self.scale)

    def _apply_right(self, x: Tensor, shape: Sequence[int], op: LayerOp) -> Tensor:
        """Applies the right factor, as a weight of this shape, to groups of channels."""
        if self.right is not None:
            return op(x, self.right.to(x.dtype).reshape(tuple(shape)))
        lora = self._right_as_lora(shape)
        zero = x.new_zeros(())  # as `out`, it leaves the difference alone
        return lora.forward(x, zero, x.new_empty(()).expand(tuple(shape)), None, op)

    def _right_as_lora(self, shape: Sequence[int]) -> LoraDelta:
        up, down = _required(self.right_up), _required(self.right_down)
        ones = [1 for _ in shape[2:]]
        if self.right_core is not None:
            return LoraDelta(down, up.T, float(down.shape[0]), self.right_core)
        return LoraDelta(down.reshape(-1, *shape[1:]), up.reshape(*up.shape[:2], *ones), float(down.shape[0]))

    def dense_left(self, dtype: torch.dtype) -> Tensor:
        """Returns the left factor `[a, b]`, the product of its low-rank factors if it has those."""
        if self.left is not None:
            return self.left.to(dtype)
        return _required(self.left_up).to(dtype) @ _required(self.left_down).to(dtype)

    def _dense_right(self, dtype: torch.dtype) -> Tensor:
        if self.right is not None:
            return self.right.to(dtype)
        up, down = _required(self.right_up).flatten(1).to(dtype), _required(self.right_down).flatten(1).to(dtype)
        if self.right_core is None:
            return up @ down
        return torch.einsum("mp,mr...->pr...", up, torch.einsum("mn...,nr->mr...", self.right_core.to(dtype), down))

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with a dense right factor in the number of dimensions of this weight."""
        if self.right is None:
            return self
        right = self.right.reshape(self.right.shape[0], -1, *weight_shape[2:])
        return self.with_factors({**self.factors(), "right": right})

    @property
    def left_sides(self) -> tuple[int, int]:
        """Rows and columns of the left factor."""
        return _sides(self.left, self.left_up, self.left_down, 0)

    @property
    def right_sides(self) -> tuple[int, int]:
        """Rows and columns of the right factor; the columns include the kernel unless there is a core."""
        return _sides(self.right, self.right_up, self.right_down, 0 if self.right_core is None else 1)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the delta as a matrix; with a core, the columns exclude the kernel."""
        (a, b), (c, d) = self.left_sides, self.right_sides
        return a * c, b * d

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight; a kernel without a core is in the columns."""
        return self.sides if self.right_core is None else (*self.sides, *self.right_core.shape[2:])

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields missing or duplicate factors, ranks that disagree, an invalid alpha, and shapes that do not fit."""
        yield from alpha_issues(self.alpha)
        missing = list(self._missing())
        yield from missing
        if missing:
            return
        for name, factor in self.factors().items():
            dims = (4,) if name == "right_core" else (2, 4) if name == "right" else (2,)
            if factor.dim() not in dims or 0 in factor.shape:
                allowed = f"{' or '.join(map(str, dims))} dimensions, none empty"
                yield Issue(name, f"the shape is {list(factor.shape)}", allowed, DAMAGED)
                return
        yield from self._disagreements()
        if weight_shape is not None:
            yield from self._misfits(tuple(weight_shape))

    def _missing(self) -> Iterator[Issue]:
        for side in ("left", "right"):
            parts = {name.removeprefix(side) for name in self.factors() if name.startswith(side)} - {"_core"}
            if parts not in ({""}, {"_up", "_down"}):
                shown = ", ".join(sorted(f"{side}{name}" for name in parts)) or "nothing"
                problem = f"the {side} factor consists of {shown}"
                allowed = f"{side} alone, or {side}_up and {side}_down"
                yield Issue(f"{side}{min(parts, default='')}", problem, allowed, DAMAGED)
        if self.right_core is not None and self.right is not None:
            yield Issue(
                "right_core",
                "a core is combined with a dense right factor",
                "a core with right_up and right_down",
                DAMAGED,
            )

    def _disagreements(self) -> Iterator[Issue]:
        rank = self.rank
        ranks = {"left_up": (self.left_up, 1), "left_down": (self.left_down, 0), "right_down": (self.right_down, 0)}
        ranks["right_up"] = (self.right_up, 0 if self.right_core is not None else 1)
        for name, (factor, axis) in ranks.items():
            if factor is not None and factor.shape[axis] != rank:
                yield Issue(name, f"the shape is {list(factor.shape)}", f"rank {rank} in all factors", DAMAGED)
        if self.right_core is not None and tuple(self.right_core.shape[:2]) != (rank, rank):
            problem = f"the shape is {list(self.right_core.shape)}"
            yield Issue("right_core", problem, f"[{rank}, {rank}, k, k]", DAMAGED)

    def _misfits(self, shape: tuple[int, ...]) -> Iterator[Issue]:
        rows, columns = self.sides
        has_core = self.right_core is not None
        left = "left" if self.left is not None else "left_up"
        if rows != shape[0]:
            allowed = f"{shape[0]} rows of the product for the base's weight {list(shape)}"
            yield Issue(left, f"the product has {rows} rows", allowed, OTHER_BASE)
        inputs = math.prod(shape[1:2]) if has_core else math.prod(shape[1:])
        if columns != inputs:
            allowed = f"{inputs} columns of the product for the base's weight {list(shape)}"
            yield Issue(left, f"the product has {columns} columns", allowed, OTHER_BASE)
        kernel = self.right_core if has_core else self.right
        # ComfyUI's trainer stores the kernel in the columns of a matrix.
        is_flat = kernel is not None and kernel.dim() == 2 and kernel.shape[1] % math.prod(shape[2:]) == 0
        if kernel is not None and _kernel(kernel.shape) != _kernel(shape) and not is_flat:
            allowed = f"the kernel {list(shape[2:])} of the base's weight {list(shape)}"
            yield Issue(
                "right_core" if has_core else "right", f"the shape is {list(kernel.shape)}", allowed, OTHER_BASE
            )


def factorize(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Returns two integers whose product is `dimension`, the smaller one first, as LyCORIS chooses them.

    Args:
        dimension: 1 or more.
        factor: -1 means the most even split. A divisor of `dimension` is one of the two integers; otherwise `factor`
            is the upper bound of the smaller one.
    """
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    limit = dimension if factor < 0 else factor
    divisors = [number for number in range(1, math.isqrt(dimension) + 1) if dimension % number == 0]
    best = max(number for number in divisors if number <= max(1, limit))
    return best, dimension // best


def _sides(dense: Tensor | None, up: Tensor | None, down: Tensor | None, axis: int) -> tuple[int, int]:
    """Returns rows and columns of a factor; `axis` is the dimension of `up` with the rows."""
    if dense is not None:
        return dense.shape[0], dense[0].numel()
    return _required(up).shape[axis], _required(down)[0].numel()


def _kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the kernel of a weight of this shape; empty for 1 x 1, which equals a linear layer."""
    return () if math.prod(shape[2:]) == 1 else tuple(shape[2:])


def _required(factor: Tensor | None) -> Tensor:
    """Returns a factor that a valid delta has (see `issues`)."""
    if factor is None:
        raise SettingsError("the delta lacks a factor", remedy="check `issues()` before you use it")
    return factor
