from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.untrained import write_untrained_base
from lora_engine.data.manifest import Manifest, Picture
from lora_engine.data.pixels import write_png
from lora_engine.training.spec import TrainSettings

# Shapes this small only lose by being spread over cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in ("small-sd", "small-sd-v", "small-sdxl")}


def write_dataset(folder: Path, sizes: list[int], heldout: int = 0, **about: Any) -> Path:
    pictures = []
    for number, size in enumerate([*sizes, *[sizes[0]] * heldout]):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        tiles = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)) * 2 - 1
        name = f"pictures/{digest[:16]}.png"
        write_png(folder / name, tiles.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2))
        split = "train" if number < len(sizes) else "heldout"
        caption = about.get("caption", f"a sks star {number % 2}")
        pictures.append(
            Picture(
                sha256=digest, file=name, width=size, height=size, caption=caption, source=f"{number}.png", split=split
            )
        )
    Manifest(pictures=tuple(pictures), trigger="sks", class_word=about.get("class_word", "star")).save(folder)
    return folder


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    def make(sizes: list[int] | None = None, heldout: int = 0, **about: Any) -> Path:
        return write_dataset(tmp_path / "dataset", sizes or [16] * 5, heldout, **about)

    return make


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(heldout=1)


@pytest.fixture
def settings() -> Callable[..., TrainSettings]:
    def make(**change: Any) -> TrainSettings:
        plain: dict[str, Any] = {"method": "finetune", "rank": 2, "steps": 4, "batch": 2, "seed": 7}
        if change.get("method") == "dreambooth":
            plain["prior"] = {"count": 3, "steps": 2}
        return TrainSettings.model_validate({**plain, **change})

    return make
