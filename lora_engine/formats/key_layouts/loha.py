"""Factor keys of LoHa: LyCORIS and PEFT share them, but PEFT stores alpha in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_engine.adapters import Delta, LohaDelta
from lora_engine.formats.key_layout import LYCORIS_KEYS, PEFT_KEYS, TableFactorKeys
from lora_engine.formats.lora_config import ranks_and_alphas
from lora_engine.formats.peft_types import PEFT_TYPES, PeftType

_NAMES = {
    "up1": "hada_w1_a",
    "down1": "hada_w1_b",
    "up2": "hada_w2_a",
    "down2": "hada_w2_b",
    "core1": "hada_t1",
    "core2": "hada_t2",
}
_CORES = ("core1", "core2")
# Files saved from the live model carry the name of PEFT's adapter.
_LIVE = {f"{suffix}.default": factor for factor, suffix in _NAMES.items()}


def loha_settings(modules: Mapping[str, Delta]) -> dict[str, Any]:
    """Returns PEFT's `LoHaConfig` for one component's modules (by path)."""
    has_cores = any(isinstance(delta, LohaDelta) and delta.core1 is not None for delta in modules.values())
    ranks = {path: (delta.rank or 0, delta.alpha or 0.0) for path, delta in modules.items()}
    return {
        **ranks_and_alphas(ranks, "alpha"),
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "use_effective_conv2d": has_cores,
    }


LYCORIS_KEYS.add(TableFactorKeys("loha", _NAMES, optional=_CORES))
PEFT_KEYS.add(TableFactorKeys("loha", _NAMES, aliases=_LIVE, optional=_CORES))
PEFT_TYPES.add("LOHA", PeftType(("loha",), "alpha", loha_settings))
