"""Stores blobs behind a URL through fsspec: S3, other object stores, file servers. All errors become `StoreError`."""

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

from lora_engine.files import expand_home
from registry.entities import is_digest
from registry.store.blobs import Blobs, Orphan, check_digest, copy_hashed, copy_verified, missing
from registry.store.local import LocalBlobs
from registry.store.redaction import redact_url
from registry.store.remote_errors import malformed_url, unsupported_protocol, with_context

_TRASH, _QUARANTINE, _UNFINISHED = "bin", "damaged", "unfinished"
_SINCE = ".since"
# Protocols where a file appears only when it is closed, and complete: no temporary key is needed.
_ATOMIC_UPLOAD = frozenset({"s3", "s3a", "gs", "gcs"})


def open_blobs(url: str) -> Blobs:
    """Returns the backend of a URL; a plain path and `file://` are a local folder.

    Raises:
        StoreError: The URL is malformed, no file system of its protocol is known, or its package is not installed.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise malformed_url(url) from None  # the cause may quote a password
    if parts.scheme in {"", "file", "local"}:
        return LocalBlobs(Path(url2pathname(parts.path)) if parts.scheme else expand_home(url).absolute())
    return FsspecBlobs(url)


class FsspecBlobs:
    """Blobs as keys `ab/abcdef...` below a URL; the layout of a local folder, so one can be copied to the other.

    On S3 and Google Cloud Storage a blob is one upload that becomes visible when it is complete. Elsewhere it is
    written to a temporary key and moved, which is as atomic as the server's move or copy. There are no locks between
    machines. A garbage collection therefore moves a blob into `bin/`, where readers still find it and `touch` restores
    it; a later collection deletes it.

    Args:
        url: Such as `s3://bucket/loraline`; credentials and endpoint come from the environment.

    Raises:
        StoreError: No file system of that protocol is known, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        from fsspec import get_filesystem_class
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._protocol = urlsplit(url).scheme
        try:
            get_filesystem_class(self._protocol)
        except ImportError as error:
            raise unsupported_protocol(error, self._protocol, self.url) from error
        except ValueError:
            raise unsupported_protocol(None, self._protocol, self.url) from None
        try:
            with with_context(self.url):
                self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise unsupported_protocol(error, self._protocol, self.url) from error
        except (ValueError, TypeError):
            raise malformed_url(self.url) from None
        self._root = root.rstrip("/")

    def write(self, digest: str, source: Callable[[], BinaryIO]) -> None:
        """Stores the bytes that `source` opens; keeps an intact blob, replaces a damaged one.

        Raises:
            StoreError: The bytes have another digest, or the store cannot be written.
        """
        with with_context(self.url):
            key = self._key(digest)
            # A copy in the trash does not count: a collection deletes it soon.
            if self._info(key) is not None and self.actual_digest(digest) == digest:
                return
            with source() as stream:
                if self._protocol in _ATOMIC_UPLOAD:
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
        """Opens the stored bytes without verifying them; reads in blocks.

        Raises:
            MissingBlob: Nothing is stored under the digest.
            StoreError: The store cannot be reached, or there is no such bucket.
        """
        with with_context(self.url):
            for key in (self._key(digest), self._trash_key(digest), self._key(digest)):
                with suppress(FileNotFoundError):
                    self._fs.invalidate_cache(key)
                    return cast("BinaryIO", _ReadStream(self._fs.open(key, "rb"), self.url))
            self._require_root()
            raise missing(digest, self._where(digest))

    def exists(self, digest: str) -> bool:
        """Returns True if a blob is stored under the digest."""
        with with_context(self.url):
            return self._info(self._key(digest)) is not None or self._info(self._trash_key(digest)) is not None

    def actual_digest(self, digest: str) -> str:
        """Reads the stored bytes and returns their digest.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        with self.open(digest) as stream:
            return copy_hashed(stream, _NullWriter())  # type: ignore[arg-type]  # it only writes

    def digests(self) -> Iterator[str]:
        """Yields the digests of all stored blobs, sorted."""
        digests = set()
        for name, _ in self._list(""):
            folder, _, digest = name.rpartition("/")
            if is_digest(digest) and folder in {digest[:2], _TRASH}:
                digests.add(digest)
        yield from sorted(digests)

    def age(self, digest: str) -> float:
        """Returns when the blob was written, in seconds since the epoch, by the clock of the store."""
        return _modified(self._require_info(digest))

    def size(self, digest: str) -> int:
        """Returns the size of a blob in bytes, without reading it."""
        return int(self._require_info(digest)["size"])

    def touch(self, digest: str) -> bool:
        """Restores a blob from the trash if it is there; returns False if there is none."""
        with with_context(self.url):
            return self._info(self._key(digest)) is not None or self.restore(digest)

    def remove(self, digest: str, before: float) -> bool:
        """Moves a blob into the trash unless it was written since `before`; returns True if it did."""
        with with_context(self.url):
            key = self._key(digest)
            info = self._info(key)
            if info is None or _modified(info) >= before:
                return False
            # Some servers keep a file's time when they move it: the time of this file is the time of the removal.
            self._fs.makedirs(f"{self._root}/{_TRASH}", exist_ok=True)
            self._fs.pipe_file(f"{self._trash_key(digest)}{_SINCE}", b"")
            self._move(key, self._trash_key(digest))
        return True

    def quarantine(self, digest: str) -> str:
        """Moves a blob to the quarantine, unchanged, and returns its new URL.

        Raises:
            MissingBlob: Nothing is stored under the digest.
        """
        with with_context(self.url):
            key = self._key(digest) if self._info(self._key(digest)) else self._trash_key(digest)
            if self._info(key) is None:
                raise missing(digest, self._where(digest))
            target = f"{self._root}/{_QUARANTINE}/{digest}.{time.time_ns()}"
            self._move(key, target)
        return redact_url(f"{self._protocol}://{target.lstrip('/')}")

    def trash(self) -> Iterator[Orphan]:
        """Yields the removed blobs, by digest, with the time of their removal."""
        entries = {name.rpartition("/")[2]: info for name, info in self._list(_TRASH)}
        for digest in filter(is_digest, sorted(entries)):
            since = entries.get(digest + _SINCE, entries[digest])
            yield Orphan(digest, int(entries[digest]["size"]), _modified(since))

    def restore(self, digest: str) -> bool:
        """Moves a blob from the trash back to its key; returns False if it is not in the trash."""
        with with_context(self.url):
            if self._info(self._trash_key(digest)) is None:
                return False
            self._move(self._trash_key(digest), self._key(digest))
            self._delete(self._trash_key(digest) + _SINCE)
        return True

    def delete_from_trash(self, digest: str) -> None:
        """Deletes a removed blob for good."""
        with with_context(self.url):
            self._delete(self._trash_key(digest))
            self._delete(self._trash_key(digest) + _SINCE)

    def orphans(self) -> Iterator[Orphan]:
        """Yields the keys that are no blobs, such as uploads of a killed writer, without those in the quarantine."""
        for name, info in self._list(""):
            folder, _, digest = name.rpartition("/")
            if folder not in {_QUARANTINE, _TRASH} and not (is_digest(digest) and folder == digest[:2]):
                yield Orphan(name, int(info["size"]), _modified(info))

    def remove_orphan(self, name: str) -> None:
        """Deletes an orphan."""
        with with_context(self.url):
            self._delete(f"{self._root}/{name}")

    def check(self, patience: int = 3) -> None:
        """Checks that the store can be reached, with a short timeout and no retries.

        Args:
            patience: Timeout in seconds to connect and to read (S3 only).

        Raises:
            StoreError: It cannot be reached; the message names the cause.
        """
        from fsspec.core import url_to_fs

        if self._protocol in {"s3", "s3a"}:
            limits = {"connect_timeout": patience, "read_timeout": patience, "retries": {"max_attempts": 0}}
            fs, _ = url_to_fs(self.url, config_kwargs=limits, skip_instance_cache=True)
            fs.retries = 1
        else:
            fs = self._fs
        with with_context(self.url):
            fs.info(self._bucket if self._protocol in _ATOMIC_UPLOAD else "")

    def _upload(self, key: str, stream: BinaryIO, digest: str) -> None:
        target = self._fs.open(key, "wb")
        try:
            copy_verified(stream, target, digest, self._where(digest))
        except BaseException:
            # Closing would publish the incomplete upload.
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
        # Other processes write to the store too, so fsspec's cached listing may be outdated.
        self._fs.invalidate_cache(key)
        try:
            info: dict[str, Any] = self._fs.info(key)
        except FileNotFoundError:
            return None
        return info if info["type"] == "file" else None

    def _require_info(self, digest: str) -> dict[str, Any]:
        with with_context(self.url):
            info = self._info(self._key(digest)) or self._info(self._trash_key(digest))
        if info is None:
            raise missing(digest, self._where(digest))
        return info

    def _list(self, below: str) -> Iterator[tuple[str, dict[str, Any]]]:
        with with_context(self.url):
            self._fs.invalidate_cache()
            entries = self._fs.find(f"{self._root}/{below}", detail=True)
            if not entries:
                self._require_root()
        for key, info in sorted(entries.items()):
            yield key[len(self._root) + 1 :], info

    def _require_root(self) -> None:
        """Raises FileNotFoundError if the bucket does not exist; a folder in the bucket need not exist yet."""
        if self._protocol in _ATOMIC_UPLOAD:
            self._fs.invalidate_cache()
            self._fs.info(self._bucket)

    @property
    def _bucket(self) -> str:
        return str(self._root).lstrip("/").partition("/")[0]

    def _key(self, digest: str) -> str:
        return f"{self._root}/{check_digest(digest)[:2]}/{digest}"

    def _trash_key(self, digest: str) -> str:
        return f"{self._root}/{_TRASH}/{check_digest(digest)}"

    def _where(self, digest: str) -> str:
        return f"{redact_url(self.url)}/{digest[:2]}/{digest}"


class _ReadStream:
    """A sequential stream whose errors become `StoreError`."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self._stream, self._url = stream, url

    def read(self, size: int = -1) -> bytes:
        with with_context(self._url):
            return self._stream.read(size)

    def __enter__(self) -> _ReadStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stream.close()


class _NullWriter:
    def write(self, _chunk: bytes) -> None:
        pass


def _modified(info: dict[str, Any]) -> float:
    for field in ("LastModified", "mtime", "updated", "last_modified", "modified", "created"):
        value = info.get(field)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, int | float):
            return float(value)
    raise NotImplementedError("the file system reports no modification time")
