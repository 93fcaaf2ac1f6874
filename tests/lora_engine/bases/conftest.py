from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
def untrained(untrained_base: Callable[[str], Path]) -> dict[str, Path]:
    return {shape: untrained_base(shape) for shape in SHAPES}
