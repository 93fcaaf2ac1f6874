"""Reads tar and zip archives of images: bounded, and only regular files with names inside of the archive.

Archives of datasets come from strangers: their members may lead out of the target, be links or devices, or unpack to a
thousand times their size. `unpacking` writes the files; a child process reads here (`decoder_child`).
"""

from __future__ import annotations

import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import IO, Any, Self

from lora_engine.errors import DataError

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
TABLES = (".parquet", ".arrow")
MAX_MEMBERS = 1_000_000
MAX_MEMBER_BYTES = 256 << 20
MAX_ARCHIVE_BYTES = 256 << 30
MAX_RATIO, FREE_BYTES = 200, 16 << 20
"""Largest size of the content relative to the archive, beside the bytes that every archive may unpack to."""
_MAX_NAME, _MAX_PART = 1_000, 255
_UNIX = 3
_DRIVE = re.compile(r"[A-Za-z]:")
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
_UNREADABLE = (NotImplementedError, RuntimeError)
Member = tuple[dict[str, Any], bytes]
"""`name`, with the content; or with `problem`, why it cannot be used."""


def is_archive(name: str) -> bool:
    """Returns True if the file of this name is an archive."""
    return name.lower().endswith(ARCHIVES)


def is_table(name: str) -> bool:
    """Returns True if the file of this name is a table that may hold images."""
    return name.lower().endswith(TABLES)


def clean_member_name(name: str) -> str:
    """Returns the name of a member relative to the archive, with `/` between its parts.

    Raises:
        DataError: It leads out of the archive, is absolute, or is too long.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or _DRIVE.match(name):
        raise DataError("has an absolute path", allowed="names inside of the archive")
    if ".." in path.parts or "\0" in name:
        raise DataError("leads out of the archive", allowed="names inside of the archive")
    if not path.parts:
        raise DataError("has no name")
    length = len(name.encode(errors="surrogateescape"))
    if length > _MAX_NAME or any(len(part.encode(errors="surrogateescape")) > _MAX_PART for part in path.parts):
        raise DataError(f"has a name of {length:,} bytes", allowed=f"{_MAX_NAME}, and {_MAX_PART} for each folder")
    if is_archive(path.name) or is_table(path.name):
        raise DataError("is an archive inside of an archive", remedy="unpack it")
    return path.as_posix()


def read_archive(file: IO[bytes], name: str, size: int) -> Iterator[Member]:
    """Yields the members of an archive in its order, without folders.

    Args:
        file: The archive.
        name: Its name.
        size: Its bytes.

    Raises:
        DataError: It is broken, has too many members, or unpacks to too many bytes; after those that can be read.
    """
    members = _read_zip(file) if name.lower().endswith(".zip") else _read_tar(file)
    limit = min(MAX_ARCHIVE_BYTES, MAX_RATIO * size + FREE_BYTES)
    total = count = 0
    try:
        for facts, content in members:
            count, total = count + 1, total + len(content)
            if count > MAX_MEMBERS:
                raise DataError(f"has more than {MAX_MEMBERS:,} members")
            if total > limit:
                raise DataError(f"unpacks to more than {limit:,} bytes", allowed=f"{MAX_RATIO} times its size")
            yield facts, content
    except _BROKEN as error:
        raise DataError(f"is broken after {count} members ({str(error) or type(error).__name__})") from None
    except RecursionError:
        raise DataError(f"is broken after {count} members") from None


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error where Python's reader takes a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(str(error) or "no end mark") from None


def _read_tar(file: IO[bytes]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # the list would grow with the archive
            if not member.isdir():
                yield _read_or_refuse(member.name, partial(_extract, archive, member))


def _read_zip(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield _read_or_refuse(member.orig_filename, partial(_unzip, archive, member))


def _read_or_refuse(name: str, read: Callable[[], bytes]) -> Member:
    try:
        clean_member_name(name)
        return {"name": name}, read()
    except DataError as error:
        return {"name": name, "problem": error.reason}, b""


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or member.issparse():
        is_link = member.issym() or member.islnk()
        raise DataError("is a link" if is_link else "is a device, a pipe or sparse", allowed="files")
    _check_size(member.size)
    source = archive.extractfile(member)
    content = source.read(MAX_MEMBER_BYTES + 1) if source is not None else b""
    if len(content) != member.size:
        raise EOFError("the archive ends within a member")
    return content


def _unzip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    mode = member.external_attr >> 16
    if member.create_system == _UNIX and stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
        raise DataError("is a link, a device or a pipe", allowed="files")
    _check_size(member.file_size)
    if member.file_size > FREE_BYTES + MAX_RATIO * member.compress_size:
        raise DataError(f"unpacks to more than {MAX_RATIO} times its size")
    try:
        with archive.open(member) as source:
            content = source.read(member.file_size + 1)
    except (*_BROKEN, *_UNREADABLE) as error:
        raise DataError(f"cannot be unpacked ({str(error) or type(error).__name__})") from None
    if len(content) != member.file_size:
        raise DataError(f"has {len(content):,} bytes", allowed=f"{member.file_size:,}, as it states")
    return content


def _check_size(size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise DataError(f"has {size:,} bytes", allowed=f"at most {MAX_MEMBER_BYTES:,}")
