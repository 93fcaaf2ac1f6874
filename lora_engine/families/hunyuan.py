"""HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1 and Hunyuan-DiT (Tencent), which are only recognized.

The first three have the blocks of FLUX.1 and more of them. ComfyUI writes the names of Black Forest Labs.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_engine.families.double_stream import (
    ATTENTION,
    DOUBLE_SHAPES,
    FEED_FORWARD,
    MODULATION,
    SINGLE,
    SINGLE_MODULATION,
    SINGLE_SHAPES,
)
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable, same_names

_REFINER = "context_embedder.token_refiner.refiner_blocks"
_OWN = {
    "img_mlp.fc1": ("ff.net.0.proj",),
    "img_mlp.fc2": ("ff.net.2",),
    "txt_mlp.fc1": ("ff_context.net.0.proj",),
    "txt_mlp.fc2": ("ff_context.net.2",),
    "img_mod.linear": ("norm1.linear",),
    "txt_mod.linear": ("norm1_context.linear",),
    "img_attn_q": ("attn.to_q",),
    "img_attn_k": ("attn.to_k",),
    "img_attn_v": ("attn.to_v",),
    "txt_attn_q": ("attn.add_q_proj",),
    "txt_attn_k": ("attn.add_k_proj",),
    "txt_attn_v": ("attn.add_v_proj",),
}
_DOUBLE = Blocks(
    "double_blocks", "transformer_blocks", {**_OWN, **ATTENTION, **FEED_FORWARD, **MODULATION}, DOUBLE_SHAPES
)
_SINGLE = Blocks(
    "single_blocks",
    "single_transformer_blocks",
    {**SINGLE, **SINGLE_MODULATION, "modulation.linear": ("norm.linear",)},
    SINGLE_SHAPES,
)
_REFINER_MODULES = same_names(
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "norm_out.linear")
)


def _family(name: str, title: str, blocks: Mapping[str, int], width: int, header: str) -> Family:
    return Family(
        name=name,
        title=title,
        names=NameTable((_DOUBLE, _SINGLE, Blocks(_REFINER, _REFINER, _REFINER_MODULES))),
        sizes=(Size(title, blocks, {"w": width}, {_REFINER: 2}),),
        marks=r"txt_in_individual_token_refiner_|txt_in_(c|t)_embedder_",
        header=header,
    )


_BOTH = {"transformer_blocks": 20, "single_transformer_blocks": 40}
for _entry in (
    _family("hunyuan_video", "HunyuanVideo", _BOTH, 3072, r"hunyuan_?video|framepack"),
    _family("hunyuan_video_15", "HunyuanVideo 1.5", {"transformer_blocks": 54}, 2048, r"hunyuan_?video_?1_5"),
    _family("hunyuan_image", "HunyuanImage 2.1", _BOTH, 3584, r"hunyuan_?image.*"),
    Family("hunyuan_dit", "Hunyuan-DiT", marks=r"blocks_\d+_attn[12]_(Wqkv|out_proj|q_proj|kv_proj)"),
):
    families.add(_entry.name, _entry)
