"""Builds the `modelspec.*` entries of a header: Stability AI's metadata standard 1.0.1, which model browsers show.

They depend only on the adapter and its card, so the same training gives the same bytes. There is no `date`; a date in
an imported file is kept when it is written again.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_engine.adapters import Adapter
from lora_engine.formats.card import Card
from lora_engine.formats.family import context_widths
from lora_engine.formats.safetensors_io import BODY_SHA256
from lora_engine.formats.transformers.dit import transformer_names

PREFIX = "modelspec."
DIGEST = {f"{PREFIX}hash_sha256": f"0x{BODY_SHA256}"}
"""The standard's digest entry, with the placeholder that the writer replaces."""
SPECIFICATION = "1.0.1"
SGM = "https://github.com/Stability-AI/generative-models"
_V = "v_prediction"
# kohya's name of the base version to (architecture, resolution).
_ARCHITECTURES = {
    "sdxl_base_v1-0": ("stable-diffusion-xl-v1-base/lora", "1024x1024"),
    "sd_v2_v": ("stable-diffusion-v2-768-v/lora", "768x768"),
    "sd_v2": ("stable-diffusion-v2-512/lora", "512x512"),
    "sd_v1": ("stable-diffusion-v1/lora", "512x512"),
}
_TRANSFORMER_RESOLUTION = "1024x1024"
_PREDICTIONS = {_V: "v", "v": "v", "epsilon": "epsilon", "eps": "epsilon"}


def base_version(adapter: Adapter, card: Card) -> str:
    """Returns kohya's name of the base version; empty for a family that kohya does not support."""
    if adapter.base == "sdxl":
        return "sdxl_base_v1-0"
    if adapter.base in transformer_names:
        return transformer_names[adapter.base].version
    if adapter.base != "sd":
        return ""
    if 1024 not in context_widths(adapter.modules):
        return "sd_v1"
    return "sd_v2_v" if _PREDICTIONS.get(card.prediction or "") == "v" else "sd_v2"


def model_spec(adapter: Adapter, card: Card, *, kohya_names: bool) -> dict[str, str]:
    """Returns the required and recommended entries of the standard, without the digest of the tensors.

    Args:
        adapter: The adapter.
        card: Its card.
        kohya_names: True if the tensors have kohya's names, False for diffusers' names.
    """
    version, parents = base_version(adapter, card), card.recipe.get("parents") or ()
    architecture, resolution = _architecture(adapter, version)
    kinds = sorted({delta.kind for delta in adapter.modules.values()})
    entries = {
        "sai_model_spec": SPECIFICATION,
        "architecture": architecture,
        "implementation": SGM if kohya_names else "diffusers",
        "title": card.title or f"{' and '.join(kinds) or 'embedding'} for {card.base or adapter.base or 'any base'}",
        "resolution": card.resolution or resolution,
        "prediction_type": _PREDICTIONS.get(card.prediction or ""),
        "license": card.license,
        "trigger_phrase": card.trigger,
        "usage_hint": f"Trigger: {card.trigger}" if card.trigger else None,
        "merged_from": ", ".join(str(parent).partition(" sha256:")[0] for parent in parents),
        "tags": ", ".join(dict.fromkeys([*kinds, *_methods(card), *filter(None, [card.class_word])])),
    }
    return {f"{PREFIX}{name}": text for name, text in entries.items() if text}


def _architecture(adapter: Adapter, version: str) -> tuple[str, str]:
    if adapter.base in transformer_names:
        return transformer_names[adapter.base].architecture, _TRANSFORMER_RESOLUTION
    return _ARCHITECTURES.get(version, ("", ""))


def _methods(card: Card) -> list[str]:
    method = card.recipe.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    return [str(name)] if name else []
