"""Merging checkpoints from file to file equals the same arithmetic on loaded tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_models import cast_model, metadata_of, shard

from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.merging.methods.ties import ties
from lora_engine.streaming import CHECKPOINT_METHODS, merge_checkpoints
from lora_engine.streaming import rewrite as rewriting

UNET = "unet/diffusion_pytorch_model.safetensors"


def noisy(path, seed, dtype=torch.float32, rows=4):
    """Writes a component's file with tensors of every shape, some integers, and one wider than a block."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "down_blocks.0.a": (rows, 3),
        "conv_in.weight": (5, 3, 3, 3),
        "norm.bias": (7,),
        "scale": (),
        "b": (60, 90),
    }
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    save_file(tensors | {"position_ids": torch.arange(4) + seed}, path, {"format": "pt"})
    return path


@pytest.fixture
def three(tmp_path):
    return [noisy(tmp_path / f"{seed}.safetensors", seed, torch.float16) for seed in (1, 2, 3)]


def by_hand(files, function):
    loaded = [load_file(file) for file in files]
    merged = {}
    for name, first in loaded[0].items():
        wide = [tensors[name].float() for tensors in loaded]
        merged[name] = function(wide).to(first.dtype) if first.is_floating_point() else first
    return merged


CASES = {
    "weighted-sum": ([0.5, 0.3, 0.2], {}, lambda t: 0.5 * t[0] + 0.3 * t[1] + 0.2 * t[2]),
    "add-difference": ([0.7], {}, lambda t: t[0] + 0.7 * (t[1] - t[2])),
    "ties": (
        [1.0, -0.5],
        {"density": 0.3, "scale": 1.5},
        lambda t: t[0] + ties([t[1] - t[0], t[2] - t[0]], [1.0, -0.5], density=0.3, scale=1.5),
    ),
}


def test_every_method_has_a_case():
    assert set(CASES) == set(CHECKPOINT_METHODS)


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("method", CASES)
def test_merging_from_file_to_file_is_the_arithmetic_on_loaded_tensors(method, block, three, tmp_path, monkeypatch):
    monkeypatch.setattr(rewriting, "BLOCK", block)
    weights, options, function = CASES[method]
    out = tmp_path / "out.safetensors"
    report = merge_checkpoints(three, weights, out, method=method, options=options, component="unet")
    merged, expected = load_file(out), by_hand(three, function)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-3, atol=1e-6, msg=name)
    assert (report.tensors, report.kept) == (5, 1)
    note = json.loads(metadata_of(out)["loraline.merged"])
    assert note == {"method": method, "weights": weights, "options": options, "parents": report.parents}


def test_a_sum_with_weight_1_is_the_model_bit_for_bit(three, tmp_path):
    out = tmp_path / "out.safetensors"
    merge_checkpoints(three[:1], [1.0], out, component="unet")
    first, merged = load_file(three[0]), load_file(out)
    assert first.keys() == merged.keys()
    assert all(torch.equal(first[name], merged[name]) for name in first)


def test_folders_are_merged_however_they_are_sharded(bases, tmp_path):
    one, two = bases["float16"], shard(bases["bfloat16"], tmp_path / "sharded")
    merge_checkpoints([one, two], [0.25, 0.75], tmp_path / "out")
    first, merged = load_file(one / UNET), load_file(tmp_path / "out" / UNET)
    second = load_file(bases["bfloat16"] / UNET)
    assert first.keys() == merged.keys()
    for name, tensor in merged.items():
        expected = (0.25 * first[name].float() + 0.75 * second[name].float()).half()
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-7)
    assert (tmp_path / "out" / "model_index.json").read_bytes() == (one / "model_index.json").read_bytes()


def test_models_that_differ_are_refused_before_work_starts(three, untrained_base, tmp_path):
    other = noisy(tmp_path / "other.safetensors", 4, rows=5)
    lacking = tmp_path / "lacking.safetensors"
    save_file({name: t for name, t in load_file(three[0]).items() if name != "b"}, lacking)
    for models, problem in (
        ([three[0], other], r"'unet.down_blocks.0.a' is F32 \[5, 3\], and in the first model F16 \[4, 3\]"),
        ([three[0], lacking], "1 tensors are not in both models; 'unet.b' is only in"),
        ([lacking, three[0]], "1 tensors are not in both models; 'unet.b' is only in"),
    ):
        with pytest.raises(BaseModelError, match=problem):
            merge_checkpoints(models, [0.5, 0.5], tmp_path / "out.safetensors", component="unet")
    with pytest.raises(BaseModelError, match="tensors are not in both"):
        merge_checkpoints([untrained_base("small-sd"), untrained_base("small-sdxl")], [0.5, 0.5], tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("count", "weights", "method", "options", "problem"),
    [
        (3, [1.0, 1.0], "weighted-sum", {}, "3 models with 2 weights"),
        (2, [1.0], "add-difference", {}, "2 models. Allowed: three models"),
        (2, [1.0, 1.0], "ties", {}, "2 models with 2 weights"),
        (2, [1.0], "ties", {"density": 0.0}, "density is 0.0"),
        (2, [1.0], "ties", {"lambda": 1.0}, "no option 'lambda'"),
        (2, [1.0, float("nan")], "weighted-sum", {}, "the weight nan"),
        (2, [1.0, 1.0], "average", {}, "average"),
    ],
)
def test_settings_that_a_method_does_not_accept_are_refused(count, weights, method, options, problem, three, tmp_path):
    with pytest.raises(SettingsError, match=problem):
        merge_checkpoints(
            three[:count], weights, tmp_path / "out.safetensors", method=method, options=options, component="unet"
        )


def test_the_sources_may_not_be_the_output(bases, tmp_path):
    copy = cast_model(bases["float32"], tmp_path / "copy", "float16")
    with pytest.raises(SettingsError, match="is the model itself"):
        merge_checkpoints([bases["float32"], copy], [0.5, 0.5], copy)
