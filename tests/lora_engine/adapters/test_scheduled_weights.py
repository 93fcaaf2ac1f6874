"""Weights that change over the steps: the layers that get products, equal outputs, the base as it was."""

import pytest
import torch
from torch import nn

from lora_engine.adapters import Adapter, FullDelta, LoraDelta, collapse
from lora_engine.adapters.rows import RowLayer
from lora_engine.adapters.scheduled_weights import ScheduledWeights
from lora_engine.errors import AdapterError

LARGE, SMALL, NORM = "unet.0", "unet.2", "unet.1"
"""A weight of many values, a small one, and a norm."""


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 8))


def adapter(seed):
    draw = torch.Generator().manual_seed(seed)
    modules = {
        LARGE: LoraDelta(torch.randn(4, 512, generator=draw), 0.01 * torch.randn(512, 4, generator=draw), 4.0),
        SMALL: LoraDelta(torch.randn(4, 512, generator=draw), 0.01 * torch.randn(8, 4, generator=draw), 4.0),
        NORM: FullDelta(0.1 * torch.randn(512, generator=draw), None),
    }
    return Adapter(modules)


def fused(net, adapters, multipliers, x):
    other = network()
    other.load_state_dict(net.state_dict())
    for own, multiplier in zip(adapters, multipliers, strict=True):
        collapse({"unet": other}, own, multiplier)
    return other(x)


@pytest.mark.parametrize(("rows", "predictions", "products"), [(4, 1, {LARGE}), (4, 2000, set()), (4096, 1, set())])
@torch.no_grad()
def test_large_weights_of_few_rows_get_products_and_outputs_equal_fused_weights(rows, predictions, products):
    net, adapters = network(), [adapter(1), adapter(2)]
    layers, parameters = list(net), [parameter.clone() for parameter in net.parameters()]
    plain, x = network(), torch.randn(rows, 512, generator=torch.Generator().manual_seed(3))
    with ScheduledWeights({"unet": net}, adapters) as weights:
        for step in range(4):
            multipliers = [0.2 * step, 1.0 - 0.3 * step]
            weights.set_multipliers(lambda index, name, values=multipliers: values[index])
            for _ in range(predictions if step == 0 else 1):
                out = net(x)
            expected = fused(plain, adapters, multipliers, x)
            assert (out - expected).abs().max() <= 5e-6 * expected.abs().max()
        assert weights.products == products
        assert isinstance(net[0], RowLayer) == bool(products)
    assert list(net) == layers
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), parameters, strict=True))
    assert not any(layer._forward_hooks for layer in net)


@torch.no_grad()
def test_weights_that_change_before_a_prediction_stay_merged():
    net = network()
    with ScheduledWeights({"unet": net}, [adapter(1)]) as weights:
        weights.set_multipliers(lambda index, name: 0.1)
        weights.set_multipliers(lambda index, name: 0.2)
        assert weights.products == set()
        x = torch.ones(2, 512)
        expected = fused(network(), [adapter(1)], [0.2], x)
        torch.testing.assert_close(net(x), expected)


def test_an_adapter_that_does_not_fit_is_refused():
    with pytest.raises(AdapterError, match=r"unet\.0"):
        ScheduledWeights({"unet": network()}, [Adapter({LARGE: LoraDelta(torch.ones(4, 5), torch.ones(8, 4), 4.0)})])
