from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.training.spec import TrainSettings


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"rank": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"alpha": -1.0},
        {"caption_dropout": 1.5},
        {"schedule": "cosmic"},
        {"method": "magic"},
        {"precision": "fp8"},
        {"warmup": 10},
        {"seed": -1},
        {"unknown": 1},
        {"kind": "lorra"},
        {"kind": {"name": "lora", "factor": 8}},
        {"overrides": {"unet.*": {"rank": 0}}},
        {"dropout": 1.0},
        {"method": "finetune", "prior": {}},
        {"prior": {"count": 0}},
    ],
)
def test_invalid_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(change)[-1]):
        TrainSettings.model_validate({"steps": 10, **change})


def test_settings_survive_json() -> None:
    settings = TrainSettings(steps=10, targets=["attention", "text"], prior={"prompt": "a star"})  # type: ignore[arg-type]
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("module", ["lora_engine.training.spec", "lora_engine.training.spawn", "lora_engine.progress"])
def test_specs_and_callers_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(n in sys.modules for n in ('torch', 'diffusers', 'transformers')))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
