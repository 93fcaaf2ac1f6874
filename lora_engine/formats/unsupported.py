"""Names that tell what a file is when no codec here can read it, so that the refusal gives the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora_engine.formats.transformers.unsupported import is_qwen_attention, unsupported, unsupported_family

FOREIGN: Mapping[str, str] = {
    r"(unet|text_encoder):\d+:(up|down)": "an adapter in cloneofsimo's form",
    r"lycoris_.*": "an adapter in the names of LyCORIS' wrapper",
    r".*\.processor\..*_lora\..*": "an adapter in the attention processors of old diffusers",
    r"(emb_params|string_to_param.*|clip_[lg])": "a textual-inversion embedding",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a full checkpoint, not an adapter",
}
"""Pattern of tensor names to what a file is that holds one."""


def unsupported_reason(keys: Iterable[str]) -> str | None:
    """What a file with such keys is, where it is known but not read."""
    keys = list(keys)
    family = unsupported_family(keys) or ("qwen_image" if is_qwen_attention(keys, None) else None)
    if family:
        return f"an adapter for {unsupported[family].title} ({family}), a base family that is not supported"
    for key in sorted(keys):
        for pattern, what in FOREIGN.items():
            if re.fullmatch(pattern, key):
                return what
    return None
