"""Stores frozen weights in 8-bit floats, or in the CPU's memory, and restores each for the time of its use.

float8 e4m3 with one scale per row, as the scaled fp8 weights of published files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HIGHEST = 448.0
"""The largest number of float8 e4m3."""
WeightStorage = tuple[Callable[[Tensor, Tensor | None], Tensor], Callable[[], Tensor]]
"""A function (input, bias) -> output, and one that returns the weight in its original dtype."""
Swap = Callable[[list[Tensor]], Callable[[], list[Tensor]]]
"""See `BlockSwapper.add`."""


class _LinearOfStored(torch.autograd.Function):
    """A linear layer that restores its weight in the forward and again in the backward pass.

    Autograd would keep every restored weight until the backward pass, which saves nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, restore: Callable[[], Tensor]) -> Tensor:
        ctx.restore = restore
        return F.linear(x, restore().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        gradient: Tensor = gradients[0]
        weight = ctx.restore().to(gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1]) @ weight
        return rows.view(*gradient.shape[:-1], weight.shape[1]), None, None


def store_weight(weight: Tensor, *, fp8: bool, swap: Swap | None = None) -> WeightStorage:
    """Returns the operations of a stored weight.

    Args:
        weight: [rows, columns]; the caller releases it.
        fp8: Stores float8 and a scale per row; False stores the weight as it is.
        swap: Moves what is stored to the CPU's memory, and returns a function that returns it on the device; None
            keeps it there.
    """
    dtype = weight.dtype
    stored = [*_to_fp8(weight)] if fp8 else [weight]
    fetch = None if swap is None else swap(stored)
    stored = stored if fetch is None else []

    def restore() -> Tensor:
        values = stored if fetch is None else fetch()
        return values[0].to(dtype) * values[1].to(dtype) if fp8 else values[0]

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = _LinearOfStored.apply(x, bias, restore)  # type: ignore[no-untyped-call]
        return out

    return apply, restore


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weight as float8 [rows, columns], and its scales [rows, 1]."""
    values = weight.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / _HIGHEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (values / scales).to(torch.float8_e4m3fn), scales
