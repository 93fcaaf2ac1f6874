"""The original names of a Stable Diffusion U-Net (CompVis, Stability AI), over those of diffusers.

Literal tables and the counting of blocks; no tensors. The counting holds for any number of levels and layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Path of a block of diffusers' U-Net to the original one, for every block that the settings give.

    Args:
        config: Settings of `UNet2DConditionModel`: `down_block_types`, `up_block_types` and `layers_per_block`.
    """
    layers = int(config.get("layers_per_block", 2))
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    table = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for level in range(len(down)):
        # Block 0 is conv_in; each level has its layers and then one block that halves the size.
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            table[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + layers}.0.op"
    for level, kind in enumerate(up):
        first = level * (layers + 1)
        for layer in range(layers + 1):
            table[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        # What doubles the size sits in the last block of its level, behind the attention where there is one.
        place = 2 if "CrossAttn" in kind else 1
        table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + layers}.{place}.conv"
    return table


def unet_name(path: str, blocks: Mapping[str, str]) -> str | None:
    """The original path of a module of the U-Net, without `model.diffusion_model.`; None where there is none.

    Args:
        path: As diffusers names it.
        blocks: From `unet_blocks`.
    """
    if path in OUTSIDE:
        return OUTSIDE[path]
    parts = path.split(".")
    for length in (5, 4, 3):
        block = blocks.get(".".join(parts[:length]))
        if block is None or length > len(parts):
            continue
        rest = parts[length:]
        if "resnets" in parts[:length]:
            inner = RESNET.get(".".join(rest))
            return f"{block}.{inner}" if inner else None
        # Inside a transformer the two namings agree.
        return ".".join([block, *rest])
    return None
