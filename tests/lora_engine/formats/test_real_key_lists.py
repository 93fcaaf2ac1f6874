"""Names and shapes of adapter files seen in the wild: each is read, or refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from law_adapters import NAMES
from safetensors.torch import save_file

from lora_engine.errors import AdapterError
from lora_engine.formats import read_adapter

FOLDER = Path(__file__).resolve().parents[3] / "../shared/keylists"
REASONS = ("FLUX", "SD3", "transformer", "ComfyUI", "no factor of a kind")


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the key lists are not beside this checkout")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_real_file_is_read_or_refused_with_the_reason(path, tmp_path):
    listed = json.loads(path.read_text())["tensors"]
    # One row of each tensor is enough to tell names; the shapes are real in the number of dimensions.
    tensors = {name: torch.ones([min(size, 4) for size in shape]) for name, shape in listed.items()}
    save_file(tensors, tmp_path / "real.safetensors")
    for names in (None, NAMES):
        said = outcome(tmp_path / "real.safetensors", names)
        assert said == "read" or ("real.safetensors" in said and any(reason in said for reason in REASONS)), said


def outcome(path, names):
    try:
        adapter, _ = read_adapter(path, names)
    except AdapterError as error:
        return str(error)
    return "read" if adapter.modules else "nothing was read"
