"""Defines the order in which cloneofsimo's format numbers modules: by parent class, then by sibling.

The tables are frozen: the class tree of diffusers and transformers in early 2023. Newer versions have another order
(the second attention before the feed-forward net), which the format's own code reads wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError

# Class to the paths of its modules. Later classes contain the earlier ones of their branch.
CLASSES: Mapping[str, str] = {
    "CrossAttention": r".*\.attn[12]",
    "Attention": r".*\.attn[12]",
    "GEGLU": r".*\.ff\.net\.0",
    "FeedForward": r".*\.ff",
    "BasicTransformerBlock": r".*\.transformer_blocks\.\d+",
    "Transformer2DModel": r".*\.attentions\.\d+",
    "ResnetBlock2D": r".*\.resnets\.\d+",
    "Downsample2D": r".*\.downsamplers\.\d+",
    "Upsample2D": r".*\.upsamplers\.\d+",
    "TimestepEmbedding": r"time_embedding",
    "UNet2DConditionModel": r"",
    "CLIPAttention": r".*\.self_attn",
    "CLIPMLP": r".*\.mlp",
    "CLIPEncoderLayer": r".*\.layers\.\d+",
    "CLIPTextTransformer": r"text_model",
}
# Classes that our own files list, from narrow to wide.
_WRITTEN: Mapping[str, Sequence[str]] = {
    "CrossAttention": ("CrossAttention", "Attention"),
    "GEGLU": ("GEGLU",),
    "FeedForward": ("FeedForward",),
    "Transformer2DModel": ("Transformer2DModel",),
    "ResnetBlock2D": ("ResnetBlock2D",),
    "Downsample2D": ("Downsample2D",),
    "Upsample2D": ("Upsample2D",),
    "TimestepEmbedding": ("TimestepEmbedding",),
    "UNet2DConditionModel": ("UNet2DConditionModel",),
    "CLIPAttention": ("CLIPAttention",),
    "CLIPMLP": ("CLIPMLP",),
}
# Class to the classes that it makes redundant.
_WITHIN: Mapping[str, Collection[str]] = {
    "FeedForward": ("GEGLU",),
    "Transformer2DModel": ("CrossAttention", "GEGLU", "FeedForward"),
    "UNet2DConditionModel": tuple(_WRITTEN),
}
# The order of siblings in the constructors of those versions.
_SIBLINGS = (
    ("conv_in", "time_embedding", "add_embedding", "down_blocks", "up_blocks", "mid_block", "conv_out"),
    ("attentions", "resnets", "downsamplers", "upsamplers"),
    ("proj_in", "transformer_blocks", "proj_out"),
    ("attn1", "ff", "attn2"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    ("self_attn", "mlp"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
)
_ORDER = {name: index for siblings in _SIBLINGS for index, name in enumerate(siblings)}
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
_TARGETS = ("unet", "text_encoder")
_NO_LAYER = re.compile(r".*(norm|embeddings?)[^.]*(\.\w+_embedding)?$")


def ordered_layers(component: str, names: Collection[str], targets: Sequence[str]) -> Iterator[str]:
    """Yields the layers below modules of the classes, in the order in which the format numbers them.

    Args:
        component: `unet` or `text_encoder`.
        names: Canonical names of the base's modules.
        targets: Names of classes.
    """
    pairs = set()
    for name in names:
        part, _, path = name.partition(".")
        if part != component or _NO_LAYER.fullmatch(path):
            continue
        parts = path.split(".")
        for length in range(len(parts)):
            above = ".".join(parts[:length])
            if any(re.fullmatch(CLASSES[target], above) for target in targets):
                pairs.add((tuple(map(_sort_key, parts[:length])), tuple(map(_sort_key, parts)), name))
    yield from (name for _, _, name in sorted(pairs))


def classes_for(component: str, modules: Mapping[str, Delta]) -> list[str]:
    """Returns the narrowest classes that contain all of a component's modules.

    Raises:
        AdapterError: The format has no such component, or no class with such a module.
    """
    if component not in _TARGETS:
        raise AdapterError(
            f"cloneofsimo's format has no component {component!r}",
            where=next(iter(modules)),
            allowed=", ".join(_TARGETS),
            remedy="choose another format",
        )
    needed = set()
    for name in modules:
        path = name.partition(".")[2]
        parents = [path[: dot.start()] for dot in re.finditer(r"\.|$", path)][:-1]
        matches = (name for name in _WRITTEN if any(re.fullmatch(CLASSES[name], part) for part in ["", *parents]))
        candidates = [name for name in matches if name.startswith("CLIP") == (component == "text_encoder")]
        if not candidates:
            allowed, remedy = ", ".join(_WRITTEN), "choose another format"
            raise AdapterError("no class of the format has this module", where=name, allowed=allowed, remedy=remedy)
        needed.add(candidates[0])
    needed -= {inner for outer in needed for inner in _WITHIN.get(outer, ()) if inner != outer}
    return [written for name in _WRITTEN if name in needed for written in _WRITTEN[name]]


def _sort_key(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (_ORDER.get(part, 0), part)
