from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def make_image(width: int = 40, height: int = 32, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def add_image(images: Path) -> Callable[..., Path]:
    def add(
        name: str, *, width: int = 40, height: int = 32, seed: int | None = None, caption: str | None = None
    ) -> Path:
        path = images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_seed = seed if seed is not None else len(list(images.rglob("*")))
        make_image(width, height, noise_seed).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return add
