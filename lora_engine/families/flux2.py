"""FLUX.2 and FLUX.3 (Black Forest Labs), which are only recognized."""

from __future__ import annotations

from lora_engine.families.double_stream import ATTENTION, ATTENTION_SHAPES, PROJECTIONS
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable, same_names

_FEED_FORWARD = {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_FEED_FORWARD_SHAPES = {
    **dict.fromkeys(("ff.linear_in", "ff_context.linear_in"), "6w w"),
    **dict.fromkeys(("ff.linear_out", "ff_context.linear_out"), "w 3w"),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_OUTSIDE_SHAPES = {
    "x_embedder": "w 128",
    "context_embedder": "w t",
    "double_stream_modulation_img.linear": "6w w",
    "double_stream_modulation_txt.linear": "6w w",
    "single_stream_modulation.linear": "3w w",
    "norm_out.linear": "2w w",
    "proj_out": "128 w",
}
FLUX2 = Family(
    name="flux2",
    title="FLUX.2",
    names=NameTable(
        (
            Blocks(
                "double_blocks",
                "transformer_blocks",
                {**ATTENTION, **_FEED_FORWARD},
                {**ATTENTION_SHAPES, **_FEED_FORWARD_SHAPES},
            ),
            Blocks(
                "single_blocks",
                "single_transformer_blocks",
                {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)},
                {"attn.to_qkv_mlp_proj": "9w w", "attn.to_out": "w 4w"},
            ),
        ),
        _OUTSIDE,
        _OUTSIDE_SHAPES,
    ),
    sizes=(
        Size("FLUX.2 klein 4B", {"transformer_blocks": 5, "single_transformer_blocks": 20}, {"w": 3072, "t": 7680}),
        Size("FLUX.2 klein 9B", {"transformer_blocks": 8, "single_transformer_blocks": 24}, {"w": 4096, "t": 12288}),
        Size("FLUX.2 dev", {"transformer_blocks": 8, "single_transformer_blocks": 48}, {"w": 6144, "t": 15360}),
    ),
    header=r"flux_?2(_.*)?",
)
_BLOCK = (*PROJECTIONS, "ff.linear_in", "ff.linear_out")
_BLOCK_SHAPES = {**dict.fromkeys(PROJECTIONS, "w w"), "ff.linear_in": "6w w", "ff.linear_out": "w 3w"}
_LISTS = {"mode_blocks.image": 5, "mode_blocks.image_cond": 5, "txt_mode_blocks": 5, "single_transformer_blocks": 28}
FLUX3 = Family(
    name="flux3",
    title="FLUX.3",
    names=NameTable(tuple(Blocks(name, name, same_names(*_BLOCK), _BLOCK_SHAPES) for name in _LISTS)),
    sizes=(Size("FLUX.3", _LISTS, {"w": 3072}),),
    header=r"flux_?3(_.*)?",
)
for _family in (FLUX2, FLUX3):
    families.add(_family.name, _family)
