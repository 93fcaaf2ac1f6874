"""Describes Stable Diffusion 1.x (CompVis, Runway): 512 pixels, CLIP ViT-L/14, predicts the noise."""

from __future__ import annotations

from lora_engine.bases.published.architecture import Architecture, ComponentConfig

# The text encoder of OpenAI's CLIP ViT-L/14. Tokens 0, 1 and 2 are those of the published files; for transformers, an
# end token of 2 means "the highest token of the row", as in CLIP's own code.
CLIP_L = {
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
CLIP_L_REPOSITORY = "openai/clip-vit-large-patch14"

SD15 = Architecture(
    name="sd15",
    family="sd",
    pipeline="StableDiffusionPipeline",
    components={
        "unet": ComponentConfig("diffusers", "UNet2DConditionModel", UNET),
        "vae": ComponentConfig("diffusers", "AutoencoderKL", AUTOENCODER),
        "text_encoder": ComponentConfig("transformers", "CLIPTextModel", CLIP_L),
        "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", TOKENIZER),
        "scheduler": ComponentConfig("diffusers", "PNDMScheduler", {**SCHEDULE, "skip_prk_steps": True}),
    },
    adaptable=("unet", "text_encoder"),
    settings={"requires_safety_checker": False},
    tokenizers={"tokenizer": CLIP_L_REPOSITORY},
)
