"""Maps diffusers' names of Stable Diffusion's autoencoder to the original names (CompVis)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VAE_PREFIXES = ("vae.", "first_stage_model.")
"""Prefixes of the names in files with all components of a base with a transformer."""
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
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# 1x1 convolutions in the original, linear layers in diffusers.
VAE_CONVOLUTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# Folders saved before diffusers 0.18 have these names, including the published Stable Diffusion 1.5.
EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns diffusers' path of each block of the autoencoder to the original path.

    Args:
        config: Settings of `AutoencoderKL`: `block_out_channels` and `layers_per_block`.
    """
    levels, layers = len(config["block_out_channels"]), int(config.get("layers_per_block", 1))
    table = {
        f"{side}.{name}": f"{side}.{original}" for side in ("encoder", "decoder") for name, original in MIDDLE.items()
    }
    for level in range(levels):
        # The original numbers the decoder's levels from the image side.
        opposite = levels - 1 - level
        for layer in range(layers):
            table[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
        for layer in range(layers + 1):
            table[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{opposite}.block.{layer}"
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{opposite}.upsample.conv"
    return table


def vae_name(path: str, blocks: Mapping[str, str]) -> str | None:
    """Returns the original path of a module of the autoencoder, without `first_stage_model.`; None if unknown.

    Args:
        path: diffusers' path.
        blocks: Result of `vae_blocks`.
    """
    if path in OUTSIDE:
        return OUTSIDE[path]
    if path in blocks:
        return blocks[path]
    for table in (RESNET, VAE_ATTENTION):
        for name, original in table.items():
            block = blocks.get(path.removesuffix(f".{name}")) if path.endswith(f".{name}") else None
            if block is not None:
                return f"{block}.{original}"
    return None


def current_vae_name(name: str) -> str:
    """Returns the current name of a tensor that may have the name of an earlier diffusers."""
    above, _, leaf = name.rpartition(".")
    block, _, last = above.rpartition(".")
    if block.endswith("mid_block.attentions.0") and last in EARLIER:
        return f"{block}.{EARLIER[last]}.{leaf}"
    return name
