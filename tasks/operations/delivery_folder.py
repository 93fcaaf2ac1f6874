"""Writes, lists and removes the files of a delivery target: a local folder, or a URL that fsspec knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

from lora_engine.errors import EngineError
from lora_engine.files import atomic_write, check_within, write_within
from registry.errors import StoreError
from registry.store.redaction import redact_url
from registry.store.remote_errors import malformed_url, unsupported_protocol, with_context
from registry.store.trees import check_relative
from tasks.errors import DeliveryError

_ATOMIC_UPLOAD = frozenset({"s3", "s3a", "gs", "gcs"})
"""Protocols where a file appears only when its upload is complete."""
_MAX_MANIFEST = 1 << 20


class TargetFolder(Protocol):
    """The files of a target, by relative path with `/`; paths that leave the target are refused.

    All methods raise `DeliveryError` if the target is gone, full, or cannot be read or written.
    """

    where: str
    """Location for messages, without secrets."""

    def require(self) -> None:
        """Raises DeliveryError if the target does not exist."""
        ...

    def list_files(self, suffix: str) -> list[str]:
        """Returns the paths that end with a text, sorted."""
        ...

    def size(self, path: str) -> int | None:
        """Returns the size of a file in bytes; None if there is none."""
        ...

    def read(self, path: str) -> bytes:
        """Returns the first MiB of a file."""
        ...

    def write(self, path: str, content: bytes | Path) -> None:
        """Replaces a file atomically by bytes, or by a copy of a local file."""
        ...

    def delete(self, path: str) -> None:
        """Deletes a file if it exists."""
        ...


def open_target(location: str) -> TargetFolder:
    """Returns the folder or bucket at a path or URL.

    Raises:
        DeliveryError: No file system of the protocol is known, or its package is not installed.
    """
    try:
        parts = urlsplit(location)
        if "://" not in location or parts.scheme in {"file", "local"}:
            return _LocalTarget(Path(url2pathname(parts.path)) if "://" in location else Path(location))
        return _RemoteTarget(location, parts.scheme)
    except StoreError as error:
        raise DeliveryError(error.problem, where=error.where, remedy="correct `to` in delivery.yaml") from None
    except ValueError:
        raise DeliveryError(malformed_url(location).problem, remedy="correct `to` in delivery.yaml") from None


class _LocalTarget:
    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)

    def require(self) -> None:
        # A missing folder is not created: it may be a disk that is not mounted.
        if not self.folder.is_dir():
            raise DeliveryError(
                "the folder of the target does not exist", where=self.where, remedy="mount it, or create it"
            )

    def list_files(self, suffix: str) -> list[str]:
        with self._errors():
            return sorted(
                (Path(folder) / name).relative_to(self.folder).as_posix()
                for folder, _, names in os.walk(self.folder, onerror=_raise)
                for name in names
                if name.endswith(suffix)
            )

    def size(self, path: str) -> int | None:
        with self._errors():
            place = self._place(path)
            return place.stat().st_size if place.is_file() and not place.is_symlink() else None

    def read(self, path: str) -> bytes:
        with self._errors(), self._place(path).open("rb") as file:
            return file.read(_MAX_MANIFEST)

    def write(self, path: str, content: bytes | Path) -> None:
        with self._errors(), write_within(self.folder):
            place = self._place(path)
            if isinstance(content, bytes):
                atomic_write(place, content)
                return
            with content.open("rb") as source:
                atomic_write(place, lambda file: shutil.copyfileobj(source, file, 1 << 20))

    def delete(self, path: str) -> None:
        with self._errors():
            place = self._place(path)
            place.unlink(missing_ok=True)
            while place.parent != self.folder:
                place = place.parent
                try:
                    place.rmdir()
                except OSError:  # not empty, or gone
                    return

    def _place(self, path: str) -> Path:
        place = self.folder / check_relative(path)
        with write_within(self.folder):
            check_within(place)
        return place

    @contextmanager
    def _errors(self) -> Iterator[None]:
        self.require()
        try:
            yield
        except OSError as error:
            raise DeliveryError(
                f"the target cannot be used: {error.strerror}",
                where=str(error.filename or self.where),
                remedy="check the disk, its free space and the permissions; the next delivery continues",
            ) from error
        except (EngineError, StoreError) as error:
            if isinstance(error, DeliveryError):
                raise
            raise DeliveryError(
                error.problem, where=self.where, remedy="remove links that leave the folder of the target"
            ) from error


class _RemoteTarget:
    def __init__(self, url: str, protocol: str) -> None:
        from fsspec import get_filesystem_class
        from fsspec.core import url_to_fs

        self.url, self.where, self._protocol = url.rstrip("/"), redact_url(url), protocol
        try:
            get_filesystem_class(protocol)
            with with_context(self.url):
                self._fs, root = url_to_fs(self.url)
        except ImportError as error:
            raise unsupported_protocol(error, protocol, self.url) from error
        except (ValueError, TypeError):
            raise unsupported_protocol(None, protocol, self.url) from None
        self._root = str(root).rstrip("/")

    def require(self) -> None:
        with self._errors():
            self._fs.invalidate_cache()
            if self._protocol in _ATOMIC_UPLOAD:
                self._fs.info(self._root.lstrip("/").partition("/")[0])

    def list_files(self, suffix: str) -> list[str]:
        with self._errors():
            self._fs.invalidate_cache()
            keys = self._fs.find(self._root)
        return sorted(key[len(self._root) + 1 :] for key in keys if key.endswith(suffix))

    def size(self, path: str) -> int | None:
        with self._errors():
            key = self._key(path)
            self._fs.invalidate_cache(key)
            with suppress(FileNotFoundError):
                info = self._fs.info(key)
                return int(info["size"]) if info["type"] == "file" else None
            return None

    def read(self, path: str) -> bytes:
        with self._errors():
            key = self._key(path)
            self._fs.invalidate_cache(key)
            return bytes(self._fs.cat_file(key, start=0, end=_MAX_MANIFEST))

    def write(self, path: str, content: bytes | Path) -> None:
        with self._errors():
            key = self._key(path)
            target = key if self._protocol in _ATOMIC_UPLOAD else f"{key}.{uuid4().hex}.partial"
            try:
                if target != key:
                    self._fs.makedirs(self._fs._parent(key), exist_ok=True)
                if isinstance(content, bytes):
                    self._fs.pipe_file(target, content)
                else:
                    self._fs.put_file(str(content), target)
                if target != key:
                    self._fs.mv(target, key)
            finally:
                self._fs.invalidate_cache(key)

    def delete(self, path: str) -> None:
        with self._errors():
            key = self._key(path)
            with suppress(FileNotFoundError):
                self._fs.rm_file(key)
            self._fs.invalidate_cache(key)

    def _key(self, path: str) -> str:
        return f"{self._root}/{check_relative(path)}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with with_context(self.url):
                yield
        except StoreError as error:
            remedy = error.remedy.replace("`store` in loraline.yaml", "`to` in delivery.yaml")
            raise DeliveryError(error.problem.replace("store", "target"), where=self.where, remedy=remedy) from error


def _raise(error: OSError) -> None:
    raise error
