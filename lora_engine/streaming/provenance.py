"""Reads and writes the list of fused adapters in a model's header, and drops header entries that are stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_engine.documents import parse_json
from lora_engine.errors import BaseModelError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file

FUSED = "loraline.fused"
# Digests of the tensors before the change.
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class FusedAdapter:
    """An adapter that is part of a model's weights.

    Attributes:
        sha256: Digest of its file, or of the names and digests of the files in its folder.
        weight: Multiplier of the adapter.
        title: Title from its card.
    """

    sha256: str
    weight: float
    title: str = ""


def adapter_digest(path: Path) -> str:
    """Returns the SHA-256 of an adapter's file, or of the names and digests of the files in its folder."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return sha256_bytes(canonical_json({str(file.relative_to(path)): sha256_file(file) for file in files}))


def fused_adapters(metadata: Mapping[str, str], where: Path) -> list[FusedAdapter]:
    """Returns the adapters that a header names, in the order in which they were fused.

    Raises:
        BaseModelError: The header's list is malformed.
    """
    place, remedy = f"{where}: metadata {FUSED!r}", "remove the entry from the header, or save the model again"
    entries = parse_json(metadata.get(FUSED, "[]"), place, BaseModelError, remedy=remedy)
    try:
        return [_entry(entry) for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"the list of fused adapters is malformed: {error}"
        raise BaseModelError(problem, where=place, remedy=remedy) from error


def with_adapters(metadata: Mapping[str, str], adapters: Sequence[FusedAdapter]) -> dict[str, str]:
    """Returns the metadata with this list of fused adapters, and without digests of the old tensors."""
    current = {key: text for key, text in metadata.items() if key not in (*_STALE, FUSED)}
    return current | ({FUSED: canonical_json([asdict(entry) for entry in adapters]).decode()} if adapters else {})


def without_stale(metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the metadata without entries that describe the old tensors."""
    return with_adapters(metadata, [])


def _entry(entry: dict[str, Any]) -> FusedAdapter:
    return FusedAdapter(str(entry["sha256"]), float(entry["weight"]), str(entry.get("title", "")))
