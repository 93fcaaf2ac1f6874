"""Remembers what decoding the images of a folder gave, so that an unchanged image is not decoded again.

A file of the cache has no pixels: it names the clean PNGs by their digests, and a function reads them from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from lora_engine.data.decoders import DecodedImage
from lora_engine.data.duplicates import Print
from lora_engine.data.rights import GenerationSign
from lora_engine.data.spec import IngestSettings
from lora_engine.documents import read_json_object
from lora_engine.errors import DataError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes, sha256_file

_REVISION = 1
"""To be raised when the decoder gives other pixels, hashes or evidence of the same file."""
_MAX_BYTES = 256 << 20
ReadByDigest = Callable[[str], bytes | None]


class DecodeCache:
    """The decoded images of one folder with one choice of settings.

    Args:
        folder: Folder of the caches of a home; each is a file in it.
        images: The user's folder.
        settings: See `IngestSettings`.
        read: Returns verified bytes by their SHA-256; None if they are not stored.
        roots: See `verify_credentials`.
    """

    def __init__(
        self, folder: Path, images: Path, settings: IngestSettings, read: ReadByDigest, roots: Path | None = None
    ) -> None:
        # What the decoder's results depend on beside the bytes of a file.
        basis = settings.model_dump(mode="json", include={"max_pixels", "background", "alpha", "c2pa"})
        basis |= {"revision": _REVISION, "roots": None if roots is None else sha256_file(roots), **_versions()}
        self._basis, self._keeps_opacity = sha256_bytes(canonical_json(basis)), settings.alpha == "mask"
        # One file per folder: other settings replace what is there, so the caches do not grow.
        self._path = folder / f"{sha256_bytes(str(images.resolve()).encode())}.json"
        self._read = read
        self._known = self._load()
        self._kept: dict[str, dict[str, Any]] = {}

    def find(self, sha256: str) -> DecodedImage | None:
        """Returns a decoded image by the digest of its file; None if it is unknown or its pixels are gone."""
        facts = self._known.get(sha256)
        if facts is None:
            return None
        try:
            png, stated = self._read(facts["png"]), facts["opacity"]
            # Without a mask of it, only its being there counts.
            opacity = self._read(stated) if stated else b"" if stated == "" else None
            evidence = cast("tuple[GenerationSign, ...]", tuple(facts["evidence"]))
            width, height = facts["size"]
            found = Print.from_json(facts["print"])
        except (KeyError, TypeError, ValueError):  # damaged: it is decoded and written again
            self._known.pop(sha256, None)
            return None
        if png is None or (opacity is None and stated is not None):
            return None
        return DecodedImage(sha256, (width, height), found, evidence, png, opacity)

    def keep(self, image: DecodedImage) -> None:
        """Adds a decoded image to what `save` writes."""
        if (known := self._known.get(image.sha256)) is not None:
            self._kept[image.sha256] = known
            return
        opacity = "" if image.opacity is not None else None
        if image.opacity is not None and self._keeps_opacity:
            opacity = sha256_bytes(image.opacity)
        self._kept[image.sha256] = {
            "size": image.size,
            "print": image.print.to_json(),
            "evidence": image.evidence,
            "png": sha256_bytes(image.png),
            "opacity": opacity,
        }

    def save(self, used: Collection[str]) -> None:
        """Writes the images of these digests; others are forgotten, such as those that were revoked."""
        images = {sha256: facts for sha256, facts in self._kept.items() if sha256 in used}
        atomic_write(self._path, canonical_json({"basis": self._basis, "images": images}))

    def _load(self) -> dict[str, Any]:
        try:
            content = read_json_object(self._path, DataError, max_bytes=_MAX_BYTES)
        except (OSError, DataError):
            return {}
        images = content.get("images")
        return images if content.get("basis") == self._basis and isinstance(images, dict) else {}


def _versions() -> dict[str, str]:
    # Another decoder may give other pixels of the same file.
    optional = [name for name, module in (("pillow-heif", "pillow_heif"), ("c2pa-python", "c2pa")) if find_spec(module)]
    return {name: metadata.version(name) for name in ("pillow", *optional)}
