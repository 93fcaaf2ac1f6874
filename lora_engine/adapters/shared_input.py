"""Adapted linear layers that read one input, all in one step: q, k and v of an attention.

An attention calls `to_q`, `to_k` and `to_v` with the very same tensor. The first that is called computes for all, and
the others hand out what is ready. So the backward pass meets them together: the gradients to the input are added up as
they are computed, and the factors `down` are one matrix in it. Where layers do not get the same tensor after all, or
one cannot go in one step (`AdaptedLayer.can_fuse`), each computes for itself; the meaning is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_engine.adapters.low_rank import LowRankLinear, apply_frozen, merges

# Weight and bias of a layer; weight, `down` and `up` transposed.
_Frozen = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]

# diffusers' attentions, CLIP's and T5's, and T5's gated feed-forward.
_SIBLINGS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)


class Sharing(Protocol):
    """What an `AdaptedLayer` shows of itself here."""

    multiplier: float
    dropout: float
    fused_forward: LowRankLinear | None
    shared: SharedInput | None

    def can_fuse(self, x: Tensor) -> bool: ...  # noqa: D102


def share_inputs(layers: Mapping[str, Sharing], module: Callable[[str], nn.Module]) -> None:
    """Joins those of the layers, by canonical name, that get one tensor from the module around them.

    Layers join where each goes in one step with its delta and all have one scale. The keys and values of a
    cross-attention stay apart: their input seldom takes a gradient, and there is little else to share.

    Args:
        layers: By canonical name.
        module: Gives the module of a canonical name.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for leaves in _SIBLINGS:
            found = [layers[name] for leaf in leaves if (name := f"{parent}.{leaf}") in layers]
            scales = {None if layer.fused_forward is None else layer.fused_forward.scale for layer in found}
            if len(found) > 1 and len(scales) == 1 and None not in scales and not _crosses(module, parent, leaves):
                shared = SharedInput(found)
                for layer in found:
                    layer.shared = shared


def _crosses(module: Callable[[str], nn.Module], parent: str, leaves: Sequence[str]) -> bool:
    # diffusers' attentions say it; where the parent is a whole component, there is nothing to ask.
    asked = "to_q" in leaves and "." in parent
    return asked and bool(getattr(module(parent), "is_cross_attention", False))


class SharedInput:
    """Layers that are called with the same tensor, one after another.

    Args:
        layers: Two or more, each with a `fused_forward`, all of one scale.
    """

    def __init__(self, layers: Sequence[Sharing]) -> None:
        self._layers = tuple(layers)
        self._steps = [layer.fused_forward for layer in layers if layer.fused_forward is not None]
        self._ready: dict[Sharing, Tensor | None] = {}
        self._input: Tensor | None = None
        self._state: tuple[Any, ...] = ()

    def output(self, layer: Sharing, x: Tensor) -> Tensor | None:
        """What a layer gives for an input; None where it is to compute for itself."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        state = self._now(x)
        if layer not in self._ready or x is not self._input or state != self._state:
            self._ready = self._compute(x)
            self._input, self._state = x, state
        out = self._ready.pop(layer)
        if not self._ready:
            self._input = None
        return out

    def _now(self, x: Tensor) -> tuple[Any, ...]:
        # The values that an output depends on: what changed between two calls is not to be passed over.
        settings = [(layer.multiplier, layer.dropout) for layer in self._layers]
        values = [tensor for step in self._steps for tensor in (step.weight, step.bias, step.down, step.up)]
        versions = [tensor._version for tensor in values if tensor is not None]
        return (x._version, torch.is_grad_enabled(), *settings, *versions)

    def _compute(self, x: Tensor) -> dict[Sharing, Tensor | None]:
        apart: dict[Sharing, Tensor | None] = dict.fromkeys(self._layers)
        multiplier = self._layers[0].multiplier
        if any(layer.multiplier != multiplier or not layer.can_fuse(x) for layer in self._layers):
            return apart
        downs, ups, views = zip(*(step.factors_in(x.dtype) for step in self._steps), strict=True)
        rows = x.numel() // x.shape[-1]
        if any(merges(rows, down, up) for down, up in zip(downs, ups, strict=True)):
            return apart
        frozen = [(step.weight, step.bias, *seen) for step, seen in zip(self._steps, views, strict=True)]
        scale = multiplier * self._steps[0].scale
        outs = _Step.apply(x, scale, frozen, *downs, *ups)  # type: ignore[no-untyped-call]
        return dict(zip(self._layers, outs, strict=True))


class _Step(torch.autograd.Function):
    """As `low_rank`'s, for several layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, frozen: Sequence[_Frozen], *factors: Tensor) -> tuple[Tensor, ...]:
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        lows = [torch.mm(rows, down_t) for _, _, _, down_t, _ in frozen]
        outs = [
            apply_frozen(rows, weight_t, bias).addmm_(low, up_t, alpha=scale)
            for (_, bias, weight_t, _, up_t), low in zip(frozen, lows, strict=True)
        ]
        # What a factor that stands still would need is not kept.
        moves_x, _, _, *moves = ctx.needs_input_grad
        moves_down, moves_up = any(moves[: len(frozen)]), any(moves[len(frozen) :])
        weights = [weight if moves_x else None for weight, *_ in frozen]
        between = [low if moves_up else None for low in lows]
        ctx.save_for_backward(rows if moves_down else None, *factors, *weights, *between)
        ctx.scale, ctx.ups_t, ctx.moves = scale, [up_t for *_, up_t in frozen], (moves_x, moves_down, moves_up)
        return tuple(out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, (moves_x, moves_down, moves_up) = len(gradients), ctx.moves
        entered, *kept = ctx.saved_tensors
        downs, ups, weights, lows = (kept[place : place + count] for place in range(0, len(kept), count))
        rows = [each if each.dim() == 2 else each.reshape(-1, each.shape[-1]) for each in gradients]
        rows_t = [own.t() for own in rows]
        to_x = None
        to_downs: Sequence[Tensor | None] = [None] * count
        to_ups: Sequence[Tensor | None] = [None] * count
        if moves_up:
            parts = zip(ups, rows_t, lows, strict=True)
            to_ups = [torch.addmm(up, own_t, low, beta=0.0, alpha=ctx.scale) for up, own_t, low in parts]
        if moves_down or moves_x:
            stacked = torch.cat(downs)
            inner_t = torch.cat([torch.mm(up_t, own_t) for up_t, own_t in zip(ctx.ups_t, rows_t, strict=True)])
        if moves_down:
            to_stacked = torch.addmm(stacked, inner_t, entered, beta=0.0, alpha=ctx.scale)
            to_downs = torch.split(to_stacked, [down.shape[0] for down in downs])
        if moves_x:
            to_x = torch.mm(rows[0], weights[0])
            for own, weight in zip(rows[1:], weights[1:], strict=True):
                to_x.addmm_(own, weight)
            to_x.addmm_(inner_t.t(), stacked, alpha=ctx.scale)
            to_x = to_x if gradients[0].dim() == 2 else to_x.view(*gradients[0].shape[:-1], to_x.shape[-1])
        return to_x, None, None, *to_downs, *to_ups
