"""The one module that wraps a layer under an adapter. It knows no kind: what a delta does is the delta's own affair."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.adapters.delta import Delta
from lora_engine.adapters.layer import LayerOp, bias_of, meta_weight
from lora_engine.adapters.low_rank import is_plain_linear
from lora_engine.adapters.shared_input import SharedInput


class AdaptedLayer(nn.Module):
    """A layer under one delta: the layer's own output, then what the delta makes of it.

    The wrapped layer keeps its identity, hooks, mode and gradients' settings. Attributes that the wrapper lacks
    (`weight`, `in_features`, ...) are the wrapped layer's.

    Args:
        base: The layer, or another `AdaptedLayer` (adapters stack; each sees the innermost layer's weight).
        delta: The delta; its factors become parameters of this module, shared with the delta, so that `.to()` and
            optimisers move both.
        multiplier: Strength; 0 gives the base's output, bit for bit.
        trainable: Whether the factors (those that the delta does not freeze) take gradients.

    Attributes:
        dropout: Share of the input that the delta does not see (as PEFT's `lora_dropout`); see `Attachment.adapter_dropout`.
        whole: The layer and the delta in one step, where the kind has that and the layer is not wrapped already.
        shared: The layers that are called with the same input, where there are others.
    """

    base: nn.Module

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
        self._op = LayerOp.of(layer)
        self._layer = (layer,)  # in a tuple, so that it is not registered a second time
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
        """The adapted output."""
        if not (args or kwargs):
            shared = None if self.shared is None else self.shared.output(self, x)
            if shared is not None:
                return shared
            if self.fused_forward is not None and self.can_fuse(x):
                return self.fused_forward(x, self.multiplier)
        out: Tensor = self.base(x, *args, **kwargs)
        if self.multiplier == 0.0:
            return out
        if self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        layer = self._layer[0]
        # A quantised layer computes its weight when asked, so only kinds that read it ask.
        weight: Tensor = layer.weight if self.delta.reads_base else meta_weight(layer)  # type: ignore[assignment]
        return self.delta.forward(x, out, weight, bias_of(layer), self._op, self.multiplier)

    def can_fuse(self, x: Tensor) -> bool:
        """Whether the layer and the delta are one step for this input, now."""
        fused_forward, usual = self.fused_forward, self.multiplier != 0.0 and not self.dropout
        return fused_forward is not None and usual and fused_forward.applies_to(x) and is_plain_linear(self.base)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer below all wrappers."""
    while isinstance(layer, AdaptedLayer):
        layer = layer.base
    return layer
