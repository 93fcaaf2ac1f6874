"""Tests that kinds a format cannot hold are refused, or approximated by the nearest LoRA on request."""

import pytest
import torch
from law_adapters import random_delta
from torch import nn

from lora_engine.adapters import Adapter, DictTree
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs
from lora_engine.merging.approximate import approximate


def test_a_kind_that_a_format_cannot_hold_is_refused_and_approximated_only_on_request():
    shape = (6, 8)
    names = {"unet.a": shape, "unet.b": shape}
    adapter = Adapter({"unet.a": random_delta("loha", shape), "unet.b": random_delta("lora", shape)}, "sd")
    with pytest.raises(AdapterError, match=r"unet\.a: .*'loha'"):
        codecs["diffusers"].encode(adapter)
    exact = approximate(adapter, "kohya")
    assert exact.adapter is adapter
    assert (exact.retained, exact.total) == ({}, 1.0)
    near = approximate(adapter, "diffusers", rank=2, module_names=names)
    assert near.adapter.modules["unet.b"] is adapter.modules["unet.b"]
    weight = torch.zeros(shape)
    dense, approximation = (item.modules["unet.a"].delta_weight(weight) for item in (adapter, near.adapter))
    lost = float((dense - approximation).square().sum() / dense.square().sum())
    assert near.adapter.modules["unet.a"].rank == 2
    assert near.retained == {"unet.a": pytest.approx(1 - lost, abs=1e-5)}
    assert near.retained["unet.a"] < near.total < 1
    full = approximate(adapter, "diffusers", rank=6, module_names=names)
    assert full.total == pytest.approx(1, abs=1e-6)
    codecs["diffusers"].encode(full.adapter)
    assert approximate(adapter, "diffusers").total >= 0.99
    with pytest.raises(AdapterError, match=r"unet\.a.*base"):
        approximate(Adapter({"unet.a": random_delta("ia3", shape)}, "sd"), "diffusers", module_names=names)


def test_an_approximation_reports_modules_that_it_leaves_out():
    adapter = Adapter({"unet.a": random_delta("full", (6,)), "unet.b": random_delta("lora", (6, 8))}, "sd")
    near = approximate(adapter, "diffusers")
    assert list(near.adapter.modules) == ["unet.b"]
    assert near.retained == {"unet.a": 0.0}
    assert near.total < 1
    with pytest.raises(AdapterError, match="no module"):
        approximate(Adapter({"unet.a": random_delta("full", (6,))}, "sd"), "diffusers")


def test_modules_that_are_refused_beside_an_approximation_are_approximated_too():
    """diffusers needs one kind for all modules of a component."""
    base = DictTree({"unet": nn.ModuleDict({name: nn.Linear(8, 6) for name in "abc"})}, "sd")
    modules = {
        "unet.a": random_delta("dora", (6, 8), axis="input"),
        "unet.b": random_delta("dora", (6, 8)),
        "unet.c": random_delta("lora", (6, 8)),
    }
    near = approximate(Adapter(modules, "sd"), "diffusers", rank=6, base=base)
    assert list(near.adapter.modules) == list(modules)
    assert set(near.retained) == {"unet.a", "unet.b"}
    assert near.adapter.modules["unet.c"] is modules["unet.c"]
    assert near.total == pytest.approx(1, abs=1e-6)
    codecs["diffusers"].encode(near.adapter)


@pytest.mark.parametrize(("form", "axis"), [("comfyui", "output"), ("diffusers", "input")])
def test_a_magnitude_that_a_format_cannot_hold_is_approximated(form, axis):
    layers = nn.ModuleDict({"mid_block": nn.ModuleDict({"a": nn.Linear(8, 6), "b": nn.Linear(8, 6)})})
    base = DictTree({"unet": layers}, "sd")
    held = "input" if axis == "output" else "output"
    modules = {
        f"unet.mid_block.{name}": random_delta("dora", (6, 8), axis=side) for name, side in (("a", axis), ("b", held))
    }
    with pytest.raises(AdapterError, match=r"unet\.mid_block\.a: the magnitude"):
        codecs[form].encode(Adapter(modules, "sd"))
    near = approximate(Adapter(modules, "sd"), form, rank=6, base=base)
    codecs[form].encode(near.adapter)
    if form == "comfyui":  # the other format needs one kind
        assert near.adapter.modules["unet.mid_block.b"] is modules["unet.mid_block.b"]
    approximation = near.adapter.modules["unet.mid_block.a"]
    assert approximation.kind == "lora"
    weight = layers["mid_block"]["a"].weight.detach()
    torch.testing.assert_close(
        approximation.delta_weight(weight), modules["unet.mid_block.a"].delta_weight(weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("module", ["final_layer_norm", "embeddings.token_embedding"])
def test_comfyui_is_not_given_layers_of_text_encoders_that_it_does_not_read(module):
    name, shape = f"text_encoder.text_model.{module}", (6,) if module.endswith("norm") else (6, 8)
    adapter = Adapter({name: random_delta("full", shape)}, "sd")
    with pytest.raises(AdapterError, match=f"{name}: ComfyUI does not read adapters"):
        codecs["comfyui"].encode(adapter)
    codecs["kohya"].encode(adapter)


def test_comfyui_is_given_the_projection_of_sdxls_second_text_encoder():
    adapter = Adapter({"text_encoder_2.text_projection": random_delta("lora", (6, 8))}, "sdxl")
    tensors, _ = codecs["comfyui"].encode(adapter)
    assert {key.partition(".")[0] for key in tensors} == {"lora_te2_text_projection"}


def test_parts_that_cannot_be_fused_are_approximated_together():
    names = {f"transformer.transformer_blocks.0.{part}": (12, 12) for part in ("attn.to_q", "attn.to_k", "attn.to_v")}
    names |= {"transformer.transformer_blocks.1.attn.to_out.0": (12, 12)}
    adapter = Adapter({n: random_delta("lokr", s, seed=i) for i, (n, s) in enumerate(names.items())}, "flux")
    with pytest.raises(AdapterError, match="cannot be converted exactly"):
        codecs["comfyui"].encode(adapter)
    near = approximate(adapter, "comfyui", rank=12, module_names=names)
    codecs["comfyui"].encode(near.adapter)
    *parts, alone = names
    assert sorted(near.retained) == sorted(parts)
    assert near.adapter.modules[alone] is adapter.modules[alone]
    for name in parts:
        weight = torch.zeros(12, 12)
        actual, expected = (item.modules[name].delta_weight(weight) for item in (near.adapter, adapter))
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
