"""Names that tell what a file is when no codec here can read it, so that the refusal gives the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

FOREIGN: Mapping[str, str] = {
    r"lora_unet_(double|single)_blocks_\d+_.*": "a FLUX adapter in kohya's names",
    r"lora_unet_joint_blocks_\d+_.*": "an SD3 adapter in kohya's names",
    r"lora_unet_blocks_\d+_.*": "an adapter of a diffusion transformer (such as Anima or Krea 2) in kohya's names",
    r"lora_transformer_.*": "an adapter of a diffusion transformer (such as FLUX or SD3) in OneTrainer's names",
    r"(diffusion_model\.)?(double|single)_blocks\..*": "a FLUX adapter in Black Forest Labs' names",
    r"diffusion_model\.(blocks|layers)\..*": "an adapter of a diffusion transformer in ComfyUI's names",
    r"diffusion_model\..*": "an adapter in ComfyUI's names",
    r"transformer\..*": "an adapter of a diffusion transformer (such as FLUX or SD3) in diffusers' names",
    r"(base_model\.model\.)?(single_)?transformer_blocks\..*": "an adapter of a transformer (such as Qwen-Image)",
    r"(unet|text_encoder):\d+:(up|down)": "an adapter in cloneofsimo's form",
    r"lycoris_.*": "an adapter in the names of LyCORIS' wrapper",
    r".*\.processor\..*_lora\..*": "an adapter in the attention processors of old diffusers",
    r"(emb_params|string_to_param.*|clip_[lg])": "a textual-inversion embedding",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a full checkpoint, not an adapter",
}
"""Pattern of tensor names to what a file is that holds one."""


def foreign_reason(keys: Iterable[str]) -> str | None:
    """What a file with such keys is, where it is known but not read."""
    for key in sorted(keys):
        for pattern, what in FOREIGN.items():
            if re.fullmatch(pattern, key):
                return what
    return None
