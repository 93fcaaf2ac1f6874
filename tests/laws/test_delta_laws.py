"""Laws for every registered adapter kind on every type of layer."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_adapters import (
    LAYERS,
    applies_to,
    dense_output,
    forward_of,
    input_of,
    layer_of,
    op_of,
    random_delta,
    tree_of,
    tucker_delta,
)
from torch import nn

from lora_engine.adapters import Adapter, DictTree, LoraDelta, attach, collapse, create_adapter, kinds
from lora_engine.adapters.delta import fill_kaiming_uniform
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.merged_weights import MergedWeights

PAIRS = [(kind, name) for kind in kinds for name in LAYERS if applies_to(kind, layer_of(name))]
pairs = pytest.mark.parametrize(("kind", "layer_name"), PAIRS)


def test_the_laws_cover_every_kind_and_layer():
    assert {kind for kind, _ in PAIRS} == set(kinds)
    assert {layer for _, layer in PAIRS} == set(LAYERS)
    assert set(PAIRS) >= {("full", layer) for layer in LAYERS}
    assert set(PAIRS) >= {(kind, layer) for kind in kinds for layer in LAYERS if "norm" not in layer}


def adapter_of(kind, layer, seed=1):
    return Adapter({"unet.0": random_delta(kind, layer.weight.shape, seed=seed)})


@pairs
def test_merged_weights_equal_stacked_attachments_and_removal_restores_the_parameters(kind, layer_name):
    layer = layer_of(layer_name)
    tree, x = tree_of(layer), input_of(layer)
    others = adapter_of("full", layer, seed=2), adapter_of(kind, layer, seed=3)
    adapters = [adapter_of(kind, layer), *others]
    weight, bias, before = layer.weight, bias_of(layer), layer(x)
    with attach(tree, adapters[0], 0.7), attach(tree, adapters[1], -0.4), attach(tree, adapters[2], 0.2):
        stacked = tree.get_module("unet.0")(x)
    with MergedWeights(tree, adapters) as merged, torch.no_grad():
        assert torch.equal(layer(x), before)
        merged.set_multipliers(lambda index, name: (0.7, -0.4, 0.2)[index])
        torch.testing.assert_close(layer(x), stacked, rtol=1e-4, atol=1e-5)
        merged.set_multipliers(lambda index, name: 0.0)
        assert torch.equal(layer(x), before)
        merged.set_multipliers(lambda index, name: 1.0)
    assert layer.weight is weight
    assert bias_of(layer) is bias
    assert torch.equal(layer(x), before)


@pairs
def test_a_new_adapter_has_no_effect(kind, layer_name):
    layer = layer_of(layer_name)
    adapter = create_adapter(tree_of(layer), "*", kind, rank=2, generator=torch.Generator().manual_seed(0))
    delta = adapter.modules["unet.0"]
    assert torch.count_nonzero(delta.delta_weight(layer.weight)) == 0
    x = input_of(layer)
    with attach(tree_of(layer), adapter) as attachment, torch.no_grad():
        wrapped = attachment._layers["unet.0"]
        assert torch.equal(wrapped(x), layer(x))


@pairs
def test_a_new_adapter_is_the_same_while_another_thread_loads_a_model(kind, layer_name, monkeypatch):
    tree = tree_of(layer_of(layer_name))

    def create():
        generator = torch.Generator().manual_seed(0)
        return create_adapter(tree, "*", kind, rank=2, generator=generator).modules["unet.0"]

    before = create()
    # transformers and diffusers do this to the whole process.
    for name in ("kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor.fill_(torch.nan))
    during = create()
    assert all(torch.equal(factor, during.factors()[name]) for name, factor in before.factors().items())


def test_factors_are_filled_as_torch_does():
    for shape in ((3, 5), (4, 6, 3, 3), (2, 1, 1, 1)):
        own, expected = torch.empty(shape), torch.empty(shape)
        fill_kaiming_uniform(own, torch.Generator().manual_seed(3))
        nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(3))
        assert torch.equal(own, expected)


@pairs
@settings(max_examples=8)
@given(st.integers(1, 3), st.floats(0.1, 20), st.floats(-2, 2), st.integers(0, 2**31))
def test_forward_is_the_layer_with_the_changed_weight(kind, layer_name, rank, alpha, multiplier, seed):
    layer = layer_of(layer_name)
    delta = random_delta(kind, layer.weight.shape, rank, alpha, seed)
    x = input_of(layer, seed)
    with torch.no_grad():
        expected = dense_output(delta, layer, x, multiplier)
        output = forward_of(delta, layer, x, multiplier)
    assert delta.delta_weight(layer.weight).dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("layer_name", [name for name in LAYERS if name.startswith("conv")])
def test_a_tucker_core_equals_its_dense_delta(layer_name):
    layer = layer_of(layer_name)
    delta, x = tucker_delta(layer.weight.shape), input_of(layer)
    with torch.no_grad():
        expected, output = dense_output(delta, layer, x, 0.5), forward_of(delta, layer, x, 0.5)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(delta.without_core().delta_weight(layer.weight), delta.delta_weight(layer.weight))


@pairs
@pytest.mark.parametrize("multiplier", [1.0, -0.7])
def test_collapsed_equals_attached(kind, layer_name, multiplier):
    layer = layer_of(layer_name)
    tree, adapter, x = tree_of(layer), adapter_of(kind, layer), input_of(layer)
    with torch.no_grad(), attach(tree, adapter, multiplier):
        attached = tree.get_module("unet.0")(x)
    collapse(tree, adapter, multiplier)
    with torch.no_grad():
        collapsed = tree.get_module("unet.0")(x)
    torch.testing.assert_close(collapsed, attached, rtol=1e-5, atol=1e-5)


@pairs
def test_multiplier_0_is_the_base_bit_for_bit(kind, layer_name):
    layer = layer_of(layer_name)
    tree, x = tree_of(layer), input_of(layer)
    with torch.no_grad():
        plain = layer(x)
        with attach(tree, adapter_of(kind, layer), 0.0) as attachment:
            assert torch.equal(tree.get_module("unet.0")(x), plain)
            attachment.multiplier = 1.0
            assert not torch.allclose(tree.get_module("unet.0")(x), plain)
    before = layer.weight.detach().clone()
    collapse(tree, adapter_of(kind, layer), 0.0)
    assert torch.equal(layer.weight, before)


@pairs
def test_detach_restores_the_same_base_modules(kind, layer_name):
    layer = layer_of(layer_name)
    model = nn.Sequential(layer, nn.Identity())
    tree = DictTree({"unet": model})
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.weight.requires_grad_(False)
    layer.eval()
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    x = input_of(layer)
    with attach(tree, adapter_of(kind, layer), trainable=True) as attachment:
        assert not tree.get_module("unet.0").training
        tree.get_module("unet.0")(x).sum().backward()
        assert len(attachment.parameters()) > 0
        assert all(parameter.grad is not None for parameter in attachment.parameters())
    assert calls == [1]
    assert layer.weight.grad is None
    after = list(model.named_modules())
    assert [name for name, _ in after] == [name for name, _ in modules]
    assert all(new is old for (_, new), (_, old) in zip(after, modules, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not layer.training
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pairs
@pytest.mark.parametrize("first_off", [0, 1])
def test_stacked_attachments_detach_in_any_order(kind, layer_name, first_off):
    layer = layer_of(layer_name)
    tree, x = tree_of(layer), input_of(layer)
    both = [attach(tree, adapter_of(kind, layer, seed), 0.5) for seed in (1, 2)]
    with torch.no_grad():
        both[first_off].detach()
        left = tree.get_module("unet.0")(x)
        both[1 - first_off].detach()
        with attach(tree, adapter_of(kind, layer, 2 - first_off), 0.5):
            assert torch.equal(tree.get_module("unet.0")(x), left)
    assert tree.get_module("unet.0") is layer


@pairs
def test_stacked_adapters_add_their_differences_to_the_base(kind, layer_name):
    """No delta scales or rotates the difference of another adapter."""
    layer, x = layer_of(layer_name), input_of(layer_of(layer_name))
    tree, own = tree_of(layer), random_delta(kind, layer.weight.shape, seed=1)
    other = random_delta("full", layer.weight.shape, seed=2)
    bias, change = bias_of(layer), own.delta_bias(bias_of(layer))
    bias = bias if change is None else change + (0 if bias is None else bias)
    weight = layer.weight + own.delta_weight(layer.weight) + other.delta_weight(layer.weight)
    expected = op_of(layer)(x, weight, bias)
    for order in ((own, other), (other, own)):
        lower, upper = (attach(tree, Adapter({"unet.0": delta})) for delta in order)
        with torch.no_grad(), lower, upper:
            output = tree.get_module("unet.0")(x)
            upper.detach()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_dtype_of_the_base(kind, layer_name, dtype):
    layer = layer_of(layer_name).to(dtype)
    tree, x = tree_of(layer), input_of(layer)
    x = x.to(dtype) if x.is_floating_point() else x
    adapter = adapter_of(kind, layer)
    with torch.no_grad(), attach(tree, adapter):
        assert tree.get_module("unet.0")(x).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert tree.get_module("unet.0")(x).dtype == layer(x).dtype
    with attach(tree, adapter.to(dtype=torch.float16)), torch.no_grad():
        assert tree.get_module("unet.0")(x).dtype == dtype


def test_wrong_delta_fails_the_law():
    """Negative control: a forward without the scale fails."""

    class Forgetful(LoraDelta):
        @property
        def scale(self):
            return 1.0

        def delta_weight(self, base):
            return super().delta_weight(base) * (self.alpha / self.rank)

    layer, x = layer_of("linear"), input_of(layer_of("linear"))
    made = random_delta("lora", layer.weight.shape)
    wrong = Forgetful(made.down, made.up, made.alpha)
    with torch.no_grad():
        expected = op_of(layer)(x, layer.weight + wrong.delta_weight(layer.weight), layer.bias)
        assert not torch.allclose(
            wrong.forward(x, layer(x), layer.weight, bias_of(layer), op_of(layer)), expected, atol=1e-3
        )
