"""Where bytes are kept by their digest: what every backend promises, and how bytes are compared with a digest.

The backends are in `local` (a folder) and `remote` (a URL). Which blobs are wanted is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

from registry.entities import is_digest
from registry.errors import DamagedBlob, MissingBlob, StoreError

_CHUNK = 1 << 20


class Orphan(NamedTuple):
    """Something that lies among the blobs and is none, such as the leftover of a killed writer.

    Args:
        name: Path within the store.
        size: Bytes.
        modified: When it was written, in seconds since the epoch.
    """

    name: str
    size: int
    modified: float


class Blobs(Protocol):
    """A backend: bytes in, bytes out, by digest. Any number of processes may use the same place at once.

    A blob is never there by halves: it appears whole under its digest, or not at all, whenever its writer dies.
    Collecting is safe beside writers: who writes or renews a blob may count on it for the grace period.
    """

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; what is there and whole is renewed, what is damaged is replaced."""
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
        """When the blob was written or renewed last, in seconds since the epoch."""
        ...

    def size(self, digest: str) -> int:
        """Its bytes, counted by the backend."""
        ...

    def touch(self, digest: str) -> bool:
        """Makes a blob safe from a collection for another grace period; False where there is none."""
        ...

    def remove(self, digest: str, before: float) -> bool:
        """Takes a blob away unless it was written or renewed since `before`; gives whether it did."""
        ...

    def quarantine(self, digest: str) -> str:
        """Moves what is stored under the digest out of the way, unchanged, and says where it lies now."""
        ...

    def trash(self) -> Iterator[Orphan]:
        """What `remove` took away and a reader could still get back; the names are digests."""
        ...

    def restore(self, digest: str) -> bool:
        """Puts back what `remove` took away; False where it cannot."""
        ...

    def delete_from_trash(self, digest: str) -> None:
        """Deletes for good what `remove` took away."""
        ...

    def orphans(self) -> Iterator[Orphan]:
        """What lies in the store and is no blob."""
        ...

    def remove_orphan(self, name: str) -> None:
        """Deletes a stray."""
        ...


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


def copy_verified(source: BinaryIO, target: BinaryIO, digest: str, where: str) -> None:
    """Copies a stream that must have that digest.

    Raises:
        StoreError: It has another one.
    """
    actual = copy_hashed(source, target)
    if actual != digest:
        raise StoreError(
            f"the source changed while it was stored: digest {actual} instead of {digest}",
            where=where,
            remedy="see that nothing else writes into the folder, and try again",
        )


def check_digest(digest: str) -> str:
    """The digest, given back if it is one: nothing else may become part of a path.

    Raises:
        StoreError: It is none.
    """
    if not is_digest(digest):
        raise StoreError(f"{digest!r} is not a digest", allowed="64 lower-case hexadecimal digits")
    return digest
