"""Blobs behind a URL, over fsspec: S3 and its kin, other object stores, file servers. Errors come out worded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

from registry.entities import is_digest
from registry.store.blobs import Blobs, Orphan, check_digest, copy_hashed, copy_verified, missing
from registry.store.local import LocalBlobs
from registry.store.remote_errors import with_context, word_unknown

_BIN, _ASIDE, _UNFINISHED = "bin", "damaged", "unfinished"
_SINCE = ".since"
# Where a file that is being written appears only when it is closed, and whole: no temporary key is needed.
_WHOLE_AT_ONCE = frozenset({"s3", "s3a", "gs", "gcs"})


def open_blobs(url: str) -> Blobs:
    """The backend of a URL; a plain path and `file://` are a local folder.

    Raises:
        StoreError: No file system of that protocol is known, or its package is not installed.
    """
    parts = urlsplit(url)
    if parts.scheme in {"", "file", "local"}:
        return LocalBlobs(Path(url2pathname(parts.path)) if parts.scheme else Path(url).expanduser().absolute())
    return FsspecBlobs(url)


class FsspecBlobs:
    """Blobs as keys `ab/abcdef...` below a URL; the same layout as in a local folder, so that either can be copied.

    On S3 and Google Cloud Storage a blob is one upload that becomes visible when it is complete. Elsewhere it is
    written to a key of its own and moved into its place, which is as whole as the server's move or copy is. There are
    no locks between machines, so a collection moves a blob into `trash/`, where readers still find it, and a later one
    deletes it; so that a writer who saw the blob just before keeps it.

    Args:
        url: Such as `s3://bucket/loraline`; credentials and endpoint are those of the environment.

    Raises:
        StoreError: No file system of that protocol is known, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._protocol = urlsplit(url).scheme
        try:
            self._fs, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise word_unknown(error, self._protocol, self.url) from error
        self._root = root.rstrip("/")

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; what is there and whole stays, what is damaged is replaced.

        Raises:
            StoreError: The bytes have another digest, or the store cannot be written.
        """
        with with_context(self.url):
            key = self._key(digest)
            # Not what is in the bin: its days are counted.
            if self._info(key) is not None and self.actual_digest(digest) == digest:
                return
            with source() as stream:
                if self._protocol in _WHOLE_AT_ONCE:
                    self._upload(key, stream, digest)
                    return
                temporary = f"{self._root}/{_UNFINISHED}/{uuid4().hex}"
                try:
                    self._fs.makedirs(self._fs._parent(temporary), exist_ok=True)
                    with self._fs.open(temporary, "wb") as target:
                        copy_verified(stream, target, digest, self._where(digest))
                    self._move(temporary, key)
                except BaseException:
                    self._delete(temporary)
                    raise

    def open(self, digest: str) -> BinaryIO:
        """The stored bytes, not yet verified; read in pieces.

        Raises:
            MissingBlob: Nothing is stored under the digest.
            StoreError: The store cannot be reached, or there is no such bucket.
        """
        with with_context(self.url):
            for key in (self._key(digest), self._binned(digest), self._key(digest)):
                with suppress(FileNotFoundError):
                    self._fs.invalidate_cache(key)
                    return cast("BinaryIO", _Reading(self._fs.open(key, "rb"), self.url))
            self._require_root()
            raise missing(digest, self._where(digest))

    def exists(self, digest: str) -> bool:
        """Whether something is stored under the digest."""
        with with_context(self.url):
            return self._info(self._key(digest)) is not None or self._info(self._binned(digest)) is not None

    def actual_digest(self, digest: str) -> str:
        """The digest that the stored bytes really have; all of them are read.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        with self.open(digest) as stream:
            return copy_hashed(stream, _Nowhere())  # type: ignore[arg-type]  # it only writes

    def digests(self) -> Iterator[str]:
        """All digests that something is stored under, sorted."""
        found = set()
        for name, _ in self._list(""):
            folder, _, digest = name.rpartition("/")
            if is_digest(digest) and folder in {digest[:2], _BIN}:
                found.add(digest)
        yield from sorted(found)

    def age(self, digest: str) -> float:
        """When the blob was written, in seconds since the epoch, by the clock of the store."""
        return _instant(self._found(digest))

    def size(self, digest: str) -> int:
        """Its bytes, counted by the backend."""
        return int(self._found(digest)["size"])

    def touch(self, digest: str) -> bool:
        """Makes a blob safe from a collection for another grace period; False where there is none."""
        with with_context(self.url):
            return self._info(self._key(digest)) is not None or self.restore(digest)

    def remove(self, digest: str, before: float) -> bool:
        """Moves a blob into the bin unless it was written since `before`; gives whether it did."""
        with with_context(self.url):
            key = self._key(digest)
            about = self._info(key)
            if about is None or _instant(about) >= before:
                return False
            # Some servers keep a file's time when they move it; this one says since when it has been in the bin.
            self._fs.makedirs(f"{self._root}/{_BIN}", exist_ok=True)
            self._fs.pipe_file(f"{self._binned(digest)}{_SINCE}", b"")
            self._move(key, self._binned(digest))
        return True

    def quarantine(self, digest: str) -> str:
        """Moves what is stored under the digest out of the way, unchanged, and says where it lies now.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        with with_context(self.url):
            key = self._key(digest) if self._info(self._key(digest)) else self._binned(digest)
            if self._info(key) is None:
                raise missing(digest, self._where(digest))
            target = f"{self._root}/{_ASIDE}/{digest}.{time.time_ns()}"
            self._move(key, target)
        return f"{self._protocol}://{target.lstrip('/')}"

    def trash(self) -> Iterator[Orphan]:
        """What collections moved away, by digest, with the time at which they did."""
        entries = {name.rpartition("/")[2]: about for name, about in self._list(_BIN)}
        for digest in filter(is_digest, sorted(entries)):
            since = entries.get(digest + _SINCE, entries[digest])
            yield Orphan(digest, int(entries[digest]["size"]), _instant(since))

    def restore(self, digest: str) -> bool:
        """Moves a blob from the bin back into its place; False where it is not in the bin."""
        with with_context(self.url):
            if self._info(self._binned(digest)) is None:
                return False
            self._move(self._binned(digest), self._key(digest))
            self._delete(self._binned(digest) + _SINCE)
        return True

    def delete_from_trash(self, digest: str) -> None:
        """Deletes for good what `remove` moved away."""
        with with_context(self.url):
            self._delete(self._binned(digest))
            self._delete(self._binned(digest) + _SINCE)

    def orphans(self) -> Iterator[Orphan]:
        """Keys that are no blobs, such as what a killed writer left; what was set aside is none of them."""
        for name, about in self._list(""):
            folder, _, digest = name.rpartition("/")
            if folder not in {_ASIDE, _BIN} and not (is_digest(digest) and folder == digest[:2]):
                yield Orphan(name, int(about["size"]), _instant(about))

    def remove_orphan(self, name: str) -> None:
        """Deletes a stray."""
        with with_context(self.url):
            self._delete(f"{self._root}/{name}")

    def check(self, patience: int = 3) -> None:
        """Looks whether the place can be reached at all, without waiting for long.

        Args:
            patience: Seconds for a connection.

        Raises:
            StoreError: It cannot; the message says why.
        """
        from fsspec.core import url_to_fs

        if self._protocol in {"s3", "s3a"}:
            limits = {"connect_timeout": patience, "read_timeout": patience, "retries": {"max_attempts": 0}}
            fs, _ = url_to_fs(self.url, config_kwargs=limits, skip_instance_cache=True)
            fs.retries = 1
        else:
            fs = self._fs
        with with_context(self.url):
            fs.info(self._bucket if self._protocol in _WHOLE_AT_ONCE else "")

    def _upload(self, key: str, stream: BinaryIO, digest: str) -> None:
        target = self._fs.open(key, "wb")
        try:
            copy_verified(stream, target, digest, self._where(digest))
        except BaseException:
            # Closing would make visible what is there so far.
            target.discard()
            target.closed = True
            raise
        target.close()

    def _move(self, source: str, target: str) -> None:
        self._fs.makedirs(self._fs._parent(target), exist_ok=True)
        self._fs.mv(source, target)
        self._fs.invalidate_cache(source)
        self._fs.invalidate_cache(target)

    def _delete(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(key)
        self._fs.invalidate_cache(key)

    def _info(self, key: str) -> dict[str, Any] | None:
        # Other processes write here, too: what was listed before says nothing about now.
        self._fs.invalidate_cache(key)
        try:
            about: dict[str, Any] = self._fs.info(key)
        except FileNotFoundError:
            return None
        return about if about["type"] == "file" else None

    def _found(self, digest: str) -> dict[str, Any]:
        with with_context(self.url):
            about = self._info(self._key(digest)) or self._info(self._binned(digest))
        if about is None:
            raise missing(digest, self._where(digest))
        return about

    def _list(self, below: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with with_context(self.url):
            self._fs.invalidate_cache()
            found = self._fs.find(f"{self._root}/{below}", detail=True)
            if not found:
                self._require_root()
        for key, about in sorted(found.items()):
            yield key[len(self._root) + 1 :], about

    def _require_root(self) -> None:
        """Raises FileNotFoundError where there is no such bucket; a folder of one need not exist yet."""
        if self._protocol in _WHOLE_AT_ONCE:
            self._fs.invalidate_cache()
            self._fs.info(self._bucket)

    @property
    def _bucket(self) -> str:
        return str(self._root).lstrip("/").partition("/")[0]

    def _key(self, digest: str) -> str:
        return f"{self._root}/{check_digest(digest)[:2]}/{digest}"

    def _binned(self, digest: str) -> str:
        return f"{self._root}/{_BIN}/{check_digest(digest)}"

    def _where(self, digest: str) -> str:
        return f"{self.url}/{digest[:2]}/{digest}"


class _Reading:
    """A stream whose failures are worded; read from the beginning to the end."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self._stream, self._url = stream, url

    def read(self, size: int = -1) -> bytes:
        with with_context(self._url):
            return self._stream.read(size)

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stream.close()


class _Nowhere:
    def write(self, _chunk: bytes) -> None:
        pass


def _instant(about: dict[str, Any]) -> float:
    for field in ("LastModified", "mtime", "updated", "last_modified", "modified", "created"):
        value = about.get(field)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, int | float):
            return float(value)
    raise NotImplementedError("it does not say when a file was written")
