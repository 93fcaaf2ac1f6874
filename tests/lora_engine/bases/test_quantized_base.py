from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_engine.adapters import LayerSettings, attach, collapse, create_adapter, kinds
from lora_engine.adapters.adapted import AdaptedLayer, innermost
from lora_engine.adapters.layer import LayerOp, meta_weight
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.bases.quantized import Quantization, QuantizedLinear, check_quantization
from lora_engine.errors import AdapterError, SettingsError

pytest.importorskip("bitsandbytes")

BITS: tuple[Quantization, ...] = ("8bit", "4bit", "fp8")
# Largest relative error of the network's output, for these random weights.
TOLERANCE = {"8bit": 0.02, "4bit": 0.3, "fp8": 0.08}
SHAPES = ["small-sd", "small-flux"]
READS_ONLY_SHAPE = {"pissa"}  # reads the weight, although its delta depends only on the shape
Load = Callable[[str, Quantization], BaseModel]


@pytest.fixture(scope="module")
def load(untrained_base: Callable[[str], Path]) -> Load:
    return lambda shape, bits: load_base(str(untrained_base(shape)), device="cpu", quantise=bits)


def inputs_of(base: BaseModel) -> tuple[Tensor, Tensor, Conditioning]:
    noisy = torch.randn(2, *base.latent_shape((16, 16)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return noisy, torch.tensor([100, 700]), base.encode_text(["a", "b"])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_quantized_base_is_close_to_the_original(load: Load, shape: str, bits: Quantization) -> None:
    plain, base = load(shape, "none"), load(shape, bits)
    assert base.module_names() == plain.module_names()
    expected, actual = plain.predict(*inputs_of(plain)), base.predict(*inputs_of(base))
    error = float((actual - expected).norm() / expected.norm())
    assert 0.0 < error < TOLERANCE[bits]


@pytest.mark.parametrize("bits", BITS)
def test_only_the_linear_layers_of_the_blocks_are_quantized(load: Load, bits: Quantization) -> None:
    base = load("small-flux", bits)
    quantized = {name for name in base.module_names() if isinstance(base.get_module(name), QuantizedLinear)}
    blocks = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")
    linear = {name for name in base.module_names() if isinstance(base.get_module(name), nn.Linear)}
    assert quantized == {name for name in linear if name.startswith(blocks)}
    assert quantized < linear


@pytest.mark.parametrize("bits", BITS)
def test_the_layer_computes_with_its_dequantized_weight(bits: Quantization) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48).requires_grad_(False)
    layer = QuantizedLinear(plain, bits)
    x = torch.randn(3, 5, 64, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=2e-2)
    assert (layer.weight - plain.weight).norm() < TOLERANCE[bits] * plain.weight.norm()
    assert (layer.meta_weight.shape, layer.meta_weight.dtype) == (plain.weight.shape, plain.weight.dtype)
    assert layer.meta_weight.untyped_storage().nbytes() == plain.weight.element_size()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, layer.weight.sum(0).expand(3, 5, 64), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bits", BITS)
def test_a_lora_trains_on_a_quantized_base_and_the_base_stays(load: Load, bits: Quantization) -> None:
    base = load("small-sd", bits)
    before = {name: value.clone() for name, value in base.modules["unet"].state_dict().items()}
    inputs = inputs_of(base)
    with torch.no_grad():
        target = base.predict(*inputs) + 0.1
    adapter = create_adapter(base, "attention", rank=2, generator=torch.Generator().manual_seed(0))
    with attach(base, adapter, trainable=True) as attachment:
        optimizer = torch.optim.Adam(attachment.parameters(), lr=0.02)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(base.predict(*inputs), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        own = {id(parameter) for parameter in attachment.parameters()}
        with_gradient = [value for value in base.modules["unet"].parameters() if value.grad is not None]
        assert {id(value) for value in with_gradient} == own
    assert losses[-1] < 0.8 * losses[0]
    after = base.modules["unet"].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", sorted(kinds))
def test_every_kind_works_on_a_quantized_layer(kind: str, bits: Quantization) -> None:
    torch.manual_seed(1)
    layer = QuantizedLinear(nn.Linear(32, 32).requires_grad_(False), bits)
    generator = torch.Generator().manual_seed(2)
    delta = LayerSettings(kind, 4).create(layer, generator)
    factors = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in delta.factors().items()
    }
    delta = delta.with_factors(factors)
    x = torch.randn(6, 32, generator=generator)
    wrapped = AdaptedLayer(layer, delta, 0.7)
    with torch.no_grad():
        change = 0.7 * delta.delta_weight(layer.weight)
        bias = delta.delta_bias(layer.bias)
        expected = layer(x) + LayerOp()(x, change, None if bias is None else 0.7 * bias)
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(kinds))
def test_reads_base_states_whether_a_kind_reads_weight_values(kind: str) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(32, 32)
    generator = torch.Generator().manual_seed(2)
    delta = LayerSettings(kind, 4).create(layer, generator)
    # Noise, because equal blocks would be no rotation.
    factors = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in delta.factors().items()
    }
    delta = delta.with_factors(factors)
    weight = layer.weight.detach()
    same = torch.equal(delta.delta_weight(weight), delta.delta_weight(weight + torch.randn(weight.shape)))
    assert same is not delta.reads_base or kind in READS_ONLY_SHAPE
    assert delta.reads_base or kind not in READS_ONLY_SHAPE


def test_an_adapter_is_not_collapsed_into_a_quantized_weight(load: Load) -> None:
    base = load("small-sd", "8bit")
    adapter = create_adapter(base, "attention", rank=2)
    with pytest.raises(AdapterError, match="quantized"):
        collapse(base, adapter)


def test_the_meta_weight_of_a_plain_layer_is_its_weight() -> None:
    layer = nn.Linear(4, 4)
    assert meta_weight(innermost(layer)) is layer.weight


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SettingsError, match="quantised"):
        check_quantization("4bit")
    check_quantization("none")


def test_the_setting_is_refused_before_the_base_is_read(load: Load) -> None:
    with pytest.raises(SettingsError, match="2bit"):
        load("small-sd", "2bit")  # type: ignore[arg-type]
