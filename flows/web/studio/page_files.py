"""Keeps the files that the studio page shows or takes in, in one folder of the home that is cleaned."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from lora_engine.files import atomic_write, sha256_bytes

_KEEP = 6 * 60 * 60
"""Seconds for which a file is kept."""


class PageFiles:
    """The folder of the page's files; a page that is mounted begins with an empty one.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def write(self, content: bytes, name: str) -> str:
        """Writes a file that browsers may load, unchanged, and returns its path; deletes files that are too old."""
        self.clean(_KEEP)
        path = self.folder / sha256_bytes(content) / name
        if not path.exists():
            atomic_write(path, content)
        return str(path)

    def clean(self, seconds: float) -> None:
        """Deletes the folders in which nothing was written for some seconds."""
        oldest = time.time() - seconds
        for folder in self.folder.iterdir():
            if folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)
