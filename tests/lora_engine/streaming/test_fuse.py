"""Fusing from file to file equals collapsing into a loaded model, and unfusing reverts it."""

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from law_adapters import random_delta
from safetensors.torch import load_file
from stored_models import TARGETS, adapter_for, cast_model, collapsed, metadata_of, saved, shard, spacing, weights_of

from lora_engine.adapters import Adapter, LoraDelta, kinds
from lora_engine.adapters.full import FullDelta
from lora_engine.checkpoints import convert_checkpoint
from lora_engine.errors import AdapterError
from lora_engine.files import sha256_file
from lora_engine.formats import write_adapter
from lora_engine.merging.concatenate import concatenate
from lora_engine.streaming import fuse, unfuse

STORED = "conditioner.embedders.1.model.text_projection"
UNET = "unet/diffusion_pytorch_model.safetensors"
KINDS = sorted({random_delta(kind, (8, 8)).to_export().kind for kind in kinds} - {"lora"})


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(["lora", *KINDS], ["float32", "float16"]), ("lora", "bfloat16"), ("dora", "bfloat16")],
)
def test_fusing_is_collapsing(kind, dtype, bases, tmp_path):
    adapter = adapter_for(bases[dtype], kind)
    assert adapter.modules
    report = fuse(bases[dtype], [(saved(adapter, tmp_path / "a.safetensors"), 0.7)], tmp_path / "out")
    expected = collapsed(bases[dtype], adapter, 0.7, getattr(torch, dtype))
    tensors = weights_of(tmp_path / "out", adapter.modules)
    before = weights_of(bases[dtype], adapter.modules)
    assert report.modules == len(adapter.modules)
    for name, value in expected.items():
        if kind != "lora":
            assert torch.equal(tensors[name], value), name
        elif dtype == "float32":
            torch.testing.assert_close(tensors[name], value, rtol=1e-6, atol=1e-7)
        else:  # the last bit of float32 may decide a rounding
            assert ((tensors[name].double() - value.double()).abs() <= spacing(value)).all(), name
            assert (tensors[name] == value).double().mean() > 0.99, name
    assert any(not torch.equal(tensors[name], before[name]) for name in tensors)


def test_a_change_of_a_bias_is_fused(bases, tmp_path):
    name = TARGETS[3]
    whole = FullDelta(torch.zeros(8, 8, 3, 3), torch.arange(8.0))
    before = weights_of(bases["float32"], [name])
    adapter = Adapter({name: FullDelta(torch.zeros_like(before[f"{name}.weight"]), whole.bias)})
    fuse(bases["float32"], [(saved(adapter, tmp_path / "a.safetensors"), 2.0)], tmp_path / "out")
    after = weights_of(tmp_path / "out", [name])
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"] + 2 * torch.arange(8.0))
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])


def test_everything_else_keeps_its_bytes_and_the_header_names_the_adapter(bases, tmp_path):
    base = bases["float16"]
    adapter = adapter_for(base, targets=TARGETS[:1])
    path = saved(adapter, tmp_path / "a.safetensors")
    fuse(base, [(path, 0.5)], tmp_path / "out")
    files = {file.relative_to(base) for file in base.rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file()} == files
    differing = [str(file) for file in files if (base / file).read_bytes() != (tmp_path / "out" / file).read_bytes()]
    assert differing == [UNET]
    old, new = load_file(base / UNET), load_file(tmp_path / "out" / UNET)
    changed = [name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))]
    assert changed == [f"{TARGETS[0].removeprefix('unet.')}.weight"]
    metadata = metadata_of(tmp_path / "out" / UNET)
    assert json.loads(metadata.pop("loraline.fused")) == [{"sha256": sha256_file(path), "title": "", "weight": 0.5}]
    assert metadata == {"format": "pt", "note": "kept"}  # and the digest of what the tensors were is gone
    lengths = [int.from_bytes((folder / UNET).read_bytes()[:8], "little") for folder in (base, tmp_path / "out")]
    assert lengths[0] % 4096 == lengths[1] % 4096  # so that large tensors can go by pages


def test_fusing_two_is_fusing_their_concatenation(bases, tmp_path):
    one, two = adapter_for(bases["float32"], seed=1), adapter_for(bases["float32"], seed=9, rank=3, targets=TARGETS[2:])
    paths = [saved(one, tmp_path / "one.safetensors"), saved(two, tmp_path / "two.safetensors")]
    both = saved(concatenate([one, two], [0.7, -0.4]), tmp_path / "both.safetensors")
    fuse(bases["float32"], [(paths[0], 0.7), (paths[1], -0.4)], tmp_path / "apart")
    fuse(bases["float32"], [(both, 1.0)], tmp_path / "together")
    apart, together = (weights_of(tmp_path / name, TARGETS) for name in ("apart", "together"))
    for name in apart:
        torch.testing.assert_close(apart[name], together[name], rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bytes(bases, tmp_path):
    path = saved(adapter_for(bases["bfloat16"]), tmp_path / "a.safetensors")
    for name in ("one", "two"):
        fuse(bases["bfloat16"], [(path, 0.7)], tmp_path / name)
    contents = [
        {
            file.relative_to(tmp_path / name): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("one", "two")
    ]
    assert Path(UNET) in contents[0]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "dora", "ia3"])
