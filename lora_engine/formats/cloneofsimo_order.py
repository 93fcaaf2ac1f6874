"""The order in which cloneofsimo's format counts modules: below which classes, and in which order siblings come.

A frozen table: the class tree of the diffusers and transformers of early 2023. Newer versions of them have another
order (the second attention before the feed-forward net), in which the format's own code goes astray.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from lora_engine.adapters import Delta
from lora_engine.errors import AdapterError

# Class to the paths of its modules. A later class has the earlier ones of the same line of descent within it.
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
# What our own files list, from narrow to wide, each with what it makes superfluous.
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
_WITHIN: Mapping[str, Collection[str]] = {
    "FeedForward": ("GEGLU",),
    "Transformer2DModel": ("CrossAttention", "GEGLU", "FeedForward"),
    "UNet2DConditionModel": tuple(_WRITTEN),
}
# The order of siblings in the constructors of those days.
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
_PLACES = {name: place for siblings in _SIBLINGS for place, name in enumerate(siblings)}
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
_TARGETS = ("unet", "text_encoder")
_NO_LAYER = re.compile(r".*(norm|embeddings?)[^.]*(\.\w+_embedding)?$")


def counted(component: str, names: Collection[str], targets: Sequence[str]) -> Iterator[str]:
    """The layers below modules of the classes, in the order in which the format counts them.

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
                pairs.add((tuple(map(_place, parts[:length])), tuple(map(_place, parts)), name))
    yield from (name for _, _, name in sorted(pairs))


def classes_for(component: str, modules: Mapping[str, Delta]) -> list[str]:
    """The narrowest classes below which all of a component's modules are.

    Raises:
        AdapterError: The format knows no such component, or no class with such a module.
    """
    if component not in _TARGETS:
        raise AdapterError(
            f"cloneofsimo's format has no component {component!r}",
            where=next(iter(modules)),
            allowed=", ".join(_TARGETS),
            remedy="choose another format",
        )
    wanted = set()
    for name in modules:
        path = name.partition(".")[2]
        above = [path[: hit.start()] for hit in re.finditer(r"\.|$", path)][:-1]
        able = (known for known in _WRITTEN if any(re.fullmatch(CLASSES[known], part) for part in ["", *above]))
        fit = [known for known in able if known.startswith("CLIP") == (component == "text_encoder")]
        if not fit:
            allowed, remedy = ", ".join(_WRITTEN), "choose another format"
            raise AdapterError("no class of the format has this module", where=name, allowed=allowed, remedy=remedy)
        wanted.add(fit[0])
    wanted -= {inner for outer in wanted for inner in _WITHIN.get(outer, ()) if inner != outer}
    return [spelt for known in _WRITTEN if known in wanted for spelt in _WRITTEN[known]]


def _place(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (_PLACES.get(part, 0), part)
