"""PiSSA: LoRA initialized with the base's principal singular vectors (arXiv 2404.02948, section 3); training only.

The paper subtracts the initial product from the base, so the adapter fits only that residual. Here the base does not
change; the delta subtracts the initial product, which computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.adapters.delta import Delta, Issue, dense_forward
from lora_engine.adapters.layer import LayerOp
from lora_engine.adapters.lora import LoraDelta, check_rank
from lora_engine.decomposition import sketched_svd

_LARGE = 256


@dataclass(frozen=True, eq=False)
class PissaDelta(Delta):
    """`scale * (up @ down - up_start @ down_start)`.

    Attributes:
        down, up: The factors of a LoRA.
        down_start, up_start: Initial values of `down` and `up`; not trained.
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
        """Creates a delta from the singular value decomposition U S V of the weight, as a matrix `[out, in * k * k]`.

        `up` has the first `rank` columns of `U sqrt(S / scale)`, and `down` the first rows of `sqrt(S / scale) V`. Thus
        `scale * up @ down` is the principal part of the weight. For a rank above 1/8 of the shorter side and for small
        weights the decomposition is exact, otherwise randomized with `generator`. `alpha` None or 0 means `rank`.
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
        """Builds a delta from the four factors; `alpha` None means the rank (scale 1)."""
        return cls(**factors, alpha=float(factors["down"].shape[0]) if alpha is None else alpha)

    def factors(self) -> dict[str, Tensor]:
        """Returns the trained factors and their initial values."""
        return {"down": self.down, "up": self.up, "down_start": self.down_start, "up_start": self.up_start}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors and the same alpha."""
        return replace(self, **factors)  # type: ignore[arg-type]

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns the difference of the two products in float32 (float64 for a float64 base), shaped as `base`."""
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
        """Returns the output, computed with the trained and the initial factors."""
        if op.groups > 1:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        # Computes both in the same way, so that a new delta gives exactly 0.
        zero = out.new_zeros(())
        trained = self._trained().forward(x, zero, base_weight, base_bias, op)
        start = self._start().forward(x, zero, base_weight, base_bias, op)
        return torch.add(out, trained - start, alpha=multiplier)

    def to_export(self) -> LoraDelta:
        """Returns exactly the same difference as a LoRA of twice the rank and the same scale."""
        down = torch.cat([self.down, self.down_start])
        return LoraDelta(down, torch.cat([self.up, -self.up_start], dim=1), 2 * self.alpha)

    def _trained(self) -> LoraDelta:
        return LoraDelta(self.down, self.up, self.alpha)

    def _start(self) -> LoraDelta:
        return LoraDelta(self.down_start, self.up_start, self.alpha)

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields the issues of trained and initial factors, and initial factors of another shape."""
        yield from self._trained().issues(weight_shape)
        for issue in self._start().issues(weight_shape):
            if issue.factor != "alpha":
                yield replace(issue, factor=f"{issue.factor}_start")
        if self.down.shape != self.down_start.shape:
            problem, allowed = f"the shape is {list(self.down_start.shape)}", f"that of `down`, {list(self.down.shape)}"
            yield Issue("down_start", problem, allowed, "train the adapter again")


def principal_part(
    matrix: Tensor, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first `rank` singular vectors and values: `[rows, rank]`, `[rank]`, `[rank, columns]`.

    Large matrices use a randomized decomposition, whose cost grows with the rank instead of the shorter side.

    Args:
        matrix: Two dimensions, float32 or float64.
        rank: From 1 to the shorter side.
        generator: Draws the random directions.
    """
    shorter = min(matrix.shape)
    if shorter <= _LARGE or 8 * rank > shorter:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    left, values, right = sketched_svd(matrix, rank, generator=generator)
    # A matrix of a lower rank has fewer directions; zeros fill the rest.
    missing = rank - len(values)
    return F.pad(left, (0, missing)), F.pad(values, (0, missing)), F.pad(right, (0, 0, 0, missing))
