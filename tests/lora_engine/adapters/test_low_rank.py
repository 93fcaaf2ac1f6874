"""A linear layer and its low-rank difference in one step: the same outputs and gradients, and when it is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora_engine.adapters import kinds
from lora_engine.adapters.adapted import AdaptedLayer
from lora_engine.adapters.low_rank import LowRankLinear, merges

# With few rows the difference is added to each of them, with many it is merged into the weight.
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
    entering = x.detach().clone().requires_grad_(learns)
    out = adapted(entering)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    found = {"out": out.detach(), "x": entering.grad}
    for name, factor in adapted.factors.items():
        found[name] = factor.grad
        factor.grad = None
    return found


def by_the_long_way(adapted: AdaptedLayer, x: Tensor, *, learns: bool = True) -> dict[str, Tensor]:
    fused_forward, adapted.fused_forward = adapted.fused_forward, None
    try:
        return results(adapted, x, learns=learns)
    finally:
        adapted.fused_forward = fused_forward


@pytest.mark.parametrize("way", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_in_one_step_outputs_and_gradients_are_the_same(way: str, bias: bool, dims: int) -> None:
    rows, inputs, outputs, rank = SHAPES[way]
    adapted = wrapped(inputs, outputs, rank, bias=bias)
    x = torch.randn(*(2, rows, inputs)[3 - dims :], generator=torch.Generator().manual_seed(1))
    assert merges(x.numel() // inputs, adapted.factors["down"], adapted.factors["up"]) == (way == "merged")
    mine, theirs = results(adapted, x), by_the_long_way(adapted, x)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("way", SHAPES)
def test_the_written_out_gradients_are_the_true_ones(way: str) -> None:
    rows, inputs, outputs, rank = {"side": (2, 5, 4, 2), "merged": (30, 5, 4, 2)}[way]
    draw = torch.Generator().manual_seed(2)
    x, down, up, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((rows, inputs), (rank, inputs), (outputs, rank), (outputs, inputs), (outputs,))
    )
    assert merges(rows, down, up) == (way == "merged")

    def apply(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return LowRankLinear(weight, bias, down, up, 1.5)(x, 0.5)

    moving = [value.requires_grad_() for value in (x, down, up)]
    assert torch.autograd.gradcheck(apply, moving)


@pytest.mark.parametrize("way", SHAPES)
def test_a_factor_that_stands_still_takes_no_gradient_and_the_others_theirs(way: str) -> None:
    rows, inputs, outputs, rank = SHAPES[way]
    adapted = wrapped(inputs, outputs, rank, kind="lora-fa")
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    mine, theirs = results(adapted, x), by_the_long_way(adapted, x)
    assert mine["down"] is None
    assert theirs["down"] is None
    for name in ("out", "x", "up"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5 * float(theirs[name].abs().max()))


def test_what_an_optimiser_writes_is_seen_at_the_next_step() -> None:
    adapted = wrapped(12, 20, 3)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    before = results(adapted, x)["out"]
    with torch.no_grad():
        adapted.factors["up"].mul_(3)
    after = results(adapted, x)["out"]
    torch.testing.assert_close(after, by_the_long_way(adapted, x)["out"], rtol=1e-5, atol=1e-4)
    assert not torch.equal(before, after)
    adapted.double()
    torch.testing.assert_close(results(adapted, x.double())["out"].float(), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", SHAPES)
def test_an_input_that_takes_no_gradient_leaves_the_factors_theirs(way: str) -> None:
    rows, inputs, outputs, rank = SHAPES[way]
    adapted = wrapped(inputs, outputs, rank)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    mine, theirs = results(adapted, x, learns=False), by_the_long_way(adapted, x, learns=False)
    assert mine["x"] is None
    for name in ("out", "down", "up"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-5 * float(theirs[name].abs().max()))


@pytest.mark.parametrize(
    ("kind", "learns", "way", "count"),
    [
        ("lora", True, "side", 5),  # the factors, the weight, the rows, and what the rows have between the factors
        ("lora", False, "side", 4),
        ("lora-fa", True, "side", 4),
        ("lora-fa", False, "side", 3),
        ("lora", True, "merged", 4),
        ("lora", False, "merged", 3),
        ("lora-fa", True, "merged", 4),
    ],
)
def test_the_backward_pass_keeps_only_what_a_gradient_needs(kind: str, learns: bool, way: str, count: int) -> None:
    rows, inputs, outputs, rank = SHAPES[way]
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


MORE: dict[str, Callable[[nn.Linear], object]] = {
    "a hook": lambda layer: layer.register_forward_hook(lambda layer, given, out: out + 100),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda layer, given: None),
    "a hook of the backward pass": lambda layer: layer.register_full_backward_hook(lambda layer, into, out: None),
    "a hook before the backward pass": lambda layer: layer.register_full_backward_pre_hook(lambda layer, out: None),
    "another forward": replaced,
    "another class": lambda layer: setattr(layer, "__class__", Doubling),
    "a weight that is no parameter": parameterless,
}


@pytest.mark.parametrize("more", MORE)
def test_a_layer_that_does_more_than_multiply_is_called(more: str) -> None:
    adapted = wrapped(12, 20, 3)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    assert adapted.can_fuse(x)
    before = results(adapted, x)["out"]
    MORE[more](adapted.base)
    assert not adapted.can_fuse(x)
    if more in ("a hook", "another forward"):
        torch.testing.assert_close(results(adapted, x)["out"], before + 100, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [torch.ones(12), torch.ones(12, 3).t(), torch.ones(3, 12, dtype=torch.float64)],
    ids=["one dimension", "not contiguous", "another dtype"],
)
def test_inputs_that_one_step_cannot_take_go_through_the_layer(x: Tensor) -> None:
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
def test_a_base_of_which_one_part_learns_gets_its_gradient(part: str) -> None:
    adapted = wrapped(12, 20, 3)
    getattr(adapted.base, part).requires_grad_(True)
    assert not adapted.can_fuse(torch.ones(3, 12))
    results(adapted, torch.ones(3, 12))
    assert getattr(adapted.base, part).grad is not None


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "merged"),
    [
        (16, 8, 8, 4, True),
        (15, 8, 8, 4, False),  # what the rows have between the factors is smaller than the weight
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


def test_low_precision_is_never_merged_since_that_would_round_the_difference_away() -> None:
    down, up = torch.zeros(3, 12), torch.zeros(20, 3)
    assert merges(400, down, up)
    assert not merges(400, down.bfloat16(), up.bfloat16())
