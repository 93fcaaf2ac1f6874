"""Qwen-Image (and its Edit and Layered editions, which have the same shapes) and Qwen-Image 2.1; only recognized."""

from __future__ import annotations

from lora_engine.families.double_stream import ADDED_PROJECTIONS, PROJECTIONS
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import NameTable, same_blocks

_ATTENTION = (*PROJECTIONS, *ADDED_PROJECTIONS)
_SHAPES = {
    **dict.fromkeys(_ATTENTION, "w w"),
    **dict.fromkeys(("img_mlp.net.0.proj", "txt_mlp.net.0.proj"), "4w w"),
    **dict.fromkeys(("img_mlp.net.2", "txt_mlp.net.2"), "w 4w"),
    **dict.fromkeys(("img_mod.1", "txt_mod.1"), "6w w"),
}
QWEN_IMAGE = Family(
    name="qwen_image",
    title="Qwen-Image",
    names=NameTable(
        (same_blocks(_SHAPES),),
        {"txt_in": "txt_in", "img_in": "img_in", "proj_out": "proj_out", "norm_out.linear": "norm_out.linear"},
        {"txt_in": "w 3584", "img_in": "w 64", "proj_out": "64 w", "norm_out.linear": "2w w"},
    ),
    sizes=(Size("Qwen-Image", {"transformer_blocks": 60}, {"w": 3072}),),
    header=r"qwen_image(?!_2_1).*",
)
_SECOND = {
    **dict.fromkeys(PROJECTIONS, "w w"),
    **dict.fromkeys(("img_mlp.proj", "img_mlp.gate_layer"), "3w w"),
    "img_mlp.out": "w 3w",
}
QWEN_IMAGE_21 = Family(
    name="qwen_image_21",
    title="Qwen-Image 2.1",
    names=NameTable((same_blocks(_SECOND),)),
    sizes=(Size("Qwen-Image 2.1", {"transformer_blocks": 32}, {"w": 4096}),),
    header=r"qwen_image_2_1.*",
)
for _family in (QWEN_IMAGE, QWEN_IMAGE_21):
    families.add(_family.name, _family)
