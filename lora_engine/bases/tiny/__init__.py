"""The embedded base: a small Stable Diffusion of a drawn world, with its CLIP, its judge and the recipe that made them.

Importing this imports no torch. The weights are in `weights/`; `python -m lora_engine.bases.tiny build` makes them
anew.
"""

from __future__ import annotations

from pathlib import Path

from lora_engine.errors import BaseModelError

_WEIGHTS = Path(__file__).resolve().parent / "weights"


def folder() -> Path:
    """The diffusers folder with the weights; in it also `clip/` and `judge.safetensors`.

    Raises:
        BaseModelError: The weights are not there.
    """
    if not (_WEIGHTS / "model_index.json").is_file():
        raise BaseModelError(
            "the weights of the embedded base are missing",
            where=str(_WEIGHTS),
            remedy="install the package whole, or build them: `python -m lora_engine.bases.tiny build`",
        )
    return _WEIGHTS
