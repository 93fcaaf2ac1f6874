"""The fused forward of a linear layer and a low-rank delta: outputs, gradients, and conditions for its use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_engine.adapters import kinds
from lora_engine.adapters.adapted import AdaptedLayer
from lora_engine.adapters.low_rank import LowRankLinear, merges

# With few rows the difference is added to the output, with many it is merged into the weight.
SHAPES = {"side": (3, 12, 20, 3), "merged": (400, 12, 20, 3)}


def wrapped(inputs: int, outputs: int, rank: int, *, bias: bool = True, kind: str = "lora") -> AdaptedLayer:
    layer = nn.Linear(inputs, outputs, bias=bias)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=draw))
    layer.requires_grad_(False)
    delta = kinds[kind].create(layer.weight, layer.bias, rank, 2.0 * rank, draw)
    factors = {**delta.factors(), "up": torch.randn(outputs, rank, generator=draw)}
    return AdaptedLayer(layer, delta.with_factors(factors), 0.7, trainable=True)


def results(adapted: AdaptedLayer, x: Tensor, *, learns: bool = True) -> dict[str, Tensor]:
    inputs = x.detach().clone().requires_grad_(learns)
    out = adapted(inputs)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    tensors = {"out": out.detach(), "x": inputs.grad}
    for name, factor in adapted.factors.items():
        tensors[name] = factor.grad
        factor.grad = None
    return tensors


def without_fusion(adapted: AdaptedLayer, x: Tensor, *, learns: bool = True) -> dict[str, Tensor]:
    fused_forward, adapted.fused_forward = adapted.fused_forward, None
    try:
        return results(adapted, x, learns=learns)
    finally:
        adapted.fused_forward = fused_forward


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_fused_outputs_and_gradients_are_the_same(path: str, bias: bool, dims: int) -> None:
    rows, inputs, outputs, rank = SHAPES[path]
    adapted = wrapped(inputs, outputs, rank, bias=bias)
    x = torch.randn(*(2, rows, inputs)[3 - dims :], generator=torch.Generator().manual_seed(1))
    assert merges(x.numel() // inputs, adapted.factors["down"], adapted.factors["up"]) == (path == "merged")
    fused, separate = results(adapted, x), without_fusion(adapted, x)
    assert fused.keys() == separate.keys()
    for name, value in separate.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("path", SHAPES)
def test_the_explicit_gradients_pass_gradcheck(path: str) -> None:
    rows, inputs, outputs, rank = {"side": (2, 5, 4, 2), "merged": (30, 5, 4, 2)}[path]
    draw = torch.Generator().manual_seed(2)
    x, down, up, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((rows, inputs), (rank, inputs), (outputs, rank), (outputs, inputs), (outputs,))
    )
    assert merges(rows, down, up) == (path == "merged")

    def apply(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return LowRankLinear(weight, bias, down, up, 1.5)(x, 0.5)

    trainable = [value.requires_grad_() for value in (x, down, up)]
    assert torch.autograd.gradcheck(apply, trainable)


@pytest.mark.parametrize("path", SHAPES)
def test_only_trained_factors_get_gradients(path: str) -> None:
    rows, inputs, outputs, rank = SHAPES[path]
    adapted = wrapped(inputs, outputs, rank, kind="lora-fa")
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    fused, separate = results(adapted, x), without_fusion(adapted, x)
    assert fused["down"] is None
    assert separate["down"] is None
    for name in ("out", "x", "up"):
        torch.testing.assert_close(
            fused[name], separate[name], rtol=1e-5, atol=1e-5 * float(separate[name].abs().max())
        )


def test_an_optimizer_update_is_used_at_the_next_step() -> None:
    adapted = wrapped(12, 20, 3)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    before = results(adapted, x)["out"]
    with torch.no_grad():
        adapted.factors["up"].mul_(3)
    after = results(adapted, x)["out"]
    torch.testing.assert_close(after, without_fusion(adapted, x)["out"], rtol=1e-5, atol=1e-4)
    assert not torch.equal(before, after)
    adapted.double()
    torch.testing.assert_close(results(adapted, x.double())["out"].float(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", SHAPES)
def test_factors_get_gradients_when_the_input_gets_none(path: str) -> None:
    rows, inputs, outputs, rank = SHAPES[path]
    adapted = wrapped(inputs, outputs, rank)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    fused, separate = results(adapted, x, learns=False), without_fusion(adapted, x, learns=False)
    assert fused["x"] is None
    for name in ("out", "down", "up"):
        torch.testing.assert_close(
            fused[name], separate[name], rtol=1e-5, atol=1e-5 * float(separate[name].abs().max())
        )


@pytest.mark.parametrize(
    ("kind", "learns", "path", "count"),
    [
        ("lora", True, "side", 5),  # the factors, the weight, the rows, and the activations between the factors
        ("lora", False, "side", 4),
        ("lora-fa", True, "side", 4),
        ("lora-fa", False, "side", 3),
        ("lora", True, "merged", 4),
        ("lora", False, "merged", 3),
        ("lora-fa", True, "merged", 4),
    ],
)
def test_the_backward_pass_saves_only_the_needed_tensors(kind: str, learns: bool, path: str, count: int) -> None:
    rows, inputs, outputs, rank = SHAPES[path]
    adapted, packed = wrapped(inputs, outputs, rank, kind=kind), []
    x = torch.ones(rows, inputs, requires_grad=learns)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor
    ):
        adapted(x)
    assert len(packed) == count


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(layer: nn.Linear) -> None:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 100  # type: ignore[method-assign]


def parameterless(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "a hook": lambda layer: layer.register_forward_hook(lambda layer, inputs, out: out + 100),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda layer, inputs: None),
    "a hook of the backward pass": lambda layer: layer.register_full_backward_hook(lambda layer, inputs, out: None),
    "a hook before the backward pass": lambda layer: layer.register_full_backward_pre_hook(lambda layer, out: None),
    "another forward": replaced,
    "another class": lambda layer: setattr(layer, "__class__", Doubling),
    "a weight that is no parameter": parameterless,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_with_other_behavior_is_called(change: str) -> None:
    adapted = wrapped(12, 20, 3)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    assert adapted.can_fuse(x)
    before = results(adapted, x)["out"]
    CHANGES[change](adapted.base)
    assert not adapted.can_fuse(x)
    if change in ("a hook", "another forward"):
        torch.testing.assert_close(results(adapted, x)["out"], before + 100, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [torch.ones(12), torch.ones(12, 3).t(), torch.ones(3, 12, dtype=torch.float64)],
    ids=["one dimension", "not contiguous", "another dtype"],
)
def test_inputs_that_cannot_be_fused_go_through_the_layer(x: Tensor) -> None:
    adapted = wrapped(12, 20, 3)
    assert adapted.can_fuse(torch.ones(3, 12))
    assert not adapted.can_fuse(x)
    if x.dtype == torch.float32:
        out = adapted(x)
        torch.testing.assert_close(out, adapted(x.expand(2, *x.shape).contiguous())[0], rtol=1e-5, atol=1e-4)


def test_under_autocast_the_layer_is_called() -> None:
    adapted = wrapped(12, 20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not adapted.can_fuse(torch.ones(3, 12))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_trained_weight_or_bias_of_the_base_gets_its_gradient(part: str) -> None:
    adapted = wrapped(12, 20, 3)
    getattr(adapted.base, part).requires_grad_(True)
    assert not adapted.can_fuse(torch.ones(3, 12))
    results(adapted, torch.ones(3, 12))
    assert getattr(adapted.base, part).grad is not None


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "merged"),
    [
        (16, 8, 8, 4, True),
        (15, 8, 8, 4, False),  # the activations between the factors are smaller than the weight
        (9, 8, 8, 8, True),
        (8, 8, 8, 8, False),  # as many rows as columns
        (13, 4, 12, 8, True),
        (6, 4, 12, 8, False),
        (7, 4, 12, 8, True),
        (7, 12, 4, 8, True),
    ],
)
def test_the_difference_is_merged_where_that_costs_less(
    rows: int, inputs: int, outputs: int, rank: int, merged: bool
) -> None:
    down, up = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
    assert merges(rows, down, up) == merged
    assert merges(rows, down.double(), up.double()) == merged


def test_low_precision_is_never_merged() -> None:
    down, up = torch.zeros(3, 12), torch.zeros(20, 3)
    assert merges(400, down, up)
    assert not merges(400, down.bfloat16(), up.bfloat16())
