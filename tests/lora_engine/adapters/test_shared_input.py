"""Fused layers with a shared input: outputs and gradients, and conditions for their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Attachment, DictTree, attach, create_adapter
from lora_engine.adapters import shared_input as module
from lora_engine.adapters.adapted import AdaptedLayer
from lora_engine.adapters.shared_input import SharedInput

INNER, OTHER, ROWS = 12, 10, 5


class Attention(nn.Module):
    """An attention with diffusers' names; a cross-attention reads keys and values from another sequence."""

    def __init__(self, other: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.is_cross_attention = other is not None
        self.to_q = nn.Linear(INNER, INNER, bias=bias)
        self.to_k = nn.Linear(other or INNER, INNER, bias=bias)
        self.to_v = nn.Linear(other or INNER, 2 * INNER, bias=bias)

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        states = x if states is None else states
        query, key, value = self.to_q(x), self.to_k(states), self.to_v(states)
        return torch.softmax(query @ key.transpose(-1, -2), -1) @ value


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn1, self.attn2 = Attention(bias=bias), Attention(OTHER, bias=bias)
        self.requires_grad_(False)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.attn2(self.attn1(x)[..., :INNER], states)


def adapter_for(net: nn.Module, targets: str = "unet.*.to_*", **settings: object) -> Adapter:
    draw = torch.Generator().manual_seed(1)
    fresh = create_adapter({"unet": net}, targets, rank=3, generator=draw, **settings)  # type: ignore[arg-type]
    moved = {
        name: delta.with_factors({**delta.factors(), "up": torch.randn(delta.up.shape, generator=draw)})  # type: ignore[attr-defined]
        for name, delta in fresh.modules.items()
    }
    return Adapter(moved, fresh.base, fresh.fingerprint)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each fused step."""
    counts: list[int] = []
    plain = module._Step.apply

    def counted(x: Tensor, scale: float, frozen: list[object], *factors: Tensor) -> object:
        counts.append(len(frozen))
        return plain(x, scale, frozen, *factors)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(module._Step, "apply", counted)
    return counts


def inputs(dims: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x, states = torch.randn(2, ROWS, INNER, generator=draw), torch.randn(2, 4, OTHER, generator=draw)
    return (x, states) if dims == 3 else (x[0], states[0])


def results(net: nn.Module, attachment: Attachment, dims: int = 3) -> dict[str, Tensor | None]:
    x, states = (value.clone().requires_grad_() for value in inputs(dims))
    out = net(x, states)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    tensors = {"out": out.detach(), "x": x.grad, "states": states.grad}
    for name, factor in attachment.named_parameters():
        tensors[name], factor.grad = factor.grad, None
    return tensors


@contextmanager
def separately(net: nn.Module) -> Iterator[None]:
    """Makes each layer compute its own output while the context is open."""
    layers = {layer: layer.shared for layer in net.modules() if isinstance(layer, AdaptedLayer)}
    for layer in layers:
        layer.shared = None
    yield
    for layer, shared in layers.items():
        layer.shared = shared


def assert_same(fused: dict[str, Tensor | None], separate: dict[str, Tensor | None]) -> None:
    assert fused.keys() == separate.keys()
    for name, value in separate.items():
        assert value is not None, name
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_outputs_and_gradients_equal_those_of_separate_layers(bias: bool, dims: int, steps: list[int]) -> None:
    net = Net(bias)
    attachment = attach({"unet": net}, adapter_for(net, alpha=5.0), 0.7, trainable=True)
    fused = results(net, attachment, dims)
    assert steps == [3]  # the self-attention: q, k and v read one input
    with separately(net):
        separate = results(net, attachment, dims)
    assert len(steps) == 1
    assert_same(fused, separate)


def test_the_explicit_gradients_pass_gradcheck(steps: list[int]) -> None:
    net = Net().double()
    attachment = attach({"unet": net}, adapter_for(net), trainable=True)
    for layer in net.modules():
        if isinstance(layer, AdaptedLayer):
            layer.double()
    x, states = (value.double().requires_grad_() for value in inputs(2))
    factors = attachment.parameters()
    assert torch.autograd.gradcheck(lambda x, states, *factors: net(x, states), (x, states, *factors))
    assert set(steps) == {3}


def test_only_trained_factors_get_gradients(steps: list[int]) -> None:
    net = Net()
    attachment = attach({"unet": net}, adapter_for(net, kind="lora-fa"), trainable=True)
    fused = results(net, attachment)
    assert steps == [3]
    assert all(layer.factors["down"].grad is None for layer in net.modules() if isinstance(layer, AdaptedLayer))
    with separately(net):
        assert_same(fused, results(net, attachment))


def test_only_adapted_layers_are_grouped(steps: list[int]) -> None:
    net = Net()
    attachment = attach({"unet": net}, adapter_for(net, "re:unet\\.attn1\\.to_[qv]"), trainable=True)
    fused = results(net, attachment)
    assert steps == [2]
    with separately(net):
        assert_same(fused, results(net, attachment))


def test_layers_of_different_scales_are_not_grouped(steps: list[int]) -> None:
    net = Net()
    adapter = adapter_for(net)
    odd = adapter.modules["unet.attn1.to_k"]
    modules = {**adapter.modules, "unet.attn1.to_k": type(odd).from_factors(odd.factors(), 7.0)}
    attachment = attach({"unet": net}, Adapter(modules, adapter.base, adapter.fingerprint), trainable=True)
    fused = results(net, attachment)
    assert not steps
    with separately(net):
        assert_same(fused, results(net, attachment))


def other_tensor(net: Net, x: Tensor) -> Tensor:
    return net.attn1.to_q(x) + net.attn1.to_k(x.clone()) + net.attn1.to_v(x + 1)[..., :INNER]


def written_in_between(net: Net, x: Tensor) -> Tensor:
    x = x.clone()
    with torch.no_grad():
        query = net.attn1.to_q(x)
        x.add_(1)
        return query + net.attn1.to_k(x)


def bias_moved_in_between(net: Net, x: Tensor) -> Tensor:
    query = net.attn1.to_q(x)
    with torch.no_grad():
        net.attn1.to_k.base.bias.add_(1)
    out = query + net.attn1.to_k(x)
    with torch.no_grad():
        net.attn1.to_k.base.bias.sub_(1)
    return out


def factor_moved_in_between(net: Net, x: Tensor) -> Tensor:
    query = net.attn1.to_q(x)
    with torch.no_grad():
        net.attn1.to_k.factors["up"].add_(1)
    out = query + net.attn1.to_k(x)
    with torch.no_grad():
        net.attn1.to_k.factors["up"].sub_(1)
    return out


def strength_changed_in_between(net: Net, x: Tensor) -> Tensor:
    query = net.attn1.to_q(x)
    net.attn1.to_k.multiplier = 0.0
    out = query + net.attn1.to_k(x)
    net.attn1.to_k.multiplier = 1.0
    return out


def backwards_and_twice(net: Net, x: Tensor) -> Tensor:
    attention = net.attn1
    first = attention.to_v(x)[..., :INNER] + attention.to_v(x)[..., INNER:] + attention.to_k(x)
    return first + attention.to_q(x) + attention.to_q(x)


def hooked(net: Net, x: Tensor) -> Tensor:
    handle = net.attn1.to_v.base.register_forward_hook(lambda layer, args, out: out + 100)
    out = net.attn1(x)
    handle.remove()
    return out


@pytest.mark.parametrize(
    "use",
    [
        other_tensor,
        written_in_between,
        bias_moved_in_between,
        factor_moved_in_between,
        strength_changed_in_between,
        backwards_and_twice,
        hooked,
    ],
)
def test_other_uses_give_the_same_output_as_separate_layers(use: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net()
    attach({"unet": net}, adapter_for(net), trainable=True)
    x = inputs()[0]
    fused = use(net, x)
    with separately(net):
        torch.testing.assert_close(fused, use(net, x), rtol=1e-5, atol=1e-4)


def test_without_gradients_in_inference_mode_and_with_dropout_it_is_the_same() -> None:
    net = Net()
    attachment = attach({"unet": net}, adapter_for(net), trainable=True)
    x, states = inputs()
    with separately(net):
        expected = net(x, states)
        with attachment.adapter_dropout(0.5, 3):
            dropped = net(x, states)
    with torch.no_grad():
        torch.testing.assert_close(net(x, states), expected, rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(net(x, states), expected, rtol=1e-5, atol=1e-4)
    with attachment.adapter_dropout(0.5, 3):
        torch.testing.assert_close(net(x, states), dropped, rtol=1e-5, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    net = Net()
    attachment = attach({"unet": net}, adapter_for(net), trainable=True)
    expected = results(net, attachment)

    class Again(nn.Module):
        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            first = checkpoint(net.attn1, x, use_reentrant=False)
            out: Tensor = checkpoint(net.attn2, first[..., :INNER], states, use_reentrant=False)
            return out

    assert_same(results(Again(), attachment), expected)


def test_nothing_is_cached_after_all_outputs_are_read() -> None:
    net = Net()
    attach({"unet": net}, adapter_for(net), trainable=True)
    net(*inputs())
    shared = net.attn1.to_q.shared
    assert isinstance(shared, SharedInput)
    assert shared is net.attn1.to_v.shared
    assert net.attn2.to_k.shared is None
    assert not shared._ready
    assert shared._input is None


def test_a_second_adapter_is_not_fused(steps: list[int]) -> None:
    net = Net()
    first, second = adapter_for(net), adapter_for(net, alpha=1.0)
    x, states = inputs()
    lower = attach({"unet": net}, first)
    upper = attach({"unet": net}, second)
    both = net(x, states)
    assert steps == [3]
    with separately(net):
        torch.testing.assert_close(both, net(x, states), rtol=1e-5, atol=1e-4)
    lower.detach()
    upper.detach()
    assert DictTree({"unet": net}).get_module("unet.attn1.to_q") is net.attn1.to_q
    assert type(net.attn1.to_q) is nn.Linear


def test_a_factor_in_another_precision_is_fused(steps: list[int]) -> None:
    net = Net().bfloat16()
    attachment = attach({"unet": net}, adapter_for(Net()), trainable=True)
    x, states = (value.bfloat16() for value in inputs())
    net(x, states).float().square().sum().backward()
    assert steps == [3]
    for name, factor in attachment.named_parameters():
        assert factor.grad is not None, name
        assert factor.grad.dtype == torch.float32
