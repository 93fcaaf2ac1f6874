"""Writes files atomically, hashes bytes and encodes canonical JSON.

Standard library only: this is the one module of the engine that the registry may import.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

FilePath = str | os.PathLike[str]
"""A path as public functions take it."""
_CHUNK = 1 << 20
# Bytes per write call: smaller and larger ones were no faster.
_WRITE_SIZE = 512 << 10
# Bytes after which the kernel is asked to start writeback.
_WRITEBACK_SIZE = 4 << 20


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Replaces a file atomically: after a crash, the path holds either the complete old file or the complete new one.

    Args:
        path: The file; its folder is created if it is missing.
        content: The bytes, or a function that writes them to the open binary file.

    Raises:
        OSError: The disk is full, read-only or gone; the old file is untouched and the partial file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".partial")
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates a private file; set the permissions that open() would have set.
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def is_present(path: FilePath) -> bool:
    """Returns True if a file or folder exists; False also for text that is no path, such as one that is too long."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def append_chunks(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Appends chunks to an open file and starts their writeback early, which shortens the `fsync` that follows."""
    file.flush()
    descriptor = file.fileno()
    done = begun = file.tell()
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            count = os.write(descriptor, view[:_WRITE_SIZE])
            view, done = view[count:], done + count
            if done - begun >= _WRITEBACK_SIZE and hasattr(os, "posix_fadvise"):
                # On DONTNEED, Linux starts writeback; the pages stay cached until they are written.
                os.posix_fadvise(descriptor, begun, done - begun, os.POSIX_FADV_DONTNEED)
                begun = done


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder durable; does nothing where folders cannot be opened, as on Windows."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(content: bytes) -> str:
    """Returns the lower-case hexadecimal SHA-256 of the bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Returns the lower-case hexadecimal SHA-256 of the concatenated chunks."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the lower-case hexadecimal SHA-256 of a file, read in chunks of 1 MiB."""
    with path.open("rb") as file:
        return sha256_chunks(iter(lambda: file.read(_CHUNK), b""))


def canonical_json(value: Any) -> bytes:
    """Returns the canonical JSON of a value: sorted keys, no spaces, UTF-8; NaN raises `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _umask() -> int:
    # The umask cannot be read without setting it; other threads see 0o022 meanwhile.
    current = os.umask(0o022)
    os.umask(current)
    return current
