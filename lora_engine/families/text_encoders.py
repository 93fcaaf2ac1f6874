"""Tables of the text encoders that several families share."""

from __future__ import annotations

from lora_engine.families.family import TextEncoder
from lora_engine.families.names import Blocks, NameTable, same_names

_CLIP = NameTable(
    (
        Blocks(
            "text_model.encoder.layers",
            "text_model.encoder.layers",
            same_names(
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
                "mlp.fc1",
                "mlp.fc2",
                "layer_norm1",
                "layer_norm2",
            ),
        ),
    ),
    outside={
        name: name
        for name in (
            "text_model.embeddings.token_embedding",
            "text_model.embeddings.position_embedding",
            "text_model.final_layer_norm",
            "text_projection",
        )
    },
)
_T5 = NameTable(
    (
        Blocks(
            "encoder.block",
            "encoder.block",
            same_names(
                "layer.0.SelfAttention.q",
                "layer.0.SelfAttention.k",
                "layer.0.SelfAttention.v",
                "layer.0.SelfAttention.o",
                "layer.0.SelfAttention.relative_attention_bias",
                "layer.0.layer_norm",
                "layer.1.DenseReluDense.wi_0",
                "layer.1.DenseReluDense.wi_1",
                "layer.1.DenseReluDense.wo",
                "layer.1.layer_norm",
            ),
        ),
    ),
    outside={name: name for name in ("shared", "encoder.embed_tokens", "encoder.final_layer_norm")},
)
CLIP_L = TextEncoder("clip_l", _CLIP, "lora_te1_")
"""OpenAI's CLIP ViT-L/14."""
CLIP_G = TextEncoder("clip_g", _CLIP, "lora_te2_")
"""OpenCLIP's ViT-bigG/14."""
T5_XXL = TextEncoder("t5xxl", _T5, "lora_te3_", aliases=("t5",))
"""T5 v1.1 XXL. kohya's number is 3 in every family."""
T5_TEXT = r"SelfAttention\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)"
"""Pattern of T5's layers, for target presets."""
