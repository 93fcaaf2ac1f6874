"""Adapters of the embedded base with planted faults: overfitted, leaking, drifting, and one without a fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.evaluation.run import evaluate
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.files import sha256_bytes
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from tools.tiny_base.world import Scene, draw, full_caption, scenes

TRIGGER, CLASS = "sks", "ring"
IMAGES = 8
"""Training images, held-out images and prompts."""
RECIPES: dict[str, dict[str, Any]] = {
    "good": {
        "method": "dreambooth",
        "steps": 80,
        "prior": {"count": 8, "steps": 8, "prompt": [full_caption(scene) for scene in scenes(5, 8)]},
    },
    "overfit": {"method": "finetune", "steps": 300, "rank": 16, "learning_rate": 4e-3},
    "leak": {"method": "finetune", "steps": 80},
    "drift": {"method": "finetune", "steps": 80, "learning_rate": 1e-2},
}
"""What is planted -> settings of the training. `overfit` has three training images with captions of the trigger alone,
`leak` captions of the class word without the trigger, `drift` five times the rate."""


def write_concept(folder: Path, seed: int, fault: str) -> tuple[Path, list[str]]:
    """Writes a dataset of crescents; returns it with prompts of other scenes."""
    trained, heldout, prompts = (scenes(100 * seed + part, IMAGES, "concept") for part in range(3))
    trained = trained[:3] if fault == "overfit" else trained
    images = [_entry(folder, scene, _caption(scene, fault), "train") for scene in trained]
    images += [_entry(folder, scene, _caption(scene, ""), "heldout") for scene in heldout]
    Manifest(pictures=tuple(images), trigger=TRIGGER, class_word=CLASS).save(folder)
    return folder, [full_caption(scene, word=TRIGGER) for scene in prompts]


def _caption(scene: Scene, fault: str) -> str:
    return TRIGGER if fault == "overfit" else full_caption(scene, word=CLASS if fault == "leak" else TRIGGER)


def _entry(folder: Path, scene: Scene, caption: str, split: str) -> ImageEntry:
    values = torch.from_numpy(draw(scene).copy()).permute(2, 0, 1).float() / 127.5 - 1
    digest = sha256_bytes(f"{scene}".encode())
    write_png(folder / f"pictures/{digest[:16]}.png", values)
    return ImageEntry.model_validate(
        {
            "sha256": digest,
            "file": f"pictures/{digest[:16]}.png",
            "width": 32,
            "height": 32,
            "caption": caption,
            "source": f"{digest[:8]}.png",
            "split": split,
        }
    )


def train_planted(folder: Path, seed: int, fault: str, **change: Any) -> tuple[Path, Path, list[str]]:
    """Trains an adapter with a planted fault; returns its folder, the dataset and the prompts."""
    dataset, prompts = write_concept(folder / "dataset", seed, fault)
    plain: dict[str, Any] = {"batch": 4, "rank": 8, "learning_rate": 2e-3, "seed": seed, "targets": "all"}
    settings = TrainSettings.model_validate({**plain, **RECIPES[fault], **change})
    train(settings, "tiny", dataset, folder / "adapter", folder / "work")
    return folder / "adapter", dataset, prompts


def evaluate_planted(
    folder: Path, adapter: Path, dataset: Path, prompts: Sequence[str], seed: int, **change: Any
) -> dict[str, Any]:
    """Evaluates an adapter with the metrics of memorization, leakage and drift."""
    plain: dict[str, Any] = {"seeds": 1, "seed": seed, "extra": ("class_drift", "unrelated_drift"), "keep": 0}
    settings = EvaluateSettings(**{**plain, **change})
    return evaluate(settings, "tiny", adapter, dataset, folder / "report", prompts=prompts)
