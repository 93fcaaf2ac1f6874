from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.untrained_captioners import BUILDERS, write_captioner


@pytest.fixture(scope="session")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns a folder per family; do not change them."""
    root = tmp_path_factory.mktemp("captioners")
    return {family: write_captioner(root / family, family) for family in BUILDERS}


@pytest.fixture(scope="session")
def shown() -> list[Image.Image]:
    """Returns three different images of different sizes."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (60, 40))]
