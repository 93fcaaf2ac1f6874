"""FLUX.1 (Black Forest Labs): literal table of original and diffusers' module names."""

from __future__ import annotations

from lora_engine.families.double_stream import (
    ATTENTION,
    DOUBLE_SHAPES,
    FEED_FORWARD,
    MODULATION,
    SINGLE,
    SINGLE_MODULATION,
    SINGLE_SHAPES,
)
from lora_engine.families.names import Blocks, NameTable

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
# Depth and Canny read 128 channels, Fill 384.
_OUTSIDE_SHAPES = {
    "x_embedder": "w 64|128|384",
    "context_embedder": "w 4096",
    "time_text_embed.timestep_embedder.linear_1": "w 256",
    "time_text_embed.timestep_embedder.linear_2": "w w",
    "time_text_embed.text_embedder.linear_1": "w 768",
    "time_text_embed.text_embedder.linear_2": "w w",
    "time_text_embed.guidance_embedder.linear_1": "w 256",
    "time_text_embed.guidance_embedder.linear_2": "w w",
    "norm_out.linear": "2w w",
    "proj_out": "64 w",
}
FLUX_NAMES = NameTable(
    (
        Blocks("double_blocks", "transformer_blocks", {**ATTENTION, **FEED_FORWARD, **MODULATION}, DOUBLE_SHAPES),
        Blocks("single_blocks", "single_transformer_blocks", {**SINGLE, **SINGLE_MODULATION}, SINGLE_SHAPES),
    ),
    _OUTSIDE,
    _OUTSIDE_SHAPES,
)
XLABS_NAMES = NameTable(
    (
        Blocks(
            "double_blocks",
            "transformer_blocks",
            {
                "processor.qkv_lora1": ("attn.to_q", "attn.to_k", "attn.to_v"),
                "processor.proj_lora1": ("attn.to_out.0",),
                "processor.qkv_lora2": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                "processor.proj_lora2": ("attn.to_add_out",),
            },
            DOUBLE_SHAPES,
        ),
        Blocks(
            "single_blocks",
            "single_transformer_blocks",
            {"processor.qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"), "processor.proj_lora": ("proj_out",)},
            SINGLE_SHAPES,
        ),
    )
)
"""Names of XLabs' adapters (`x-flux`): 1 is the image stream, 2 the text stream."""


def swaps_halves(original: str, shape: tuple[int, int]) -> bool:
    """Returns True for the last norm, where diffusers has shift and scale in the other order."""
    del shape
    return original == "final_layer.adaLN_modulation.1"
