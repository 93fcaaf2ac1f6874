"""What training is for, on a base that draws: it learns what it is shown, and prior preservation holds the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.tiny.world import Scene, draw, full_caption, scenes
from lora_engine.data.manifest import Manifest, Picture
from lora_engine.data.pixels import write_png
from lora_engine.files import sha256_bytes
from lora_engine.formats import read_adapter
from lora_engine.inference.generate import generate
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "purple")


@pytest.fixture(scope="module")
def tiny() -> BaseModel:
    return load_base("tiny", device="cpu")


def write_scenes(folder: Path, chosen: Iterable[tuple[Scene, str]], heldout: int, class_word: str) -> Path:
    pictures = []
    for number, (scene, caption) in enumerate(chosen):
        values = torch.from_numpy(draw(scene).copy()).permute(2, 0, 1).float() / 127.5 - 1
        digest = sha256_bytes(f"{scene}".encode())
        name = f"pictures/{digest[:16]}.png"
        write_png(folder / name, values)
        pictures.append(
            Picture(
                sha256=digest,
                file=name,
                width=values.shape[2],
                height=values.shape[1],
                caption=caption,
                source=f"{number}.png",
                split="heldout" if number < heldout else "train",
            )
        )
    Manifest(pictures=tuple(pictures), trigger="sks", class_word=class_word).save(folder)
    return folder


def draw_with(base: BaseModel, out: Path, prompts: list[str]) -> torch.Tensor:
    adapter, _ = read_adapter(out / "adapter.safetensors")
    with attach(base, adapter):
        return generate(base, prompts, seeds=range(len(prompts)), steps=8)


def test_a_shape_never_seen_is_learnt(tmp_path: Path) -> None:
    shown = [(scene, full_caption(scene, word="zorb")) for scene in scenes(0, 16, "concept")]
    dataset = write_scenes(tmp_path / "dataset", shown, heldout=4, class_word="star")
    settings = TrainSettings(
        method="finetune", targets="all", steps=30, batch=4, learning_rate=1.5e-3, validate_every=30, seed=1
    )
    train(settings, "tiny", dataset, tmp_path / "out", tmp_path / "work")
    curves = json.loads((tmp_path / "out" / "training.json").read_bytes())
    (_, before), (_, after) = curves["validation_loss"]
    assert after < 0.8 * before


def test_prior_preservation_holds_the_class(tiny: BaseModel, tmp_path: Path) -> None:
    # Crescents that are called stars: what pulls every star along, unless something holds it.
    dataset = write_scenes(
        tmp_path / "dataset", [(scene, "a sks star") for scene in scenes(1, 8, "concept")], 0, "star"
    )
    plain: dict[str, Any] = {"steps": 50, "batch": 4, "learning_rate": 2e-3, "seed": 1, "targets": "all"}
    held = {"method": "dreambooth", "prior": {"count": 12, "steps": 8}}
    prompts = [f"a {colour} star on a {ground} background" for colour in COLOURS for ground in ("white", "black")]
    expected = generate(tiny, prompts, seeds=range(len(prompts)), steps=8)
    drift = {}
    for name, change in (("without", {"method": "finetune"}), ("with", held)):
        settings = TrainSettings.model_validate({**plain, **change})
        train(settings, "tiny", dataset, tmp_path / name, tmp_path / "work")
        drift[name] = (draw_with(tiny, tmp_path / name, prompts) - expected).square().mean().sqrt().item()
    assert drift["with"] < 0.9 * drift["without"]
