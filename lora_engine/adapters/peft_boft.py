"""BOFT as in PEFT: butterflies of block rotations over the inputs, and a gain for each output.

Liu et al. 2023 (arXiv 2311.06243). LyCORIS' BOFT, which rotates outputs, is another kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from lora_engine.adapters.delta import DAMAGED, OTHER_BASE, Delta, Issue
from lora_engine.adapters.rotation import cayley, check_has_rows, compute_dtype, nearest_block, rotate_blocks
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeftBoftDelta(Delta):
    """`W' = scale * W (B_m ... B_1)^T`, where `B_i` permutes, rotates blocks, and permutes back.

    Attributes:
        blocks: `[m, n, b, b]`; `n * b` is the number of inputs, times the kernel size for a convolution. The rotation
            of a block is `(I - S)(I + S)^-1` with `S = (block - block^T) / 2`.
        scale: `[out, 1]`, for a convolution `[1, out]`.
    """

    kind: ClassVar[str] = "peft-boft"
    blocks: Tensor
    scale: Tensor

    @property
    def alpha(self) -> None:
        """None: the kind has no alpha."""
        return

    @property
    def rank(self) -> None:
        """None: the kind has no inner dimension."""
        return

    @classmethod
    def create(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rank: int,
        alpha: float | None,
        generator: torch.Generator | None,
        *,
        butterflies: int = 1,
    ) -> Self:
        """Creates a delta without effect; `rank` is the requested block size.

        Raises:
            SettingsError: The layer is a norm, or its inputs cannot be split into blocks for so many butterflies.
        """
        check_has_rows(weight)
        inputs = math.prod(weight.shape[1:])
        allowed = f"a number of inputs that is divisible by an even block size times {1 << (butterflies - 1)}"
        if butterflies == 1:
            allowed = "at least 2 inputs"
        size = nearest_block(inputs, rank, lambda size: _is_valid(butterflies, inputs // size, size), allowed)
        shape = (weight.shape[0], 1) if weight.dim() == 2 else (1, weight.shape[0])
        return cls(torch.zeros(butterflies, inputs // size, size, size), torch.ones(shape))

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], alpha: float | None) -> Self:
        """Builds a delta from `blocks` and `scale`; ignores alpha."""
        return cls(factors["blocks"], factors["scale"])

    def factors(self) -> dict[str, Tensor]:
        """Returns `blocks` and `scale`."""
        return {"blocks": self.blocks, "scale": self.scale}

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Returns a delta with other tensors."""
        return replace(self, blocks=factors["blocks"], scale=factors["scale"])

    def delta_weight(self, base: Tensor) -> Tensor:
        """Returns `W' - W` in float32 (float64 for a float64 base)."""
        rows = base.to(compute_dtype(base)).flatten(1)
        blocks = self.blocks.to(compute_dtype(self.blocks))
        changes = cayley((blocks.transpose(-1, -2) - blocks) / 2.0)
        half, rotated = blocks.shape[-1] // 2, rows
        for stage, change in enumerate(changes.unbind()):
            part = _rotate_stage(change, rotated, half, 2 << stage) if stage else rotate_blocks(change, rotated)
            rotated = rotated + part
        gains = self.scale.flatten().to(rows.dtype)[:, None]
        return (gains * (rotated - rows) + (gains - 1.0) * rows).reshape(base.shape)

    def reshaped_for(self, weight_shape: Sequence[int]) -> Self:
        """Returns the delta with `scale` in the shape for this weight."""
        return replace(self, scale=self.scale.reshape((-1, 1) if len(weight_shape) == 2 else (1, -1)))

    def issues(self, weight_shape: Sequence[int] | None = None) -> Iterator[Issue]:
        """Yields invalid blocks, a scale of the wrong shape, and shapes that do not fit the weight."""
        shape = list(self.blocks.shape)
        if len(shape) != 4 or 0 in shape or shape[-1] != shape[-2]:
            yield Issue("blocks", f"the shape is {shape}", "[butterflies, n, b, b], none empty", DAMAGED)
            return
        if not _is_valid(*shape[:3]):
            allowed = "for m > 1 butterflies, an even block size and a block count divisible by 2 ** (m - 1)"
            yield Issue("blocks", f"the shape is {shape}", allowed, DAMAGED)
        gains = list(self.scale.shape)
        if len(gains) != 2 or 0 in gains or min(gains) != 1:
            yield Issue("scale", f"the shape is {gains}", "[out, 1] or [1, out]", DAMAGED)
        elif weight_shape is not None:
            inputs = math.prod(weight_shape[1:]) if len(weight_shape) > 1 else 0
            if shape[1] * shape[2] != inputs:
                problem = f"the shape is {shape}, which rotates {shape[1] * shape[2]} inputs"
                yield Issue("blocks", problem, f"the inputs of the base's weight {list(weight_shape)}", OTHER_BASE)
            elif self.scale.numel() != weight_shape[0]:
                allowed = f"{weight_shape[0]} values, one for each output of the base's weight {list(weight_shape)}"
                yield Issue("scale", f"the shape is {gains}", allowed, OTHER_BASE)


def _is_valid(butterflies: int, number: int, size: int) -> bool:
    return butterflies == 1 or (size % 2 == 0 and number % (1 << (butterflies - 1)) == 0)


def _rotate_stage(change: Tensor, rows: Tensor, half: int, pieces: int) -> Tensor:
    """Returns the change of one butterfly: inverse permutation, rotation, permutation.

    The permutation moves the even half blocks of each run of `pieces` before the odd ones.
    """
    runs = rows.reshape(*rows.shape[:-1], -1, pieces, half)
    order = torch.cat([torch.arange(0, pieces, 2), torch.arange(1, pieces, 2)]).to(rows.device)
    permuted = runs.index_select(-2, order.argsort()).flatten(-3)
    return rotate_blocks(change, permuted).reshape(runs.shape).index_select(-2, order).flatten(-3)
