"""Factor keys of LoRA."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, PEFT_KEYS, TableFactorKeys
from lora_engine.formats.validate import RESHAPE
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_BIAS = "lora_B.bias"
_MOST_SIZES = 8  # of a weight; the product of a long tensor takes quadratic time
EMBEDDING = {"lora_embedding_B": "down", "lora_embedding_A": "up"}
"""PEFT's suffixes for embeddings, whose factors are swapped and transposed: `A` is `up.T`, `B` is `down.T`."""


@dataclass(frozen=True)
class LoraKeys(TableFactorKeys):
    """LoRA's factors, perhaps with the shape to which ComfyUI pads the weight before it adds the difference.

    The difference has that shape, so the padding changes no weight that the difference fits.
    """

    @property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return (*super().suffixes, RESHAPE)

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor or setting with this suffix."""
        return RESHAPE if suffix == RESHAPE else super().factor(suffix)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix.

        Raises:
            AdapterError: The stated shape is not that of the difference.
        """
        factors = {name: tensor for name, tensor in tensors.items() if name != RESHAPE}
        delta = super().read(factors, alpha)
        if RESHAPE in tensors and isinstance(delta, LoraDelta) and not list(delta.issues()):
            stated, shape = tensors[RESHAPE].flatten()[:_MOST_SIZES].tolist(), list(delta.weight_shape)
            if (stated[:1], math.prod(stated)) != (shape[:1], math.prod(shape)):
                raise AdapterError(
                    f"{RESHAPE!r} is {stated}, and the difference has the shape {shape}",
                    allowed="the shape of the difference",
                    remedy="save or download the adapter again",
                )
        return delta


@dataclass(frozen=True)
class ScaledBiasKeys(LoraKeys):
    """PEFT's factor keys: the bias of `lora_B` is scaled by alpha / rank, a delta's bias is not."""

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix; a scaled bias is float64, to write the same value again."""
        transposed = {name: tensor.T if name in EMBEDDING else tensor for name, tensor in tensors.items()}
        delta = super().read(transposed, alpha)
        if not isinstance(delta, LoraDelta) or delta.bias is None or delta.scale == 1.0:
            return delta
        return replace(delta, bias=delta.bias.to(torch.float64) * delta.scale)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix, without alpha."""
        tensors = super().write(delta)
        if isinstance(delta, LoraDelta) and delta.bias is not None and delta.scale != 1.0:
            tensors[_BIAS] = _stored_bias(delta, delta.bias)
        return tensors


def with_scaled_bias(delta: Delta) -> Delta:
    """Returns a LoRA with the bias rounded to what PEFT's keys can store; any other delta unchanged."""
    if not isinstance(delta, LoraDelta) or delta.bias is None or delta.scale == 1.0:
        return delta
    if delta.scale == 0.0:  # PEFT's scale would switch the bias off, too
        return replace(delta, up=torch.zeros_like(delta.up), alpha=float(delta.rank))
    return replace(delta, bias=_stored_bias(delta, delta.bias).to(torch.float64) * delta.scale)


def _stored_bias(delta: LoraDelta, bias: Tensor) -> Tensor:
    wide = bias.to(torch.float64)
    return (wide if delta.scale == 0.0 else wide / delta.scale).to(delta.up.dtype)


LYCORIS_KEYS.add(
    LoraKeys(
        "lora",
        {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "bias": "diff_b"},
        optional=("mid", "bias"),
    )
)
# Files saved from the live model carry the name of PEFT's adapter.
_LIVE = {"lora_A.default.weight": "down", "lora_B.default.weight": "up", "lora_B.default.bias": "bias"}
_NAMES = {"down": "lora_A.weight", "up": "lora_B.weight", "bias": _BIAS}
PEFT_KEYS.add(ScaledBiasKeys("lora", _NAMES, aliases={**_LIVE, **EMBEDDING}, optional=("bias",)))
DIFFUSERS_KEYS.add(
    ScaledBiasKeys(
        "lora",
        _NAMES,
        aliases={
            **_LIVE,
            "lora_A": "down",
            "lora_B": "up",  # of Mochi
            "lora.down.weight": "down",
            "lora.up.weight": "up",
            "lora_linear_layer.down.weight": "down",
            "lora_linear_layer.up.weight": "up",
        },
        optional=("bias",),
    )
)
