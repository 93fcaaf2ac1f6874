"""Defines the layer types that can carry an adapter, and the operation of each (`LayerOp`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.errors import AdapterError

ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_adaptable(layer: nn.Module) -> bool:
    """Returns True if the layer has a weight and is of a type in `ADAPTABLE` or diffusers' `RMSNorm`."""
    return (isinstance(layer, ADAPTABLE) or _is_rms_norm(layer)) and meta_weight(layer) is not None


def _is_rms_norm(layer: nn.Module) -> bool:
    # diffusers has its own RMSNorm class; the name check avoids the import of diffusers.
    return isinstance(layer, nn.RMSNorm) or (
        type(layer).__name__ == "RMSNorm" and type(layer).__module__.startswith("diffusers.")
    )


@dataclass(frozen=True)
class LayerOp:
    """The operation of a layer for any weight: `op(x, weight, bias)`, which is linear in weight and bias.

    Attributes:
        dims: Spatial dimensions of the weight: 0 for a linear layer, 2 for `Conv2d`.
        groups: Groups of a convolution.
        pad: Argument of `F.pad` before the convolution, in padding modes other than zeros.
        other: The function of a layer that is neither linear nor a convolution (embedding, norm); None for those two.
    """

    dims: int = 0
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    pad: tuple[int, ...] = ()
    other: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> LayerOp:
        """Returns the operation of a layer.

        Raises:
            AdapterError: The layer is of a type that cannot carry an adapter.
        """
        if isinstance(layer, nn.Linear):
            return cls()
        if isinstance(layer, nn.Conv2d):
            pad = () if layer.padding_mode == "zeros" else tuple(layer._reversed_padding_repeated_twice)
            return cls(2, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode, pad)
        if isinstance(layer, nn.Embedding):
            return cls(other=lambda x, weight, bias: F.embedding(x, weight))
        if isinstance(layer, nn.LayerNorm):
            return cls(other=partial(_layer_norm, tuple(layer.normalized_shape), layer.eps))
        if isinstance(layer, nn.GroupNorm):
            return cls(other=partial(_group_norm, layer.num_groups, layer.eps))
        if _is_rms_norm(layer):
            return cls(other=partial(_rms_norm, layer.weight.shape, layer.eps))  # type: ignore[arg-type]
        raise AdapterError(
            f"a layer of type {type(layer).__name__!r} cannot carry an adapter",
            allowed=", ".join(kind.__name__ for kind in ADAPTABLE),
            remedy="leave the module out of the targets",
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns the layer's output for an input, computed with this weight and bias."""
        if self.other is not None:
            return self.other(x, weight, bias)
        if self.dims == 0:
            return F.linear(x, weight, bias)
        if self.pad:
            padded = F.pad(x, self.pad, mode=self.padding_mode)
            return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _layer_norm(shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _group_norm(groups: int, eps: float, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps)


def _rms_norm(shape: tuple[int, ...], eps: float | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = F.rms_norm(x, shape, weight, eps)
    return out if bias is None else out + bias


def meta_weight(layer: nn.Module) -> Tensor:
    """Returns the weight of a layer; for a quantized layer, a stand-in of its shape, dtype and device."""
    stand_in: Tensor | None = layer.__dict__.get("meta_weight")
    return layer.weight if stand_in is None else stand_in  # type: ignore[return-value]


def bias_of(layer: nn.Module) -> Tensor | None:
    """Returns the bias of a layer; None if it has none, such as an embedding."""
    return getattr(layer, "bias", None)