def test_unfusing_gives_the_base_within_rounding(kind, dtype, bases, tmp_path):
    base, path = bases[dtype], tmp_path / "a.safetensors"
    adapter = adapter_for(base, kind)
    saved(adapter, path)
    fuse(base, [(path, 0.7)], tmp_path / "fused")
    report = unfuse(tmp_path / "fused", [(path, 0.7)], tmp_path / "back", base=base)
    old, new, fused = (weights_of(path, adapter.modules) for path in (base, tmp_path / "back", tmp_path / "fused"))
    largest = 0.0
    for name in old:
        distance = (old[name].double() - new[name].double()).abs()
        largest = max(largest, float(distance.max()))
        assert (distance <= spacing(fused[name]) / 2 + spacing(old[name]) + 1e-7).all(), name
    assert report.recorded
    assert report.difference == pytest.approx(largest, abs=1e-12)
    assert "loraline.fused" not in metadata_of(tmp_path / "back" / UNET)
    if not any(delta.reads_base for delta in adapter.modules.values()):
        without = unfuse(tmp_path / "fused", [(path, 0.7)], tmp_path / "alone")
        alone = weights_of(tmp_path / "alone", adapter.modules)
        assert without.difference is None
        for name in new:  # the delta is formed from the fused weight's shape alone
            torch.testing.assert_close(alone[name], new[name], rtol=0, atol=0)


