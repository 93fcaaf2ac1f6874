"""Prior preservation on the embedded base: the output for the class does not drift.

Shorter runs do not show it for any seed, so this runs in `make nightly` only.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.files import sha256_bytes
from lora_engine.formats import read_adapter
from lora_engine.inference.generate import generate
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from tools.tiny_base.world import Scene, draw, scenes

COLORS = ("red", "green", "blue", "purple")


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    return load_base("tiny", device="cpu")


def write_scenes(folder: Path, captioned: Iterable[tuple[Scene, str]], heldout: int, class_word: str) -> Path:
    images = []
    for number, (scene, caption) in enumerate(captioned):
        values = torch.from_numpy(draw(scene).copy()).permute(2, 0, 1).float() / 127.5 - 1
        digest = sha256_bytes(f"{scene}".encode())
        name = f"pictures/{digest[:16]}.png"
        write_png(folder / name, values)
        images.append(
            ImageEntry(
                sha256=digest,
                file=name,
                width=values.shape[2],
                height=values.shape[1],
                caption=caption,
                source=f"{number}.png",
                split="heldout" if number < heldout else "train",
            )
        )
    Manifest(pictures=tuple(images), trigger="sks", class_word=class_word).save(folder)
    return folder


def draw_with(base: BaseModel, out: Path, prompts: list[str]) -> torch.Tensor:
    adapter, _ = read_adapter(out / "adapter.safetensors")
    with attach(base, adapter):
        return generate(base, prompts, seeds=range(len(prompts)), steps=8)


@pytest.fixture(scope="module")
def misnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crescents captioned as stars, which changes every star unless the class is preserved."""
    captioned = [(scene, "a sks star") for scene in scenes(1, 8, "concept")]
    return write_scenes(tmp_path_factory.mktemp("misnamed") / "dataset", captioned, 0, "star")


PROMPTS = [f"a {color} star on a {ground} background" for color in COLORS for ground in ("white", "black")]


def train_with_and_without(misnamed: Path, folder: Path, steps: int, prior: dict[str, Any]) -> dict[str, Path]:
    plain: dict[str, Any] = {"steps": steps, "batch": 4, "learning_rate": 2e-3, "seed": 1, "targets": "all"}
    changes = {"without": {"method": "finetune"}, "with": {"method": "dreambooth", "prior": prior}}
    for name, change in changes.items():
        settings = TrainSettings.model_validate({**plain, **change})
        train(settings, "tiny", misnamed, folder / name, folder / "work")
    return {name: folder / name for name in changes}


@pytest.mark.nightly
def test_prior_preservation_preserves_the_class(tiny: BaseModel, misnamed: Path, tmp_path: Path) -> None:
    expected = generate(tiny, PROMPTS, seeds=range(len(PROMPTS)), steps=8)
    drift = {
        name: (draw_with(tiny, out, PROMPTS) - expected).square().mean().sqrt().item()
        for name, out in train_with_and_without(misnamed, tmp_path, 50, {"count": 12, "steps": 8}).items()
    }
    assert drift["with"] < 0.9 * drift["without"]
