"""`Blobs`: the protocol of storage backends that store bytes by digest, and functions that compare bytes with digests.

The backends are in `local` (a folder) and `remote` (a URL). They do not know which blobs are in use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

from registry.entities import is_digest
from registry.errors import DamagedBlob, MissingBlob, StoreError

_CHUNK = 1 << 20


class Orphan(NamedTuple):
    """A file in the store that is no blob, such as the temporary file of a killed writer.

    Args:
        name: Path within the store.
        size: Size in bytes.
        modified: Time of the last write, in seconds since the epoch.
    """

    name: str
    size: int
    modified: float


class Blobs(Protocol):
    """A backend that stores bytes by digest. Any number of processes may use the same store at once.

    A blob appears complete under its digest or not at all, even if its writer is killed. Garbage collection is safe
    beside writers: a blob that was written or touched stays for the grace period.
    """

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; touches an intact blob, replaces a damaged one."""
        ...

    def open(self, digest: str) -> BinaryIO:
        """Opens the stored bytes without verifying them."""
        ...

    def exists(self, digest: str) -> bool:
        """Returns True if a blob is stored under the digest."""
        ...

    def actual_digest(self, digest: str) -> str:
        """Reads the stored bytes and returns their digest."""
        ...

    def digests(self) -> Iterator[str]:
        """Yields the digests of all stored blobs, sorted."""
        ...

    def age(self, digest: str) -> float:
        """Returns when the blob was last written or touched, in seconds since the epoch."""
        ...

    def size(self, digest: str) -> int:
        """Returns the size of a blob in bytes, without reading it."""
        ...

    def touch(self, digest: str) -> bool:
        """Restarts the garbage collection's grace period of a blob; returns False if there is none."""
        ...

    def remove(self, digest: str, before: float) -> bool:
        """Removes a blob unless it was written or touched since `before`; returns True if it did."""
        ...

    def quarantine(self, digest: str) -> str:
        """Moves a blob to the quarantine, unchanged, and returns its new path."""
        ...

    def trash(self) -> Iterator[Orphan]:
        """Yields the removed blobs that can still be restored; their names are digests."""
        ...

    def restore(self, digest: str) -> bool:
        """Restores a removed blob; returns False if it is not in the trash."""
        ...

    def delete_from_trash(self, digest: str) -> None:
        """Deletes a removed blob for good."""
        ...

    def orphans(self) -> Iterator[Orphan]:
        """Yields the files in the store that are no blobs."""
        ...

    def remove_orphan(self, name: str) -> None:
        """Deletes an orphan."""
        ...


def copy_hashed(source: BinaryIO, target: BinaryIO) -> str:
    """Copies a stream and returns the SHA-256 of the copied bytes."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
    return digest.hexdigest()


def missing(digest: str, where: str) -> MissingBlob:
    """Returns the error for a missing blob."""
    return MissingBlob(
        f"the bytes with digest {digest} are gone",
        where=where,
        remedy="run the pipeline again, which repeats the step that made them, or restore them from a backup",
    )


def damaged(digest: str, actual: str, where: str) -> DamagedBlob:
    """Returns the error for a blob whose bytes differ from its digest."""
    return DamagedBlob(
        f"the bytes have digest {actual}, but {digest} was stored",
        where=where,
        remedy="run the pipeline again, which repeats the step that made them, or restore them from a backup",
    )


def copy_verified(source: BinaryIO, target: BinaryIO, digest: str, where: str) -> None:
    """Copies a stream and verifies its digest.

    Raises:
        StoreError: The copied bytes have another digest.
    """
    actual = copy_hashed(source, target)
    if actual != digest:
        raise StoreError(
            f"the source changed while it was stored: digest {actual} instead of {digest}",
            where=where,
            remedy="stop what else writes into the folder, and try again",
        )


def check_digest(digest: str) -> str:
    """Returns the digest unchanged; guards every path that is built from one.

    Raises:
        StoreError: The text is not a digest.
    """
    if not is_digest(digest):
        raise StoreError(f"{digest!r} is not a digest", allowed="64 lower-case hexadecimal digits")
    return digest
