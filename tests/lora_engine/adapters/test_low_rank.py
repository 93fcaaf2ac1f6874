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


def results(adapted: AdaptedLayer, x: Tensor) -> dict[str, Tensor]:
    entering = x.detach().clone().requires_grad_()
    out = adapted(entering)
    (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    found = {"out": out.detach(), "x": entering.grad}
    for name, factor in adapted.factors.items():
        found[name] = factor.grad
        factor.grad = None
    return found


def by_the_long_way(adapted: AdaptedLayer, x: Tensor) -> dict[str, Tensor]:
    whole, adapted.whole = adapted.whole, None
    try:
        return results(adapted, x)
    finally:
        adapted.whole = whole


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


def hooked(adapted: AdaptedLayer) -> None:
    adapted.base.register_forward_hook(lambda layer, given, out: out + 100)


def replaced(adapted: AdaptedLayer) -> None:
    plain = adapted.base.forward
    adapted.base.forward = lambda x: plain(x) + 100


@pytest.mark.parametrize("change", [hooked, replaced])
def test_a_layer_that_does_more_than_multiply_is_called(change: Callable[[AdaptedLayer], None]) -> None:
    adapted = wrapped(12, 20, 3)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    before = results(adapted, x)["out"]
    change(adapted)
    torch.testing.assert_close(results(adapted, x)["out"], before + 100, rtol=1e-5, atol=1e-4)


def test_a_base_that_learns_gets_its_gradient() -> None:
    adapted = wrapped(12, 20, 3)
    adapted.base.requires_grad_(True)
    results(adapted, torch.ones(3, 12))
    assert adapted.base.weight.grad is not None


def test_low_precision_is_never_merged_since_that_would_round_the_difference_away() -> None:
    down, up = torch.zeros(3, 12), torch.zeros(20, 3)
    assert merges(400, down, up)
    assert not merges(400, down.bfloat16(), up.bfloat16())
