"""A generated image for tests of what files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_engine.inference.image_metadata import Drawing, UsedAdapter
from lora_engine.inference.prompts.prompt import parse_prompt


def make_drawing(prompt: str, adapters: list[UsedAdapter], negative: str = "", **changes: Any) -> Drawing:
    """Returns a drawing with 12 steps on the embedded base."""
    settings: dict[str, Any] = {
        "base": "tiny",
        "fingerprint": "f" * 64,
        "scheduler": "DPMSolverMultistepScheduler",
        "scheduler_options": {},
        "steps": 12,
        "guidance": 3.0,
        "version": "1.2.3",
    }
    negative_prompt = parse_prompt(negative, is_negative=True)
    return Drawing(parse_prompt(prompt), negative_prompt, adapters, **{**settings, **changes})


def make_adapter(folder: Path, reference: str) -> UsedAdapter:
    """Returns the digests of a new file; its content depends on the reference."""
    file = folder / f"{len(reference)}.safetensors"
    save_file({"a": torch.ones(len(reference))}, file, {"note": reference})
    return UsedAdapter.of_file(file, reference)


def make_image() -> Image.Image:
    """Returns an image of 48 x 32 pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
