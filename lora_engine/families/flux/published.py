"""Describes FLUX.1 (Black Forest Labs): 12 billion parameters, CLIP ViT-L/14, T5 v1.1 XXL; dev is distilled."""

from __future__ import annotations

from typing import Any

from lora_engine.families.family import Architecture, ComponentConfig
from lora_engine.families.sd.published import CLIP_L_CONFIG, CLIP_L_REPOSITORY, TOKENIZER
from lora_engine.families.sd3.published import SD3_AUTOENCODER, T5_REPOSITORY, T5_TOKENIZER, T5_XXL_CONFIG

_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
_AUTOENCODER = {**SD3_AUTOENCODER, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
}


def _architecture(name: str, transformer: dict[str, Any], schedule: dict[str, Any]) -> Architecture:
    return Architecture(
        name=name,
        family="flux",
        pipeline="FluxPipeline",
        components={
            "transformer": ComponentConfig("diffusers", "FluxTransformer2DModel", {**_TRANSFORMER, **transformer}),
            "vae": ComponentConfig("diffusers", "AutoencoderKL", _AUTOENCODER),
            "text_encoder": ComponentConfig("transformers", "CLIPTextModel", CLIP_L_CONFIG),
            "text_encoder_2": ComponentConfig("transformers", "T5EncoderModel", T5_XXL_CONFIG),
            "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", TOKENIZER),
            "tokenizer_2": ComponentConfig("transformers", "T5TokenizerFast", T5_TOKENIZER),
            "scheduler": ComponentConfig("diffusers", "FlowMatchEulerDiscreteScheduler", {**_SCHEDULE, **schedule}),
        },
        adaptable=("transformer", "text_encoder", "text_encoder_2"),
        tokenizers={"tokenizer": CLIP_L_REPOSITORY, "tokenizer_2": T5_REPOSITORY},
    )


FLUX_DEV = _architecture("flux", {"guidance_embeds": True}, {"shift": 3.0, "use_dynamic_shifting": True})
FLUX_SCHNELL = _architecture("flux-schnell", {"guidance_embeds": False}, {"shift": 1.0, "use_dynamic_shifting": False})
