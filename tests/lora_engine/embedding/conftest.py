from __future__ import annotations

from tests.lora_engine.evaluation.conftest import base, clip_folder

__all__ = ["base", "clip_folder"]
