"""Fuses adapted linear layers that read one input into one step: q, k and v of an attention.

An attention calls `to_q`, `to_k` and `to_v` with the same tensor object. The first call computes the outputs of all,
and the others return them. One backward pass then accumulates the gradients of the input in place, and stacks the
factors `down` into one matrix. If the layers get different tensors, or one cannot be fused (`AdaptedLayer.can_fuse`),
each computes its own output, with the same result.
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
    """The attributes of `AdaptedLayer` that this module reads."""

    multiplier: float
    dropout: float
    fused_forward: LowRankLinear | None
    shared: SharedInput | None

    def can_fuse(self, x: Tensor) -> bool: ...  # noqa: D102


def share_inputs(layers: Mapping[str, Sharing], module: Callable[[str], nn.Module]) -> None:
    """Groups the layers that get the same input tensor from their parent module.

    A group needs a fused forward in every layer and one scale. Keys and values of a cross-attention are not grouped:
    their input rarely needs a gradient, and they share little else.

    Args:
        layers: The adapted layers by canonical name.
        module: Returns the module of a canonical name.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for leaves in _SIBLINGS:
            group = [layers[name] for leaf in leaves if (name := f"{parent}.{leaf}") in layers]
            scales = {None if layer.fused_forward is None else layer.fused_forward.scale for layer in group}
            if len(group) > 1 and len(scales) == 1 and None not in scales and not _crosses(module, parent, leaves):
                shared = SharedInput(group)
                for layer in group:
                    layer.shared = shared


def _crosses(module: Callable[[str], nn.Module], parent: str, leaves: Sequence[str]) -> bool:
    # diffusers' attentions have the attribute; a parent that is a whole component is no attention.
    is_attention = "to_q" in leaves and "." in parent
    return is_attention and bool(getattr(module(parent), "is_cross_attention", False))


class SharedInput:
    """A group of layers that are called with the same tensor, one after another.

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
        """Returns the output of a layer for an input; None means the layer must compute it."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        state = self._fingerprint(x)
        if layer not in self._ready or x is not self._input or state != self._state:
            self._ready = self._compute(x)
            self._input, self._state = x, state
        out = self._ready.pop(layer)
        if not self._ready:
            self._input = None
        return out

    def _fingerprint(self, x: Tensor) -> tuple[Any, ...]:
        # Everything that an output depends on: a change between two calls must discard the cached outputs.
        settings = [(layer.multiplier, layer.dropout) for layer in self._layers]
        values = [tensor for step in self._steps for tensor in (step.weight, step.bias, step.down, step.up)]
        versions = [tensor._version for tensor in values if tensor is not None]
        return (x._version, torch.is_grad_enabled(), *settings, *versions)

    def _compute(self, x: Tensor) -> dict[Sharing, Tensor | None]:
        not_fused: dict[Sharing, Tensor | None] = dict.fromkeys(self._layers)
        multiplier = self._layers[0].multiplier
        if any(layer.multiplier != multiplier or not layer.can_fuse(x) for layer in self._layers):
            return not_fused
        downs, ups, views = zip(*(step.factors_in(x.dtype) for step in self._steps), strict=True)
        rows = x.numel() // x.shape[-1]
        if any(merges(rows, down, up) for down, up in zip(downs, ups, strict=True)):
            return not_fused
        frozen = [(step.weight, step.bias, *transposed) for step, transposed in zip(self._steps, views, strict=True)]
        scale = multiplier * self._steps[0].scale
        outs = _Step.apply(x, scale, frozen, *downs, *ups)  # type: ignore[no-untyped-call]
        return dict(zip(self._layers, outs, strict=True))


class _Step(torch.autograd.Function):
    """The fused step of `low_rank` for several layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, frozen: Sequence[_Frozen], *factors: Tensor) -> tuple[Tensor, ...]:
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        lows = [torch.mm(rows, down_t) for _, _, _, down_t, _ in frozen]
        outs = [
            apply_frozen(rows, weight_t, bias).addmm_(low, up_t, alpha=scale)
            for (_, bias, weight_t, _, up_t), low in zip(frozen, lows, strict=True)
        ]
        # Saves no activations for frozen factors.
        needs_x, _, _, *needs = ctx.needs_input_grad
        needs_down, needs_up = any(needs[: len(frozen)]), any(needs[len(frozen) :])
        weights = [weight if needs_x else None for weight, *_ in frozen]
        saved_lows = [low if needs_up else None for low in lows]
        ctx.save_for_backward(rows if needs_down else None, *factors, *weights, *saved_lows)
        ctx.scale, ctx.ups_t, ctx.needs = scale, [up_t for *_, up_t in frozen], (needs_x, needs_down, needs_up)
        return tuple(out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, (needs_x, needs_down, needs_up) = len(gradients), ctx.needs
        inputs, *saved = ctx.saved_tensors
        downs, ups, weights, lows = (saved[start : start + count] for start in range(0, len(saved), count))
        rows = [grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1]) for grad in gradients]
        rows_t = [grad.t() for grad in rows]
        to_x = None
        to_downs: Sequence[Tensor | None] = [None] * count
        to_ups: Sequence[Tensor | None] = [None] * count
        if needs_up:
            parts = zip(ups, rows_t, lows, strict=True)
            to_ups = [torch.addmm(up, grad_t, low, beta=0.0, alpha=ctx.scale) for up, grad_t, low in parts]
        if needs_down or needs_x:
            stacked = torch.cat(downs)
            inner_t = torch.cat([torch.mm(up_t, grad_t) for up_t, grad_t in zip(ctx.ups_t, rows_t, strict=True)])
        if needs_down:
            to_stacked = torch.addmm(stacked, inner_t, inputs, beta=0.0, alpha=ctx.scale)
            to_downs = torch.split(to_stacked, [down.shape[0] for down in downs])
        if needs_x:
            to_x = torch.mm(rows[0], weights[0])
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                to_x.addmm_(grad, weight)
            to_x.addmm_(inner_t.t(), stacked, alpha=ctx.scale)
            to_x = to_x if gradients[0].dim() == 2 else to_x.view(*gradients[0].shape[:-1], to_x.shape[-1])
        return to_x, None, None, *to_downs, *to_ups
