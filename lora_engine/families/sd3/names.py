"""Stable Diffusion 3 and 3.5 (Stability AI): literal table of original and diffusers' module names."""

from __future__ import annotations

from lora_engine.families.double_stream import DOUBLE_SHAPES
from lora_engine.families.names import Blocks, NameTable

_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
# A second attention adds three values to the modulation of the image. The context of the last block is only normalized.
_SHAPES = {
    **DOUBLE_SHAPES,
    **dict.fromkeys(("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"), "w w"),
    "norm1.linear": "6w|9w w",
    "norm1_context.linear": "6w|2w w",
}
_OUTSIDE_SHAPES = {
    "pos_embed.proj": "w 64",
    "context_embedder": "w 4096",
    "time_text_embed.timestep_embedder.linear_1": "w 256",
    "time_text_embed.timestep_embedder.linear_2": "w w",
    "time_text_embed.text_embedder.linear_1": "w 2048",
    "time_text_embed.text_embedder.linear_2": "w w",
    "norm_out.linear": "2w w",
    "proj_out": "64 w",
}
SD3_NAMES = NameTable(
    (Blocks("joint_blocks", "transformer_blocks", _JOINT, _SHAPES),),
    _OUTSIDE,
    _OUTSIDE_SHAPES,
    {"pos_embed": "pos_embed.pos_embed"},
)
# Widths of the published models: 3 medium and 3.5 medium, and 3.5 large.
WIDTHS = (1536, 2432)


def swaps_halves(original: str, shape: tuple[int, int]) -> bool:
    """Returns True if diffusers swaps the halves of a layer's rows."""
    # The context of the last block is only normalized: its modulation has two values where other blocks have six.
    # diffusers uses its continuous norm for it, as at the end of the network, with scale before shift. A delta of the
    # bias or of whole rows does not show the width of the layer.
    rows, columns = shape
    widths = (columns,) if columns else WIDTHS
    ends = original.endswith("context_block.adaLN_modulation.1") and rows in [2 * width for width in widths]
    return ends or original == "final_layer.adaLN_modulation.1"
