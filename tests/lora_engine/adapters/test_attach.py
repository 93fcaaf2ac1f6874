"""Attaching, detaching and collapsing: refusals, unchanged bases, and the wrapper's attributes."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_engine.adapters import (
    Adapter,
    DictTree,
    LoraDelta,
    adaptable_layers,
    attach,
    collapse,
    create_adapter,
    module_shapes,
)
from lora_engine.errors import AdapterError, SettingsError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Conv2d(3, 3, 3)])
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.blocks[0](self.first(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


def delta(out=6, inner=4, rank=2):
    return LoraDelta(torch.ones(rank, inner), torch.ones(out, rank), float(rank))


def test_a_rank_above_the_layers_is_refused_by_name(model):
    with pytest.raises(SettingsError, match=r"unet\.first: rank 5 .* Allowed: 1 to 4"):
        create_adapter({"unet": model}, "unet.first", rank=5)


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(model, rank):
    with pytest.raises(SettingsError, match="Allowed: 1 to"):
        create_adapter({"unet": model}, "unet.first", rank=rank)


def test_the_same_generator_makes_the_same_adapter(model):
    first, second = (
        create_adapter(DictTree({"unet": model}, "sd", "f"), ["unet.first", "unet.blocks.*"], rank=2, generator=g)
        for g in seeds(2)
    )
    assert first == second
    assert (first.base, first.fingerprint) == ("sd", "f")
    assert first != create_adapter(
        DictTree({"unet": model}, "sd", "f"), ["unet.first", "unet.blocks.*"], rank=2, generator=next(seeds(1, 5))
    )


def seeds(count, seed=3):
    return (torch.Generator().manual_seed(seed) for _ in range(count))


@pytest.mark.parametrize(
    ("name", "part", "problem"),
    [
        ("unet.second", delta(), "no module 'unet.second'"),
        ("vae.first", delta(), "no module 'vae.first'"),
        ("unet.norm", delta(), r"'down'.*the base's weight \[6\]"),
        ("unet.blocks.0", delta(), r"'down'.*\[2, 4\]"),
        ("unet.first", delta(out=5), r"'up'.*\[5, 2\]"),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_base_unchanged(model, name, part, problem):
    before, state = list(model.modules()), copy.deepcopy(model.state_dict())
    adapter = Adapter({"unet.first": delta(), name: part})
    for apply in (attach, collapse):
        with pytest.raises(AdapterError, match=problem):
            apply({"unet": model}, adapter)
    assert list(model.modules()) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_empty_adapter_is_refused(model):
    with pytest.raises(AdapterError, match="no modules"):
        attach({"unet": model}, Adapter({}))


def test_detach_is_idempotent_and_refuses_a_base_changed_in_the_meantime(model):
    attachment = attach({"unet": model}, Adapter({"unet.first": delta()}))
    attachment.detach()
    attachment.detach()
    assert type(model.first) is nn.Linear
    attachment = attach({"unet": model}, Adapter({"unet.first": delta()}))
    model.first = nn.Linear(4, 6)
    with pytest.raises(AdapterError, match="replaced while it was attached"):
        attachment.detach()


def test_an_exception_inside_detaches(model):
    first = model.first
    with (
        pytest.raises(RuntimeError, match="cannot be multiplied"),
        attach({"unet": model}, Adapter({"unet.first": delta()})),
    ):
        model(torch.ones(1, 5))
    assert model.first is first


def test_the_wrapper_has_the_attributes_of_the_layer(model):
    first = model.first
    with attach({"unet": model}, Adapter({"unet.first": delta()})):
        assert model.first.weight is first.weight
        assert model.first.in_features == 4
        with pytest.raises(AttributeError, match="nothing"):
            _ = model.first.nothing


def test_training_changes_only_the_copies(model):
    adapter = create_adapter({"unet": model}, "*.first", rank=2, generator=next(seeds(1)))
    with attach({"unet": model}, adapter, trainable=True) as attachment:
        optimizer = torch.optim.SGD(attachment.parameters(), lr=1.0)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        trained = attachment.adapter()
        assert [name for name, _ in attachment.named_parameters()] == ["unet.first.down", "unet.first.up"]
    assert torch.count_nonzero(adapter.modules["unet.first"].up) == 0
    assert torch.count_nonzero(trained.modules["unet.first"].up) > 0
    assert not any(factor.requires_grad for factor in trained.modules["unet.first"].factors().values())


def test_factors_follow_a_model_that_is_moved_or_copied(model):
    adapter = Adapter({"unet.first": delta()})
    with attach({"unet": model}, adapter):
        expected = model(torch.ones(1, 4))
        torch.testing.assert_close(copy.deepcopy(model)(torch.ones(1, 4)), expected)
        model.double()
        assert model.first.delta.down.dtype == torch.float64


def test_collapse_adds_in_float32_and_casts_last(model):
    model = model.to(torch.bfloat16)
    adapter = Adapter({"unet.first": delta()})
    expected = (model.first.weight.float() + 0.3 * 2).to(torch.bfloat16)
    collapse({"unet": model}, adapter, 0.3)
    assert torch.equal(model.first.weight, expected)


def test_layers_under_an_adapter_keep_their_names(model):
    names = [name for name, _ in adaptable_layers(model)]
    shapes = module_shapes({"unet": model})
    with (
        attach({"unet": model}, Adapter({"unet.first": delta()})),
        attach({"unet": model}, Adapter({"unet.first": delta()})),
    ):
        assert [name for name, _ in adaptable_layers(model)] == names
        assert module_shapes({"unet": model}) == shapes


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_have_one_name_in_every_version_of_transformers(kind):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = kind(CLIPTextConfig(vocab_size=9, max_position_embeddings=4, projection_dim=8, **sizes))
    tree = DictTree({"text_encoder": text})
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert name in tree.module_names()
    layer = tree.get_module(name)
    with attach(tree, Adapter({name: delta(8, 8)})):
        assert tree.get_module(name) is not layer
    assert tree.get_module(name) is layer
    assert any(module is layer for module in text.modules())


@pytest.mark.parametrize(
    ("part", "issue"),
    [
        (LoraDelta(torch.ones(2, 4), torch.ones(6, 3), 2.0), "whose rank is not that"),
        (LoraDelta(torch.ones(2, 4), torch.ones(6, 2), float("nan")), "alpha is nan"),
        (LoraDelta(torch.ones(2, 4), torch.ones(6, 2), float("-inf")), "alpha is -inf"),
        (LoraDelta(torch.ones(2, 4, 1), torch.ones(6, 2), 1.0), "2 or 4 dimensions"),
        (LoraDelta(torch.ones(0, 4), torch.ones(6, 0), 1.0), "none empty"),
        (LoraDelta(torch.ones(2, 4, 1, 1), torch.ones(6, 2, 1, 1), 1.0, torch.ones(3, 2, 3, 3)), r"\[2, 2, k, k\]"),
    ],
)
def test_issues_of_a_delta_are_reported(part, issue):
    messages = "; ".join(f"{item.problem} {item.allowed}" for item in part.issues())
    assert re.search(issue, messages)


@pytest.mark.parametrize(("down", "up"), [((2, 4), (6, 2)), ((2, 4, 1, 1), (6, 2, 1, 1)), ((2, 4, 1, 1), (6, 2))])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_a_1x1_convolution_and_a_linear_layer_accept_each_others_factors(down, up, shape):
    generator = next(seeds(1))
    part = LoraDelta(torch.randn(down, generator=generator), torch.randn(up, generator=generator), 3.0)
    assert not list(part.issues(shape))
    reshaped, weight = part.reshaped_for(shape), torch.zeros(shape)
    assert reshaped.down.dim() == reshaped.up.dim() == len(shape)
    assert torch.equal(reshaped.delta_weight(weight), part.delta_weight(weight))
