"""Provides the embedded base: a small Stable Diffusion of a synthetic world, with its CLIP, its judge and its recipe.

Importing this imports no torch. The weights are in `weights/`; `python -m lora_engine.bases.tiny build` trains them.
"""

from __future__ import annotations

from pathlib import Path

from lora_engine.errors import BaseModelError

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def folder() -> Path:
    """Returns the diffusers folder with the weights, `clip/` and `judge.safetensors`.

    Raises:
        BaseModelError: The weights are missing.
    """
    if not (_WEIGHTS / "model_index.json").is_file():
        raise BaseModelError(
            "the weights of the embedded base are missing",
            where=str(_WEIGHTS),
            remedy="reinstall the package, or run `python -m lora_engine.bases.tiny build`",
        )
    return _WEIGHTS
