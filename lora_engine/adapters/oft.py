"""OFT and BOFT as LyCORIS has them (its diag-oft and boft): the outputs are rotated, block by block.

Orthogonal finetuning is Qiu et al. 2023 (arXiv 2306.07280), with butterflies Liu et al. 2023 (arXiv 2311.06243). The
bias is not rotated: the meaning is a change of the weight. What PEFT calls OFT and BOFT are other kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward, kinds
from lora_engine.adapters.layer import LayerOp
from lora_engine.adapters.rotation import cayley, check_has_rows, limited, nearest_block, turn, wide


@dataclass(frozen=True, eq=False)
class OftDelta(Delta):
    """`W' = rescale * R^T W`, where `R = (I + Q)(I - Q)^-1` in blocks and `Q = blocks - blocks^T`.

    Attributes:
        blocks: `[n, b, b]`, where `n * b` are the outputs.
        alpha: The constraint: the Frobenius norm of all `Q` is at most `alpha` times the number of outputs; 0 is none.
        rescale: `[out, 1, ...]`, a gain for each output after the rotation, or None.
    """

    kind: ClassVar[str] = "oft"
    dims: ClassVar[int] = 3
    blocks: Tensor
    alpha: float = 0.0
    rescale: Tensor | None = None

    @property
    def rank(self) -> None:
        """None: there is no inner dimension."""
        return

    @property
    def outputs(self) -> int:
        """How many outputs the blocks rotate."""
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        rescale: bool = False,
    ) -> Self:
        """A fresh delta that turns nothing; `rank` is the wanted block size, `alpha` None means no constraint.

        Raises:
            SettingsError: The layer is a norm, or its outputs cannot be cut into blocks.
        """
        check_has_rows(weight)
        gains = torch.ones(weight.shape[0], *(1 for _ in weight.shape[1:])) if rescale else None
        return cls(torch.zeros(cls._block_shape(weight.shape[0], rank)), float(alpha or 0.0), gains)

    @classmethod
    def _block_shape(cls, outputs: int, wanted: int) -> tuple[int, ...]:
        # LyCORIS takes the smaller one of size and number for the size, and reads nothing else.
        allowed = "a number of outputs with a divisor of at least 2 that is no more than its square root"
        size = nearest_block(outputs, wanted, lambda size: size * size <= outputs, allowed)
        return outputs // size, size, size

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of `blocks` and perhaps `rescale`; `alpha` None stands for no constraint."""
        return cls(factors["blocks"], alpha or 0.0, factors.get("rescale"))

    def factors(self) -> dict[str, Tensor]:
        """`blocks`, and `rescale` where there is one."""
        return {"blocks": self.blocks} | ({} if self.rescale is None else {"rescale": self.rescale})

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same constraint with other tensors."""
        return replace(self, blocks=factors["blocks"], rescale=factors.get("rescale"))

    def _skew(self, dtype: torch.dtype) -> Tensor:
        blocks = self.blocks.to(dtype)
        return limited(blocks - blocks.transpose(-1, -2), self.alpha * self.outputs)

    def _change(self, rows: Tensor) -> Tensor:
        """Rotated less unrotated, along the last dimension."""
        # R^T = (I - Q)(I + Q)^-1 is Cayley's form of -Q.
        return turn(cayley(-self._skew(wide(self.blocks))), rows)

    def _rescaled(self, rows: Tensor) -> Tensor:
        change = self._change(rows)
        if self.rescale is None:
            return change
        gains = self.rescale.flatten().to(rows.dtype)
        return gains * change + (gains - 1.0) * rows

    def delta_weight(self, base: Tensor) -> Tensor:
        """`W' - W` in float32 (float64 for a float64 base)."""
        rows = base.to(wide(base)).flatten(1).T
        return self._rescaled(rows).T.reshape(base.shape)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """The output and what the rotation changes of it; the weight is rotated where it is smaller than the input."""
        if op.other is not None or op.groups > 1 or x.numel() > base_weight.numel():
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        # The layer anew: `out` may hold what other adapters added, and dropout may have thinned out `x`.
        plain = op(x, base_weight.to(x.dtype))
        channel = -1 - op.dims
        change = self._rescaled(plain.movedim(channel, -1)).movedim(-1, channel)
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """The same delta with `rescale` in the number of dimensions that this weight has."""
        if self.rescale is None:
            return self
        return replace(self, rescale=self.rescale.reshape(-1, *(1 for _ in weight_shape[1:])))

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Blocks that are not square, a constraint below 0, gains for other outputs, a misfit to a weight."""
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            yield Issue("alpha", f"the constraint is {self.alpha!r}", "a finite number, 0 or above", DAMAGED)
        shape = list(self.blocks.shape)
        if len(shape) != self.dims or 0 in shape or shape[-1] != shape[-2]:
            allowed = f"{'[stages, n, b, b]' if self.dims == 4 else '[n, b, b]'}, none empty"
            yield Issue("blocks", f"the shape is {shape}", allowed, DAMAGED)
            return
        yield from self._own_faults()
        if self.rescale is not None and (self.rescale.dim() == 0 or set(self.rescale.shape[1:]) - {1}):
            yield Issue("rescale", f"the shape is {list(self.rescale.shape)}", f"[{self.outputs}, 1, ...]", DAMAGED)
        elif self.rescale is not None and self.rescale.numel() != self.outputs:
            allowed = f"[{self.outputs}, 1, ...], as the blocks {shape} rotate"
            yield Issue("rescale", f"the shape is {list(self.rescale.shape)}", allowed, DAMAGED)
        if weight_shape is not None and (len(weight_shape) < 2 or weight_shape[0] != self.outputs):
            problem = f"the shape is {shape}, which rotates {self.outputs} outputs"
            yield Issue("blocks", problem, f"the outputs of the base's weight {list(weight_shape)}", OTHER_BASE)

    def _own_faults(self) -> Iterator[Issue]:
        yield from ()


kinds.add(OftDelta.kind, OftDelta)
