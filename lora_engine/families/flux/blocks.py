"""The blocks of FLUX.1 in the lists of A1111's block-weight extension."""

from __future__ import annotations

import re

from lora_engine.families.block_names import BlockNames


def _block_of(module: str) -> str:
    component, _, name = module.partition(".")
    if component.startswith("text_encoder"):
        return "CLIP" if component == "text_encoder" else "T5"
    if match := re.match(r"(single_)?transformer_blocks\.([0-9]+)\.", name):
        return f"{'S' if match[1] else 'D'}{int(match[2]):02d}"
    return "OUT" if name.startswith(("norm_out", "proj_out")) else "IN"


FLUX_BLOCKS = BlockNames(
    (("CLIP", "T5", "IN", *(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38)), "OUT"),), _block_of
)
