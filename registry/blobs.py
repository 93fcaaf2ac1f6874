"""Where bytes are kept by their digest. One backend, the local folder; another one is another class like it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from lora_engine.files import atomic_write, sha256_file, sync_folder
from registry.entities import is_digest
from registry.errors import DamagedBlob, MissingBlob, StoreError, disk_errors

_CHUNK = 1 << 20


class Blobs(Protocol):
    """A backend: bytes in, bytes out, by digest."""

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens, unless they are there already and whole."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """The stored bytes, not yet verified."""
        ...

    def exists(self, digest: str) -> bool:
        """Whether something is stored under the digest."""
        ...

    def actual_digest(self, digest: str) -> str:
        """The digest that the stored bytes really have."""
        ...

    def digests(self) -> Iterator[str]:
        """All digests that something is stored under, sorted."""
        ...

    def age(self, digest: str) -> float:
        """When the blob was written, in seconds since the epoch."""
        ...

    def strays(self) -> Iterator[Path]:
        """What lies in the store and is no blob, such as the leftovers of a killed writer."""
        ...


class LocalBlobs:
    """Blobs as files `ab/abcdef...` of a local folder; any number of processes may write at once.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; what is there and whole stays, what is damaged is replaced.

        Raises:
            StoreError: The bytes have another digest: the source changed while it was read.
            HomeError: The disk is full or read-only.
        """
        path = self.path(digest)
        if path.is_file() and sha256_file(path) == digest:
            return
        with disk_errors(path):
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder)
            with source() as stream:
                atomic_write(path, lambda file: _copy_verified(stream, file, digest, str(path)))

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
        """When the blob was written, in seconds since the epoch."""
        return self.path(digest).stat().st_mtime

    def strays(self) -> Iterator[Path]:
        """Files that are no blobs."""
        for path in sorted(self.folder.rglob("*")):
            is_blob = is_digest(path.name) and path.name.startswith(path.parent.name)
            if not path.is_dir() and not is_blob:
                yield path

    def path(self, digest: str) -> Path:
        """Where the blob of that digest is, or would be."""
        if not is_digest(digest):
            raise StoreError(f"{digest!r} is not a digest", allowed="64 lower-case hexadecimal digits")
        return self.folder / digest[:2] / digest


def copy_hashed(source: BinaryIO, target: BinaryIO) -> str:
    """Copies a stream and gives the SHA-256 of what went through."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def missing(digest: str, where: str) -> MissingBlob:
    """The error for bytes that are gone."""
    return MissingBlob(
        f"the bytes with digest {digest} are gone",
        where=where,
        remedy="run the pipeline again (the step that made them is repeated), or restore them from a backup",
    )


def damaged(digest: str, actual: str, where: str) -> DamagedBlob:
    """The error for bytes that are not what was stored."""
    return DamagedBlob(
        f"the bytes have digest {actual}, but {digest} was stored",
        where=where,
        remedy="run the pipeline again (the step that made them is repeated), or restore them from a backup",
    )


def _copy_verified(source: BinaryIO, target: BinaryIO, digest: str, where: str) -> None:
    actual = copy_hashed(source, target)
    if actual != digest:
        raise StoreError(
            f"the source changed while it was stored: digest {actual} instead of {digest}",
            where=where,
            remedy="see that nothing else writes into the folder, and try again",
        )
