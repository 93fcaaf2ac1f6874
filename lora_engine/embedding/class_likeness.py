"""Compares class images with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lora_engine.data.class_images import Likeness
from lora_engine.data.pixels import read_pixels
from lora_engine.embedding.embedder import Embedder

_NEUTRAL = "a picture"


def measure_likeness(embedder: Embedder, files: Sequence[Path], prompts: Sequence[str]) -> Likeness:
    """Returns how alike images and prompts are.

    Args:
        embedder: An embedder of images and texts.
        files: The images.
        prompts: The prompt of each image.
    """
    # Images have different sizes, and the embedder takes a batch of one size.
    images = torch.cat([embedder.embed_images(read_pixels(file)[None]) for file in files])
    texts = dict(zip(prompts, embedder.embed_texts(list(prompts)), strict=True))
    own = [float(image @ texts[prompt]) for image, prompt in zip(images, prompts, strict=True)]
    neutral = images @ embedder.embed_texts([_NEUTRAL])[0]
    return Likeness(prompts[0], own, neutral.tolist())
