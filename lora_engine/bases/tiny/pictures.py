"""Scenes as tensors and as files: batches for training and folders of captioned pictures. What a scene is, is in `world`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.bases.tiny import world


def stack_drawings(scenes: Sequence[world.Scene]) -> Tensor:
    """The pictures of the scenes, uint8 [n, 3, 32, 32]."""
    return torch.from_numpy(np.stack([world.draw(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def to_pixels(drawings: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return drawings.float().div(127.5).sub(1)


def label(scenes: Sequence[world.Scene]) -> dict[str, Tensor]:
    """Attribute -> class of each scene, int64 [n], in the order of `world.ATTRIBUTES`."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in scenes])
        for name, words in world.ATTRIBUTES.items()
    }


def write_pictures(folder: Path, scenes: Sequence[world.Scene], *, word: str | None = None) -> list[Path]:
    """Writes each scene as `NN.png` with its full caption in `NN.txt` beside it.

    Args:
        folder: Made if it is missing.
        scenes: What to draw.
        word: What captions call the object instead of its shape, such as `zorb` for a crescent.

    Returns:
        The paths of the pictures, in the order of the scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(scenes))))
    paths = []
    for number, scene in enumerate(scenes, start=1):
        path = folder / f"{number:0{digits}}.png"
        Image.fromarray(world.draw(scene)).save(path)
        path.with_suffix(".txt").write_text(world.full_caption(scene, word=word) + "\n", encoding="utf-8")
        paths.append(path)
    return paths
