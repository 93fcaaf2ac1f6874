"""The trees of artifacts: finds the files of a folder, and writes and reads the canonical list of an artifact."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from lora_engine.files import FilePath, canonical_json, is_file_name
from registry.entities import ArtifactRef, FileEntry, is_digest
from registry.errors import DamagedBlob, StoreError


def encode_tree(kind: str, files: Mapping[str, FileEntry]) -> bytes:
    """Returns the canonical list of an artifact's files; its digest names the artifact."""
    return canonical_json({"kind": kind, "files": {path: vars(entry) for path, entry in files.items()}})


def check_relative(relative: str) -> str:
    """Returns the relative path of a file in an artifact unchanged.

    Raises:
        StoreError: It is absolute, leaves the tree, or has a character that some file systems cannot write.
    """
    if not all(map(is_file_name, relative.split("/"))):
        raise StoreError(
            f"invalid path {relative!r} of a file in an artifact",
            allowed="relative paths of printable names with '/', without '.', '..' and backslashes",
        )
    return relative


def scan_tree(folder: Path) -> dict[str, FilePath | bytes]:
    """Returns the files of a folder by relative path.

    Raises:
        StoreError: It is no folder, or has something else than regular files and folders.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError("not a folder", where=str(folder), allowed="a folder of regular files")
    files: dict[str, FilePath | bytes] = {}
    for base, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(base) / name
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                files[path.relative_to(folder).as_posix()] = path
            elif not stat.S_ISDIR(mode):
                raise _irregular(path)
    return files


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading, never a link, a pipe or a device.

    Raises:
        StoreError: It is missing, or not a regular file.
    """
    try:
        # The path may have been replaced since the scan: do not follow a link or wait for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise StoreError("no such file", where=str(path)) from None
    except OSError as error:
        raise _irregular(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(path)
    return os.fdopen(descriptor, "rb")


def _irregular(path: Path) -> StoreError:
    return StoreError(
        "not a readable regular file",
        where=str(path),
        allowed="regular files; no links, pipes or devices",
        remedy="replace it with a copy of the file",
    )


def parse_tree(content: bytes, ref: ArtifactRef) -> dict[str, FileEntry]:
    """Returns the files of an artifact by the bytes of its list.

    Raises:
        DamagedBlob: The bytes are not the list of an artifact of this kind.
    """
    where = f"list of {ref.kind} {ref.sha256[:12]}"
    try:
        tree = json.loads(content)
        files = {check_relative(path): FileEntry(**entry) for path, entry in tree["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedBlob("the bytes of this digest are not a list of files", where=where) from error
    if tree.get("kind") != ref.kind or not all(is_digest(entry.sha256) for entry in files.values()):
        raise DamagedBlob(f"it lists an artifact of kind {tree.get('kind')!r}", where=where, allowed=repr(ref.kind))
    return files
