"""Describes Stable Diffusion 2.x (Stability AI): OpenCLIP ViT-H/14.

`sd2` has 768 pixels and predicts the velocity (2.0-v, 2.1); `sd2-base` has 512 and predicts the noise.
"""

from __future__ import annotations

from lora_engine.bases.published.architecture import Architecture, ComponentConfig
from lora_engine.bases.published.sd15 import AUTOENCODER, SCHEDULE, TOKENIZER, UNET

# OpenCLIP's ViT-H/14 has 24 text layers; the model was trained on the output of the second to last.
CLIP_H = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 512,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_UNET = {
    **UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
CLIP_H_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def _architecture(name: str, pixels: int, prediction: str) -> Architecture:
    unet = {**_UNET, "sample_size": pixels // 8}
    if prediction == "v_prediction":
        # Attention overflows in half precision (the note on the model card of 2.1).
        unet["upcast_attention"] = True
    schedule = {**SCHEDULE, "prediction_type": prediction}
    return Architecture(
        name=name,
        family="sd",
        pipeline="StableDiffusionPipeline",
        components={
            "unet": ComponentConfig("diffusers", "UNet2DConditionModel", unet),
            "vae": ComponentConfig("diffusers", "AutoencoderKL", {**AUTOENCODER, "sample_size": pixels}),
            "text_encoder": ComponentConfig("transformers", "CLIPTextModel", CLIP_H),
            "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", {**TOKENIZER, "pad_token": "!"}),
            "scheduler": ComponentConfig("diffusers", "DDIMScheduler", schedule),
        },
        adaptable=("unet", "text_encoder"),
        settings={"requires_safety_checker": False},
        tokenizers={"tokenizer": CLIP_H_REPOSITORY},
    )


SD2 = _architecture("sd2", 768, "v_prediction")
SD2_BASE = _architecture("sd2-base", 512, "epsilon")
