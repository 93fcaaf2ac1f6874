"""Describes Stable Diffusion 3 medium and 3.5 (Stability AI): CLIP ViT-L/14, OpenCLIP ViT-bigG/14 and T5 v1.1 XXL."""

from __future__ import annotations

from typing import Any

from lora_engine.families.family import Architecture, ComponentConfig
from lora_engine.families.sd.published import CLIP_L_CONFIG, CLIP_L_REPOSITORY, TOKENIZER
from lora_engine.families.sdxl.published import CLIP_G_CONFIG, CLIP_G_REPOSITORY

# The encoder of Google's T5 v1.1 XXL; only its encoder is used.
T5_XXL_CONFIG = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
T5_TOKENIZER = {
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_ids": 100,
    "model_max_length": 512,
}
T5_REPOSITORY = "google/t5-v1_1-xxl"
# The autoencoder of SD 3 and FLUX.1; theirs differ only in scale and shift.
SD3_AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_AUTOENCODER = {**SD3_AUTOENCODER, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
# 3 medium has 24 blocks of 24 heads; 3.5 medium adds a second attention to the first 13; 3.5 large has 38 blocks of 38
# heads. Both versions of 3.5 normalize queries and keys.
_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
_MEDIUM_35 = {
    **_MEDIUM,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
_LARGE_35 = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}


def _architecture(name: str, transformer: dict[str, Any]) -> Architecture:
    return Architecture(
        name=name,
        family="sd3",
        pipeline="StableDiffusion3Pipeline",
        components={
            "transformer": ComponentConfig("diffusers", "SD3Transformer2DModel", {**_TRANSFORMER, **transformer}),
            "vae": ComponentConfig("diffusers", "AutoencoderKL", _AUTOENCODER),
            "text_encoder": ComponentConfig("transformers", "CLIPTextModelWithProjection", CLIP_L_CONFIG),
            "text_encoder_2": ComponentConfig("transformers", "CLIPTextModelWithProjection", CLIP_G_CONFIG),
            "text_encoder_3": ComponentConfig("transformers", "T5EncoderModel", T5_XXL_CONFIG),
            "tokenizer": ComponentConfig("transformers", "CLIPTokenizer", TOKENIZER),
            "tokenizer_2": ComponentConfig("transformers", "CLIPTokenizer", {**TOKENIZER, "pad_token": "!"}),
            "tokenizer_3": ComponentConfig("transformers", "T5TokenizerFast", T5_TOKENIZER),
            "scheduler": ComponentConfig(
                "diffusers", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}
            ),
        },
        adaptable=("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
        tokenizers={
            "tokenizer": CLIP_L_REPOSITORY,
            "tokenizer_2": CLIP_G_REPOSITORY,
            "tokenizer_3": T5_REPOSITORY,
        },
    )


SD3_MEDIUM = _architecture("sd3", _MEDIUM)
SD35_MEDIUM = _architecture("sd35-medium", _MEDIUM_35)
SD35_LARGE = _architecture("sd35-large", _LARGE_35)