def test_one_of_two_adapters_can_be_unfused(bases, tmp_path):
    base = bases["float32"]
    paths = [saved(adapter_for(base, seed=seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    fuse(base, [(paths[0], 1.0), (paths[1], 0.5)], tmp_path / "both")
    unfuse(tmp_path / "both", [(paths[0], 1.0)], tmp_path / "second")
    fuse(base, [(paths[1], 0.5)], tmp_path / "expected")
    tensors, expected = (weights_of(tmp_path / name, TARGETS) for name in ("second", "expected"))
    for name in tensors:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-6)
    names = [json.loads(metadata_of(tmp_path / name / UNET)["loraline.fused"]) for name in ("second", "expected")]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", ["dora", "ia3", "oft"])
def test_a_kind_that_needs_the_base_is_not_unfused_without(kind, bases, tmp_path):
    path = saved(adapter_for(bases["float32"], kind), tmp_path / "a.safetensors")
    fuse(bases["float32"], [(path, 1.0)], tmp_path / "fused")
    with pytest.raises(AdapterError, match="depends on the original weight"):
        unfuse(tmp_path / "fused", [(path, 1.0)], tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_adapter_or_weight_is_not_unfused_unless_allowed(bases, tmp_path):
    one, two = (saved(adapter_for(bases["float32"], seed=s), tmp_path / f"{s}.safetensors") for s in (1, 2))
    fuse(bases["float32"], [(one, 1.0)], tmp_path / "fused")
    for path, weight in ((two, 1.0), (one, 0.5)):
        with pytest.raises(AdapterError, match="does not name the adapter"):
            unfuse(tmp_path / "fused", [(path, weight)], tmp_path / "back")
    report = unfuse(tmp_path / "fused", [(two, 1.0)], tmp_path / "back", allow_other_base=True)
    assert not report.recorded


def test_shards_are_fused_like_one_file(bases, tmp_path):
    sharded = shard(bases["float16"], tmp_path / "sharded")
    path = saved(adapter_for(sharded), tmp_path / "a.safetensors")
    fuse(sharded, [(path, 1.0)], tmp_path / "one")
    fuse(bases["float16"], [(path, 1.0)], tmp_path / "two")
    one, two = (weights_of(tmp_path / name, TARGETS) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("location", ["unet", UNET])
def test_a_component_alone_is_fused(location, bases, tmp_path):
    path = saved(adapter_for(bases["float16"], targets=TARGETS[:4]), tmp_path / "a.safetensors")
    out = tmp_path / ("out" if location == "unet" else "out.safetensors")
    fuse(bases["float16"] / location, [(path, 1.0)], out)
    fuse(bases["float16"], [(path, 1.0)], tmp_path / "whole")
    file = out / "diffusion_pytorch_model.safetensors" if location == "unet" else out
    assert file.read_bytes() == (tmp_path / "whole" / UNET).read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "float8_e5m2"])
def test_other_float_dtypes_are_fused_in_wider_arithmetic(dtype, bases, tmp_path):
    base = cast_model(bases["float32"], tmp_path / "base", dtype)
    adapter = adapter_for(base, targets=TARGETS[:2], size=0.5)
    fuse(base, [(saved(adapter, tmp_path / "a.safetensors"), 1.0)], tmp_path / "out")
    before, after = weights_of(base, adapter.modules), weights_of(tmp_path / "out", adapter.modules)
    wide = torch.float64 if dtype == "float64" else torch.float32
    for name, delta in adapter.modules.items():
        old = before[f"{name}.weight"].to(wide)
        expected = (old + delta.delta_weight(old)).to(getattr(torch, dtype)).to(wide)
        torch.testing.assert_close(after[f"{name}.weight"].to(wide), expected, rtol=1e-6, atol=1e-6)


ATTENTIONS = {
    "lora": "unet.down_blocks.1.attentions.0",
    "lokr": "unet.down_blocks.1.attentions.1",
    "dora": "unet.down_blocks.2.attentions.0",
}
CONVOLUTIONS = {
    "lora": "unet.mid_block.resnets.1.conv2",
    "lokr": "unet.mid_block.resnets.0.conv1",
    "dora": "unet.down_blocks.1.resnets.0.conv1",
}


@pytest.mark.parametrize("architecture", ["sd15", "sd2", "sdxl"])
def test_an_original_file_is_fused_like_its_folder(architecture, untrained_base, untrained_file, tmp_path):
    folder, single = untrained_base(architecture), untrained_file(architecture)
    encoder = "text_encoder_2" if architecture == "sdxl" else "text_encoder"
    modules = {}
    for number, (kind, attention) in enumerate(ATTENTIONS.items()):
        layer = f"{encoder}.text_model.encoder.layers.{number + 3}"
        targets = [f"{layer}.self_attn.k_proj", f"{layer}.self_attn.v_proj", f"{layer}.mlp.fc1"]
        targets += [f"{attention}.proj_in", f"{attention}.transformer_blocks.0.attn2.to_k", CONVOLUTIONS[kind]]
        of_kind = adapter_for(folder, kind, targets=targets).modules
        assert of_kind.keys() == set(targets)
        modules |= of_kind
    path = saved(Adapter(modules), tmp_path / "a.safetensors")
    fuse(folder, [(path, 0.7)], tmp_path / "folder")
    fuse(single, [(path, 0.7)], tmp_path / "single.safetensors")
    (converted,) = convert_checkpoint(tmp_path / "folder", tmp_path / "converted.safetensors", to="ldm")
    before, expected, tensors = (load_file(file) for file in (single, converted, tmp_path / "single.safetensors"))
    assert expected.keys() == tensors.keys() == before.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, tensors[name])}
    # One tensor holds k and v of a layer.
    assert len(changed) == len(modules) - (0 if architecture == "sd15" else len(ATTENTIONS))
    for name in expected:
        if name in changed:
            torch.testing.assert_close(tensors[name], expected[name], rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert torch.equal(tensors[name], expected[name]), name


@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
def test_a_weight_that_an_original_file_stores_transposed_is_fused_like_the_folders(
    kind, untrained_base, untrained_file, tmp_path
):
    name = "text_encoder_2.text_projection"
    folder, single = untrained_base("sdxl"), untrained_file("sdxl")
    path = saved(adapter_for(folder, kind, targets=[name]), tmp_path / "a.safetensors")
    fuse(folder / "text_encoder_2", [(path, 0.7)], tmp_path / "folder")
    fuse(single, [(path, 0.7)], tmp_path / "single.safetensors")
    stored, fused = (load_file(file)[STORED] for file in (single, tmp_path / "single.safetensors"))
    of_folder = load_file(tmp_path / "folder" / "model.safetensors")["text_projection.weight"]
    assert not torch.equal(fused, stored)
    torch.testing.assert_close(fused.T, of_folder, rtol=1e-6, atol=1e-7)


def test_adapters_of_any_format_are_fused(bases, tmp_path):
    adapter = adapter_for(bases["float16"])
    for name in ("kohya", "peft", "diffusers"):
        location = tmp_path / name if name == "peft" else tmp_path / f"{name}.safetensors"
        write_adapter(
            location, Adapter({n: LoraDelta(d.down, d.up, 3.0) for n, d in adapter.modules.items()}), format=name
        )
        fuse(bases["float16"], [(location, 0.7)], tmp_path / f"{name}-out")
    tensors = [weights_of(tmp_path / f"{name}-out", TARGETS) for name in ("kohya", "peft", "diffusers")]
    assert all(torch.equal(tensors[0][name], other[name]) for other in tensors[1:] for name in tensors[0])


def test_tensors_at_odd_offsets_are_fused(tmp_path):
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).half()
    header = {
        "down_blocks.0.flags": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "down_blocks.0.to_q.weight": {"dtype": "F16", "shape": [6, 4], "data_offsets": [3, 51]},
    }
    text = json.dumps(header).encode()
    body = b"\x01\x02\x03" + weight.numpy().tobytes()
    (tmp_path / "base.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    adapter = Adapter({"unet.down_blocks.0.to_q": LoraDelta(torch.ones(1, 4), torch.ones(6, 1), 1.0)})
    out = tmp_path / "out.safetensors"
    fuse(tmp_path / "base.safetensors", [(saved(adapter, tmp_path / "a.safetensors"), 1.0)], out)
    tensors = load_file(out)
    assert torch.equal(tensors["down_blocks.0.to_q.weight"], (weight.float() + 1).half())
    assert tensors["down_blocks.0.flags"].tolist() == [1, 2, 3]
