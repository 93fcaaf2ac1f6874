"""Locates the weights of the embedded base, a small Stable Diffusion of a synthetic world, and of its CLIP.

Torch-free. `tools/tiny_base` in the repository trained them.
"""

from __future__ import annotations

from pathlib import Path

from lora_engine.errors import BaseModelError
from lora_engine.families.training_defaults import TrainingDefaults

WEIGHTS = Path(__file__).resolve().parent / "weights"
"""The folder, whether or not it is complete."""

DEFAULTS = TrainingDefaults(
    resolution=32,
    learning_rate=1.5e-3,
    rank=8,
    batch=8,
    targets="all",
    precision="fp32",
    reasons={
        "resolution": "the size that the base generates",
        "learning_rate": "as in examples/merge; larger bases need a smaller one",
        "precision": "exact; the base is small",
        "gradient_checkpointing": "the base is small",
    },
)


def folder() -> Path:
    """Returns the diffusers folder with the weights, `clip/` and `judge.safetensors`.

    Raises:
        BaseModelError: The weights are missing.
    """
    if not (WEIGHTS / "model_index.json").is_file():
        raise BaseModelError(
            "the weights of the embedded base are missing",
            where=str(WEIGHTS),
            remedy="reinstall the package",
        )
    return WEIGHTS
