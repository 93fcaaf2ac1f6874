"""AuraFlow, PixArt, Kandinsky 2's prior, Sana, HiDream and Stable Cascade, which are only recognized."""

from __future__ import annotations

from lora_engine.families.double_stream import ADDED_PROJECTIONS, PROJECTIONS
from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import NameTable, same_blocks

_FEED_FORWARD = {"linear_1": "f w", "linear_2": "f w", "out_projection": "w f"}
_SINGLE = {**dict.fromkeys(PROJECTIONS, "w w"), **{f"ff.{name}": shape for name, shape in _FEED_FORWARD.items()}}
_JOINT = {
    **_SINGLE,
    **dict.fromkeys(ADDED_PROJECTIONS, "w w"),
    **{f"ff_context.{name}": shape for name, shape in _FEED_FORWARD.items()},
    "norm1_context.linear": "6w w",
}
AURA_FLOW = Family(
    name="aura_flow",
    title="AuraFlow",
    names=NameTable(
        tuple(
            same_blocks({**shapes, "norm1.linear": "6w w"}, name)
            for name, shapes in (("joint_transformer_blocks", _JOINT), ("single_transformer_blocks", _SINGLE))
        )
    ),
    sizes=(Size("AuraFlow", {"joint_transformer_blocks": 4, "single_transformer_blocks": 32}, {"w": 3072, "f": 8192}),),
    marks=r"(double|single)_layers_\d+_",
    header=r"aura_?flow.*",
)
_TWO_ATTENTIONS = {
    f"{name}.{part}": "w w" for name in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")
}
_PIXART = {**_TWO_ATTENTIONS, "ff.net.0.proj": "4w w", "ff.net.2": "w 4w"}
_PRIOR = {name: shape for name, shape in _PIXART.items() if not name.startswith("attn2.")}
PIXART = Family(
    name="pixart",
    title="PixArt",
    names=NameTable((same_blocks(_PIXART),)),
    sizes=(Size("PixArt", {"transformer_blocks": 28}, {"w": 1152}),),
    marks=r"blocks_\d+_(attn_qkv|attn_proj|cross_attn_(q|kv)_linear|cross_attn_proj)(?=_|$)",
    header=r"pixart.*",
)
PRIOR = Family(
    name="kandinsky2_prior",
    title="Kandinsky 2's prior",
    names=NameTable((same_blocks(_PRIOR),)),
    sizes=(Size("Kandinsky 2's prior", {"transformer_blocks": 20}, {"w": 2048}),),
)
_SANA = {**_TWO_ATTENTIONS, "ff.conv_inverted": "5w w", "ff.conv_depth": "5w 9", "ff.conv_point": "w p"}
SANA = Family(
    name="sana",
    title="Sana",
    names=NameTable((same_blocks(_SANA),)),
    sizes=(
        Size("Sana 1.6B", {"transformer_blocks": 20}, {"w": 2240, "p": 5600}),
        Size("Sana 0.6B", {"transformer_blocks": 28}, {"w": 1152, "p": 2880}),
    ),
    header=r"sana(?!_?video).*",
)
# The feed-forward network is 2.5 times as wide by the default of the class, and 3 times in published models.
_SANA_VIDEO = {
    **_TWO_ATTENTIONS,
    "ff.conv_inverted": "5w|6w w",
    "ff.conv_depth": "5w|6w 9",
    "ff.conv_point": "w p|3w",
    "ff.conv_temp": "w 3w",
}
SANA_VIDEO = Family(
    name="sana_video",
    title="SANA-Video",
    names=NameTable((same_blocks(_SANA_VIDEO),)),
    sizes=(Size("SANA-Video 2B", {"transformer_blocks": 20}, {"w": 2240, "p": 5600}),),
    header=r"sana_?video.*",
)
HIDREAM = Family(name="hidream", title="HiDream", marks=r"(double|single)_stream_blocks_\d+_", header=r"hidream.*")
CASCADE = Family(
    name="cascade", title="Stable Cascade", marks=r"(down|up)_blocks_\d+_\d+_(attention|mapper|channelwise)_"
)
for _family in (AURA_FLOW, PIXART, PRIOR, SANA, SANA_VIDEO, HIDREAM, CASCADE):
    families.add(_family.name, _family)
