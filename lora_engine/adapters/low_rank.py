"""A frozen linear layer and its low-rank difference in one step, for training: fewer operations, and less copied.

Computes what `LoraDelta.forward` does; where a layer is not plain, that is what runs. Hu et al. 2021, equation 3, with
the backward pass written out: for `y = x W^T + b + s (x D^T) U^T` and the gradient g of y,

    dU = g^T (s x D^T),   dD = (s g U)^T x,   dx = g W + (s g U) D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LowRankLinear:
    """What a plain linear layer gives under `scale * up @ down`.

    Args:
        weight: `[out, in]`, frozen.
        bias: `[out]`, frozen.
        down: `[r, in]`.
        up: `[out, r]`.
        scale: Of the difference.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> None:
        self._weight, self._bias, self._down, self._up, self._scale = weight, bias, down, up, scale
        self._views: tuple[Tensor, Tensor, Tensor] | None = None
        self._places: tuple[int, ...] = ()

    def suits(self, x: Tensor) -> bool:
        """Whether this input can be taken, now: one dtype, nothing to learn in the base, no compiler looking on."""
        if torch.compiler.is_compiling():
            return False
        bias = self._bias
        frozen = not (self._weight.requires_grad or (bias is not None and bias.requires_grad))
        fits = x.dtype == self._weight.dtype and x.dim() > 1 and x.is_contiguous()
        return frozen and fits and not torch.is_autocast_enabled(x.device.type)

    def __call__(self, x: Tensor, multiplier: float) -> Tensor:
        """The output, in the dtype of x; gradients go to x and the factors."""
        if self._down.dtype == x.dtype == self._up.dtype:
            views, down, up = self._transposed(), self._down, self._up
        else:
            down, up = self._down.to(x.dtype), self._up.to(x.dtype)
            views = (self._transposed()[0], down.detach().t(), up.detach().t())
        out: Tensor = _Step.apply(  # type: ignore[no-untyped-call]
            x, down, up, self._weight, self._bias, views, multiplier * self._scale
        )
        return out

    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        # Made once and not at each step; they see what the optimiser writes. A move to another device makes new ones.
        places = (self._weight.data_ptr(), self._down.data_ptr(), self._up.data_ptr())
        if self._views is None or places != self._places:
            self._views = (self._weight.detach().t(), self._down.detach().t(), self._up.detach().t())
            self._places = places
        return self._views


def _merges(rows: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether it costs less to form the changed weight than to add the difference to every row.

    Where there are many more rows than columns. In low precision the changed weight would round the difference away;
    and it is kept for the backward pass in the place of what the rows have between the factors, so it must be smaller.
    """
    count, rank = rows.shape[0], down.shape[0]
    entering, leaving = down.shape[1], up.shape[0]
    size = entering * leaving
    return rows.element_size() >= 4 and count * (entering + leaving) > 2 * size and count * rank >= size


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        views: tuple[Tensor, Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        weight_t, down_t, up_t = views
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        low: Tensor | None = None
        if _merges(rows, down, up):
            weight = torch.addmm(weight, up, down, alpha=scale)
            out = _apply(rows, weight.t(), bias)
        else:
            low = torch.mm(rows, down_t)
            out = _apply(rows, weight_t, bias).addmm_(low, up_t, alpha=scale)
        # What a factor that stands still would need is not kept.
        moves_x, moves_down, moves_up = ctx.needs_input_grad[:3]
        kept = rows if moves_down or (moves_up and low is None) else None
        ctx.save_for_backward(down, up, weight if moves_x else None, kept, low if moves_up else None)
        ctx.scale, ctx.merged, ctx.down_t = scale, low is None, down_t
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        down, up, weight, entered, low = ctx.saved_tensors
        moves_x, moves_down, moves_up = ctx.needs_input_grad[:3]
        shape = gradient.shape
        rows = gradient if gradient.dim() == 2 else gradient.reshape(-1, shape[-1])
        to_x = to_down = to_up = None
        if moves_up:
            low = torch.mm(entered, ctx.down_t) if ctx.merged else low
            to_up = torch.addmm(up, rows.t(), low, beta=0.0, alpha=ctx.scale)
        adds_to_x = moves_x and not ctx.merged
        if moves_down or adds_to_x:
            inner = torch.mm(rows, up)
        if moves_down:
            to_down = torch.addmm(down, inner.t(), entered, beta=0.0, alpha=ctx.scale)
        if moves_x:
            to_x = torch.mm(rows, weight)
            if adds_to_x:
                to_x.addmm_(inner, down, alpha=ctx.scale)
            to_x = to_x if len(shape) == 2 else to_x.view(*shape[:-1], to_x.shape[-1])
        return to_x, to_down, to_up, None, None, None, None


def _apply(rows: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(rows, weight_t) if bias is None else torch.addmm(bias, rows, weight_t)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling a layer does no more than `nn.Linear` does: its own type and weight, and no hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )
