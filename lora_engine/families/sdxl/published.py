"""Describes Stable Diffusion XL base 1.0 (Stability AI): 1024 pixels, CLIP ViT-L/14 and OpenCLIP ViT-bigG/14."""

from __future__ import annotations

from lora_engine.families.family import Architecture, ComponentConfig, ComponentLocation
from lora_engine.families.sd.published import (
    AUTOENCODER,
    CLIP_L_CONFIG,
    CLIP_L_REPOSITORY,
    SCHEDULE,
    TOKENIZER,
    UNET_LOCATION,
    VAE_LOCATION,
)

CLIP_G_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
CLIP_G_REPOSITORY = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
}

SDXL_BASE = Architecture(
    name="sdxl",
    family="sdxl",
    pipeline="StableDiffusionXLPipeline",
    components={
        "unet": ComponentConfig("diffusers", "UNet2DConditionModel", _UNET),
        "vae": ComponentConfig(
            "diffusers", "AutoencoderKL", {**AUTOENCODER, "sample_size": 1024, "scaling_factor": 0.13025}
        ),
        "text_encoder": ComponentConfig("transformers", "CLIPTextModel", CLIP_L_CONFIG),
        "text_encoder_2": ComponentConfig("transformers", "CLIPTextModelWithProjection", CLIP_G_CONFIG),
        "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", TOKENIZER),
        "tokenizer_2": ComponentConfig("transformers", "CLIPTokenizer", {**TOKENIZER, "pad_token": "!"}),
        "scheduler": ComponentConfig(
            "diffusers",
            "EulerDiscreteScheduler",
            {
                # Settings of other schedulers, which the published file contains too.
                **SCHEDULE,
                "skip_prk_steps": True,
                "prediction_type": "epsilon",
                "interpolation_type": "linear",
                "timestep_spacing": "leading",
                "use_karras_sigmas": False,
            },
        ),
    },
    adaptable=("unet", "text_encoder", "text_encoder_2"),
    settings={"force_zeros_for_empty_prompt": True},
    tokenizers={"tokenizer": CLIP_L_REPOSITORY, "tokenizer_2": CLIP_G_REPOSITORY},
    file={
        "unet": UNET_LOCATION,
        "vae": VAE_LOCATION,
        "text_encoder": ComponentLocation("conditioner.embedders.0.transformer.", "clip"),
        "text_encoder_2": ComponentLocation("conditioner.embedders.1.model.", "open_clip"),
    },
    modelspec=("stable-diffusion-xl-v1-base", "1024x1024"),
)
