"""Adapters merged into weights for a while: no drift, 16-bit weights, refusals."""

import pytest
import torch
from torch import nn

from lora_engine.adapters import Adapter, LoraDelta, attach, collapse
from lora_engine.adapters.merged_weights import MergedWeights, can_merge
from lora_engine.errors import AdapterError

NAME = "unet.0"


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8)).to(dtype)


def adapter(seed=1, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 12, generator=generator), torch.randn(8, 4, generator=generator)
    return Adapter({NAME: LoraDelta(down, scale * up, 4.0, bias=torch.randn(8, generator=generator))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_200_changes_leave_the_weights_that_one_change_gives(dtype):
    net = network(dtype)
    with MergedWeights({"unet": net}, [adapter(1), adapter(2)]) as merged:
        merged.set_multipliers(lambda index, name: 0.7)
        first = net[0].weight.detach().clone(), net[0].bias.detach().clone()
        for step in range(200):
            merged.set_multipliers(lambda index, name, step=step: 0.01 * step - index)
        merged.set_multipliers(lambda index, name: 0.7)
        assert torch.equal(net[0].weight, first[0])
        assert torch.equal(net[0].bias, first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_adapter_is_merged_as_it_is_collapsed(dtype):
    net, collapsed = network(dtype), network(dtype)
    collapse({"unet": collapsed}, adapter(), 0.7)
    with MergedWeights({"unet": net}, [adapter()]) as merged:
        merged.set_multipliers(lambda index, name: 0.7)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(net[0].weight, collapsed[0].weight, rtol=2 * unit, atol=unit)
        torch.testing.assert_close(net[0].bias, collapsed[0].bias, rtol=2 * unit, atol=unit)


def test_equal_multipliers_compute_nothing(monkeypatch):
    net = network()
    with MergedWeights({"unet": net}, [adapter()]) as merged:
        merged.set_multipliers(lambda index, name: 0.5)
        version = net[0].weight._version
        merged.set_multipliers(lambda index, name: 0.5)
        assert net[0].weight._version == version
        merged.set_multipliers(lambda index, name: 0.6)
        assert net[0].weight._version > version


def test_a_layer_with_an_attached_adapter_is_refused_and_nothing_changes():
    net = network()
    with attach({"unet": net}, adapter(2)):
        wrapped = net[0]
        with pytest.raises(AdapterError, match="an adapter is attached to it"):
            MergedWeights({"unet": net}, [adapter()])
        assert net[0] is wrapped
        assert not can_merge(wrapped)
    assert can_merge(net[0])


def test_an_adapter_that_does_not_fit_is_refused_before_any_layer_changes():
    net = network()
    wrong = Adapter({NAME: LoraDelta(torch.ones(4, 5), torch.ones(8, 4), 4.0)})
    with pytest.raises(AdapterError, match=r"unet\.0"):
        MergedWeights({"unet": net}, [adapter(), wrong])
    assert type(net[0]) is nn.Linear
