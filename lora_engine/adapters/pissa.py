"""PiSSA: LoRA that begins with the base's principal singular vectors (arXiv 2404.02948, section 3), for training alone.

The paper takes those out of the base, so that the base changes and an adapter fits that residual alone. Here the base
stays as it is, and the start is subtracted from the delta instead, which computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.adapters.delta import Delta, Issue, dense_forward, kinds
from lora_engine.adapters.layer import LayerOp
from lora_engine.adapters.lora import LoraDelta, check_rank
from lora_engine.decomposition import sketched_svd

_LARGE = 256


@dataclass(frozen=True, eq=False)
class PissaDelta(Delta):
    """`scale * (up @ down - up_start @ down_start)`.

    Attributes:
        down, up: As a LoRA's.
        down_start, up_start: What those began as; not trained.
        alpha: The scale is `alpha / r`.
    """

    kind: ClassVar[str] = "pissa"
    frozen: ClassVar[frozenset[str]] = frozenset({"down_start", "up_start"})
    down: Tensor
    up: Tensor
    down_start: Tensor
    up_start: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner dimension of the trained factors."""
        return self.down.shape[0]

    @classmethod
    def create(
        cls, weight: Tensor, bias: Tensor | None, rank: int, alpha: float | None, generator: torch.Generator | None
    ) -> Self:
        """A fresh delta from the singular value decomposition U S V of the weight, as a matrix `[out, in * k * k]`.

        `up` is `U sqrt(S / scale)` and `down` `sqrt(S / scale) V`, in their first `rank` columns and rows, so that
        `scale * up @ down` is that part of the weight. Above rank 1/8 of the shorter side and for small weights the
        decomposition is exact, else randomised with `generator`. `alpha` None or 0 means `rank`.
        """
        check_rank(rank, weight)
        alpha = float(alpha or rank)
        left, values, right = principal_part(weight.detach().float().cpu().flatten(1), rank, generator)
        root = (values * (rank / alpha)).sqrt()
        down, up = root.unsqueeze(1) * right, left * root
        down = down.reshape(rank, *weight.shape[1:])
        up = up.reshape(-1, rank, *(1 for _ in weight.shape[2:]))
        return cls(down, up, down.clone(), up.clone(), alpha)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """The delta of the four factors; `alpha` None stands for the rank (scale 1)."""
        return cls(**factors, alpha=float(factors["down"].shape[0]) if alpha is None else alpha)

    def factors(self) -> dict[str, Tensor]:
        """The trained ones and what they began as."""
        return {"down": self.down, "up": self.up, "down_start": self.down_start, "up_start": self.up_start}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """The same alpha with other tensors."""
        return replace(self, **factors)  # type: ignore[arg-type]

    def delta_weight(self, base: Tensor) -> Tensor:
        """The difference of the two products in float32 (float64 for a float64 base), in the shape of `base`."""
        return self._trained().delta_weight(base) - self._start().delta_weight(base)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """The output by way of the rank, twice."""
        if op.groups > 1:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        # Two sums that are taken alike, so that a fresh delta's difference is 0 to the last bit.
        nothing = out.new_zeros(())
        trained = self._trained().forward(x, nothing, base_weight, base_bias, op)
        start = self._start().forward(x, nothing, base_weight, base_bias, op)
        return torch.add(out, trained - start, alpha=multiplier)

    def to_export(self) -> LoraDelta:
        """The same delta as a LoRA of twice the rank and the same scale, exactly."""
        down = torch.cat([self.down, self.down_start])
        return LoraDelta(down, torch.cat([self.up, -self.up_start], dim=1), 2 * self.alpha)

    def _trained(self) -> LoraDelta:
        return LoraDelta(self.down, self.up, self.alpha)

    def _start(self) -> LoraDelta:
        return LoraDelta(self.down_start, self.up_start, self.alpha)

    def faults(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """What is wrong with either half, and a start of another shape than what began there."""
        yield from self._trained().faults(weight_shape)
        for fault in self._start().faults(weight_shape):
            if fault.factor != "alpha":
                yield replace(fault, factor=f"{fault.factor}_start")
        if self.down.shape != self.down_start.shape:
            problem, allowed = f"the shape is {list(self.down_start.shape)}", f"that of `down`, {list(self.down.shape)}"
            yield Issue("down_start", problem, allowed, "train the adapter again")


def principal_part(
    matrix: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular vectors and values: `[rows, rank]`, `[rank]`, `[rank, columns]`.

    Large matrices take a randomised decomposition, whose cost grows with the rank instead of the shorter side.

    Args:
        matrix: Two dimensions, float32 or float64.
        rank: From 1 to the shorter side.
        generator: Where the random directions come from.
    """
    shorter = min(matrix.shape)
    if shorter <= _LARGE or 8 * rank > shorter:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = sketched_svd(matrix, rank, generator=generator)
    # A matrix of a lower rank has no more directions: the rest begins, and stays, at nothing.
    missing = rank - len(values)
    return F.pad(left, (0, missing)), F.pad(values, (0, missing)), F.pad(right, (0, 0, 0, missing))


kinds.add(PissaDelta.kind, PissaDelta)
