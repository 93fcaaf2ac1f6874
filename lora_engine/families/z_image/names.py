"""Z-Image (Alibaba): literal tables of original and diffusers' module names, and of its text encoder's."""

from __future__ import annotations

from lora_engine.families.family import TextEncoder
from lora_engine.families.names import Blocks, NameTable, same_names

_PLAIN = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
    **same_names(
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        *("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
    ),
}
_MODULATED = {**_PLAIN, **same_names("adaLN_modulation.0")}
_SHAPES = {
    **dict.fromkeys(("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"), "w w"),
    "feed_forward.w1": "f w",
    "feed_forward.w2": "w f",
    "feed_forward.w3": "f w",
    "adaLN_modulation.0": "4w 256",
}
Z_IMAGE_NAMES = NameTable(
    (
        Blocks("layers", "layers", _MODULATED, _SHAPES),
        Blocks("noise_refiner", "noise_refiner", _MODULATED, _SHAPES),
        Blocks("context_refiner", "context_refiner", _PLAIN, _SHAPES),
    ),
    {
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        "t_embedder.mlp.0": "t_embedder.mlp.0",
        "t_embedder.mlp.2": "t_embedder.mlp.2",
        "cap_embedder.0": "cap_embedder.0",
        "cap_embedder.1": "cap_embedder.1",
    },
    {
        "all_x_embedder.2-1": "w 64",
        "all_final_layer.2-1.linear": "64 w",
        "all_final_layer.2-1.adaLN_modulation.1": "w 256",
        "t_embedder.mlp.0": "1024 256",
        "t_embedder.mlp.2": "256 1024",
        "cap_embedder.1": "w 2560",
    },
    {name: name for name in ("x_pad_token", "cap_pad_token")},
)
QWEN3 = TextEncoder(
    role="qwen3_4b",
    names=NameTable(
        (
            Blocks(
                "layers",
                "layers",
                same_names(
                    *(f"self_attn.{part}_proj" for part in "qkvo"),
                    *("self_attn.q_norm", "self_attn.k_norm"),
                    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
                    *("input_layernorm", "post_attention_layernorm"),
                ),
            ),
        ),
        {"embed_tokens": "embed_tokens", "norm": "norm"},
    ),
    kohya="lora_te_",
    level="model.",
)
"""Qwen3-4B."""
