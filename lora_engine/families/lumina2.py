"""Lumina Image 2 (and Neta Lumina, NewBie, which have its shapes); only recognized."""

from __future__ import annotations

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable

# Grouped queries: 24 heads of queries, 8 of keys and values.
_BLOCK = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "feed_forward.w1": ("feed_forward.linear_1",),
    "feed_forward.w2": ("feed_forward.linear_2",),
    "feed_forward.w3": ("feed_forward.linear_3",),
    "adaLN_modulation.1": ("norm1.linear",),
}
_SHAPES = {
    "attn.to_q": "w w",
    "attn.to_k": "k w",
    "attn.to_v": "k w",
    "attn.to_out.0": "w w",
    "feed_forward.linear_1": "4w w",
    "feed_forward.linear_2": "w 4w",
    "feed_forward.linear_3": "4w w",
    "norm1.linear": "4w 1024",
}
_LISTS = ("layers", "noise_refiner", "context_refiner")
LUMINA2 = Family(
    name="lumina2",
    title="Lumina 2",
    names=NameTable(tuple(Blocks(name, name, _BLOCK, _SHAPES) for name in _LISTS)),
    sizes=(Size("Lumina 2", {"layers": 26}, {"w": 2304, "k": 768}, {"noise_refiner": 2, "context_refiner": 2}),),
    header=r"lumina_?2.*",
)
families.add(LUMINA2.name, LUMINA2)
