"""Compares the weights of two adapter files. Functions import the engine themselves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.errors import BaseModelError

if TYPE_CHECKING:
    from lora_engine.merging.compare import AdapterComparison


def compare_weights(first: Path, second: Path, bases: Iterable[str | None] = ()) -> AdapterComparison:
    """Compares the effect of two adapter files on each module of their base.

    Args:
        first: The reference.
        second: The file to compare with it.
        bases: Candidate bases, for kinds that need base weights; only one with the adapters' fingerprint is read.

    Raises:
        AdapterError: A file is no valid adapter.
    """
    from lora_engine.bases.base import load_base
    from lora_engine.formats import read_bundle
    from lora_engine.merging.compare import compare_adapters

    bundles = read_bundle(first), read_bundle(second)
    needs_base = any(delta.reads_base for bundle in bundles for delta in bundle.adapter.modules.values())
    base = _find_base(bases, bundles[0].adapter.fingerprint) if needs_base else None
    return compare_adapters(
        bundles[0].adapter,
        bundles[1].adapter,
        base=load_base(base, device="cpu") if base else None,
        words=(bundles[0].embeddings, bundles[1].embeddings),
    )


def _find_base(bases: Iterable[str | None], fingerprint: str | None) -> str | None:
    from lora_engine.bases.source import resolve_base

    for base in bases:
        try:
            if base and fingerprint is not None and resolve_base(base).fingerprint() == fingerprint:
                return base
        except BaseModelError:
            continue
    return None


def read_file_card(file: Path) -> dict[str, Any]:
    """Returns the card in an adapter file's header."""
    from lora_engine.formats import read_bundle

    return read_bundle(file).card.model_dump(mode="json")
