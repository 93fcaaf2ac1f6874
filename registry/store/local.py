"""Blobs in a local folder, or in one that several machines mount."""

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

_LOCKS, _ASIDE = "locks", "damaged"
# The lock is held for microseconds; the default of 50 ms would make writers wait for nothing.
_POLL = 0.002


class LocalBlobs:
    """Blobs as files `ab/abcdef...` of a local folder.

    A file is written beside its place and renamed into it. A blob is removed, and renewed, under a lock, so that of a
    writer who finds it and a collection that takes it away one comes first.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; what is there and whole is renewed, what is damaged is replaced.

        Raises:
            StoreError: The bytes have another digest: the source changed while it was read.
            HomeError: The disk is full or read-only.
        """
        path = self.path(digest)
        with disk_errors(path):
            if self.touch(digest) and self._is_whole(path):
                return
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder)
            with source() as stream:
                atomic_write(path, lambda file: copy_verified(stream, file, digest, str(path)))

    def open(self, digest: str) -> BinaryIO:
        """The stored bytes, not yet verified.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise missing(digest, str(self.path(digest))) from None

    def exists(self, digest: str) -> bool:
        """Whether something is stored under the digest."""
        return self.path(digest).is_file()

    def actual_digest(self, digest: str) -> str:
        """The digest that the stored bytes really have.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        try:
            return sha256_file(self.path(digest))
        except FileNotFoundError:
            raise missing(digest, str(self.path(digest))) from None

    def digests(self) -> Iterator[str]:
        """All digests that something is stored under, sorted."""
        for path in sorted(self.folder.glob("[0-9a-f][0-9a-f]/*")):
            if is_digest(path.name) and path.name.startswith(path.parent.name):
                yield path.name

    def age(self, digest: str) -> float:
        """When the blob was written or renewed last, in seconds since the epoch."""
        return self.path(digest).stat().st_mtime

    def size(self, digest: str) -> int:
        """Its bytes, counted by the backend."""
        return self.path(digest).stat().st_size

    def touch(self, digest: str) -> bool:
        """Makes a blob safe from a collection for another grace period; False where there is none."""
        path = self.path(digest)
        if not path.is_file():
            return False
        with self._lock(digest):
            try:
                os.utime(path)
            except (FileNotFoundError, PermissionError):  # collected meanwhile, or another user's: write it anew
                return False
        return True

    def remove(self, digest: str, before: float) -> bool:
        """Takes a blob away unless it was written or renewed since `before`; gives whether it did."""
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
        """Moves what is stored under the digest out of the way, unchanged, and says where it lies now.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        path = self.path(digest)
        target = self.folder / _ASIDE / f"{digest}.{time.time_ns()}"
        with disk_errors(target):
            target.parent.mkdir(exist_ok=True)
            try:
                path.rename(target)
            except FileNotFoundError:
                raise missing(digest, str(path)) from None
            sync_folder(path.parent)
        return str(target)

    def trash(self) -> Iterator[Orphan]:
        """Nothing: what is removed here is gone at once."""
        return iter(())

    def restore(self, digest: str) -> bool:
        """Puts nothing back: what is removed here is gone at once."""
        return False

    def delete_from_trash(self, digest: str) -> None:
        """Does nothing: what is removed here is gone at once."""

    def orphans(self) -> Iterator[Orphan]:
        """Files that are no blobs; what was set aside is none of them."""
        for path in sorted(self.folder.rglob("*")):
            is_blob = is_digest(path.name) and path.name.startswith(path.parent.name)
            inside = path.relative_to(self.folder)
            if inside.parts[0] in {_LOCKS, _ASIDE} or is_blob:
                continue
            try:
                about = path.lstat()
            except FileNotFoundError:
                continue  # its writer has finished
            if path.is_symlink() or not path.is_dir():
                yield Orphan(inside.as_posix(), about.st_size, about.st_mtime)

    def remove_orphan(self, name: str) -> None:
        """Deletes a stray."""
        with disk_errors(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob of that digest is, or would be."""
        return self.folder / check_digest(digest)[:2] / digest

    def _is_whole(self, path: Path) -> bool:
        try:
            return sha256_file(path) == path.name
        except FileNotFoundError:
            return False

    def _lock(self, digest: str) -> FileLock:
        folder = self.folder / _LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{digest[:2]}.lock", poll_interval=_POLL)
