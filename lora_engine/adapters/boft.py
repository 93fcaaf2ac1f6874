"""BOFT as in LyCORIS: stages of block rotations over the outputs, each with twice the stride (a butterfly).

Liu et al. 2023 (arXiv 2311.06243). At a multiplier other than 1, LyCORIS scales the rotation of each stage. Here the
multiplier scales the delta, as for every kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_engine.adapters.delta import DAMAGED, Issue
from lora_engine.adapters.oft import OftDelta
from lora_engine.adapters.rotation import cayley, compute_dtype, nearest_block, rotate_blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BoftDelta(OftDelta):
    """`W' = rescale * R_m ... R_1 W`; stage i rotates blocks of outputs with stride `2^i * b / 2`.

    Attributes:
        blocks: `[stages, n, b, b]`; `n * b` is the number of outputs, and `b` is even.
    """

    kind: ClassVar[str] = "boft"
    dims: ClassVar[int] = 4

    @classmethod
    def _block_shape(cls, outputs: int, requested: int) -> tuple[int, ...]:
        allowed = "a number of outputs that is an even block size times a power of 2"
        size = nearest_block(outputs, requested, lambda size: _is_valid(outputs // size, size), allowed)
        return (outputs // size).bit_length(), outputs // size, size, size

    def _change(self, rows: Tensor) -> Tensor:
        half = self.blocks.shape[-1] // 2
        rotated = rows
        for stage, change in enumerate(cayley(self._skew(compute_dtype(self.blocks))).unbind()):
            rotated = rotated + _rotate_stage(change, rotated, half << stage)
        return rotated - rows

    def _own_issues(self) -> Iterator[Issue]:
        stages, number, size = self.blocks.shape[:3]
        # Stage i pairs half blocks that are 2^i half blocks apart, so their number must be divisible by 2^stages.
        if size % 2 or (number * 2) % (1 << stages):
            allowed = "an even block size, and twice the number of blocks divisible by 2 ** stages"
            yield Issue("blocks", f"the shape is {list(self.blocks.shape)}", allowed, DAMAGED)


def _is_valid(number: int, size: int) -> bool:
    return size % 2 == 0 and number & (number - 1) == 0


def _rotate_stage(change: Tensor, rows: Tensor, stride: int) -> Tensor:
    """Returns the change of one stage, which rotates blocks of values `stride` apart."""
    lead = rows.shape[:-1]
    grouped = rows.reshape(*lead, -1, 2, stride).transpose(-1, -2).flatten(-3)
    return rotate_blocks(change, grouped).reshape(*lead, -1, stride, 2).transpose(-1, -2).flatten(-3)
