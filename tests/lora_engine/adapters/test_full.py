"""Full differences: biases, norms, and their keys in files."""

import re

import pytest
import torch
from law_adapters import input_of, layer_of
from safetensors.torch import load_file, save_file
from torch import nn

from lora_engine.adapters import Adapter, DictTree, FullDelta, LoraDelta, attach, collapse, create_adapter
from lora_engine.formats import codecs, read_adapter, write_adapter

KOHYA = "lora_unet_layer"


def tree_of(layer):
    return DictTree({"unet": nn.ModuleDict({"layer": layer})})


@pytest.mark.parametrize("name", ["linear", "conv 3x3", "layer norm", "group norm"])
def test_a_difference_of_the_bias_changes_only_the_bias(name):
    layer, x = layer_of(name), input_of(layer_of(name))
    plain = layer(x).detach()
    tree, adapter = tree_of(layer), Adapter({"unet.layer": FullDelta(bias=torch.randn(layer.bias.shape))})
    before = layer.weight.detach().clone()
    with torch.no_grad(), attach(tree, adapter, 0.5):
        attached = tree.get_module("unet.layer")(x)
    collapse(tree, adapter, 0.5)
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(attached, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(attached, plain, atol=1e-3)


def test_a_layer_without_bias_gets_one_when_the_difference_of_a_bias_is_added():
    layer = nn.Linear(6, 5, bias=False)
    change = torch.randn(5)
    collapse(tree_of(layer), Adapter({"unet.layer": FullDelta(bias=change)}))
    assert torch.equal(layer.bias, change)


def test_training_the_bias_is_an_option_for_layers_that_have_one():
    layers = nn.ModuleDict({"with_bias": nn.Linear(3, 4), "without_bias": nn.Linear(3, 4, bias=False)})
    adapter = create_adapter({"unet": layers}, "*", "full", options={"train_bias": True})
    assert set(adapter.modules["unet.with_bias"].factors()) == {"diff", "bias"}
    assert set(adapter.modules["unet.without_bias"].factors()) == {"diff"}
    plain = create_adapter({"unet": layers}, "*", "full")
    assert [set(delta.factors()) for delta in plain.modules.values()] == [{"diff"}, {"diff"}]


@pytest.mark.parametrize(
    ("delta", "suffixes"),
    [
        (FullDelta(torch.ones(4, 3)), {"diff"}),
        (FullDelta(torch.ones(4, 3), torch.ones(4)), {"diff", "diff_b"}),
        (FullDelta(bias=torch.ones(4)), {"diff_b"}),
        (FullDelta(torch.ones(4), torch.ones(4)), {"w_norm", "b_norm"}),
        (FullDelta(torch.ones(4)), {"w_norm"}),
    ],
)
@pytest.mark.parametrize("form", ["loraline", "kohya"])
def test_norms_and_other_layers_have_the_keys_that_readers_expect(delta, suffixes, form, tmp_path):
    adapter = Adapter({"unet.layer": delta})
    file = write_adapter(tmp_path / "a.safetensors", adapter, format=form)[0]
    assert {key.rpartition(".")[2] for key in load_file(file)} == suffixes
    assert read_adapter(file, {"unet.layer": delta.diff.shape if delta.diff is not None else (4, 3)})[0] == adapter


def test_both_key_names_are_read_for_every_layer(tmp_path):
    save_file({f"{KOHYA}.diff": torch.ones(4), f"{KOHYA}.diff_b": torch.ones(4)}, tmp_path / "a.safetensors")
    save_file({f"{KOHYA}.w_norm": torch.ones(4), f"{KOHYA}.b_norm": torch.ones(4)}, tmp_path / "b.safetensors")
    first, second = (read_adapter(tmp_path / f"{name}.safetensors", {"unet.layer": (4,)})[0] for name in "ab")
    assert first == second


def test_a_1x1_convolutions_difference_fits_a_linear_layer():
    delta = FullDelta(torch.ones(4, 3, 1, 1)).reshaped_for((4, 3))
    assert delta.diff.shape == (4, 3)
    assert list(FullDelta(torch.ones(4, 3, 1, 1)).issues((4, 3))) == []


INVALID = {
    "nothing": (FullDelta(), None, "diff", "neither"),
    "an empty difference": (FullDelta(torch.ones(0, 3)), None, "diff", r"\[0, 3\]"),
    "a number": (FullDelta(torch.tensor(1.0)), None, "diff", r"\[\]"),
    "a matrix of a bias": (FullDelta(bias=torch.ones(4, 1)), None, "bias", r"\[4, 1\]"),
    "a bias of other outputs": (FullDelta(torch.ones(4, 3), torch.ones(3)), None, "bias", r"\[3\]"),
    "a bias of another base": (FullDelta(bias=torch.ones(4)), (5, 3), "bias", r"\[4\]"),
    "another base": (FullDelta(torch.ones(4, 3)), (4, 5), "diff", r"\[4, 3\]"),
    "as many values, otherwise": (FullDelta(torch.ones(4, 3)), (3, 4), "diff", r"\[4, 3\]"),
    "another kernel": (FullDelta(torch.ones(4, 3, 1, 1)), (4, 3, 3, 3), "diff", r"\[4, 3, 1, 1\]"),
}


@pytest.mark.parametrize("case", INVALID)
def test_structural_issues_are_named(case):
    delta, shape, factor, problem = INVALID[case]
    issues = list(delta.issues(shape))
    assert [issue.factor for issue in issues] == [factor]
    assert re.search(problem, issues[0].problem)


def test_the_bias_of_a_lora_is_read_and_written_in_both_layouts(tmp_path):
    down, up, bias = torch.randn(2, 3), torch.randn(4, 2), torch.randn(4)
    name = "unet.down_blocks.0.proj_in"
    adapter = Adapter({name: LoraDelta(down, up, 2.0, bias=bias)}, "sd")
    for form, suffix in {"kohya": "diff_b", "diffusers": "lora_B.bias", "peft": "lora_B.bias"}.items():
        tensors, metadata = codecs[form].encode(adapter)
        assert [key for key in tensors if key.endswith(suffix)]
        assert codecs[form].is_lossless(adapter)
        assert codecs[form].decode(tensors, metadata, {name: (4, 3)}) == adapter


@pytest.mark.parametrize("form", ["diffusers", "peft"])
def test_pefts_scale_is_removed_from_a_bias_and_restored(form):
    """PEFT scales the bias of `lora_B` by alpha / rank; a delta's bias is unscaled."""
    name = "unet.down_blocks.0.proj_in"
    delta = LoraDelta(torch.randn(2, 3), torch.randn(4, 2), 0.3, bias=torch.randn(4))
    adapter = Adapter({name: delta}, "sd")
    tensors, metadata = codecs[form].encode(adapter)
    stored = next(tensor for key, tensor in tensors.items() if key.endswith("lora_B.bias"))
    back = codecs[form].decode(tensors, metadata, {name: (4, 3)})
    torch.testing.assert_close(stored * back.modules[name].scale, delta.bias)
    torch.testing.assert_close(back.modules[name].delta_bias(None).float(), delta.bias)
    again, _ = codecs[form].encode(back)
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert codecs[form].is_lossless(back)
    assert not codecs[form].is_lossless(adapter)
