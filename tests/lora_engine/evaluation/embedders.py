"""Writes embedders of the published types with random weights and few channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.untrained import spelling_tokenizer

_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    config = CLIPConfig(
        text_config={**_LAYERS, **_text_ids()}, vision_config={**_LAYERS, "image_size": 16, "patch_size": 8}
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return CLIPModel(config), processor


def _siglip() -> tuple[Any, Any]:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    config = SiglipConfig(
        text_config={**_LAYERS, **_text_ids(), "projection_size": 16},
        vision_config={**_LAYERS, "image_size": 24, "patch_size": 8},
    )
    return SiglipModel(config), SiglipImageProcessorPil(size={"height": 24, "width": 24})


def _siglip2() -> tuple[Any, Any]:
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model

    config = Siglip2Config(
        text_config={**_LAYERS, **_text_ids(), "projection_size": 16},
        vision_config={**_LAYERS, "patch_size": 8, "num_patches": 16},
    )
    return Siglip2Model(config), Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)


def _dinov2() -> tuple[Any, Any]:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=mean, image_std=std
    )
    return Dinov2Model(config), processor


def _text_ids() -> dict[str, int]:
    last = len(spelling_tokenizer(16)) - 1
    return {
        "vocab_size": last + 1,
        "max_position_embeddings": 16,
        "bos_token_id": last - 1,
        "eos_token_id": last,
        "pad_token_id": last,
    }


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "dinov2": _dinov2,
}


def write_random_embedder(folder: Path, model_type: str, seed: int = 0) -> Path:
    """Writes a model, its image processor, and its tokenizer if it reads texts; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[model_type]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if model_type != "dinov2":
        spelling_tokenizer(16).save_pretrained(folder)
    return folder
