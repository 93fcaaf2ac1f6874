"""Describes Stable Diffusion 1.x (CompVis, Runway) and 2.x (Stability AI).

1.x has 512 pixels and CLIP ViT-L/14, and predicts the noise. 2.x has OpenCLIP ViT-H/14: `sd2` has 768 pixels and
predicts the velocity (2.0-v, 2.1); `sd2-base` has 512 and predicts the noise.
"""

from __future__ import annotations

from lora_engine.families.family import Architecture, ComponentConfig, ComponentLocation

# The text encoder of OpenAI's CLIP ViT-L/14. Tokens 0, 1 and 2 are those of the published files; for transformers, an
# end token of 2 means "the highest token of the row", as in CLIP's own code.
CLIP_L_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# The autoencoder of SD 1.x and 2.x; SDXL's has the same layers and other weights.
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
TOKENIZER = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 77,
    "do_lower_case": True,
}
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-05,
}
UNET_LOCATION = ComponentLocation("model.diffusion_model.", "unet")
VAE_LOCATION = ComponentLocation("first_stage_model.", "vae")
CLIP_L_REPOSITORY = "openai/clip-vit-large-patch14"

SD15 = Architecture(
    name="sd15",
    family="sd",
    pipeline="StableDiffusionPipeline",
    components={
        "unet": ComponentConfig("diffusers", "UNet2DConditionModel", UNET),
        "vae": ComponentConfig("diffusers", "AutoencoderKL", AUTOENCODER),
        "text_encoder": ComponentConfig("transformers", "CLIPTextModel", CLIP_L_CONFIG),
        "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", TOKENIZER),
        "scheduler": ComponentConfig("diffusers", "PNDMScheduler", {**SCHEDULE, "skip_prk_steps": True}),
    },
    adaptable=("unet", "text_encoder"),
    settings={"requires_safety_checker": False},
    tokenizers={"tokenizer": CLIP_L_REPOSITORY},
    file={
        "unet": UNET_LOCATION,
        "vae": VAE_LOCATION,
        "text_encoder": ComponentLocation("cond_stage_model.transformer.", "clip"),
    },
    modelspec=("stable-diffusion-v1", "512x512"),
)
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
_UNET_2 = {
    **UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
CLIP_H_REPOSITORY = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def _second(name: str, pixels: int, prediction: str, modelspec: str) -> Architecture:
    unet = {**_UNET_2, "sample_size": pixels // 8}
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
        file={
            "unet": UNET_LOCATION,
            "vae": VAE_LOCATION,
            "text_encoder": ComponentLocation("cond_stage_model.model.", "open_clip"),
        },
        modelspec=(modelspec, f"{pixels}x{pixels}"),
    )


SD2 = _second("sd2", 768, "v_prediction", "stable-diffusion-v2-768-v")
SD2_BASE = _second("sd2-base", 512, "epsilon", "stable-diffusion-v2-512")
