"""Computes digests of the user's files and folders, and detects changes without reading the files again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_engine.files import canonical_json, sha256_bytes, sha256_file

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class PathDigest:
    """The content of a file or folder when it was read.

    Attributes:
        sha256: Digest of the file's bytes, or of all names and bytes below the folder.
        files: Path relative to the folder -> digest of each regular file's bytes; a single file has the path `.`.
        stamps: Path -> size in bytes, modification time in nanoseconds and inode of each entry, links included.
    """

    sha256: str
    files: Mapping[str, str]
    stamps: Mapping[str, Stamp]

    def is_current(self, path: Path) -> bool:
        """Returns True if no entry was added, removed, replaced or written since; reads no content."""
        try:
            return dict(_stamps(path)) == self.stamps
        except OSError:
            return False


def digest_path(path: Path) -> PathDigest:
    """Returns the digest of a file, or of every file below a folder; does not follow links."""
    stamps = dict(_stamps(path))
    if not path.is_dir():
        digest = sha256_file(path)
        return PathDigest(digest, {".": digest}, stamps)
    entries: dict[str, str] = {}
    files: dict[str, str] = {}
    for relative in sorted(stamps):
        item = path / relative
        if item.is_symlink():
            entries[relative] = f"-> {item.readlink()}"
        else:
            entries[relative] = files[relative] = sha256_file(item)
    return PathDigest(sha256_bytes(canonical_json(entries)), files, stamps)


def _stamps(path: Path) -> Iterator[tuple[str, Stamp]]:
    items = [item for item in path.rglob("*") if item.is_symlink() or item.is_file()] if path.is_dir() else [path]
    for item in items:
        status = item.lstat() if item != path else item.stat()
        yield item.relative_to(path).as_posix(), (status.st_size, status.st_mtime_ns, status.st_ino)
