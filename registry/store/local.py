"""Stores blobs in a local folder, or in one that several machines mount."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from lora_engine.files import atomic_write, sha256_file, sync_folder
from registry.entities import is_digest
from registry.errors import disk_errors
from registry.store.blobs import Orphan, check_digest, copy_verified, missing

_LOCKS, _QUARANTINE = "locks", "damaged"
# Seconds. The lock is held for microseconds, so filelock's default of 50 ms would delay writers.
_POLL = 0.002


class LocalBlobs:
    """Blobs as files `ab/abcdef...` of a local folder.

    A file is written to a temporary path and renamed. `touch` and `remove` take a lock, so a writer that touches a blob
    and a garbage collection that removes it do not interleave.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; touches an intact blob, replaces a damaged one.

        Raises:
            StoreError: The bytes have another digest: the source changed while it was read.
            HomeError: The disk is full or read-only.
        """
        path = self.path(digest)
        with disk_errors(path):
            if self.touch(digest) and self._is_intact(path):
                return
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder)
            with source() as stream:
                atomic_write(path, lambda file: copy_verified(stream, file, digest, str(path)))

    def open(self, digest: str) -> BinaryIO:
        """Opens the stored bytes without verifying them.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise missing(digest, str(self.path(digest))) from None

    def exists(self, digest: str) -> bool:
        """Returns True if a blob is stored under the digest."""
        return self.path(digest).is_file()

    def actual_digest(self, digest: str) -> str:
        """Reads the stored bytes and returns their digest.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        try:
            return sha256_file(self.path(digest))
        except FileNotFoundError:
            raise missing(digest, str(self.path(digest))) from None

    def digests(self) -> Iterator[str]:
        """Yields the digests of all stored blobs, sorted."""
        for path in sorted(self.folder.glob("[0-9a-f][0-9a-f]/*")):
            if is_digest(path.name) and path.name.startswith(path.parent.name):
                yield path.name

    def age(self, digest: str) -> float:
        """Returns when the blob was last written or touched, in seconds since the epoch."""
        return self.path(digest).stat().st_mtime

    def size(self, digest: str) -> int:
        """Returns the size of a blob in bytes, without reading it."""
        return self.path(digest).stat().st_size

    def touch(self, digest: str) -> bool:
        """Restarts the garbage collection's grace period of a blob; returns False if there is none."""
        path = self.path(digest)
        if not path.is_file():
            return False
        with self._lock(digest):
            try:
                os.utime(path)
            except (FileNotFoundError, PermissionError):  # collected meanwhile, or another user's: write it again
                return False
        return True

    def remove(self, digest: str, before: float) -> bool:
        """Removes a blob unless it was written or touched since `before`; returns True if it did."""
        path = self.path(digest)
        with disk_errors(path), self._lock(digest):
            try:
                if path.stat().st_mtime >= before:
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def quarantine(self, digest: str) -> str:
        """Moves a blob to the quarantine, unchanged, and returns its new path.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        path = self.path(digest)
        target = self.folder / _QUARANTINE / f"{digest}.{time.time_ns()}"
        with disk_errors(target):
            target.parent.mkdir(exist_ok=True)
            try:
                path.rename(target)
            except FileNotFoundError:
                raise missing(digest, str(path)) from None
            sync_folder(path.parent)
        return str(target)

    def trash(self) -> Iterator[Orphan]:
        """Yields nothing: `remove` deletes local blobs at once."""
        return iter(())

    def restore(self, digest: str) -> bool:
        """Returns False: `remove` deletes local blobs at once."""
        return False

    def delete_from_trash(self, digest: str) -> None:
        """Does nothing: `remove` deletes local blobs at once."""

    def orphans(self) -> Iterator[Orphan]:
        """Yields the files that are no blobs, without those in the quarantine."""
        for path in sorted(self.folder.rglob("*")):
            is_blob = is_digest(path.name) and path.name.startswith(path.parent.name)
            inside = path.relative_to(self.folder)
            if inside.parts[0] in {_LOCKS, _QUARANTINE} or is_blob:
                continue
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # its writer has finished
            if path.is_symlink() or not path.is_dir():
                yield Orphan(inside.as_posix(), status.st_size, status.st_mtime)

    def remove_orphan(self, name: str) -> None:
        """Deletes an orphan."""
        with disk_errors(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Returns the path of a blob, whether it exists or not."""
        return self.folder / check_digest(digest)[:2] / digest

    def _is_intact(self, path: Path) -> bool:
        try:
            return sha256_file(path) == path.name
        except FileNotFoundError:
            return False

    def _lock(self, digest: str) -> FileLock:
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{digest[:2]}.lock", poll_interval=_POLL)
