"""ComfyUI's format: kohya's, for Stable Diffusion and SDXL, as ComfyUI reads none of PEFT's names of attention layers.

A file of this format is detected as kohya's, which it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from lora_engine.formats.codec import codecs
from lora_engine.formats.kohya import KohyaCodec


class ComfyuiCodec(KohyaCodec):
    """`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`."""

    name: ClassVar[str] = "comfyui"

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Never: see above."""
        return False


codecs.add(ComfyuiCodec.name, ComfyuiCodec())
