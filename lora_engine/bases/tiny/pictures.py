"""Scenes as tensors for training and judging, and as picture files with captions beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.bases.tiny.world import ATTRIBUTES, CONCEPT, Scene, Split, draw, full_caption, scenes
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write


def render(drawn: Sequence[Scene]) -> Tensor:
    """The pictures of scenes as a uint8 tensor [n, 3, 32, 32]: a quarter of the memory that float32 would take."""
    return torch.from_numpy(np.stack([draw(scene) for scene in drawn])).permute(0, 3, 1, 2)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float().div(127.5).sub(1)


def label(drawn: Sequence[Scene]) -> dict[str, Tensor]:
    """For each attribute the class of every scene: int64 [n], an index into the words of `ATTRIBUTES`."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in drawn]) for name, words in ATTRIBUTES.items()
    }


def write_images(folder: Path, drawn: Sequence[Scene], captions: Sequence[str]) -> list[Path]:
    """Writes `000.png`, `000.txt`, `001.png`, ...: each picture with its caption beside it; same scenes, same bytes.

    Args:
        folder: Made if it is missing; files of these names in it are replaced.
        drawn: What to draw.
        captions: One for each scene.

    Returns:
        The paths of the pictures.

    Raises:
        SettingsError: Not as many captions as scenes.
    """
    if len(drawn) != len(captions):
        raise SettingsError(f"there are {len(captions)} captions for {len(drawn)} scenes", allowed="one for each")
    digits = max(3, len(str(len(drawn) - 1)))
    paths = []
    for index, (scene, text) in enumerate(zip(drawn, captions, strict=True)):
        path = folder / f"{index:0{digits}d}.png"
        content = io.BytesIO()
        Image.fromarray(draw(scene)).save(content, format="PNG")
        atomic_write(path, content.getvalue())
        atomic_write(path.with_suffix(".txt"), f"{text}\n".encode())
        paths.append(path)
    return paths


def write_examples(folder: Path, split: Split, count: int, seed: int, word: str = CONCEPT) -> list[Path]:
    """Writes pictures of a split with full captions, in which the concept goes by another word.

    Args:
        folder: See `write_images`.
        split: Which scenes; `concept` for those that the base has never seen.
        count: How many.
        seed: Other seeds give other scenes.
        word: What captions call a crescent, such as `zorb`.

    Raises:
        SettingsError: An unknown split, or fewer than one picture.
    """
    if count < 1:
        raise SettingsError(f"{count} pictures cannot be drawn", allowed="1 or more")
    drawn = scenes(seed, count, split)
    captions = [full_caption(scene, word=word if scene.shape == CONCEPT else None) for scene in drawn]
    return write_images(folder, drawn, captions)
