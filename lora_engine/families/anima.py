"""Anima (and Cosmos-Predict2, whose network it has), which are only recognized."""

from __future__ import annotations

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, NameTable

_BLOCK = {
    **{f"self_attn.{part}_proj": (f"attn1.to_{part}",) for part in "qkv"},
    **{f"cross_attn.{part}_proj": (f"attn2.to_{part}",) for part in "qkv"},
    "self_attn.output_proj": ("attn1.to_out.0",),
    "cross_attn.output_proj": ("attn2.to_out.0",),
    "mlp.layer1": ("ff.net.0.proj",),
    "mlp.layer2": ("ff.net.2",),
    **{
        f"adaln_modulation_{name}.{number}": (f"norm{place}.linear_{number}",)
        for place, name in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for number in (1, 2)
    },
}
_SHAPES = {
    **dict.fromkeys(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0"), "w w"
    ),
    **dict.fromkeys(("attn2.to_k", "attn2.to_v"), "w 1024"),
    "ff.net.0.proj": "4w w",
    "ff.net.2": "w 4w",
    **{f"norm{place}.linear_1": "256 w" for place in (1, 2, 3)},
    **{f"norm{place}.linear_2": "3w 256" for place in (1, 2, 3)},
}
ANIMA = Family(
    name="anima",
    title="Anima",
    names=NameTable((Blocks("blocks", "transformer_blocks", _BLOCK, _SHAPES),)),
    sizes=(Size("Anima", {"transformer_blocks": 28}, {"w": 2048}),),
    marks=r"llm_adapter_|text_conditioner_",
    header=r"anima.*",
)
families.add(ANIMA.name, ANIMA)
