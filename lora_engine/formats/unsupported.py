"""Recognizes known but unsupported files by their tensor names, for the error message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora_engine.formats.transformers.unsupported import is_qwen_attention, unsupported, unsupported_family

KNOWN_UNSUPPORTED: Mapping[str, str] = {
    r"(unet|text_encoder):\d+:(up|down)": "an adapter in cloneofsimo's format",
    r"lycoris_.*": "an adapter with the names of LyCORIS' wrapper",
    r".*\.processor\..*_lora\..*": "an adapter in the attention processors of old diffusers",
    r"(emb_params|string_to_param.*|clip_[lg])": "a textual-inversion embedding",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a full checkpoint, not an adapter",
}
"""Pattern of tensor names to a description of files that hold a match."""


def unsupported_reason(keys: Iterable[str]) -> str | None:
    """Returns a description of a file with these keys if it is known but unsupported, else None."""
    keys = list(keys)
    family = unsupported_family(keys) or ("qwen_image" if is_qwen_attention(keys, None) else None)
    if family:
        return f"an adapter for {unsupported[family].title} ({family}), a base family that is not supported"
    for key in sorted(keys):
        for pattern, description in KNOWN_UNSUPPORTED.items():
            if re.fullmatch(pattern, key):
                return description
    return None
