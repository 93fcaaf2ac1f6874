"""Describes Z-Image and Z-Image-Turbo (Alibaba): 6 billion parameters, Qwen3-4B, FLUX.1's autoencoder.

The two have the same networks; the schedule is Turbo's.
"""

from __future__ import annotations

from lora_engine.families.family import Architecture, ComponentConfig
from lora_engine.families.sd3.published import SD3_AUTOENCODER

_REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
_TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_TEXT_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": True,
}

Z_IMAGE_BASE = Architecture(
    name="z-image",
    family="z_image",
    pipeline="ZImagePipeline",
    components={
        "transformer": ComponentConfig("diffusers", "ZImageTransformer2DModel", _TRANSFORMER),
        "vae": ComponentConfig(
            "diffusers", "AutoencoderKL", {**SD3_AUTOENCODER, "scaling_factor": 0.3611, "shift_factor": 0.1159}
        ),
        "text_encoder": ComponentConfig("transformers", "Qwen3Model", _TEXT_ENCODER),
        "tokenizer": ComponentConfig("transformers", "Qwen2Tokenizer", {}),
        "scheduler": ComponentConfig(
            "diffusers", "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}
        ),
    },
    adaptable=("transformer", "text_encoder"),
    tokenizers={"tokenizer": _REPOSITORY},
)
