"""Fused forward and backward of a frozen linear layer with a low-rank delta, for faster training.

Equals `LoraDelta.forward`, which runs if the layer is not a plain `nn.Linear`. Hu et al. 2021, equation 3, with an
explicit backward pass: for `y = x W^T + b + s (x D^T) U^T` and the gradient g of y,

    dU = g^T (s x D^T),   dD = (s g U)^T x,   dx = g W + (s g U) D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Views = tuple[Tensor, Tensor, Tensor]


class LowRankLinear:
    """The fused forward of a plain linear layer and `scale * up @ down`.

    Args:
        weight: `[out, in]`, frozen.
        bias: `[out]`, frozen.
        down: `[r, in]`.
        up: `[out, r]`.
        scale: Factor of `up @ down`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> None:
        self.weight, self.bias, self.down, self.up, self.scale = weight, bias, down, up, scale
        self._views: Views | None = None
        self._addresses: tuple[int, ...] = ()

    def applies_to(self, x: Tensor) -> bool:
        """Returns True if the input has the weight's dtype, the base is frozen, and no autocast or compiler is on."""
        if torch.compiler.is_compiling():
            return False
        bias = self.bias
        frozen = not (self.weight.requires_grad or (bias is not None and bias.requires_grad))
        fits = x.dtype == self.weight.dtype and x.dim() > 1 and x.is_contiguous()
        return frozen and fits and not torch.is_autocast_enabled(x.device.type)

    def __call__(self, x: Tensor, multiplier: float) -> Tensor:
        """Returns the output in the dtype of x, with gradients for x and the factors."""
        down, up, views = self.factors_in(x.dtype)
        out: Tensor = _Step.apply(  # type: ignore[no-untyped-call]
            x, down, up, self.weight, self.bias, views, multiplier * self.scale
        )
        return out

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Views]:
        """Returns `down` and `up` in a dtype, and the transposes of weight, `down` and `up`."""
        if self.down.dtype == dtype == self.up.dtype:
            return self.down, self.up, self._transposed()
        down, up = self.down.to(dtype), self.up.to(dtype)
        return down, up, (self._transposed()[0], down.detach().t(), up.detach().t())

    def _transposed(self) -> Views:
        # Cached: the views share the optimizer's in-place updates. A move to another device invalidates them.
        addresses = (self.weight.data_ptr(), self.down.data_ptr(), self.up.data_ptr())
        if self._views is None or addresses != self._addresses:
            self._views = (self.weight.detach().t(), self.down.detach().t(), self.up.detach().t())
            self._addresses = addresses
        return self._views


def merges(rows: int, down: Tensor, up: Tensor) -> bool:
    """Returns True if computing the changed weight costs less than adding the difference to every row.

    This holds for many more rows than columns. In low precision the changed weight would round the difference away. The
    backward pass keeps it instead of the activations between the factors, so it must be smaller.
    """
    rank, inputs = down.shape
    outputs = up.shape[0]
    size = inputs * outputs
    return down.element_size() >= 4 and rows * (inputs + outputs) > 2 * size and rows * rank >= size


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        views: Views,
        scale: float,
    ) -> Tensor:
        weight_t, down_t, up_t = views
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        low: Tensor | None = None
        if merges(rows.shape[0], down, up):
            weight = torch.addmm(weight, up, down, alpha=scale)
            out = apply_frozen(rows, weight.t(), bias)
        else:
            low = torch.mm(rows, down_t)
            out = apply_frozen(rows, weight_t, bias).addmm_(low, up_t, alpha=scale)
        # Saves no activations for frozen factors.
        needs_x, needs_down, needs_up = ctx.needs_input_grad[:3]
        saved_rows = rows if needs_down or (needs_up and low is None) else None
        ctx.save_for_backward(down, up, weight if needs_x else None, saved_rows, low if needs_up else None)
        ctx.scale, ctx.merged, ctx.down_t, ctx.up_t = scale, low is None, down_t, up_t
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        down, up, weight, inputs, low = ctx.saved_tensors
        needs_x, needs_down, needs_up = ctx.needs_input_grad[:3]
        shape = gradient.shape
        rows = gradient if gradient.dim() == 2 else gradient.reshape(-1, shape[-1])
        rows_t = rows.t()
        to_x = to_down = to_up = None
        if needs_up:
            low = torch.mm(inputs, ctx.down_t) if ctx.merged else low
            to_up = torch.addmm(up, rows_t, low, beta=0.0, alpha=ctx.scale)
        adds_to_x = needs_x and not ctx.merged
        if needs_down or adds_to_x:
            inner_t = torch.mm(ctx.up_t, rows_t)  # much faster than its transpose for a low rank
        if needs_down:
            to_down = torch.addmm(down, inner_t, inputs, beta=0.0, alpha=ctx.scale)
        if needs_x:
            to_x = torch.mm(rows, weight)
            if adds_to_x:
                to_x.addmm_(inner_t.t(), down, alpha=ctx.scale)
            to_x = to_x if len(shape) == 2 else to_x.view(*shape[:-1], to_x.shape[-1])
        return to_x, to_down, to_up, None, None, None, None


def apply_frozen(rows: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the output of the frozen layer for rows; `weight_t` is its transposed weight."""
    return torch.mm(rows, weight_t) if bias is None else torch.addmm(bias, rows, weight_t)


def is_plain_linear(layer: nn.Module) -> bool:
    """Returns True if a layer is exactly `nn.Linear`, with a plain weight and without hooks."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
    )
