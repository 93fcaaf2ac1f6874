"""Deletes the unfinished files of killed backups."""

from __future__ import annotations

import glob
import time
from pathlib import Path

from lora_engine.files import sha256_bytes
from registry.home import Home
from registry.maintenance.gc import remove_path

PARTIAL = ".partial"
_DAY = 86_400.0


def mark_of(home: Home) -> str:
    """Returns what names the home in unfinished files: its lock is held, so no other process writes them."""
    return f"{sha256_bytes(str(home.path).encode())[:12]}-"


def remove_leftovers(folder: Path, prefix: str, own: str) -> None:
    """Deletes what killed backups left: of the same home at once, of others once it was untouched for a day.

    Args:
        folder: The folder.
        prefix: First part of the names of unfinished files.
        own: First part of the names of those of the same home, whose lock the caller holds.
    """
    for path in folder.glob(f"{glob.escape(prefix)}*{PARTIAL}"):
        entries = (path, *path.rglob("*"))
        if path.name.startswith(own) or max(entry.lstat().st_mtime for entry in entries) < time.time() - _DAY:
            remove_path(path)
