"""Writes files atomically and inside their folder, hashes bytes and encodes canonical JSON.

No third-party packages: the registry imports this module of the engine.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from lora_engine.errors import EngineError

FilePath = str | os.PathLike[str]
"""A path as public functions take it."""
_CHUNK = 1 << 20
# Bytes per write call: smaller and larger ones were no faster.
_WRITE_SIZE = 512 << 10
# Bytes after which the kernel is asked to start writeback.
_WRITEBACK_SIZE = 4 << 20
# Longest name of a file on common file systems.
_NAME_BYTES = 255
# AT_FDCWD and RENAME_EXCHANGE of Linux, and the errors where it cannot exchange.
_CURRENT, _EXCHANGE = -100, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_roots: ContextVar[tuple[Path, ...]] = ContextVar("roots", default=())


@contextmanager
def write_within(folder: FilePath) -> Iterator[None]:
    """Makes `atomic_write` and `check_within` refuse all paths outside a folder, in this thread.

    Writers whose file names depend on the content of other files use it, so a name that no one checked does no harm.
    """
    token = _roots.set((*_roots.get(), Path(folder).resolve()))
    try:
        yield
    finally:
        _roots.reset(token)


def check_within(path: Path) -> None:
    """Raises an error for a path that leaves a folder of `write_within`, by its name or through a link in the folder.

    Raises:
        EngineError: The path is outside.
    """
    for root in _roots.get():
        if not (path.parent.resolve() / path.name).is_relative_to(root) or path.name == "..":
            raise EngineError(
                f"the path {os.fspath(path)!r} is outside of the output",
                where=str(root),
                allowed="paths inside the folder, without links out of it",
                remedy="name another output folder; do not use a file whose names are paths",
            )


def is_file_name(name: str) -> bool:
    """Returns True if a name can be that of a file or folder on every system: printable, and one part of a path."""
    is_part = name not in {"", ".", ".."} and not {"/", "\\"} & set(name)
    return is_part and name.isprintable() and len(name.encode(errors="replace")) <= _NAME_BYTES


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Replaces a file atomically: after a crash, the path holds either the complete old file or the complete new one.

    Args:
        path: The file; its folder is created if it is missing.
        content: The bytes, or a function that writes them to the open binary file.

    Raises:
        EngineError: The path is outside of a folder of `write_within`; nothing is written.
        OSError: The disk is full, read-only or gone; the old file is untouched and the partial file is deleted.
    """
    check_within(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A character has up to 4 bytes, a name up to 255.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=".partial")
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


def is_present_file(path: FilePath) -> bool:
    """Returns True if there is a file; otherwise as `is_present`."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_present_folder(path: FilePath) -> bool:
    """Returns True if there is a folder; otherwise as `is_present`."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def expand_home(path: FilePath) -> Path:
    """Returns a path with the home folder for a leading `~`, and as it is if the system knows no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def exchange(first: Path, second: Path) -> None:
    """Exchanges two files or folders of one file system, atomically where the system can.

    Elsewhere three renames do it; a process that is killed between them leaves `second` missing.

    Raises:
        OSError: A path is missing, or cannot be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(_CURRENT, os.fsencode(first), _CURRENT, os.fsencode(second), _EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), str(second))
    middle = first.with_name(f".{first.name}.exchange")
    second.rename(middle)
    first.rename(second)
    middle.rename(first)


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
