"""GLoRA: a low-rank change of the weight's inputs plus a LoRA (Chavan et al. 2023, arXiv 2306.07967), as in LyCORIS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward, fill_kaiming_uniform
from lora_engine.adapters.lora import LoraDelta, alpha_issues, check_rank
from lora_engine.lazy_torch import F, torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class GloraDelta(Delta):
    """`W' = W + alpha / r * (W (input_up input_down) + up down)`; the first product acts on the input channels.

    Attributes:
        input_up: `[in, r]`; for a grouped convolution, `in` is the number of inputs of one group.
        input_down: `[r, in]`.
        up: `[out, r]`, for a convolution `[out, r, 1, 1]`.
        down: `[r, in]`, for a convolution `[r, in, k, k]`.
        alpha: The scale is `alpha / r`.
    """

    kind: ClassVar[str] = "glora"
    input_up: Tensor
    input_down: Tensor
    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of both products."""
        return self.down.shape[0]

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
    ) -> Self:
        """Creates a delta: `input_up` and `up` are Kaiming uniform with a = sqrt(5), the others zero.

        `alpha` None or 0 means `rank`.
        """
        check_rank(rank, weight)
        inputs, ones = weight.shape[1], [1 for _ in weight.shape[2:]]
        input_up, up = torch.empty(inputs, rank), torch.empty(weight.shape[0], rank, *ones)
        for factor in (input_up, up):
            fill_kaiming_uniform(factor, generator)
        down = torch.zeros(rank, *weight.shape[1:])
        return cls(input_up, torch.zeros(rank, inputs), up, down, float(alpha or rank))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from its four factors; `alpha` None means the rank."""
        return cls(**factors, alpha=float(factors["down"].shape[0]) if alpha is None else alpha)

    def factors(self) -> dict[str, Tensor]:
        """Returns `input_up`, `input_down`, `up` and `down`."""
        return {"input_up": self.input_up, "input_down": self.input_down, "up": self.up, "down": self.down}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same alpha."""
        return type(self)(**factors, alpha=self.alpha)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base)."""
        weight = base.to(torch.promote_types(base.dtype, torch.float32))
        mixed = torch.einsum("oi...,ir->or...", weight, self.input_up.flatten(1).to(weight.dtype))
        mixed = torch.einsum("or...,rj->oj...", mixed, self.input_down.flatten(1).to(weight.dtype))
        added = self.up.flatten(1).to(weight.dtype) @ self.down.flatten(1).to(weight.dtype)
        return (mixed + added.reshape(base.shape)) * self.scale

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns the output; a linear layer reads the changed input in a second pass through the base's weight."""
        if op.dims or op.other is not None:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        lora = LoraDelta(self.down.flatten(1), self.up.flatten(1), self.alpha)
        added = lora.forward(x, out, base_weight, base_bias, op, multiplier)
        inner = F.linear(x, self.input_down.flatten(1).to(x.dtype))
        change = op(F.linear(inner, self.input_up.flatten(1).to(x.dtype)), base_weight.to(x.dtype))
        return torch.add(added, change.to(out.dtype), alpha=multiplier * self.scale)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with `up` and `down` in the number of dimensions of this weight."""
        ones = [1 for _ in weight_shape[2:]]
        return replace(
            self,
            input_up=self.input_up.flatten(1),
            input_down=self.input_down.flatten(1),
            up=self.up.reshape(*self.up.shape[:2], *ones),
            down=self.down.reshape(self.rank, *weight_shape[1:]),
        )

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields ranks or sizes that disagree, an invalid alpha, and shapes that do not fit the weight."""
        yield from alpha_issues(self.alpha)
        for name, factor in self.factors().items():
            if factor.dim() not in (2, 4) or 0 in factor.shape:
                yield Issue(name, f"the shape is {list(factor.shape)}", "2 or 4 dimensions, none empty", DAMAGED)
                return
        rank, inputs = self.rank, self.input_down[0].numel()
        sizes = {"input_up": [inputs, rank], "input_down": [rank, inputs], "up": [self.up.shape[0], rank]}
        for name, allowed in sizes.items():
            factor = self.factors()[name]
            if list(factor.flatten(1).shape) != allowed:
                yield Issue(name, f"the shape is {list(factor.shape)}", f"{allowed}, to match the others", DAMAGED)
                return
        if self.down[0].numel() % inputs:
            problem = f"the shape is {list(self.down.shape)}"
            yield Issue("down", problem, f"[{rank}, {inputs}] or [{rank}, {inputs}, k, k]", DAMAGED)
        elif weight_shape is not None:
            yield from self._misfits(tuple(weight_shape))

    def _misfits(self, shape: tuple[int, ...]) -> Iterator[Issue]:
        place = f"for the base's weight {list(shape)}"
        if self.up.shape[0] != shape[0]:
            yield Issue("up", f"the shape is {list(self.up.shape)}", f"{shape[0]} rows {place}", OTHER_BASE)
        if list(self.input_down.flatten(1).shape[1:]) != list(shape[1:2]):
            problem, allowed = f"the shape is {list(self.input_down.shape)}", f"[{self.rank}, {shape[1:2]}] {place}"
            yield Issue("input_down", problem, allowed, OTHER_BASE)
        if self.down[0].numel() != math.prod(shape[1:]):
            allowed = f"[{self.rank}, {math.prod(shape[1:])}] {place}"
            yield Issue("down", f"the shape is {list(self.down.shape)}", allowed, OTHER_BASE)
