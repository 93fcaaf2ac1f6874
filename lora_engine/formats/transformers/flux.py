"""FLUX.1 (Black Forest Labs): literal table of original and diffusers' module names."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.formats.transformers.dit import Blocks, NameTable, TransformerNames, transformer_names
from lora_engine.formats.transformers.fused import Rows

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_MLP_RATIO = 4  # of every published FLUX.1; used only if a file has no `proj_mlp` at all


def _rows(parts: Sequence[str], columns: int) -> Rows:
    # All fused layers have inputs of the width of q, k and v.
    return [_MLP_RATIO * columns if part.endswith("proj_mlp") else columns for part in parts]


def _swapped(original: str, shape: tuple[int, int]) -> bool:
    return original == "final_layer.adaLN_modulation.1"


FLUX = TransformerNames(
    name="flux",
    title="FLUX.1",
    names=NameTable(
        (
            Blocks("double_blocks", "transformer_blocks", _DOUBLE),
            Blocks("single_blocks", "single_transformer_blocks", _SINGLE),
        ),
        _OUTSIDE,
    ),
    mark=r"(double_blocks|single_blocks|single_transformer_blocks)_\d+_.+",
    widths=(3072,),
    rows=_rows,
    swapped=_swapped,
    text={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    version="flux1",
    architecture="flux-1-dev/lora",
)
transformer_names.add(FLUX.name, FLUX)
