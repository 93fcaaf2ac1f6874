"""Loraline's own format, used in the store: canonical module names, LyCORIS' factor keys, and always alpha."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from lora_engine.catalog import formats as catalog
from lora_engine.formats.codec import TensorCodec
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LORALINE_KEYS

COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer.")


class NativeCodec(TensorCodec):
    """`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight`."""

    format = catalog.LORALINE
    key_layout = LORALINE_KEYS
    embeddings: ClassVar[str] = "bundle"

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names begin with a component, some have LyCORIS' suffixes, and none only diffusers'."""
        if not all(key.startswith(COMPONENTS) for key in keys) or not LORALINE_KEYS.matches(keys):
            return False
        return not DIFFUSERS_KEYS.matches([key for key, _, suffix in LORALINE_KEYS.split(keys) if suffix is None])
