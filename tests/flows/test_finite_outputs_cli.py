"""Verbs that write weights refuse values that are not finite, and leave no output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.formats import write_adapter
from tests.flows.commands import loraline_here
from tests.support.untrained import write_untrained_base

NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WEIGHT = f"{NAME.removeprefix('unet.')}.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finite")
    base = write_untrained_base(folder / "base", "small-sd")
    unet = next((base / "unet").glob("*.safetensors"))
    tensors = load_file(unet)
    rows, columns = tensors[WEIGHT].shape
    adapters = {
        "small": (torch.full((1, columns), 1e-3), torch.full((rows, 1), 1e-3)),
        "large": (torch.full((1, columns), 1e5), torch.full((rows, 1), 1.0)),
        "huge": (torch.full((1, columns), 1e20), torch.full((rows, 1), 1e20)),
    }
    for name, (down, up) in adapters.items():
        write_adapter(folder / f"{name}.safetensors", Adapter({NAME: LoraDelta(down, up, 1.0)}, "sd"))
    for name, dtype, number in (
        ("half", torch.float16, 0.0),
        ("float8", torch.float8_e4m3fn, 0.0),
        ("nan", torch.float16, float("nan")),
    ):
        changed = {key: tensor.half() for key, tensor in tensors.items()}
        changed[WEIGHT] = torch.full((rows, columns), number).to(dtype)
        save_file(changed, folder / f"{name}.safetensors")
    return folder


CASES = {
    "convert to a narrow dtype": (
        ["convert", "large", "--to", "kohya", "--dtype", "float16"],
        [NAME, "'down'", "bfloat16, float32"],
    ),
    "merge with a huge weight": (["merge", "huge:1e60", "huge:1e60"], [NAME]),
    "fuse beyond float16": (["fuse", "half", "large"], [WEIGHT, "float16", "bfloat16, float32"]),
    "fuse beyond float8, which torch saturates": (["fuse", "float8", "large"], [WEIGHT, "float8_e4m3fn"]),
    "fuse beyond float32": (["fuse", "half", "huge"], [WEIGHT]),
    "fuse into a model with NaN": (["fuse", "nan", "small"], [WEIGHT, "the model has values"]),
    "merge with a model with NaN": (["merge", "half", "nan"], [WEIGHT]),
    "extract from a model with NaN": (["extract", "nan", "--base", "half", "--rank", "1"], [NAME]),
}


@pytest.mark.parametrize("case", CASES)
def test_an_output_that_is_not_finite_is_refused(case: str, files: Path, tmp_path: Path) -> None:
    (verb, *arguments), texts = CASES[case]
    paths = [
        str(files / f"{name}.safetensors") + (f":{weight}" if weight else "")
        if (files / f"{name}.safetensors").exists()
        else argument
        for argument in arguments
        for name, _, weight in [argument.partition(":")]
    ]
    done = loraline_here(verb, *paths, "-o", tmp_path / "out.safetensors", home=files)
    assert done.returncode == 1, done.stdout + done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert "kept" not in done.stdout + done.stderr
    assert not any(tmp_path.iterdir()), "nothing is half-written"


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("verb", ["fuse", "merge"])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_tensor_that_is_copied_unchanged_is_checked_too(
    files: Path, tmp_path: Path, number: float, verb: str, part: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(files / "base", model)
    weights = next((model / part).glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if "norm" in name and name.endswith("bias"))
    arguments = [model, files / "small.safetensors"] if verb == "fuse" else [model, files / "base"]
    fine = loraline_here(verb, *arguments, "-o", tmp_path / "fine", home=files)
    assert fine.returncode == 0, fine.stderr
    tensors[name].view(-1)[-1] = number
    save_file(tensors, weights, {"format": "pt"})
    done = loraline_here(verb, *arguments, "-o", tmp_path / "out", home=files)
    assert done.returncode == 1
    assert f"tensor {name!r}: the model has values that are NaN or infinite" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "model"]


def test_a_model_with_nan_is_not_converted(files: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    base = files / "base"
    for file in base.rglob("*"):
        if file.is_file():
            copy = broken / file.relative_to(base)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    unet = next((broken / "unet").glob("*.safetensors"))
    tensors = load_file(unet)
    tensors[WEIGHT][-1, -1] = torch.inf
    save_file(tensors, unet, {"format": "pt"})
    done = loraline_here("convert", broken, "--to", "original", "-o", tmp_path / "out.safetensors", home=files)
    assert done.returncode == 1, done.stdout
    assert "NaN or infinite in F" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    fine = loraline_here("convert", base, "--to", "original", "-o", tmp_path / "fine.safetensors", "--json", home=files)
    assert json.loads(fine.stdout)["files"], fine.stderr
