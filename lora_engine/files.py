"""How bytes reach the disk: one atomic write, one digest, one canonical JSON.

Standard library only. The one module of the engine that the registry may import, so that there is a single
`atomic_write` in the product. No file format lives here.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 20
# Of one write: smaller and larger ones were no faster.
_PIECE = 512 << 10
# So much is written before the disk is told to begin with it.
_PART = 4 << 20


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Writes a file that is, at any instant and after any crash, either the old one whole or the new one whole.

    Args:
        path: Where the file goes; its folder is made if it is missing.
        content: The bytes, or a function that writes them to the open binary file.

    Raises:
        OSError: The disk is full, read-only or gone; the old file is then untouched and nothing is left beside it.
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
        # mkstemp makes the file private; give it the permissions that open() would have given it.
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def append_chunks(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Appends pieces to an open file, and has the disk begin with them while more are written.

    So the `fsync` of a large file that follows has little left to wait for.
    """
    file.flush()
    descriptor = file.fileno()
    done = begun = file.tell()
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            count = os.write(descriptor, view[:_PIECE])
            view, done = view[count:], done + count
            if done - begun >= _PART and hasattr(os, "posix_fadvise"):
                # Linux starts to write what is said to be of no more use; it stays in the cache until it is written.
                os.posix_fadvise(descriptor, begun, done - begun, os.POSIX_FADV_DONTNEED)
                begun = done


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder durable (a no-op where folders cannot be opened, as on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(content: bytes) -> str:
    """The lower-case hexadecimal SHA-256 of the bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """The lower-case hexadecimal SHA-256 of bytes that come piece by piece."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """The lower-case hexadecimal SHA-256 of a file, read in chunks of 1 MiB."""
    with path.open("rb") as file:
        return sha256_chunks(iter(lambda: file.read(_CHUNK), b""))


def canonical_json(value: Any) -> bytes:
    """The one JSON encoding of a value: sorted keys, no spaces, UTF-8, no NaN (`ValueError`)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _umask() -> int:
    # There is no way to read the umask without setting it; 0o022 is what the reader sees in the meantime.
    current = os.umask(0o022)
    os.umask(current)
    return current
