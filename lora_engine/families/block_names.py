"""`BlockNames`: the blocks of a denoiser in the lists of A1111's block-weight extension, and those of the U-Nets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockNames:
    """The blocks of a family in the lists of block weights.

    Attributes:
        lists: The names in the order of a list's values; users choose a list by its number of values.
        block_of: Returns the block of a module, such as `IN04`; None for a module in no block.
    """

    lists: tuple[tuple[str, ...], ...]
    block_of: Callable[[str], str | None]


def _unet_module(module: str) -> str | None:
    component, _, name = module.partition(".")
    return "BASE" if component.startswith("text_encoder") else _unet_block(name)


def _unet_block(name: str) -> str | None:
    if name.startswith("conv_in"):
        return "IN00"
    if name.startswith("mid_block."):
        return "MID"
    if match := re.match(r"(down|up)_blocks\.([0-9]+)\.(resnets|attentions|downsamplers|upsamplers)\.([0-9]+)", name):
        level, index = int(match[2]), int(match[4])
        if match[1] == "down":
            return f"IN{3 * level + (3 if match[3] == 'downsamplers' else 1 + index):02d}"
        return f"OUT{3 * level + (2 if match[3] == 'upsamplers' else index):02d}"
    return None


def _list(inputs: Iterable[int], outputs: Iterable[int]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{n:02d}" for n in inputs), "MID", *(f"OUT{n:02d}" for n in outputs))


UNET_BLOCKS = BlockNames(
    (
        _list((4, 5, 7, 8), range(6)),
        _list((1, 2, 4, 5, 7, 8), range(3, 12)),
        _list(range(9), range(9)),
        _list(range(12), range(12)),
    ),
    _unet_module,
)
"""LoRA on SDXL, LoRA on SD, LyCORIS on SDXL, LyCORIS on SD; the first value is that of the text encoders."""
