"""OFT as in LyCORIS (its diag-oft): rotates the outputs in blocks. `boft` adds butterflies.

Orthogonal finetuning is Qiu et al. 2023 (arXiv 2306.07280). The bias is not rotated, because only the weight changes.
OFT and BOFT of PEFT are other kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.rotation import (
    cayley,
    check_has_rows,
    compute_dtype,
    limit_norm,
    nearest_block,
    rotate_blocks,
)
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class OftDelta(Delta):
    """`W' = rescale * R^T W`, where `R = (I + Q)(I - Q)^-1` in blocks and `Q = blocks - blocks^T`.

    Attributes:
        blocks: `[n, b, b]`; `n * b` is the number of outputs.
        alpha: Constraint: the Frobenius norm of all `Q` is at most `alpha` times the number of outputs; 0 means none.
        rescale: `[out, 1, ...]`, a gain for each output after the rotation; None means no gain.
    """

    kind: ClassVar[str] = "oft"
    dims: ClassVar[int] = 3
    blocks: Tensor
    alpha: float = 0.0
    rescale: Tensor | None = None

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
        return

    @property
    def outputs(self) -> int:
        """Number of outputs that the blocks rotate."""
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
        """Creates a delta without rotation; `rank` is the requested block size, `alpha` None means no constraint.

        Raises:
            SettingsError: The layer is a norm, or its outputs cannot be split into blocks.
        """
        check_has_rows(weight)
        gains = torch.ones(weight.shape[0], *(1 for _ in weight.shape[1:])) if rescale else None
        return cls(torch.zeros(cls._block_shape(weight.shape[0], rank)), float(alpha or 0.0), gains)

    @classmethod
    def _block_shape(cls, outputs: int, requested: int) -> tuple[int, ...]:
        # LyCORIS uses the smaller of block size and block count as the size, and reads no other layout.
        allowed = "a number of outputs with a divisor of at least 2 that is no more than its square root"
        size = nearest_block(outputs, requested, lambda size: size * size <= outputs, allowed)
        return outputs // size, size, size

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `blocks` and optional `rescale`; `alpha` None means no constraint."""
        return cls(factors["blocks"], alpha or 0.0, factors.get("rescale"))

    def factors(self) -> dict[str, Tensor]:
        """Returns `blocks`, and `rescale` if it is set."""
        return {"blocks": self.blocks} | ({} if self.rescale is None else {"rescale": self.rescale})

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same constraint."""
        return replace(self, blocks=factors["blocks"], rescale=factors.get("rescale"))

    def _skew(self, dtype: torch.dtype) -> Tensor:
        blocks = self.blocks.to(dtype)
        return limit_norm(blocks - blocks.transpose(-1, -2), self.alpha * self.outputs)

    def _change(self, rows: Tensor) -> Tensor:
        """Returns `(R^T - I)` applied along the last dimension."""
        # R^T = (I - Q)(I + Q)^-1 is the Cayley transform of -Q.
        return rotate_blocks(cayley(-self._skew(compute_dtype(self.blocks))), rows)

    def _rescaled(self, rows: Tensor) -> Tensor:
        change = self._change(rows)
        if self.rescale is None:
            return change
        gains = self.rescale.flatten().to(rows.dtype)
        return gains * change + (gains - 1.0) * rows

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base)."""
        rows = base.to(compute_dtype(base)).flatten(1).T
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
        """Returns the output; rotates the layer's output, or the weight if that is smaller than the input."""
        if op.other is not None or op.groups > 1 or x.numel() > base_weight.numel():
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        # Computed again: `out` may include other adapters, and dropout may have changed `x`.
        plain = op(x, base_weight.to(x.dtype))
        channel = -1 - op.dims
        change = self._rescaled(plain.movedim(channel, -1)).movedim(-1, channel)
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with `rescale` in the number of dimensions of this weight."""
        if self.rescale is None:
            return self
        return replace(self, rescale=self.rescale.reshape(-1, *(1 for _ in weight_shape[1:])))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields invalid blocks, a negative constraint, a wrong number of gains, and shapes that do not fit."""
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            yield Issue("alpha", f"the constraint is {self.alpha!r}", "a finite number, 0 or above", DAMAGED)
        shape = list(self.blocks.shape)
        if len(shape) != self.dims or 0 in shape or shape[-1] != shape[-2]:
            allowed = f"{'[stages, n, b, b]' if self.dims == 4 else '[n, b, b]'}, none empty"
            yield Issue("blocks", f"the shape is {shape}", allowed, DAMAGED)
            return
        yield from self._own_issues()
        if self.rescale is not None and (self.rescale.dim() == 0 or set(self.rescale.shape[1:]) - {1}):
            yield Issue("rescale", f"the shape is {list(self.rescale.shape)}", f"[{self.outputs}, 1, ...]", DAMAGED)
        elif self.rescale is not None and self.rescale.numel() != self.outputs:
            allowed = f"[{self.outputs}, 1, ...], one gain for each output of the blocks {shape}"
            yield Issue("rescale", f"the shape is {list(self.rescale.shape)}", allowed, DAMAGED)
        if weight_shape is not None and (len(weight_shape) < 2 or weight_shape[0] != self.outputs):
            problem = f"the shape is {shape}, which rotates {self.outputs} outputs"
            yield Issue("blocks", problem, f"the outputs of the base's weight {list(weight_shape)}", OTHER_BASE)

    def _own_issues(self) -> Iterator[Issue]:
        yield from ()
