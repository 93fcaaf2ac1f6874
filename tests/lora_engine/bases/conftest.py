from __future__ import annotations

from pathlib import Path

import pytest

from lora_engine.bases.untrained import write_untrained_base

SHAPES = (
    "small-sd",
    "small-sd-v",
    "small-sdxl",
    "small-sd-inpainting",
    "small-sdxl-inpainting",
    "small-sd3",
    "small-sd3-without-t5",
    "small-flux",
)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in SHAPES}
