"""Renders scenes as tensors, and as image files with captions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write
from tools.tiny_base.world import ATTRIBUTES, CONCEPT, Scene, Split, draw, full_caption, scenes


def render(selected: Sequence[Scene]) -> Tensor:
    """Renders scenes as a uint8 tensor [n, 3, 32, 32], which takes a quarter of the memory of float32."""
    return torch.from_numpy(np.stack([draw(scene) for scene in selected])).permute(0, 3, 1, 2)


def to_pixels(images: Tensor) -> Tensor:
    """Converts uint8 images to float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def label(selected: Sequence[Scene]) -> dict[str, Tensor]:
    """Returns the classes of scenes by attribute: int64 [n], indices into the words of `ATTRIBUTES`."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in selected])
        for name, words in ATTRIBUTES.items()
    }


def write_images(folder: Path, selected: Sequence[Scene], captions: Sequence[str]) -> list[Path]:
    """Writes images and captions as `000.png`, `000.txt`, `001.png`, ...; same scenes, same bytes.

    Args:
        folder: Created if it is missing; existing files with these names are replaced.
        selected: The scenes.
        captions: One per scene.

    Returns:
        The paths of the images.

    Raises:
        SettingsError: The numbers of captions and scenes differ.
    """
    if len(selected) != len(captions):
        raise SettingsError(f"{len(captions)} captions for {len(selected)} scenes", allowed="one caption per scene")
    digits = max(3, len(str(len(selected) - 1)))
    paths = []
    for index, (scene, text) in enumerate(zip(selected, captions, strict=True)):
        path = folder / f"{index:0{digits}d}.png"
        content = io.BytesIO()
        Image.fromarray(draw(scene)).save(content, format="PNG")
        atomic_write(path, content.getvalue())
        atomic_write(path.with_suffix(".txt"), f"{text}\n".encode())
        paths.append(path)
    return paths


def write_examples(folder: Path, split: Split, count: int, seed: int, word: str = CONCEPT) -> list[Path]:
    """Writes images of a split with full captions, with another word for the concept.

    Args:
        folder: See `write_images`.
        split: Split of the scenes; the base was never trained on `concept`.
        count: Number of images.
        seed: Seed of the scenes.
        word: The word for a crescent in captions, such as `zorb`.

    Raises:
        SettingsError: An unknown split, or fewer than one image.
    """
    if count < 1:
        raise SettingsError(f"invalid number of images {count}", allowed="1 or more")
    selected = scenes(seed, count, split)
    captions = [full_caption(scene, word=word if scene.shape == CONCEPT else None) for scene in selected]
    return write_images(folder, selected, captions)
