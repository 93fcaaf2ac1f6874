"""Writes and compares checkpoints in tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ARCHITECTURES = ("sd15", "sd2", "sdxl")


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def folder_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all weights of a diffusers folder, with the level `text_model` that transformers 5 omits."""
    weights = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            below = name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm"))
            level = "text_model." if path.parent.name.startswith("text_encoder") and below else ""
            weights[f"{path.parent.name}.{level}{name}"] = tensor
    return weights


def same_bytes(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name
