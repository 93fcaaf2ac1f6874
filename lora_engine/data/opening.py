"""Opens the images of a folder: by decoding them in children, or from what was decoded before."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lora_engine.data.decode_cache import DecodeCache
from lora_engine.data.decoders import DecodedImage, shared_decoders
from lora_engine.data.folder import Tree, open_inside
from lora_engine.data.images import MAX_BYTES
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError


@dataclass(frozen=True)
class ImageOpener:
    """Opens one image at a time; several threads may call it.

    Attributes:
        tree: The files.
        settings: See `IngestSettings`.
        cache: What was decoded before; None decodes all images.
        roots: Certificates that a signature is trusted by; see `verify_credentials`.
    """

    tree: Tree
    settings: IngestSettings
    cache: DecodeCache | None = None
    roots: Path | None = None

    def __call__(self, name: str) -> DecodedImage | DataError:
        """Returns an image, or why it cannot be used."""
        path, root = self.tree.locate(name)
        try:
            if (found := self._find(path, root)) is not None:
                return found
            settings = self.settings
            return shared_decoders().image(
                path,
                root,
                settings.max_pixels,
                settings.background_color,
                verifies=settings.c2pa == "verify",
                roots=self.roots,
            )
        except DataError as error:
            return error

    def _find(self, path: Path, root: Path) -> DecodedImage | None:
        if self.cache is None:
            return None
        with open_inside(path, root) as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                return None
            return self.cache.find(hashlib.file_digest(file, "sha256").hexdigest())
