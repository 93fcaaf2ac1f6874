"""Families of base models that adapters are seen for and that are not supported: told by names, for the refusal.

A row says what a family's modules are called once a program's prefix is taken off and dots are underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lora_engine.registries import Registry

PREFIXES = (
    "base_model_model_",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
)


@dataclass(frozen=True)
class Unsupported:
    """One such family.

    Attributes:
        title: For people.
        pattern: What the beginning of some flattened names matches, and of no other family's.
    """

    title: str
    pattern: str


unsupported: Registry[Unsupported] = Registry("unsupported family")
_FAMILIES = {
    "anima": (
        "Anima",
        r"blocks_\d+_((self|cross)_attn_(q|k|v|output)_proj|mlp_layer\d|adaln_modulation_)|llm_adapter_",
    ),
    "krea2": (
        "Krea 2",
        r"blocks_\d+_(attn_(wq|wk|wv|wo|gate)|mlp_(gate|up|down))(?=_|$)|txtfusion_|tproj_\d|txtmlp_\d",
    ),
    "qwen_image": ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_"),
    "flux2": ("FLUX.2", r"(double|single)_stream_modulation_|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj"),
    "chroma": ("Chroma", r"distilled_guidance_layer_"),
    # FLUX.1 has 38 single blocks.
    "hunyuan_video": (
        "HunyuanVideo, or another with more blocks than FLUX.1",
        r"double_blocks_\d+_(img|txt)_mlp_fc|txt_in_individual_token_refiner_"
        r"|context_embedder_token_refiner_|single_(transformer_)?blocks_(3[89]|[4-9]\d|\d{3})_",
    ),
    "hidream": ("HiDream", r"(double|single)_stream_blocks_\d+_"),
    "wan": (
        "Wan",
        r"blocks_\d+_((self|cross)_attn_(q|k|v|o|k_img|v_img)|ffn_\d|modulation)(?=_|$)"
        r"|blocks_\d+_(attn[12]_(to|add)_|ffn_net_)",
    ),
    "z_image": (
        "Z-Image or Lumina 2",
        r"(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|attn|adaLN)_",
    ),
    "ltx_video": (
        "LTX-Video, PixArt, Sana or another with blocks like theirs",
        r"transformer_blocks_\d+_(attn1|scale_shift_table)(?=_|$)|patchify_proj",
    ),
    "hunyuan_dit": ("Hunyuan-DiT", r"blocks_\d+_attn1_(Wqkv|out_proj)"),
    "cascade": ("Stable Cascade", r"(down|up)_blocks_\d+_\d+_(attention|mapper|channelwise)_"),
}
for _name, (_title, _pattern) in _FAMILIES.items():
    unsupported.add(_name, Unsupported(_title, _pattern))
# Qwen-Image has FLUX' names inside the attention of its 60 blocks, and its adapters seldom have more than those.
_ATTENTION = re.compile(r"transformer_blocks_(\d+)_attn_(to_|add_)")
_FLUX_BLOCKS, _QWEN_WIDTH = 19, 3072


def unsupported_family(names: Iterable[str]) -> str | None:
    """The unsupported family that an adapter with these names (of tensors or modules) is for, or None."""
    any_family = re.compile("|".join(entry.pattern for entry in unsupported.values()))
    # Nearly always nothing fits, which one pass tells.
    plain = [flat for name in names if any_family.match(flat := flattened(name))]
    for family, entry in unsupported.items():
        if any(re.match(entry.pattern, name) for name in plain):
            return family
    return None


def is_qwen_attention(names: Iterable[str], width: int | None) -> bool:
    """Whether names that FLUX and Qwen-Image share are Qwen-Image's: without a prefix, or of too many blocks for FLUX.

    Args:
        names: Of modules.
        width: Of the attention's input; both have 3072.
    """
    named = list(names)
    numbers = [int(match[1]) for name in named if (match := _ATTENTION.match(flattened(name)))]
    if not numbers or any("single" in name for name in named):
        return False
    bare = all(name.startswith("transformer_blocks") for name in named)
    return bare or (width == _QWEN_WIDTH and max(numbers) >= _FLUX_BLOCKS)


def flattened(name: str) -> str:
    """A name of a module or tensor with underscores for dots, without the prefix that a program put before it."""
    # With dots there is no doubt where `transformer` is the component.
    flat = name.rpartition("/")[2].removeprefix("transformer.").replace(".", "_")
    for prefix in PREFIXES:
        if flat.startswith(prefix) and not flat.startswith("transformer_blocks_"):
            flat = flat.removeprefix(prefix)
    return flat
