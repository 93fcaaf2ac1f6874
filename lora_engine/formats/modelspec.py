"""Builds the `modelspec.*` entries of a header: Stability AI's metadata standard 1.0.1, which model browsers show.

They depend only on the adapter and its card, so the same training gives the same bytes. There is no `date`; a date in
an imported file is kept when it is written again.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_engine.adapters import Adapter
from lora_engine.families import families
from lora_engine.families.family import HeaderVersion
from lora_engine.formats.card import Card
from lora_engine.formats.family import context_widths
from lora_engine.formats.safetensors_io import BODY_SHA256

_PREFIX = "modelspec."
DIGEST = {f"{_PREFIX}hash_sha256": f"0x{BODY_SHA256}"}
"""The standard's digest entry, with the placeholder that the writer replaces."""
SPECIFICATION = "1.0.1"
SGM = "https://github.com/Stability-AI/generative-models"
_PREDICTIONS = {"v_prediction": "v", "v": "v", "epsilon": "epsilon", "eps": "epsilon"}


def base_version(adapter: Adapter, card: Card) -> str:
    """Returns kohya's name of the base version; empty for an unknown family."""
    return _version_of(adapter, card).version


def model_spec(adapter: Adapter, card: Card, *, kohya_names: bool) -> dict[str, str]:
    """Returns the required and recommended entries of the standard, without the digest of the tensors.

    Args:
        adapter: The adapter.
        card: Its card.
        kohya_names: True if the tensors have kohya's names, False for diffusers' names.
    """
    version, parents = _version_of(adapter, card), card.recipe.get("parents") or ()
    kinds = sorted({delta.kind for delta in adapter.modules.values()})
    entries = {
        "sai_model_spec": SPECIFICATION,
        "architecture": version.architecture,
        "implementation": SGM if kohya_names else "diffusers",
        "title": card.title or f"{' and '.join(kinds) or 'embedding'} for {card.base or adapter.base or 'any base'}",
        "resolution": card.resolution or version.resolution,
        "prediction_type": _PREDICTIONS.get(card.prediction or ""),
        "license": card.license,
        "trigger_phrase": card.trigger,
        "usage_hint": _usage_hint(card),
        "merged_from": ", ".join(str(parent).partition(" sha256:")[0] for parent in parents),
        "tags": ", ".join(dict.fromkeys([*kinds, *_methods(card), *filter(None, [card.class_word])])),
    }
    return {f"{_PREFIX}{name}": text for name, text in entries.items() if text}


def _usage_hint(card: Card) -> str:
    hints = {"Trigger": card.trigger, "Weight": card.recommended}
    return ". ".join(f"{name}: {text}" for name, text in hints.items() if text)


def _version_of(adapter: Adapter, card: Card) -> HeaderVersion:
    versions = families[adapter.base].versions if adapter.base in families else ()
    widths, prediction = context_widths(adapter.modules), _PREDICTIONS.get(card.prediction or "")
    matching = (
        version
        for version in versions
        if (not version.width or version.width in widths) and version.prediction in ("", prediction)
    )
    return next(matching, HeaderVersion("", "", ""))


def _methods(card: Card) -> list[str]:
    method = card.recipe.get("method")
    name = method.get("name") if isinstance(method, Mapping) else method
    return [str(name)] if name else []
