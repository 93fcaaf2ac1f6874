"""LoHa: outputs and gradients with and without cores, and refusals."""

import pytest
import torch
from law_adapters import NAMES, dense_output, forward_of, gradients_of, input_of, layer_of, moved_delta, random_delta
from torch import nn

from lora_engine.adapters import Adapter, LohaDelta
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs


def loha(layer, rank, **options):
    return moved_delta(layer, "loha", rank, 3.0, spread=1.0, **options)


def by_hand(delta, shape):
    first = delta.up1 @ delta.down1
    return (delta.alpha / delta.rank * first * (delta.up2 @ delta.down2)).reshape(shape)


@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3", "conv 1x1", "conv circular", "embedding"])
def test_the_delta_is_the_product_of_two_products(layer_name):
    layer = layer_of(layer_name)
    delta = loha(layer, 2)
    torch.testing.assert_close(delta.delta_weight(layer.weight), by_hand(delta, layer.weight.shape))
    assert delta.core1 is None


@pytest.mark.parametrize("layer_name", ["conv 3x3", "conv strided", "conv oblong", "conv grouped"])
def test_with_cores_it_equals_its_dense_delta(layer_name):
    layer = layer_of(layer_name)
    delta, x = loha(layer, 2, tucker=True), input_of(layer)
    assert delta.core1.shape == (2, 2, *layer.weight.shape[2:])
    with torch.no_grad():
        halves = [
            torch.einsum("mp,mn...,nr->pr...", up, core, down)
            for up, core, down in ((delta.up1, delta.core1, delta.down1), (delta.up2, delta.core2, delta.down2))
        ]
        torch.testing.assert_close(delta.delta_weight(layer.weight), 1.5 * halves[0] * halves[1])
        output, expected = forward_of(delta, layer, x), dense_output(delta, layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 50), (40, 12, 3, 3)])
def test_the_lora_of_the_rank_squared_is_the_same_delta(shape):
    delta = random_delta("loha", shape)
    lora = delta.as_lora(shape)
    assert lora.rank == 4
    weight = torch.zeros(shape)
    torch.testing.assert_close(lora.delta_weight(weight), delta.delta_weight(weight))


@pytest.mark.parametrize("make", [lambda: nn.Linear(50, 40), lambda: nn.Conv2d(12, 40, 3)], ids=["linear", "conv"])
def test_a_large_layer_uses_the_lora_form_with_the_same_output_and_gradients(make):
    torch.manual_seed(0)
    layer = make()
    delta, x = loha(layer, 2), input_of(layer)
    output, ours = gradients_of(delta, lambda copy: forward_of(copy, layer, x))
    expected, dense = gradients_of(delta, lambda copy: dense_output(copy, layer, x))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in ours.items():
        size = max(1.0, float(dense[name].abs().max()))
        torch.testing.assert_close(gradient, dense[name], rtol=1e-3, atol=1e-4 * size)


BAD = {
    "ranks that disagree": ("up2", torch.ones(5, 3), "up2"),
    "columns that disagree": ("down2", torch.ones(2, 7), "down2"),
    "three dimensions": ("up1", torch.ones(5, 2, 1), "up1"),
    "an empty factor": ("down1", torch.ones(2, 0), "down1"),
    "one core": ("core2", torch.ones(2, 2, 3, 3), "core2"),
}


@pytest.mark.parametrize("case", BAD)
def test_issues_are_found(case):
    name, factor, expected_factor = BAD[case]
    good = random_delta("loha", (5, 6))
    assert list(good.issues((5, 6))) == []
    bad = good.with_factors({**good.factors(), name: factor})
    assert expected_factor in [issue.factor for issue in bad.issues()]


@pytest.mark.parametrize(("shape", "expected_factor"), [((6, 6), "up1"), ((5, 7), "down1"), ((5, 6, 3, 3), "down1")])
def test_a_shape_that_does_not_fit_is_found(shape, expected_factor):
    assert [issue.factor for issue in random_delta("loha", (5, 6)).issues(shape)] == [expected_factor]
    assert [issue.factor for issue in loha(nn.Conv2d(4, 6, 3), 2, tucker=True).issues((6, 4, 5, 5))] == [
        "core1",
        "core2",
    ]


@pytest.mark.parametrize("alpha", [float("nan")])
def test_an_invalid_alpha_is_found(alpha):
    good = random_delta("loha", (5, 6))
    assert [issue.factor for issue in LohaDelta.from_factors(good.factors(), alpha).issues()] == ["alpha"]


def test_a_file_that_lacks_a_factor_is_refused_by_its_name():
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors, metadata = codecs["kohya"].encode(Adapter({name: random_delta("loha", NAMES[name])}, "sd"))
    del tensors[next(key for key in tensors if key.endswith("hada_w2_a"))]
    with pytest.raises(AdapterError, match="hada_w2_a"):
        codecs["kohya"].decode(tensors, metadata, NAMES)


def test_diffusers_format_refuses_it_with_the_reason():
    name = "unet.time_embedding.linear_1"
    with pytest.raises(AdapterError, match="'loha', because diffusers does not load it"):
        codecs["diffusers"].encode(Adapter({name: random_delta("loha", NAMES[name])}, "sd"))
