"""Defines `AdaptedLayer`, the one wrapper module for all adapter kinds and layer types."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.adapters.delta import Delta
from lora_engine.adapters.layer import LayerOp, bias_of, meta_weight
from lora_engine.adapters.low_rank import is_plain_linear
from lora_engine.adapters.regularization import mask_ranks
from lora_engine.adapters.shared_input import SharedInput


class LayerWrapper(nn.Module):
    """A module in the place of a layer. Attributes that it lacks (`weight`, `in_features`, ...) are the layer's.

    Attributes:
        base: The layer, or another wrapper.
    """

    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


class AdaptedLayer(LayerWrapper):
    """A layer with one delta applied to its output.

    The wrapped layer keeps its identity, hooks, mode and `requires_grad`.

    Args:
        base: The layer, or another `AdaptedLayer` (adapters stack, and each reads the innermost layer's weight).
        delta: The delta. Its factors become parameters of this module and are shared with `self.delta`.
        multiplier: Strength of the delta; 0 returns the base's output, bit for bit.
        trainable: True gives the factors gradients, except those in `delta.frozen`.

    Attributes:
        dropout: Dropout rate of the delta's input (PEFT's `lora_dropout`); see `Attachment.adapter_dropout`.
        rank_mask: Factors of the columns of `up`, `[r]`; None changes none. For LoRA deltas only.
        is_skipped: True computes the base layer alone.
        fused_forward: Computes layer and delta in one step; None if the kind has no fused kernel or the layer was
            already wrapped.
        shared: The group of layers that are called with the same input; None without such a group.
    """

    def __init__(
        self,
        base: nn.Module,
        delta: Delta,
        multiplier: float = 1.0,
        *,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        layer = innermost(base)
        weight = meta_weight(layer)
        self.base = base
        self.multiplier = multiplier
        self.dropout = 0.0
        self.rank_mask: Tensor | None = None
        self.is_skipped = False
        self._op = LayerOp.of(layer)
        self._layer = (layer,)  # a tuple: nn.Module must not register it a second time
        factors = {
            name: nn.Parameter(
                factor.detach().clone().to(weight.device), requires_grad=trainable and name not in delta.frozen
            )
            for name, factor in delta.factors().items()
        }
        self.factors = nn.ParameterDict(factors)
        self.delta = delta.with_factors(factors)
        self.fused_forward = self.delta.fused_forward(weight, bias_of(layer), self._op) if base is layer else None
        self.shared: SharedInput | None = None
        self.training = base.training

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the adapted output, in the dtype of the base layer's output."""
        if not (args or kwargs):
            shared = None if self.shared is None else self.shared.output(self, x)
            if shared is not None:
                return shared
            if self.fused_forward is not None and self.can_fuse(x):
                return self.fused_forward(x, self.multiplier)
        out: Tensor = self.base(x, *args, **kwargs)
        if self.multiplier == 0.0 or self.is_skipped:
            return out
        if self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        layer = self._layer[0]
        # A quantized layer dequantizes its weight on access, so only kinds that read the weight access it.
        weight: Tensor = layer.weight if self.delta.reads_base else meta_weight(layer)  # type: ignore[assignment]
        delta = self.delta if self.rank_mask is None else mask_ranks(self.delta, self.rank_mask)
        return delta.forward(x, out, weight, bias_of(layer), self._op, self.multiplier)

    def can_fuse(self, x: Tensor) -> bool:
        """Returns True if the fused forward can be used for this input."""
        fused_forward, is_dropping = self.fused_forward, self.dropout or self.rank_mask is not None or self.is_skipped
        is_plain = self.multiplier != 0.0 and not is_dropping
        return fused_forward is not None and is_plain and fused_forward.applies_to(x) and is_plain_linear(self.base)


def innermost(layer: nn.Module) -> nn.Module:
    """Returns the layer inside all wrappers."""
    while isinstance(layer, LayerWrapper):
        layer = layer.base
    return layer
