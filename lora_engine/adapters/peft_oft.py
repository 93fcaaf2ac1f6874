"""OFT as in PEFT since 0.18: rotates the inputs in blocks; the parameters are the triangles of skew matrices.

Qiu et al. 2023 (arXiv 2306.07280) and 2025 (arXiv 2506.19847, the Cayley-Neumann form). LyCORIS' OFT is another kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue, dense_forward
from lora_engine.adapters.rotation import cayley, check_has_rows, compute_dtype, nearest_block, neumann, rotate_blocks
from lora_engine.catalog.kinds import MAX_TERMS
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.adapters.layer import LayerOp


@dataclass(frozen=True, eq=False)
class PeftOftDelta(Delta):
    """`W' = W R^T`, where the blocks of `R` follow from skew-symmetric matrices `S`.

    Attributes:
        angles: `[n, b (b - 1) / 2]`: the upper triangles of `S`, row by row; `n * b` is the number of inputs, times the
            kernel size for a convolution. A single row is shared by all blocks.
        terms: Number of terms of the Cayley-Neumann series for `(I + S)(I - S)^-1`; 0 means the exact
            `(I - S)(I + S)^-1` (in PEFT the two forms rotate in opposite directions).
        eps: Constrained OFT: the Frobenius norm of each `S` is at most `eps / sqrt(n)`; None means no constraint.
    """

    kind: ClassVar[str] = "peft-oft"
    angles: Tensor
    terms: int = 5
    eps: float | None = None

    @property
    def alpha(self) -> None:
        """None: the kind has no alpha."""
        return

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
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
        """Creates a delta without rotation; `rank` is the requested block size; `share` uses one block for all.

        Raises:
            SettingsError: The layer is a norm, or has only one input.
        """
        check_has_rows(weight)
        inputs = math.prod(weight.shape[1:])
        size = nearest_block(inputs, rank, lambda size: True, "at least 2 inputs")
        return cls(torch.zeros(1 if share else inputs // size, size * (size - 1) // 2), terms)

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `angles`, with PEFT's default of five terms; ignores alpha."""
        return cls(factors["angles"])

    def factors(self) -> dict[str, Tensor]:
        """Returns `angles`."""
        return {"angles": self.angles}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other angles and the same settings."""
        return replace(self, angles=factors["angles"])

    def _change(self) -> Tensor:
        """Returns `R - I` for each block, `[n, b, b]`."""
        dtype, size = compute_dtype(self.angles), self.block_size
        row, column = torch.triu_indices(size, size, 1, device=self.angles.device).unbind()
        flat = torch.zeros(self.angles.shape[0], size * size, dtype=dtype, device=self.angles.device)
        upper = flat.index_copy(1, row * size + column, self._constrained(dtype)).reshape(-1, size, size)
        skew = upper - upper.transpose(-1, -2)
        return cayley(-skew) if self.terms == 0 else neumann(skew, self.terms)

    def _constrained(self, dtype: torch.dtype) -> Tensor:
        """Returns the angles within the constraint, which gradients bypass: PEFT projects after each step."""
        angles = self.angles.to(dtype)
        if self.eps is None:
            return angles
        norms = angles.detach().norm(dim=-1, keepdim=True) * math.sqrt(2.0)
        limit = self.eps / math.sqrt(len(angles))
        projected = torch.where(norms > limit, angles.detach() * (limit / norms.clamp_min(limit)), angles.detach())
        return angles + (projected - angles.detach())

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base)."""
        dtype = compute_dtype(base)
        return rotate_blocks(self._change(), base.to(dtype).flatten(1)).reshape(base.shape)

    def forward(
        self,
        x: Tensor,
        out: Tensor,
        base_weight: Tensor,
        base_bias: Tensor | None,
        op: LayerOp,
        multiplier: float = 1.0,
    ) -> Tensor:
        """Returns the output; rotates the input, or the weight if that is smaller or has a kernel."""
        is_wide = math.prod(base_weight.shape[2:]) > 1 or x.numel() > base_weight.numel()
        if op.other is not None or op.groups > 1 or is_wide:
            return dense_forward(self, x, out, base_weight, base_bias, op, multiplier=multiplier)
        channel = -1 - op.dims
        rotated = rotate_blocks(self._change().transpose(-1, -2), x.movedim(channel, -1)).movedim(-1, channel)
        change = op(rotated, base_weight.to(x.dtype))
        return torch.add(out, change.to(out.dtype), alpha=multiplier)

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields an invalid number of angles, settings out of range, and shapes that do not fit the weight."""
        if not 0 <= self.terms <= MAX_TERMS:
            yield Issue("terms", f"the series has {self.terms!r} terms", f"0 (exact) to {MAX_TERMS}", DAMAGED)
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
