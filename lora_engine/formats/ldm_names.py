"""Maps diffusers' module names of a Stable Diffusion U-Net to the original ones (CompVis, Stability AI).

The reverse needs a table of the base's modules (`naming`): SD 1.x and 2.x (four levels) and SDXL (three) use the same
block numbers for different modules.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from lora_engine.families import families
from lora_engine.families.family import UnetLayout

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ORIGINAL_BEGINNINGS = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")


LAYOUTS: Mapping[str, UnetLayout] = {
    name: family.unet.layout for name, family in families.items() if family.unet is not None
}
"""Family to the layout of its published U-Nets."""


def original_path(path: str, layout: UnetLayout) -> str | None:
    """Returns the original path of a module of a U-Net, or None if the layout does not have the module."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    blocks = _blocks(layout)
    parts = path.split(".")
    for length in (5, 4, 3):
        block = blocks.get(".".join(parts[:length]))
        if block is None:
            continue
        rest = parts[length:]
        if rest and ".resnets." in path:
            # Inside attention blocks the two namings agree.
            if rest[0] not in _RESNET:
                return None
            rest = [_RESNET[rest[0]], *rest[1:]]
        return ".".join([block, *rest])
    return None


@functools.cache
def _blocks(layout: UnetLayout) -> dict[str, str]:
    """Maps the path of each block to its original path, in the order in which `openaimodel.py` builds them."""
    step = layout.layers + 1
    table = {
        **{f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)},
        "mid_block.attentions.0": "middle_block.1",
    }
    for level in range(layout.levels):
        for layer in range(layout.layers):
            index = step * level + layer + 1
            table[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{index}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{index}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{step * (level + 1)}.0.op"
        for layer in range(step):
            index = step * level + layer
            table[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{index}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{index}.1"
        after = 1 if level in layout.plain_up else 2
        table[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{step * level + layout.layers}.{after}"
    return table
