"""Packs a folder into an uncompressed `.tar` file and back. Accepts only regular files inside the folder; no links."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from lora_engine.files import atomic_write
from registry.errors import StoreError, disk_errors
from registry.store.trees import check_relative

ARCHIVE_SUFFIX = ".tar"


def pack_archive(folder: Path, path: Path) -> None:
    """Writes all files of a folder into an archive, atomically.

    Raises:
        HomeError: The disk is full or read-only.
    """
    with disk_errors(path):
        atomic_write(path, lambda file: _pack(folder, file))


def unpack_archive(path: Path, folder: Path) -> None:
    """Writes the files of an archive into a folder.

    Args:
        path: The archive; not trusted.
        folder: An empty folder.

    Raises:
        StoreError: The file is not a complete archive, or a member is a link, a device, or outside the folder.
        HomeError: The disk is full or read-only.
    """
    try:
        with tarfile.open(path, "r:") as archive, disk_errors(folder):
            for member in archive:
                if member.isdir():
                    continue
                stream = archive.extractfile(member) if member.isreg() and not member.issparse() else None
                if stream is None:
                    raise StoreError(
                        f"{member.name!r} is not a regular file", where=str(path), allowed="regular files; no links"
                    )
                target = folder / check_relative(member.name)
                if target.exists():
                    raise StoreError(f"{member.name!r} appears twice", where=str(path))
                target.parent.mkdir(parents=True, exist_ok=True)
                with stream, target.open("xb") as file:
                    shutil.copyfileobj(stream, file)
    except tarfile.TarError as error:
        raise StoreError(
            f"this is not a complete archive ({error})",
            where=str(path),
            remedy="name a `.tar` that `loraline backup` wrote",
        ) from error


def _pack(folder: Path, file: object) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
