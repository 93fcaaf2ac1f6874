"""The original names of Stable Diffusion's autoencoder (CompVis), over those of diffusers.

Literal tables and the counting of blocks; no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OUTSIDE = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
}
MIDDLE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
}
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# The four of them are convolutions of 1x1 in the original and linear layers in diffusers.
CONVOLUTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# Folders that were saved before diffusers 0.18, Stable Diffusion 1.5's own among them, still have these.
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Path of a block of diffusers' autoencoder to the original one.

    Args:
        config: Settings of `AutoencoderKL`: `block_out_channels` and `layers_per_block`.
    """
    levels, layers = len(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    table = {f"{side}.{ours}": f"{side}.{theirs}" for side in ("encoder", "decoder") for ours, theirs in MIDDLE.items()}
    for level in range(levels):
        # The original counts the decoder's levels from the picture's side.
        opposite = levels - 1 - level
        for layer in range(layers):
            table[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        for layer in range(layers + 1):
            table[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{opposite}.block.{layer}"
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{opposite}.upsample.conv"
    return table


def vae_name(path: str, blocks: Mapping[str, str]) -> str | None:
    """The original path of a module of the autoencoder, without `first_stage_model.`; None where there is none.

    Args:
        path: As diffusers names it.
        blocks: From `vae_blocks`.
    """
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path in blocks:
        return blocks[path]
    for table in (RESNET, ATTENTION):
        for ours, theirs in table.items():
            block = blocks.get(path.removesuffix(f".{ours}")) if path.endswith(f".{ours}") else None
            if block is not None:
                return f"{block}.{theirs}"
    return None


def current_vae_name(name: str) -> str:
    """The present name of a tensor, where a folder has that of an earlier diffusers."""
    above, _, leaf = name.rpartition(".")
    block, _, last = above.rpartition(".")
    if block.endswith("mid_block.attentions.0") and last in EARLIER:
        return f"{block}.{EARLIER[last]}.{leaf}"
    return name
