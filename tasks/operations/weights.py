"""Compares the weights of two adapter files; the engine is imported inside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import BaseModelError

if TYPE_CHECKING:
    from lora_engine.merging.compare import Comparison


def compare_weights(first: Path, second: Path, bases: Iterable[str | None] = ()) -> Comparison:
    """How far two adapter files lie apart in what they do to each module of their base.

    Args:
        first: What the other is measured against.
        second: The other.
        bases: Where the base may be, for kinds that need its weights; only one with their fingerprint is read.

    Raises:
        AdapterError: A file is no adapter, or not whole.
    """
    from lora_engine.bases.base import load_base
    from lora_engine.formats import read_bundle
    from lora_engine.merging.compare import compare_adapters
    from lora_engine.merging.deltas import needs_base_values

    one, other = read_bundle(first), read_bundle(second)
    needs_base = any(needs_base_values(delta) for bundle in (one, other) for delta in bundle.adapter.modules.values())
    place = _find(bases, one.adapter.fingerprint) if needs_base else None
    return compare_adapters(
        one.adapter,
        other.adapter,
        base=load_base(place, device="cpu") if place else None,
        words=(one.embeddings, other.embeddings),
    )


def _find(bases: Iterable[str | None], fingerprint: str | None) -> str | None:
    from lora_engine.bases.source import resolve_base

    for base in bases:
        try:
            if base and fingerprint is not None and resolve_base(base).fingerprint() == fingerprint:
                return base
        except BaseModelError:
            continue
    return None


def read_card(file: Path) -> dict[str, Any]:
    """What an adapter file says of itself."""
    from lora_engine.formats import read_bundle

    return read_bundle(file).card.model_dump(mode="json")
