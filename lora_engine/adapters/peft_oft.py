"""OFT as PEFT has it since 0.18: the inputs are rotated, block by block, by rotations made of triangular parameters.

Qiu et al. 2023 (arXiv 2306.07280) and 2025 (arXiv 2506.19847, the Cayley-Neumann form). LyCORIS' OFT is another kind.
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
from lora_engine.adapters.rotation import cayley, check_has_rows, nearest_block, neumann, turn, wide


@dataclass(frozen=True, eq=False)
class PeftOftDelta(Delta):
    """`W' = W R^T`, where `R` is made of `S` in blocks, and `S` is skew-symmetric.

    Attributes:
        angles: `[n, b (b - 1) / 2]`: the upper triangles of `S`, row by row; `n * b` are the inputs (of a convolution
            with the places of its kernel). One row alone serves all blocks.
        terms: Of the Cayley-Neumann series for `(I + S)(I - S)^-1`; 0 is the exact `(I - S)(I + S)^-1` (in PEFT the two
            forms turn in opposite directions).
        eps: Constrained OFT: the Frobenius norm of each `S` is at most `eps / sqrt(n)`; None is no constraint.
    """

    kind: ClassVar[str] = "peft-oft"
    angles: Tensor
    terms: int = 5
    eps: float | None = None

    @property
    def alpha(self) -> None:
        """None: there is no such scale."""
        return

    @property
    def rank(self) -> None:
        """None: there is no inner dimension."""
        return

    @property
    def block_size(self) -> int:
        """`b`, from the number of angles."""
        return (1 + math.isqrt(1 + 8 * self.angles.shape[-1])) // 2

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        terms: int = 5,
        share: bool = False,
    ) -> Self:
        """A fresh delta that turns nothing; `rank` is the wanted block size, with `share` one block serves all.

        Raises:
            SettingsError: The layer is a norm, or has one input only.
        """
        check_has_rows(weight)
        inputs = math.prod(weight.shape[1:])
        size = nearest_block(inputs, rank, lambda size: True, "at least 2 inputs")
        return cls(torch.zeros(1 if share else inputs // size, size * (size - 1) // 2), terms)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of `angles`, with PEFT's default of five terms; alpha means nothing here."""
        return cls(factors["angles"])

    def factors(self) -> dict[str, Tensor]:
        """`angles`."""
        return {"angles": self.angles}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same form with other angles."""
        return replace(self, angles=factors["angles"])

    def _change(self) -> Tensor:
        """`R - I` for each block, `[n, b, b]`."""
        dtype, size = wide(self.angles), self.block_size
        row, column = torch.triu_indices(size, size, 1, device=self.angles.device).unbind()
        flat = torch.zeros(self.angles.shape[0], size * size, dtype=dtype, device=self.angles.device)
        upper = flat.index_copy(1, row * size + column, self._kept(dtype)).reshape(-1, size, size)
        skew = upper - upper.transpose(-1, -2)
        return cayley(-skew) if self.terms == 0 else neumann(skew, self.terms)

    def _kept(self, dtype: torch.dtype) -> Tensor:
        """The angles, within the constraint; gradients pass the constraint by, as PEFT projects after each step."""
        angles = self.angles.to(dtype)
        if self.eps is None:
            return angles
        norms = angles.detach().norm(dim=-1, keepdim=True) * math.sqrt(2.0)
        limit = self.eps / math.sqrt(len(angles))
        kept = torch.where(norms > limit, angles.detach() * (limit / norms.clamp_min(limit)), angles.detach())
        return angles + (kept - angles.detach())

    def delta_weight(self, base: Tensor) -> Tensor:
        """`W' - W` in float32 (float64 for a float64 base)."""
        dtype = wide(base)
        return turn(self._change(), base.to(dtype).flatten(1)).reshape(base.shape)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """The output and what the layer makes of the inputs' change, where they are few; else the weight is rotated."""
        is_wide = math.prod(base_weight.shape[2:]) > 1 or x.numel() > base_weight.numel()
        if op.other is not None or op.groups > 1 or is_wide:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        channel = -1 - op.dims
        turned = turn(self._change().transpose(-1, -2), x.movedim(channel, -1)).movedim(-1, channel)
        change = op(turned, base_weight.to(x.dtype))
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Angles of no block, settings out of range, a misfit to a weight."""
        if self.terms < 0:
            yield Issue("terms", f"the series has {self.terms!r} terms", "0 (exact) or more", DAMAGED)
        if self.eps is not None and not (math.isfinite(self.eps) and self.eps > 0):
            yield Issue("eps", f"the constraint is {self.eps!r}", "a finite number above 0, or none", DAMAGED)
        shape, size = list(self.angles.shape), self.block_size if self.angles.dim() == 2 else 0
        if len(shape) != 2 or 0 in shape or shape[1] != size * (size - 1) // 2:
            yield Issue("angles", f"the shape is {shape}", "[n, b * (b - 1) / 2] for a block size b", DAMAGED)
            return
        if weight_shape is None:
            return
        inputs = math.prod(weight_shape[1:]) if len(weight_shape) > 1 else 0
        if inputs == 0 or inputs % size or shape[0] not in (1, inputs // size):
            problem = f"the shape is {shape}, which is {shape[0]} blocks of {size}"
            allowed = f"blocks for the {inputs} inputs of the base's weight {list(weight_shape)}"
            yield Issue("angles", problem, allowed, OTHER_BASE)


kinds.add(PeftOftDelta.kind, PeftOftDelta)
