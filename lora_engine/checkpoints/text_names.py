"""Literal tables from transformers' tensor names of text encoders to the original names.

CLIP is stored under transformers' names. OpenCLIP (Stable Diffusion 2, the second encoder of SDXL) has other names, and
stores the three projections of an attention in one tensor.
"""

from __future__ import annotations

import re

from lora_engine.families import Family

LEVEL = "text_model."
_BELOW_LEVEL = ("embeddings.", "encoder.layers.", "final_layer_norm.")
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# In this order, each is a third of the rows of `attn.in_proj_weight` and `attn.in_proj_bias`.
OPEN_CLIP_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# A linear layer computes x W^T, OpenCLIP x P.
TRANSPOSED = "text_projection.weight"
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# ComfyUI's names of the text encoders in a file with all components; the names inside are those of transformers.
_TEXT = re.compile(r"text_encoders\.([^.]+)\.transformer\.(.+)")


def canonical_text_name(name: str) -> str:
    """Returns a tensor name with the level `text_model`, which `CLIPTextModel` of transformers 5 lacks."""
    return f"{LEVEL}{name}" if name.startswith(_BELOW_LEVEL) else name


def text_tensor_name(family: Family, key: str) -> str | None:
    """Returns the canonical name of a text encoder's tensor in a file with all components; None for other tensors."""
    match = _TEXT.fullmatch(key)
    for component, encoder in family.text.items():
        if match and match[1] in (encoder.role, *encoder.aliases):
            return f"{component}.{canonical_text_name(match[2].removeprefix(encoder.level))}"
    return None


def open_clip_name(name: str) -> tuple[str, tuple[int, int]] | None:
    """Returns OpenCLIP's name of a tensor and its part of the rows as (index, count); None if unknown.

    Args:
        name: transformers' name, with the level `text_model`.
    """
    if name in OPEN_CLIP:
        return OPEN_CLIP[name], (0, 1)
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    block = f"transformer.resblocks.{layer}"
    if module in OPEN_CLIP_FUSED:
        return f"{block}.attn.in_proj_{kind}", (OPEN_CLIP_FUSED.index(module), len(OPEN_CLIP_FUSED))
    inner = OPEN_CLIP_LAYER.get(module)
    return (f"{block}.{inner}.{kind}", (0, 1)) if inner else None
