"""Verbs that read base weights compute with the values of quantized weights, or refuse and name the quantization."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.adapters.dora import DoraDelta
from lora_engine.formats import read_adapter, write_adapter
from tests.flows.commands import loraline_here, say

LAYERS = ("down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = "conv_in"
SHAPE = (64, 48)
LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
Stored = dict[str, Tensor]


def random_weights() -> Stored:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": 0.05 * torch.randn(SHAPE, generator=draw) for name in LAYERS}
    return tensors | {f"{CONV}.weight": torch.randn((8, 4, 3, 3), generator=draw).half()}


def scaled(tensors: Stored, *, dtype: torch.dtype = torch.float8_e4m3fn, name: str = "scale_weight") -> Stored:
    """One scale per tensor, as ComfyUI stores it."""
    stored = dict(tensors)
    for layer in LAYERS:
        weight = tensors[f"{layer}.weight"]
        scale = (weight.abs().max() / LIMITS[dtype]).float()
        stored |= {f"{layer}.weight": (weight / scale).to(dtype), f"{layer}.{name}": scale}
        stored[f"{layer}.{'scale_input' if name == 'scale_weight' else 'input_scale'}"] = torch.ones(())
    if name == "scale_weight":
        return stored | {"scaled_fp8": torch.zeros(2).to(dtype)}
    settings = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
    return stored | {f"{LAYERS[0]}.comfy_quant": torch.frombuffer(bytearray(settings), dtype=torch.uint8)}


def scaled_by_parts(tensors: Stored, parts: int) -> Stored:
    """One scale per row or per part of a row, as musubi-tuner stores them."""
    stored = dict(tensors)
    for layer in LAYERS:
        weight = tensors[f"{layer}.weight"].view(SHAPE[0], parts, -1)
        scale = weight.abs().amax(-1, keepdim=True) / 448.0
        stored[f"{layer}.weight"] = (weight / scale).view(SHAPE).to(torch.float8_e4m3fn)
        stored[f"{layer}.scale_weight"] = scale if parts > 1 else scale[:, 0]
    return stored


FORMS = {
    "scale_weight": scaled,
    "scale_weight e5m2": lambda tensors: scaled(tensors, dtype=torch.float8_e5m2),
    "weight_scale": lambda tensors: scaled(tensors, name="weight_scale"),
    "row scales": lambda tensors: scaled_by_parts(tensors, 1),
    "part scales": lambda tensors: scaled_by_parts(tensors, 4),
}


SOME_FORMS = ("scale_weight e5m2", "weight_scale", "part scales")


def values(path: Path) -> Stored:
    """The values of the layers' weights, computed here from the stored tensors."""
    tensors = load_file(path)
    decoded = {}
    for layer in LAYERS:
        weight = tensors[f"{layer}.weight"].float()
        names = [name for name in (f"{layer}.scale_weight", f"{layer}.weight_scale") if name in tensors]
        if names:
            scale = tensors[names[0]].float()
            count = max(1, scale.numel() // SHAPE[0])
            weight = (weight.view(SHAPE[0], count, -1) * scale.view(-1, count, 1)).view(SHAPE)
        decoded[layer] = weight
    return decoded


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def share(before: Stored, after: Stored, changes: Stored) -> float:
    dot = sum(float(((after[name] - before[name]) * change).sum()) for name, change in changes.items())
    return dot / sum(float(change.square().sum()) for change in changes.values())


def save(tensors: Stored, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    factors = [[0.06 * torch.randn(shape, generator=draw) for shape in ((4, SHAPE[1]), (SHAPE[0], 4))] for _ in LAYERS]
    deltas = [LoraDelta(down, up, 4.0) for down, up in factors]
    magnitudes = torch.full((SHAPE[0], 1), 0.4)
    modules = {f"unet.{LAYERS[0]}": deltas[0], f"unet.{LAYERS[1]}": DoraDelta(deltas[1], magnitudes)}
    write_adapter(path, Adapter(modules))
    return path


def wanted(before: Stored, adapter: Path, weight: float = 1.0) -> Stored:
    deltas = read_adapter(adapter)[0].modules
    return {layer: weight * deltas[f"unet.{layer}"].delta_weight(before[layer]) for layer in LAYERS}


@pytest.mark.parametrize("form", FORMS)
def test_a_fuse_changes_the_values_of_scaled_weights(form: str, adapter: Path, tmp_path: Path) -> None:
    model, out = save(FORMS[form](random_weights()), tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    report = json.loads(say("fuse", model, adapter, "-o", out, "--json", home=tmp_path))
    before, after = values(model), values(out)
    changes = wanted(before, adapter)
    assert report["survived"] == pytest.approx(share(before, after, changes), abs=1e-4)
    assert report["survived"] > 0.9
    step = 2.0**-2 if "e5m2" in form else 2.0**-3
    for layer, change in changes.items():
        expected = before[layer] + change
        assert ((after[layer] - expected).abs() <= step * expected.abs().clamp(min=1e-4)).all()
    old, new = load_file(model), load_file(out)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in old.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in new.items()
    }
    same = [name for name in old if not name.endswith((".weight", ".scale_weight", ".weight_scale"))]
    assert all(torch.equal(raw(old[name]), raw(new[name])) for name in same)
    assert torch.equal(old[f"{CONV}.weight"], new[f"{CONV}.weight"])


@pytest.mark.parametrize("form", SOME_FORMS)
def test_a_scale_stays_unless_values_would_not_fit(form: str, adapter: Path, tmp_path: Path) -> None:
    tensors = FORMS[form](random_weights())
    out = tmp_path / "out.safetensors"
    model = save(tensors, tmp_path / "model.safetensors")
    for weight, is_raised in ((1e-9, False), (8.0, True)):
        report = json.loads(say("fuse", model, f"{adapter}:{weight}", "-o", out, "--json", home=tmp_path))
        written = load_file(out)
        scales = [name for name in tensors if name.endswith(("scale_weight", "weight_scale"))]
        factors = torch.cat([(written[name] / tensors[name].float()).flatten() for name in scales])
        assert torch.equal(factors, torch.exp2(factors.log2().round()))
        assert (report["raised_scales"] > 0) is bool((factors > 1.0).any()) is is_raised
        if not is_raised:
            assert all(torch.equal(raw(written[name]), raw(tensors[name])) for name in scales)
            assert values(out).keys() == set(LAYERS)
            assert torch.equal(values(out)[LAYERS[0]], values(model)[LAYERS[0]])
    shown = say("fuse", model, f"{adapter}:8", "-o", out, home=tmp_path)
    assert "of the change survives" in shown
    assert "scales of quantized weights were raised" in shown


@pytest.mark.parametrize("form", SOME_FORMS)
def test_taking_out_gives_the_values_before(form: str, adapter: Path, tmp_path: Path) -> None:
    model = save(FORMS[form](random_weights()), tmp_path / "model.safetensors")
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    say("fuse", model, adapter, "-o", out, home=tmp_path)
    arguments = ("fuse", out, adapter, "--take-out", "--original", model, "-o", back, "--json")
    report = json.loads(say(*arguments, home=tmp_path))
    before, after = values(model), values(back)
    largest = max(float((before[name] - after[name]).abs().max()) for name in LAYERS)
    assert report["difference"] == pytest.approx(largest, rel=1e-5)
    assert largest < 0.1 * max(float(weight.abs().max()) for weight in before.values()) * (2 if "e5m2" in form else 1)


@pytest.mark.parametrize("form", SOME_FORMS)
def test_the_difference_to_a_scaled_base_is_extracted(form: str, adapter: Path, tmp_path: Path) -> None:
    base = save(FORMS[form](random_weights()), tmp_path / "base.safetensors")
    before = values(base)
    changes = wanted(before, adapter)
    plain = random_weights() | {f"{layer}.weight": before[layer] + changes[layer] for layer in LAYERS}
    tuned, out = save(plain, tmp_path / "tuned.safetensors"), tmp_path / "out.safetensors"
    say("extract", tuned, "--base", base, "--energy", 1.0, "-o", out, home=tmp_path)
    deltas = read_adapter(out)[0].modules
    for layer, change in changes.items():
        torch.testing.assert_close(deltas[f"unet.{layer}"].delta_weight(before[layer]), change, rtol=1e-3, atol=1e-5)
    same = loraline_here("extract", base, "--base", base, "--noise-aware", "-o", out, home=tmp_path)
    assert "differ in no module" in same.stderr


def test_rounding_noise_of_scaled_weights_is_no_difference(tmp_path: Path) -> None:
    tensors = random_weights()
    base = save(scaled(tensors), tmp_path / "base.safetensors")
    tuned = save(tensors, tmp_path / "tuned.safetensors")
    arguments = ("extract", tuned, "--base", base, "--noise-aware", "-o", tmp_path / "out.safetensors")
    assert "differ in no module by more than rounding" in loraline_here(*arguments, home=tmp_path).stderr
    # A change of rank 1 whose singular value is twice that of the noise is kept.
    change = torch.full(SHAPE, 0.01)
    save(tensors | {f"{LAYERS[0]}.weight": tensors[f"{LAYERS[0]}.weight"] + change}, tuned)
    say(*arguments, home=tmp_path)
    (module,) = read_adapter(tmp_path / "out.safetensors")[0].modules.values()
    assert module.rank == 1
    torch.testing.assert_close(module.delta_weight(torch.zeros(SHAPE)), change, rtol=0.2, atol=0)


@pytest.mark.parametrize("form", SOME_FORMS)
def test_scaled_models_are_merged_by_their_values(form: str, tmp_path: Path) -> None:
    tensors = random_weights()
    first = save(FORMS[form](tensors), tmp_path / "first.safetensors")
    second = save({name: -3.0 * tensor for name, tensor in tensors.items()}, tmp_path / "second.safetensors")
    out = tmp_path / "out.safetensors"
    report = json.loads(say("merge", first, second, "-o", out, "--json", home=tmp_path))
    assert (report["tensors"], report["kept"]) == (3, 0)
    a, b, merged = values(first), values(second), values(out)
    for layer in LAYERS:
        expected = 0.5 * (a[layer] + b[layer])
        assert ((merged[layer] - expected).abs() <= 0.25 * expected.abs() + 1e-4).all()
    say("merge", second, first, "-o", out, home=tmp_path)
    for layer in LAYERS:
        torch.testing.assert_close(values(out)[layer], 0.5 * (a[layer] + b[layer]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", [*SOME_FORMS, "plain e4m3"])
def test_conversion_to_plain_gives_the_same_values_in_bfloat16(form: str, adapter: Path, tmp_path: Path) -> None:
    tensors = FORMS[form](random_weights()) if form in FORMS else plain_float8(torch.float8_e4m3fn)
    model, out = save(tensors, tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    say("convert", model, "--to", "plain", "-o", out, home=tmp_path)
    written, before = load_file(out), values(model)
    assert written.keys() == random_weights().keys()
    for layer in LAYERS:
        assert torch.equal(written[f"{layer}.weight"], before[layer].bfloat16())
    assert torch.equal(written[f"{CONV}.weight"], tensors[f"{CONV}.weight"])
    again = loraline_here("convert", out, "--to", "plain", "-o", tmp_path / "again.safetensors", home=tmp_path)
    assert "no weight is quantized" in again.stderr


def packed_by_bitsandbytes(bits: int) -> tuple[Stored, Stored]:
    """The tensors that bitsandbytes saves with quantized weights, and the values that it computes with."""
    functional = pytest.importorskip("bitsandbytes").functional
    stored, expected = random_weights(), {}
    for number, layer in enumerate(LAYERS):
        weight = f"{layer}.weight"
        if bits == 4:
            # With and without quantized scales, as in published files.
            packed, state = functional.quantize_4bit(stored[weight], quant_type="nf4", compress_statistics=number == 0)
            stored |= {f"{weight}.{name}": value for name, value in state.as_dict(packed=True).items()}
            stored[weight], expected[layer] = packed, functional.dequantize_4bit(packed, state)
        else:
            rows, scales, _ = functional.int8_vectorwise_quant(stored[weight].half())
            stored |= {
                weight: rows,
                f"{layer}.SCB": scales,
                f"{layer}.weight_format": torch.zeros((), dtype=torch.uint8),
            }
            expected[layer] = functional.int8_vectorwise_dequant(rows, scales)
    return stored, expected


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_bitsandbytes_are_converted_to_plain(bits: int, adapter: Path, tmp_path: Path) -> None:
    stored, expected = packed_by_bitsandbytes(bits)
    model, out = save(stored, tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    completed = loraline_here("fuse", model, adapter, "-o", out, home=tmp_path)
    assert "Fix: write it without quantization first: loraline convert MODEL --to plain" in completed.stderr
    say("convert", model, "--to", "plain", "-o", out, home=tmp_path)
    written = load_file(out)
    assert written.keys() == random_weights().keys()
    for layer, value in expected.items():
        torch.testing.assert_close(written[f"{layer}.weight"], value.bfloat16(), rtol=2**-7, atol=0)
    say("fuse", out, adapter, "-o", tmp_path / "fused.safetensors", home=tmp_path)


def test_a_folder_with_an_index_is_converted_to_plain(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = scaled(random_weights())
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, listed in parts.items():
        save({name: tensors[name] for name in listed}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, listed in parts.items() for name in listed}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    say("convert", folder, "--to", "plain", "-o", tmp_path / "out", home=tmp_path)
    merged = {name: tensor for file in parts for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert merged.keys() == random_weights().keys()
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"].keys() == set(
        merged
    )


def plain_float8(dtype: torch.dtype) -> Stored:
    tensors = random_weights()
    return tensors | {f"{layer}.weight": tensors[f"{layer}.weight"].to(dtype) for layer in LAYERS}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_the_share_of_a_change_that_survives_is_reported(dtype: torch.dtype, adapter: Path, tmp_path: Path) -> None:
    model, out = save(plain_float8(dtype), tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    before = values(model)
    shares = {}
    for rounding in ("nearest", "stochastic"):
        arguments = ("fuse", model, f"{adapter}:0.02", "-o", out, "--rounding", rounding, "--seed", 3, "--json")
        report = json.loads(say(*arguments, home=tmp_path))
        shares[rounding] = report["survived"]
        assert report["survived"] == pytest.approx(share(before, values(out), wanted(before, adapter, 0.02)), rel=1e-3)
    assert shares["nearest"] < 0.9 if dtype.itemsize == 1 else shares["nearest"] > 0.9
    assert shares["stochastic"] == pytest.approx(1.0, abs=0.25 if dtype.itemsize == 1 else 0.02)


def test_a_float32_model_reports_no_rounding(adapter: Path, tmp_path: Path) -> None:
    model = save(random_weights(), tmp_path / "model.safetensors")
    report = json.loads(say("fuse", model, adapter, "-o", tmp_path / "out.safetensors", "--json", home=tmp_path))
    assert report["survived"] is None


@pytest.mark.parametrize("verb", ["fuse", "merge"])
def test_stochastic_rounding_is_repeated_by_its_seed(verb: str, adapter: Path, tmp_path: Path) -> None:
    model = save(plain_float8(torch.float8_e5m2), tmp_path / "model.safetensors")
    other = save({name: 1.01 * tensor.float() for name, tensor in random_weights().items()}, tmp_path / "o.safetensors")
    inputs = (model, f"{adapter}:0.02") if verb == "fuse" else (model, other)
    written = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.safetensors"
        say(verb, *inputs, "-o", out, "--rounding", "stochastic", "--seed", seed, home=tmp_path)
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_stochastic_rounding_keeps_representable_values_and_has_the_right_mean(dtype: torch.dtype) -> None:
    from lora_engine.streaming.rounding import cast_into

    draw = torch.Generator().manual_seed(0)
    exact = torch.randn(1 << 14, generator=draw).to(dtype)
    block = torch.empty_like(exact)
    cast_into(block, exact.float(), torch.Generator().manual_seed(1))
    assert torch.equal(block.float(), exact.float())
    for value in (0.3, -1.7, 2.0 - 1e-3, 1e-3, -3e-5):
        cast = torch.empty(1 << 16, dtype=dtype)
        cast_into(cast, torch.full((1 << 16,), value), draw)
        neighbors = cast.float().unique()
        assert len(neighbors) <= 2
        spread = float(neighbors.max() - neighbors.min())
        assert abs(float(cast.double().mean()) - value) <= 5 * spread / 2 / math.sqrt(1 << 16) + 1e-9


PACKED: dict[str, Any] = {
    "bitsandbytes nf4": {
        f"{LAYERS[0]}.weight": torch.zeros(1536, 1, dtype=torch.uint8),
        f"{LAYERS[0]}.weight.absmax": torch.ones(48),
        f"{LAYERS[0]}.weight.quant_map": torch.ones(16),
        f"{LAYERS[0]}.weight.quant_state.bitsandbytes__nf4": torch.zeros(20, dtype=torch.uint8),
    },
    "bitsandbytes int8": {
        f"{LAYERS[0]}.weight": torch.zeros(SHAPE, dtype=torch.int8),
        f"{LAYERS[0]}.SCB": torch.ones(SHAPE[0]),
    },
    "nvfp4": {
        f"{LAYERS[0]}.weight": torch.zeros(64, 24, dtype=torch.uint8),
        f"{LAYERS[0]}.weight_scale": torch.ones(64, 3).to(torch.float8_e4m3fn),
        f"{LAYERS[0]}.weight_scale_2": torch.ones(()),
    },
    "a scale": {f"{LAYERS[0]}.scale_weight": torch.ones(7)},
}


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_are_refused_by_every_verb_with_their_name(form: str, adapter: Path, tmp_path: Path) -> None:
    model = save(random_weights() | PACKED[form], tmp_path / "model.safetensors")
    plain, out = save(random_weights(), tmp_path / "plain.safetensors"), tmp_path / "out.safetensors"
    for arguments in (
        ("fuse", model, adapter),
        ("fuse", model, adapter, "--take-out"),
        ("extract", model, "--base", plain, "--rank", 2),
        ("extract", plain, "--base", model, "--rank", 2),
        ("merge", model, plain),
        ("convert", model, "--to", "original"),
        *([] if form == "bitsandbytes int8" else [("convert", model, "--to", "plain")]),
    ):
        completed = loraline_here(*arguments, "-o", out, home=tmp_path)
        assert completed.returncode == 1
        assert form in completed.stderr or "quantized weight is malformed" in completed.stderr, arguments
        assert LAYERS[0] in completed.stderr
        assert "Fix: " in completed.stderr
        assert not out.exists()
    completed = loraline_here("inspect", model, "--json", home=tmp_path)
    assert form in completed.stdout + completed.stderr


PIPELINE = """\
name: stripes
base: model.gguf
steps:
  photos:   {uses: ingest, images: images/}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, steps: 2}
"""


def test_a_gguf_file_is_refused_by_every_verb_with_its_name(adapter: Path, tmp_path: Path) -> None:
    plain, model = save(random_weights(), tmp_path / "plain.safetensors"), tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(64))
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(model.read_bytes())
    (tmp_path / "images").mkdir()
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    out = tmp_path / "out.safetensors"
    for path in (model, renamed):
        for arguments in (
            ("inspect", path),
            ("validate", path),
            ("fuse", path, adapter, "-o", out),
            ("fuse", path, adapter, "--take-out", "-o", out),
            ("fuse", plain, adapter, "--take-out", "--original", path, "-o", out),
            ("extract", path, "--base", plain, "--rank", 2, "-o", out),
            ("extract", plain, "--base", path, "--rank", 2, "-o", out),
            ("merge", path, plain, "-o", out),
            ("merge", adapter, adapter, "-m", "ties", "--base", path, "-o", out),
            ("convert", path, "--to", "diffusers", "-o", tmp_path / "out"),
            ("convert", path, "--to", "original", "-o", out),
            ("convert", path, "--to", "plain", "-o", out),
            ("convert", adapter, "--to", "kohya", "--base", path, "-o", out),
            ("resize", adapter, "--rank", 2, "--base", path, "-o", out),
            ("import", adapter, "--name", "a", "--license", "MIT", "--base", path),
            ("generate", "a ring", "--base", path, "-o", tmp_path / "out"),
            ("init", tmp_path / "out", "--base", path),
            ("plan", tmp_path / "pipeline.yaml", "--set", f"base={path.name}"),
            ("run", tmp_path / "pipeline.yaml", "--set", f"base={path.name}"),
        ):
            completed = loraline_here(*arguments, home=tmp_path / "home")
            assert completed.returncode in (1, 2), arguments
            assert "GGUF" in completed.stderr, (arguments, completed.stderr)
            assert "use the bf16, fp16 or fp8" in completed.stderr
            assert not out.exists()


@pytest.mark.parametrize(
    ("form", "text"), [("scale_weight", "scaled f8_e4m3 (2)"), ("scale_weight e5m2", "scaled f8_e5m2 (2)")]
)
def test_inspect_names_the_quantization(form: str, text: str, tmp_path: Path) -> None:
    model = save(FORMS[form](random_weights()), tmp_path / "model.safetensors")
    assert json.loads(say("inspect", model, "--json", home=tmp_path))["quantization"] == text
    plain = save(plain_float8(torch.float8_e4m3fn), tmp_path / "plain.safetensors")
    assert json.loads(say("inspect", plain, "--json", home=tmp_path))["quantization"] == "f8_e4m3 (2)"
    assert "f8_e4m3 (2)" in say("inspect", plain, home=tmp_path)
