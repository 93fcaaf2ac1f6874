"""Finds the sample image of a registered version: in the report of its evaluation, or in its training."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from lora_engine.documents import parse_json
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import RegistryError, StoreError
from registry.store.artifacts import Store

SIDE = 192
"""Longest side of a small sample image in pixels."""
_MAX_SAMPLE = 32 << 20


def read_report(store: Store, version: AdapterVersion) -> Mapping[str, Any]:
    """Returns the evaluation report of a version; empty if it has none, or its bytes are missing."""
    if version.report is None:
        return {}
    try:
        content = store.read(version.report, "report.json")
    except StoreError:
        return {}
    report = parse_json(content, f"report of {version.ref}", RegistryError)
    return report if isinstance(report, Mapping) else {}


def find_sample(store: Store, version: AdapterVersion) -> tuple[ArtifactRef, str] | None:
    """Returns artifact and path of the sample image of a version; None if it has none.

    It is the first image of the evaluation with the trigger word, or the last one of the training.

    Raises:
        StoreError: The bytes are missing or damaged.
    """
    if version.report is not None:
        files = store.files(version.report)
        entries = read_report(store, version).get("samples") or ()
        for entry in sorted(entries, key=lambda entry: entry.get("kind") == "unasked"):
            path = str(entry.get("adapter"))
            if path in files and files[path].size <= _MAX_SAMPLE:
                return version.report, path
    drawn = [path for path in store.files(version.artifact) if re.fullmatch(r"samples/step-[0-9]+/.+\.png", path)]
    if not drawn:
        return None
    last = max(int(path.split("/")[1][5:]) for path in drawn)
    return version.artifact, min(path for path in drawn if path.startswith(f"samples/step-{last}/"))


def has_sample(store: Store, version: AdapterVersion) -> bool:
    """Returns True if a version has a sample image."""
    try:
        return find_sample(store, version) is not None
    except StoreError:  # the bytes are missing; the version is listed all the same
        return False


def scale_sample(content: bytes) -> bytes | None:
    """Returns an image as WebP of at most `SIDE` pixels; None if it is damaged."""
    from PIL import Image

    from lora_engine.data.images import BROKEN, open_pillow

    try:
        with open_pillow(io.BytesIO(content)) as image:
            if image.width * image.height > 64_000_000:
                return None
            small = image.convert("RGB")
    except BROKEN:
        return None
    small.thumbnail((SIDE, SIDE))
    if max(small.size) <= SIDE // 2:
        factor = SIDE // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=82)
    return buffer.getvalue()
