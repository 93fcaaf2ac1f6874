"""Tables of the double-stream and single-stream blocks of Black Forest Labs, which several families build on.

The image and the text have layers of their own in a double block, and share them in a single block.
"""

from __future__ import annotations

from collections.abc import Mapping

ATTENTION: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
FEED_FORWARD: Mapping[str, tuple[str, ...]] = {
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
MODULATION: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
SINGLE_MODULATION: Mapping[str, tuple[str, ...]] = {"modulation.lin": ("norm.linear",)}
PROJECTIONS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
ADDED_PROJECTIONS = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
ATTENTION_SHAPES: Mapping[str, str] = dict.fromkeys((*PROJECTIONS, *ADDED_PROJECTIONS), "w w")
DOUBLE_SHAPES: Mapping[str, str] = {
    **ATTENTION_SHAPES,
    **dict.fromkeys(("ff.net.0.proj", "ff_context.net.0.proj"), "4w w"),
    **dict.fromkeys(("ff.net.2", "ff_context.net.2"), "w 4w"),
    **dict.fromkeys(("norm1.linear", "norm1_context.linear"), "6w w"),
}
SINGLE_SHAPES: Mapping[str, str] = {
    **dict.fromkeys(PROJECTIONS, "w w"),
    "proj_mlp": "4w w",
    "proj_out": "w 5w",
    "norm.linear": "3w w",
}
