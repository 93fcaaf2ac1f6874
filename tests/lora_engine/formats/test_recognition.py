"""A file gives the same facts and errors from mapped tensors, as in the verbs, and from torch tensors."""

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bad_corpus import BASE, CORPUS
from law_adapters import NAMES, SDXL_NAMES, random_delta, suits_shape
from safetensors.torch import save_file

from lora_engine.adapters import Adapter, kinds
from lora_engine.errors import EngineError
from lora_engine.formats import codecs, inspect, read_bundle, write_adapter
from lora_engine.formats.mapped_tensor import name_of_dtype
from lora_engine.formats.safetensors_io import map_safetensors, read_safetensors

CASES = Path(__file__).resolve().parents[3] / "../shared/cases/formats"
DTYPES = {"loraline": torch.bfloat16, "kohya": torch.float16}
WRITTEN = [(form, kind) for form, codec in codecs.items() for kind in kinds if kind in codec.key_layout.factor_keys]
# The safetensors library names either of the two tensors, at random.
AT_RANDOM = ("one body for two tensors",)
READ_HERE = {name: case for name, case in CORPUS.items() if not (case.dangerous or case.nightly)}
SAFE = [name for name, case in READ_HERE.items() if ".safe" in case.file and name not in AT_RANDOM]


def facts_of(path, read):
    """Returns what the verb `inspect` shows, or the error."""
    try:
        return json.dumps(inspect(path, read=read), sort_keys=True)
    except EngineError as error:
        return str(error)


def contents_of(path, read, names=None):
    """Returns what the verb `validate` looks at, or the error."""
    try:
        bundle = read_bundle(path, names, read=read)
    except EngineError as error:
        return str(error)
    modules = {
        name: (delta.kind, delta.rank, delta.alpha, {key: described(f) for key, f in delta.factors().items()})
        for name, delta in bundle.adapter.modules.items()
    }
    embeddings = [(embedding.token, embedding.count, embedding.widths) for embedding in bundle.embeddings]
    return modules, bundle.adapter.base, bundle.adapter.fingerprint, bundle.card, embeddings, bundle.assumptions


def described(factor):
    return tuple(factor.shape), name_of_dtype(factor), math.prod(factor.shape)


def assert_alike(path, names=None):
    assert facts_of(path, map_safetensors) == facts_of(path, read_safetensors)
    mapped, decoded = (contents_of(path, read, names) for read in (map_safetensors, read_safetensors))
    assert mapped == decoded
    return mapped


@pytest.mark.parametrize(("form", "kind"), WRITTEN)
def test_every_kind_in_every_format(form, kind, tmp_path):
    family, names = ("sdxl", SDXL_NAMES) if form == "kohya" else ("sd", NAMES)
    options = {"axis": "input"} if (form, kind) == ("comfyui", "dora") else {}
    shapes = {name: shape for name, shape in names.items() if suits_shape(kind, shape)}
    if (form, kind) in [("peft", "peft-oft"), ("peft", "peft-boft")]:  # one block size for all modules
        shapes = dict([*shapes.items()][:1])
    dtype = DTYPES.get(form, torch.float32)
    modules = {name: random_delta(kind, shape, dtype=dtype, **options) for name, shape in shapes.items()}
    write_adapter(tmp_path / "a", Adapter(modules, family), format=form, module_names=names)
    contents = assert_alike(tmp_path / "a", names)
    assert contents[0].keys() == modules.keys()


@pytest.mark.parametrize("name", SAFE)
def test_every_bad_file(name, tmp_path):
    path = tmp_path / CORPUS[name].file
    CORPUS[name].build(path)
    assert_alike(path if path.exists() else tmp_path, BASE if CORPUS[name].named else None)


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
@pytest.mark.parametrize("stem", sorted(path.stem for path in CASES.glob("c*.py") if not path.stem.startswith("c51")))
def test_every_case_of_a_real_form(stem, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(CASES), *sys.path])
    import_module(stem).build(tmp_path / "case.safetensors")
    assert_alike(tmp_path / "case.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("ups", [(1.0, 0.0, 2.0), (0.0, 0.0, 0.0), (1.0, 1.0, -0.0)])
def test_zeros_in_a_fused_layer_decide_its_parts(ups, dtype, tmp_path):
    name, width = "lora_unet_double_blocks_0_img_attn_qkv", 3072
    up = torch.zeros(3 * width, 3)
    for part, value in enumerate(ups):
        up[part * width : (part + 1) * width, part] = value
    tensors = {f"{name}.lora_down.weight": torch.ones(3, width), f"{name}.lora_up.weight": up}
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    contents = assert_alike(tmp_path / "a.safetensors")
    changed = sum(value != 0 for value in ups)
    assert len(contents[0]) == (changed or 3)
    assert {rank for _, rank, *_ in contents[0].values()} == ({1} if changed else {3})
