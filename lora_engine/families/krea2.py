"""Krea 2, which is only recognized."""

from __future__ import annotations

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable

_BLOCK = {
    "attn.wq": ("attn.to_q",),
    "attn.wk": ("attn.to_k",),
    "attn.wv": ("attn.to_v",),
    "attn.wo": ("attn.to_out.0",),
    "attn.gate": ("attn.to_gate",),
    "mlp.gate": ("ff.gate",),
    "mlp.up": ("ff.up",),
    "mlp.down": ("ff.down",),
}
# Grouped queries: 48 heads of queries, 12 of keys and values.
_SHAPES = {
    **dict.fromkeys(("attn.to_q", "attn.to_out.0", "attn.to_gate"), "w w"),
    **dict.fromkeys(("attn.to_k", "attn.to_v"), "k w"),
    **dict.fromkeys(("ff.gate", "ff.up"), "f w"),
    "ff.down": "w f",
}
KREA2 = Family(
    name="krea2",
    title="Krea 2",
    names=NameTable(
        (Blocks("blocks", "transformer_blocks", _BLOCK, _SHAPES),),
        {"tproj.1": "time_mod_proj", "first": "img_in", "last.linear": "final_layer.linear"},
        {"time_mod_proj": "6w w", "img_in": "w 64", "final_layer.linear": "64 w"},
    ),
    sizes=(Size("Krea 2", {"transformer_blocks": 28}, {"w": 6144, "k": 1536, "f": 16384}),),
    marks=r"txt_?fusion_|text_fusion_|tproj_\d|txtmlp_|tmlp_\d|transformer_blocks_\d+_attn_to_qkv$",
    header=r"krea_?2.*",
)
families.add(KREA2.name, KREA2)
