"""Factor keys of LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, PEFT_KEYS, TableFactorKeys

_BIAS = "lora_B.bias"
EMBEDDING = {"lora_embedding_B": "down", "lora_embedding_A": "up"}
"""PEFT's suffixes for embeddings, whose factors are swapped and transposed: `A` is `up.T`, `B` is `down.T`."""


@dataclass(frozen=True)
class ScaledBiasKeys(TableFactorKeys):
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
            tensors[_BIAS] = (delta.bias.to(torch.float64) / delta.scale).to(delta.up.dtype)
        return tensors


def with_scaled_bias(delta: Delta) -> Delta:
    """Returns a LoRA with the bias rounded to what PEFT's keys can store; any other delta unchanged."""
    if not isinstance(delta, LoraDelta) or delta.bias is None or delta.scale == 1.0:
        return delta
    stored = (delta.bias.to(torch.float64) / delta.scale).to(delta.up.dtype)
    return replace(delta, bias=stored.to(torch.float64) * delta.scale)


LYCORIS_KEYS.add(
    TableFactorKeys(
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
            "lora.down.weight": "down",
            "lora.up.weight": "up",
            "lora_linear_layer.down.weight": "down",
            "lora_linear_layer.up.weight": "up",
        },
        optional=("bias",),
    )
)
