"""Chroma1, which is only recognized: FLUX.1 without modulation, which an approximator replaces.

Without the approximator, adapters have the names and shapes of FLUX.1's; a header or CLIP tells them apart.
"""

from __future__ import annotations

from lora_engine.families.double_stream import (
    ATTENTION,
    DOUBLE_SHAPES,
    FEED_FORWARD,
    SINGLE,
    SINGLE_SHAPES,
)
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable
from lora_engine.families.text_encoders import T5_XXL

_APPROXIMATOR = {"in_layer": ("linear_1",), "out_layer": ("linear_2",)}

CHROMA = Family(
    name="chroma",
    title="Chroma",
    names=NameTable(
        (
            Blocks("double_blocks", "transformer_blocks", {**ATTENTION, **FEED_FORWARD}, DOUBLE_SHAPES),
            Blocks("single_blocks", "single_transformer_blocks", SINGLE, SINGLE_SHAPES),
            Blocks(
                "distilled_guidance_layer.layers",
                "distilled_guidance_layer.layers",
                _APPROXIMATOR,
                dict.fromkeys(("linear_1", "linear_2"), "5120 5120"),
            ),
        ),
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "final_layer.linear": "proj_out",
            "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
            "distilled_guidance_layer.out_proj": "distilled_guidance_layer.out_proj",
        },
        {"x_embedder": "w 64", "context_embedder": "w 4096", "proj_out": "64 w"},
    ),
    sizes=(
        Size(
            "Chroma1",
            {"transformer_blocks": 19, "single_transformer_blocks": 38},
            {"w": 3072},
            {"distilled_guidance_layer.layers": 5},
        ),
    ),
    text={"text_encoder": T5_XXL},
    header=r"chroma.*",
)
families.add(CHROMA.name, CHROMA)
