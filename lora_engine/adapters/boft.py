"""BOFT as LyCORIS has it: the outputs go through stages of block rotations, each over a wider stride (a butterfly).

Liu et al. 2023 (arXiv 2311.06243). At a multiplier other than 1 LyCORIS turns each stage by a part; here the multiplier
means the same for every kind: a part of the whole change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lora_engine.adapters.delta import DAMAGED, Issue, kinds
from lora_engine.adapters.oft import OftDelta
from lora_engine.adapters.rotation import cayley, nearest_block, turn, wide


@dataclass(frozen=True, eq=False)
class BoftDelta(OftDelta):
    """`W' = rescale * R_m ... R_1 W`; stage i turns blocks of outputs that lie `2^i * b / 2` apart.

    Attributes:
        blocks: `[stages, n, b, b]`, where `n * b` are the outputs and `b` is even.
    """

    kind: ClassVar[str] = "boft"
    dims: ClassVar[int] = 4

    @classmethod
    def _block_shape(cls, outputs: int, wanted: int) -> tuple[int, ...]:
        allowed = "a number of outputs that is an even block size times a power of 2"
        size = nearest_block(outputs, wanted, lambda size: _applies_to(outputs // size, size), allowed)
        return (outputs // size).bit_length(), outputs // size, size, size

    def _change(self, rows: Tensor) -> Tensor:
        half = self.blocks.shape[-1] // 2
        turned = rows
        for stage, change in enumerate(cayley(self._skew(wide(self.blocks))).unbind()):
            turned = turned + _turn_stage(change, turned, half << stage)
        return turned - rows

    def _own_faults(self) -> Iterator[Issue]:
        stages, number, size = self.blocks.shape[:3]
        # Stage i pairs halves of blocks that lie 2^i halves apart, so the last stage needs that many.
        if size % 2 or (number * 2) % (1 << stages):
            allowed = "an even block size, and a number of blocks that the last stage divides"
            yield Issue("blocks", f"the shape is {list(self.blocks.shape)}", allowed, DAMAGED)


def _applies_to(number: int, size: int) -> bool:
    return size % 2 == 0 and number & (number - 1) == 0


def _turn_stage(change: Tensor, rows: Tensor, stride: int) -> Tensor:
    """The change of one stage: values `stride` apart come together, in blocks, and go back to their places."""
    lead = rows.shape[:-1]
    together = rows.reshape(*lead, -1, 2, stride).transpose(-1, -2).flatten(-3)
    return turn(change, together).reshape(*lead, -1, stride, 2).transpose(-1, -2).flatten(-3)


kinds.add(BoftDelta.kind, BoftDelta)
