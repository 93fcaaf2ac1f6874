from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "formats")]
from checkpoint_files import ARCHITECTURES  # noqa: E402 (the path is set above)
from forked_readers import forked_readers  # noqa: E402, F401


@pytest.fixture(scope="session")
def folders(untrained_base: Callable[[str], Path]) -> dict[str, Path]:
    """Returns narrow bases with the real blocks, as diffusers folders."""
    return {name: untrained_base(name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def singles(untrained_file: Callable[[str], Path]) -> dict[str, Path]:
    """Returns the same bases as original single files."""
    return {name: untrained_file(name) for name in ARCHITECTURES}


@pytest.fixture
def small(singles: dict[str, Path]) -> dict[str, Tensor]:
    """Returns the tensors of the SD 1.5 file, for tests that damage them."""
    return load_file(singles["sd15"])
