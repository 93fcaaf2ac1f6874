"""Writes models for masks and enlargement with random weights: the published classes, with few channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.untrained_parts import spelling_tokenizer

SIDE = 32
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def write_clipseg(folder: Path, seed: int = 0) -> Path:
    """Writes a `CLIPSegForImageSegmentation` with tokenizer and image processor."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, ViTImageProcessorPil

    tokenizer = spelling_tokenizer(64)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**_VISION, **ends, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 64}
    vision = {**_VISION, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 8}
    config = CLIPSegConfig(
        text_config={**text, "pad_token_id": tokenizer.eos_token_id},
        vision_config=vision,
        projection_dim=32,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return _save(CLIPSegForImageSegmentation, config, folder, seed)


def write_segformer(folder: Path, labels: tuple[str, ...] = ("Background", "Hair", "Face"), seed: int = 0) -> Path:
    """Writes a `SegformerForSemanticSegmentation` with image processor."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return _save(SegformerForSemanticSegmentation, config, folder, seed)


def write_swin2sr(folder: Path, factor: int = 2, seed: int = 0) -> Path:
    """Writes a `Swin2SRForImageSuperResolution`."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    config = Swin2SRConfig(
        image_size=16,
        patch_size=1,
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=4,
        mlp_ratio=2.0,
        upscale=factor,
        upsampler="pixelshuffle",
    )
    return _save(Swin2SRForImageSuperResolution, config, folder, seed)


def _save(cls: Any, config: Any, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls(config).save_pretrained(folder)
    return folder
