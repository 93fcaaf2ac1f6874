"""Small stored models, adapters for them, and the expected weights from loaded models."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from pathlib import Path

import torch
from law_adapters import random_delta, suits_shape
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_engine.adapters import Adapter, DictTree, collapse, innermost
from lora_engine.bases.base import load_base
from lora_engine.formats import write_adapter
from lora_engine.streaming import open_model
from lora_engine.streaming.inputs import read_location

TARGETS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.resnets.0.conv1",
    "text_encoder.text_model.encoder.layers.1.self_attn.v_proj",
)


def cast_model(folder, out, dtype):
    """Writes a copy of a folder with its weights in another dtype."""
    shutil.copytree(folder, out)
    for file in out.glob("*/*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(getattr(torch, dtype))
        save_file(tensors, file, {"format": "pt", "note": "kept", "modelspec.hash_sha256": "0x0"})
    return out


def shard(folder, out):
    """Writes a copy of a folder with the U-Net in two shards."""
    shutil.copytree(folder, out)
    file = out / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names, where = sorted(tensors), {}
    for number, half in enumerate((names[::2], names[1::2]), start=1):
        part = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, out / "unet" / part, {"format": "pt"})
        where |= dict.fromkeys(half, part)
    index = out / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


def adapter_for(base, kind="lora", *, seed=0, rank=2, targets=TARGETS, size=0.05, fingerprint=None):
    """Returns an adapter of a kind on the targets that support it."""
    shapes = open_model(base).module_shapes
    modules = {}
    for index, name in enumerate(targets):
        if suits_shape(kind, shapes[name]):
            delta = random_delta(kind, shapes[name], rank, seed=seed + index).to_export()
            modules[name] = delta.with_factors({key: size * value for key, value in delta.factors().items()})
    return Adapter(modules, "", fingerprint)


def saved(adapter, path):
    write_adapter(path, adapter)
    return path


def weights_of(path, modules, **options):
    """Returns weight and bias of modules from a model's files."""
    locations = open_model(path, **options).locations
    names = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
    tensors = {name: read_location(locations[name]) for name in names if name in locations}
    assert tensors
    assert {name.rpartition(".")[0] for name in tensors} == set(modules)
    return tensors


@functools.cache
def loaded(folder, dtype):
    return load_base(str(folder), device="cpu", dtype=dtype).modules


def collapsed(folder, adapter, weight, dtype):
    """Returns weight and bias of a loaded model after an adapter was collapsed into it."""
    base = DictTree(copy.deepcopy(loaded(folder, dtype)))
    collapse(base, adapter, weight)
    tensors = {}
    for module in adapter.modules:
        layer = innermost(base.get_module(module))
        tensors |= {f"{module}.{part}": value for part, value in layer.named_parameters()}
    return {name: value.detach() for name, value in tensors.items()}


def spacing(tensor):
    """Returns the distance to the next number of the dtype."""
    exponent = torch.frexp(tensor.float()).exponent
    return torch.exp2(exponent.double()) * torch.finfo(tensor.dtype).eps / 2


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})
