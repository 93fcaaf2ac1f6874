"""Recognizes unsupported transformer families by their module names, for the error message.

The patterns match names without the program's prefix and with underscores for dots.
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
    """An unsupported family.

    Attributes:
        title: Name in messages.
        pattern: Pattern of flattened names (matched at the start) that only this family has.
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
# Qwen-Image shares FLUX' names in the attention of its 60 blocks, and its adapters rarely have other modules.
_ATTENTION = re.compile(r"transformer_blocks_(\d+)_attn_(to_|add_)")
_FLUX_BLOCKS, _QWEN_WIDTH = 19, 3072


def unsupported_family(names: Iterable[str]) -> str | None:
    """Returns the unsupported family of an adapter with these tensor or module names, or None."""
    any_family = re.compile("|".join(entry.pattern for entry in unsupported.values()))
    # One pass with a joint pattern first, because usually nothing matches.
    plain = [flat for name in names if any_family.match(flat := flattened(name))]
    for family, entry in unsupported.items():
        if any(re.match(entry.pattern, name) for name in plain):
            return family
    return None


def is_qwen_attention(names: Iterable[str], width: int | None) -> bool:
    """Returns True if names shared with FLUX are Qwen-Image's: without a prefix, or with more blocks than FLUX has.

    Args:
        names: Module names.
        width: Width of the attention's input; both families have 3072.
    """
    names = list(names)
    numbers = [int(match[1]) for name in names if (match := _ATTENTION.match(flattened(name)))]
    if not numbers or any("single" in name for name in names):
        return False
    bare = all(name.startswith("transformer_blocks") for name in names)
    return bare or (width == _QWEN_WIDTH and max(numbers) >= _FLUX_BLOCKS)


def flattened(name: str) -> str:
    """Returns a module or tensor name with underscores for dots and without the program's prefix."""
    # Only with dots is it certain that `transformer` is the component.
    flat = name.rpartition("/")[2].removeprefix("transformer.").replace(".", "_")
    for prefix in PREFIXES:
        if flat.startswith(prefix) and not flat.startswith("transformer_blocks_"):
            flat = flat.removeprefix(prefix)
    return flat
