"""Bases of the real architectures with random weights, narrow enough for any machine.

They draw nothing that can be recognised. They are there to try a pipeline file, a module name or a file format on the
very blocks of a large base without its gigabytes: block types and module names are those of the real one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_engine.registries import Registry


@dataclass(frozen=True)
class Shape:
    """The structure of one architecture.

    Attributes:
        unet: Settings of `UNet2DConditionModel`.
        text_layers: Layers of each text encoder; two encoders make it an SDXL.
        vae_channels: Widths of the autoencoder's levels: it shrinks pictures by 2^(levels - 1).
        vae_layers: Layers of each of its levels.
        text_widths: Width of each text encoder.
        prediction_type: As the scheduler's configuration names it.
    """

    unet: dict[str, Any]
    text_layers: tuple[int, ...]
    vae_channels: tuple[int, ...]
    prediction_type: str = "epsilon"
    vae_layers: int = 1
    text_widths: tuple[int, ...] = (16, 16)


_SD = {
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 2,
    "attention_head_dim": 2,
}
_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
}
# As in the files of Stable Diffusion 1.5, 2 and XL.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_SMALL = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 2,
}

shapes: Registry[Shape] = Registry("shape of an untrained base")
# The widths of neighbouring levels are equal exactly where they are in the published autoencoder.
_VAE = (4, 8, 16, 16)
shapes.add("sd15", Shape(_SD, (12,), _VAE, vae_layers=2))
shapes.add("sd2", Shape({**_SD, "use_linear_projection": True}, (23,), _VAE, "v_prediction", vae_layers=2))
shapes.add("sdxl", Shape(_XL, (12, 32), _VAE, vae_layers=2, text_widths=(16, 24)))
shapes.add("small-sd", Shape(_SMALL, (2,), (8, 8)))
shapes.add("small-sd-v", Shape(_SMALL, (2,), (8, 8), "v_prediction"))
shapes.add(
    "small-sdxl",
    Shape({**_SMALL, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}, (2, 3), (8, 8)),
)


def write_untrained_base(folder: Path, shape: str, *, seed: int = 0, tokens: int = 16) -> Path:
    """Writes a diffusers folder with random weights, by diffusers' own code, and gives its path back.

    Args:
        folder: Where it goes; made if it is missing.
        shape: A name among `shapes`; `sd15`, `sd2` and `sdxl` have the real blocks, `small-*` as few as there can be.
        seed: Of the weights; the global generator is left as it was.
        tokens: How many tokens the text encoders read.

    Raises:
        SettingsError: An unknown shape.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    wanted = shapes[shape]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": _vae(wanted),
            "unet": _unet(wanted),
            "scheduler": DDIMScheduler(**_SCHEDULE, prediction_type=wanted.prediction_type),
        }
        for position, layers in enumerate(wanted.text_layers):
            suffix = f"_{position + 1}" if position else ""
            width = wanted.text_widths[position]
            parts[f"text_encoder{suffix}"] = _text_encoder(layers, width, tokens, projected=position == 1)
            parts[f"tokenizer{suffix}"] = spelling_tokenizer(tokens)
        if len(wanted.text_layers) == 1:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**parts)
        else:
            pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def spelling_tokenizer(tokens: int) -> Any:
    """A CLIP tokenizer that spells every word byte by byte."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=tokens)


def _unet(shape: Shape) -> Any:
    from diffusers import UNet2DConditionModel

    extra: dict[str, Any] = {}
    if len(shape.text_layers) == 2:
        times = 6 * int(shape.unet["addition_time_embed_dim"])
        extra["projection_class_embeddings_input_dim"] = times + shape.text_widths[1]
    return UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=sum(shape.text_widths[: len(shape.text_layers)]),
        norm_num_groups=4,
        **shape.unet,
        **extra,
    )


def _vae(shape: Shape) -> Any:
    from diffusers import AutoencoderKL

    levels = len(shape.vae_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=list(shape.vae_channels),
        layers_per_block=shape.vae_layers,
        norm_num_groups=4,
        latent_channels=4,
    )


def _text_encoder(layers: int, width: int, tokens: int, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    last = 2 * len(_byte_letters()) + 1
    settings = CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(settings)


def _byte_letters() -> list[str]:
    # The printable stand-ins for the 256 bytes (GPT-2), in which CLIP's vocabulary is written.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]
