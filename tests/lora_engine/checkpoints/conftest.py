from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from lora_engine.bases.untrained import write_untrained_base
from lora_engine.checkpoints import convert_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import ARCHITECTURES


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Narrow bases with the real blocks, as diffusers folders."""
    root = tmp_path_factory.mktemp("folders")
    with warnings.catch_warnings():
        # Saving a pipeline without a safety checker makes diffusers say so.
        warnings.simplefilter("ignore")
        return {name: write_untrained_base(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def singles(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    """The same bases as original single files."""
    root = tmp_path_factory.mktemp("singles")
    return {
        name: convert_checkpoint(folder, root / f"{name}.safetensors", to="ldm")[0] for name, folder in folders.items()
    }


@pytest.fixture
def small(singles: dict[str, Path]) -> dict[str, Tensor]:
    """The tensors of the SD 1.5 file, to be damaged."""
    return load_file(singles["sd15"])
