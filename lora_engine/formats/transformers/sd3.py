"""Stable Diffusion 3 and 3.5 (Stability AI): literal table of original and diffusers' module names."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.formats.transformers.dit import Blocks, NameTable, TransformerNames, transformer_names
from lora_engine.formats.transformers.fused import Rows

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


# Widths of the published models: 3 medium and 3.5 medium, and 3.5 large.
_WIDTHS = (1536, 2432)


def _rows(parts: Sequence[str], columns: int) -> Rows:
    return [columns] * len(parts)


def _swapped(original: str, shape: tuple[int, int]) -> bool:
    # The context of the last block is only normalized: its modulation has two values where other blocks have six.
    # diffusers uses its continuous norm for it, as at the end of the network, with scale before shift. A delta of the
    # bias or of whole rows does not show the width of the layer.
    rows, columns = shape
    widths = (columns,) if columns else _WIDTHS
    ends = original.endswith("context_block.adaLN_modulation.1") and rows in [2 * width for width in widths]
    return ends or original == "final_layer.adaLN_modulation.1"


SD3 = TransformerNames(
    name="sd3",
    title="Stable Diffusion 3",
    names=NameTable((Blocks("joint_blocks", "transformer_blocks", _JOINT),), _OUTSIDE),
    mark=r"joint_blocks_\d+_.+|transformer_blocks_\d+_attn2_(to_|norm).+|pos_embed_proj",
    widths=_WIDTHS,
    rows=_rows,
    swapped=_swapped,
    text={"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    version="sd3",
    architecture="stable-diffusion-3/lora",
)
transformer_names.add(SD3.name, SD3)
