"""Fusing rejects invalid input before it writes a byte, and an interrupted run leaves no output."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import TARGETS, adapter_for, cast_model, saved

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.adapters.full import FullDelta
from lora_engine.bases.source import resolve_base
from lora_engine.errors import AdapterError, BaseModelError, SettingsError
from lora_engine.streaming import fuse, open_model

UNET = "unet/diffusion_pytorch_model.safetensors"


def lora(out, inner):
    return LoraDelta(torch.ones(2, inner), torch.ones(out, 2), 2.0)


def digest(folder):
    content = b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
    return hashlib.sha256(content).hexdigest()


MISFITS = {
    "missing module": ({"unet.nowhere.to_q": lora(8, 8)}, "no module 'unet.nowhere.to_q'"),
    "another shape": ({TARGETS[0]: lora(9, 8)}, "the shape is"),
    "a bias that the layer lacks": ({TARGETS[0]: FullDelta(None, torch.ones(8))}, "the module does not have"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_before_a_byte_is_written(case, bases, tmp_path):
    modules, problem = MISFITS[case]
    path = saved(Adapter(modules), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=problem):
        fuse(bases["float32"], [(path, 1.0)], tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_component_that_is_a_path_is_refused(bases, tmp_path):
    base = bases["float32"]
    model = cast_model(base, tmp_path / "models" / "model", "float32")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"../../victim": ["diffusers", "Harmless"]}))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_bytes(b"mine")
    path = saved(adapter_for(base), tmp_path / "a.safetensors")
    with pytest.raises(BaseModelError, match=r"invalid component '../../victim'"):
        fuse(model, [(path, 1.0)], tmp_path / "deep" / "er" / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "models", "victim"]


def test_an_adapter_for_another_family_is_refused(bases, tmp_path):
    adapter = Adapter(adapter_for(bases["float32"]).modules, "sdxl")
    with pytest.raises(AdapterError, match="'sdxl' and the model is 'sd'"):
        fuse(bases["float32"], [(saved(adapter, tmp_path / "a.safetensors"), 1.0)], tmp_path / "out")


def test_an_adapter_for_another_base_is_refused_unless_allowed(bases, tmp_path):
    base = bases["float32"]
    right = adapter_for(base, fingerprint=resolve_base(str(base)).fingerprint())
    wrong = adapter_for(base, fingerprint="0" * 64)
    right, wrong = saved(right, tmp_path / "right.safetensors"), saved(wrong, tmp_path / "wrong.safetensors")
    assert fuse(base, [(right, 1.0)], tmp_path / "one").fingerprint == "same"
    with pytest.raises(BaseModelError, match="an adapter was trained for 0000000000000000"):
        fuse(base, [(right, 1.0), (wrong, 1.0)], tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert fuse(base, [(wrong, 1.0)], tmp_path / "two", allow_other_base=True).fingerprint == "other"
    assert fuse(base / UNET, [(saved(adapter_for(base, targets=TARGETS[:1], fingerprint="0" * 64),
        tmp_path / "c.safetensors"), 1.0)], tmp_path / "c.out.safetensors").fingerprint == "unknown"  # fmt: skip


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(weight, bases, tmp_path):
    path = saved(adapter_for(bases["float32"]), tmp_path / "a.safetensors")
    with pytest.raises(SettingsError, match="a finite number"):
        fuse(bases["float32"], [(path, weight)], tmp_path / "out")


def test_no_adapter_is_refused(bases, tmp_path):
    with pytest.raises(SettingsError, match="no adapter"):
        fuse(bases["float32"], [], tmp_path / "out")


def test_invalid_output_paths_are_refused(bases, tmp_path):
    base = bases["float32"]
    path = saved(adapter_for(base, targets=TARGETS[:1]), tmp_path / "a.safetensors")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    for model, out, problem in (
        (base, base, "is the model itself"),
        (base, base / "inside", "is inside the model"),
        (base, full, "is not an empty folder"),
        (base / UNET, tmp_path / "out.bin", "not the name of a .safetensors file"),
        (base / UNET, base / UNET, "is the model itself"),
    ):
        with pytest.raises(SettingsError, match=problem):
            fuse(model, [(path, 1.0)], out)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "no such file or folder"),
        ("empty", "has 0 weights files"),
        ("strange.safetensors", "component of the model cannot be inferred"),
    ],
)
def test_paths_without_a_model_are_refused(name, problem, tmp_path):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(2, 2)}, tmp_path / "strange.safetensors")
    with pytest.raises(BaseModelError, match=problem):
        open_model(tmp_path / name)


def test_a_value_beyond_float16_is_refused_without_output(bases, tmp_path):
    shape = open_model(bases["float16"]).module_shapes[TARGETS[0]]
    delta = LoraDelta(torch.full((1, shape[1]), 300.0), torch.full((shape[0], 1), 300.0), 1.0)
    path = saved(Adapter({TARGETS[0]: delta}), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"NaN or infinite in float16; .* Allowed: bfloat16, float32"):
        fuse(bases["float16"], [(path, 1.0)], tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    fuse(bases["bfloat16"], [(path, 1.0)], tmp_path / "out")


def test_a_weight_of_integers_is_refused(bases, tmp_path):
    base = cast_model(bases["float32"], tmp_path / "base", "float16")
    tensors = load_file(base / UNET)
    name = f"{TARGETS[0].removeprefix('unet.')}.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, base / UNET)
    with pytest.raises(BaseModelError, match="the weights are quantized as I8 integers"):
        fuse(base, [(saved(adapter_for(base), tmp_path / "a.safetensors"), 1.0)], tmp_path / "out")


CHILD = """
import sys, threading, time
from pathlib import Path
from lora_engine.streaming import fuse, rewrite
written = rewrite._ChangedTensor.write
def slowly(*arguments):
    written(*arguments)
    Path(sys.argv[2], threading.current_thread().name).touch()
    time.sleep(60)
rewrite._ChangedTensor.write = slowly
adapter = [(Path(sys.argv[1]), 1.0)]
pairs = zip(sys.argv[3::2], sys.argv[4::2])
threads = [
    threading.Thread(target=fuse, args=(Path(model), adapter, Path(out)), name=f"half{number}")
    for number, (model, out) in enumerate(pairs)
]
for thread in threads:
    thread.start()
for thread in threads:  # at the end of the main thread, executors take no more work
    thread.join()
"""


def test_a_killed_run_leaves_no_output_and_an_unchanged_source(bases, tmp_path):
    base = bases["float32"]
    before = digest(base)
    path = saved(adapter_for(base, targets=TARGETS[:2]), tmp_path / "a.safetensors")
    outputs = {base: tmp_path / "out", base / UNET: tmp_path / "out.safetensors"}
    half = [tmp_path / "half0", tmp_path / "half1"]
    command = [sys.executable, "-c", CHILD, path, tmp_path, *itertools.chain(*outputs.items())]
    child = subprocess.Popen([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not all(file.exists() for file in half) and child.poll() is None:
        time.sleep(0.02)
    assert child.poll() is None
    # Both processes were writing.
    assert len(list(tmp_path.glob(".*.partial"))) == len(outputs)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not any(out.exists() for out in outputs.values())
    assert digest(base) == before
