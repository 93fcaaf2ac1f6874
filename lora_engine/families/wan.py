"""Wan 2.1 and 2.2 (Alibaba), which are only recognized. Nothing in a file tells the two networks of 2.2 apart."""

from __future__ import annotations

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable

_BLOCK = {
    **{f"self_attn.{part}": (f"attn1.to_{part}",) for part in "qkv"},
    **{f"cross_attn.{part}": (f"attn2.to_{part}",) for part in "qkv"},
    "self_attn.o": ("attn1.to_out.0",),
    "cross_attn.o": ("attn2.to_out.0",),
    "cross_attn.k_img": ("attn2.add_k_proj",),
    "cross_attn.v_img": ("attn2.add_v_proj",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}
_SHAPES = {
    **dict.fromkeys((part for parts in _BLOCK.values() for part in parts), "w w"),
    "ffn.net.0.proj": "f w",
    "ffn.net.2": "w f",
}
WAN = Family(
    name="wan",
    title="Wan",
    names=NameTable(
        (Blocks("blocks", "blocks", _BLOCK, _SHAPES),),
        {
            "time_projection.1": "condition_embedder.time_proj",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "head.head": "proj_out",
        },
        {"condition_embedder.time_proj": "6w w", "condition_embedder.text_embedder.linear_1": "w 4096"},
    ),
    sizes=(
        Size("Wan 14B", {"blocks": 40}, {"w": 5120, "f": 13824}),
        Size("Wan 1.3B", {"blocks": 30}, {"w": 1536, "f": 8960}),
        Size("Wan 5B", {"blocks": 30}, {"w": 3072, "f": 14336}),
    ),
    marks=r"blocks_\d+_(modulation|(self|cross)_attn_norm_|norm3)|img_emb_proj_",
    header=r"wan.*",
)
families.add(WAN.name, WAN)
